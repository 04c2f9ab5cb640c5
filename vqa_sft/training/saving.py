"""When a training saves its state, and when it stops: callbacks, and the handler of SIGTERM."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from vqa_sft.models.fast import compilation
from vqa_sft.runs.checkpoints import MARKER, mark_whole


class MarkWholeCheckpoints(TrainerCallback):
    """Writes our marker when every process has finished saving, and deletes older checkpoints only then.

    The Trainer writes checkpoints in place, `trainer_state.json` among the first files: a folder of a run that was
    killed while saving looks complete. Ours counts only with the marker.
    """

    def __init__(self) -> None:
        self.is_between_steps = False  # weights and optimiser are those of the last step

    def save_finished_step(self, trainer: Trainer) -> None:
        """Save the last complete step of a training that failed in the next one, unless it is saved already."""
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if self.is_between_steps and trainer.state.global_step and not (folder / MARKER).exists():
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_between_steps = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_between_steps = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_between_steps = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint)


class SaveAndStop(TrainerCallback):
    """Saves and stops: before the time budget ends, and at a SIGTERM, which Slurm, Kubernetes and notebooks send before
    they kill.

    `started_s` is the `time.monotonic()` from which `budget_s` counts. The main process's clock decides for all; a
    signal counts whichever process it reaches. Several processes exchange this after every step that takes at least
    `SLOW_STEP_S`, and else every `INTERVAL` steps.

    Not `enable_jit_checkpoint` (transformers 5.23): every process would decide alone, and nothing writes our marker.
    """

    INTERVAL = 10
    SLOW_STEP_S = 1.0

    def __init__(self, budget_s: float = float("inf"), started_s: float = 0.0) -> None:
        self.ends_s = started_s + budget_s
        self.reserved_s = min(60.0, 0.1 * budget_s)  # to load the best weights, and for what ends a process
        self.longest_pause_s = 0.0  # from a step to its checkpoint, evaluation included
        # Between two checks of the clock. Steps that hold a compilation are not what a step takes, and count only until
        # there are others.
        self.longest_gap_s = self.last_gap_s = 0.0
        self.has_stopped = False
        self.got_sigterm = False
        # In shared memory, for the loader's workers.
        self.is_listening = torch.zeros(1, dtype=torch.bool).share_memory_()
        self._step_s = started_s
        self._looked_s: float | None = None
        self._looked_step = self._next_look = self._num_compilations = 0

    def is_over(self) -> bool:
        """Whether the time left is too short to train until the next check of the clock and save then."""
        needed_s = self.reserved_s + (self.longest_gap_s or self.last_gap_s) + 2 * self.longest_pause_s
        return time.monotonic() + needed_s > self.ends_s

    def must_stop(self) -> bool:
        """Whether any process must; each of them waits for the others."""
        return self._look(0.0)[0]

    def _look(self, step_time_s: float) -> tuple[bool, float]:
        """Whether to stop, and the main process's time of a step."""
        seen = gather_object([(self.is_over(), self.got_sigterm, step_time_s)])
        self.got_sigterm = any(got_sigterm for _, got_sigterm, _ in seen)
        is_over, _, step_time_s = seen[0]
        return is_over or self.got_sigterm, step_time_s

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context a SIGTERM, or several, asks to stop; after it the earlier handler is back."""
        if threading.current_thread() is not threading.main_thread():  # where no handler can be set
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "got_sigterm", True))
        self.is_listening.fill_(True)
        try:
            yield
        finally:
            self.is_listening.fill_(False)
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._looked_s, self._next_look = None, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_s = time.monotonic()
        if state.global_step < self._next_look:
            return
        num_compilations = compilation.num_compilations()
        step_time_s = self.SLOW_STEP_S  # assumed until there are two checks
        if self._looked_s is not None:
            self.last_gap_s = self._step_s - self._looked_s
            if num_compilations == self._num_compilations:
                self.longest_gap_s = max(self.longest_gap_s, self.last_gap_s)
            step_time_s = self.last_gap_s / (state.global_step - self._looked_step)
        self._looked_s, self._looked_step = self._step_s, state.global_step
        self._num_compilations = num_compilations
        if state.global_step < state.max_steps:
            stops, step_time_s = self._look(step_time_s)
            is_often = args.world_size == 1 or step_time_s >= self.SLOW_STEP_S
            # At multiples, as steps are logged: the GPU is waited for once.
            self._next_look = state.global_step + (1 if is_often else self.INTERVAL - state.global_step % self.INTERVAL)
            if stops:
                self.has_stopped = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Also called where the training stops in the middle of an epoch. An evaluation there would be one that a run
        # without a stop does not have, and might choose other weights.
        if self.has_stopped:
            # Saved once: while it is saved again, a checkpoint does not count.
            control.should_save = not (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARKER).exists()
            control.should_evaluate = control.should_evaluate and state.epoch % 1 == 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.longest_pause_s = max(self.longest_pause_s, time.monotonic() - self._step_s)


def keep_worker(is_listening: torch.Tensor) -> None:
    """In a data loader's worker: a SIGTERM to the whole process group must not end it while the current step needs its
    rows. When nobody listens any more, it comes from the loader, and ends the worker."""
    signal.signal(signal.SIGTERM, lambda *_: None if is_listening else os._exit(0))
