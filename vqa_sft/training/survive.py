"""What a training survives: a kill, a SIGTERM, the end of its time budget, a GPU whose memory runs out.

    ended = train_runs(recipe.runs(), train, started_s)    one run after another, until one is interrupted
        ended = train(run, stop)                           recipes/sft.py: one run, from its rows to its folder
            ended = fit(trainer, run, needs)               the training itself

The handler of SIGTERM and the time budget are in saving.py. A killed or interrupted run resumes from its last complete
checkpoint with the same command.
"""

import contextlib
import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vqa_sft.config.recipe import Recipe
from vqa_sft.console import note
from vqa_sft.errors import explains_breakdown
from vqa_sft.models.fast import compilation
from vqa_sft.models.memory.needs import Plan, Shape
from vqa_sft.models.memory.out_of_memory import explains_out_of_memory, halve_batch
from vqa_sft.runs.checkpoints import last_whole_checkpoint, resumes_from, stopped_early
from vqa_sft.training.saving import SaveAndStop
from vqa_sft.training.trainer import AnswerTrainer


@dataclass(frozen=True)
class Finished:
    """Trained to its end."""


@dataclass(frozen=True)
class Interrupted:
    """Saved and stopped, by a SIGTERM or because time is up."""

    by_sigterm: bool


@dataclass(frozen=True)
class Retry:
    """The GPU's memory ran out; with these settings the run can be resumed, and the rows of a step stay the same."""

    settings: dict[str, Any]


def train_runs(
    runs: list[Recipe], train: Callable[[Recipe, SaveAndStop], Finished | Interrupted | Retry], started_s: float
) -> Finished | Interrupted:
    """Train one run after another: the folds of `fold: all`, else the only one. The time budget of all of them begins
    at the `time.monotonic()` of `started_s`."""
    args, folders = runs[0].arguments, [run.values["output_dir"] for run in runs]
    stop = SaveAndStop(3600 * (args.time_budget_h or math.inf), started_s)
    settings: dict[str, Any] = {}  # of a retry; the runs to come have the same GPU
    for number, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        if number:
            free_memory()
        if len(runs) > 1:
            note(f"\nFold {number + 1} of {len(runs)}: {folder}")
        with explains_breakdown(f"for {folder}", functools.partial(resumes_from, folder)):
            ended = train(run.retried(settings) if settings else run, stop)
            while isinstance(ended, Retry):
                settings |= ended.settings
                free_memory()
                ended = train(run.retried(settings), stop)
        if isinstance(ended, Interrupted):
            reason = "SIGTERM" if ended.by_sigterm else "Time is up"
            overwritten = " without --overwrite" if args.overwrite else ""
            left = ", then " + ", ".join(folders[number + 1 :]) if folders[number + 1 :] else ""
            note(f"{reason}. {folder} resumes with the same command{overwritten}{left}.")
            return ended
    return Finished()


def fit(
    trainer: AnswerTrainer, recipe: Recipe, needs: Callable[..., tuple[Shape, Plan]]
) -> Finished | Interrupted | Retry:
    """Train, from the last complete checkpoint if there is one. `needs` is `read_needs` of the run: for the message
    where the GPU's memory runs out and no smaller batch can be tried."""
    args, training_args, output_dir = recipe.arguments, trainer.args, recipe.values["output_dir"]
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is not None:
        note(f"Resuming from {checkpoint}.")
        if args.early_stopping_patience is not None:
            last_step = stopped_early(checkpoint, args.early_stopping_patience)
            training_args.max_steps = last_step or training_args.max_steps
    of_batch = {"states_global_batch": args.global_batch_size is not None, "auto_batch": args.auto_batch}
    smaller, ran_out = halve_batch(training_args, **of_batch), False
    explains = explains_out_of_memory(
        training_args,
        # Of the step at hand: a run that counts on compiled layers may have compiled none yet.
        lambda: needs(compiles=compilation.is_compiled(trainer.model)),
        is_evaluating=lambda: not trainer.model.training,
        resumes=functools.partial(resumes_from, output_dir),
        **of_batch,
    )
    with explains, trainer.stop.listening():
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except torch.cuda.OutOfMemoryError:
            if smaller is None or not trainer.model.training:
                raise
            ran_out = True
    if ran_out:
        trainer.model.zero_grad()
        free_memory()  # after the except block, which held the error and with it the tensors of the step
        with trainer.stop.listening(), contextlib.suppress(torch.cuda.OutOfMemoryError):
            trainer.marks.save_finished_step(trainer)
        print(
            f"The GPU's memory ran out at {training_args.per_device_train_batch_size} rows at a time. Resuming with "
            f"{smaller['per_device_train_batch_size']}; the rows of a step stay."
        )
        return Retry(smaller)
    return Interrupted(trainer.stop.got_sigterm) if trainer.stop.has_stopped else Finished()


def free_memory() -> None:
    """Before the next training, what the last one left."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
