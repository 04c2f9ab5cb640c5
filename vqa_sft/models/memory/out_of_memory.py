"""Where the GPU's memory ran out: smaller micro-batches to retry with, or an error that says what fits."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from trl import SFTConfig

from vqa_sft.errors import InputError, ProcessError
from vqa_sft.models import processes
from vqa_sft.models.fast import compilation
from vqa_sft.models.memory.estimate import GIB, estimate, need_gib, scoring_gib
from vqa_sft.models.memory.fit import MARGIN, as_options, largest_eval_batch, remedies
from vqa_sft.models.memory.needs import Plan, Shape


def halve_batch(training_args: SFTConfig, *, states_global_batch: bool, auto_batch: bool) -> dict[str, Any] | None:
    """Settings with which a training whose memory ran out resumes: half the micro-batch or less, the same rows a step.
    None at one row, for several processes (the others would wait for ever), and for `dataloader_drop_last`."""
    size = training_args.per_device_train_batch_size
    if size == 1 or training_args.world_size > 1 or processes.is_sharded() or training_args.dataloader_drop_last:
        return None
    rows = size * training_args.gradient_accumulation_steps
    half = max(smaller for smaller in range(1, size // 2 + 1) if rows % smaller == 0)
    settings = {"per_device_train_batch_size": half}
    if not states_global_batch:
        settings["gradient_accumulation_steps"] = rows // half
    if auto_batch:  # it would choose the same again
        settings |= {"auto_batch": False, "gradient_checkpointing": training_args.gradient_checkpointing}
    return settings


@contextmanager
def explains_out_of_memory(
    training_args: SFTConfig,
    needs: Callable[[], tuple[Shape, Plan]],
    *,
    is_evaluating: Callable[[], bool],
    states_global_batch: bool,
    auto_batch: bool,
    resumes: Callable[[], str],
) -> Iterator[None]:
    """Where the GPU's memory runs out: a ProcessError that says what to change, and with `resumes()` what the same
    command then does."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        evaluating, changes = is_evaluating(), []
        if not processes.is_sharded():
            with suppress(InputError):  # a family whose memory is not known here
                shape, plan = needs()
                rows = plan.micro_batch * training_args.gradient_accumulation_steps
                accumulated = None if states_global_batch else rows
                how = {"evaluating": evaluating, "accumulated": accumulated, "auto_batch": auto_batch}
                changes = _changes(shape, plan, rows, **how)
        changes = changes or ["lower per_device_train_batch_size or max_pixels, or set gradient_checkpointing: true"]
        if training_args.process_index:  # where all run out, the main process is the one to report it
            time.sleep(2)
        raise ProcessError(
            f"the memory of GPU {training_args.local_process_index} ran out in "
            f"{'evaluation' if evaluating else 'training'}. What fits by estimate, each line alone:\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nThe same command with it {resumes()}"
        ) from None


def _changes(
    shape: Shape, plan: Plan, rows: int, *, evaluating: bool, accumulated: int | None, auto_batch: bool
) -> list[str]:
    """What to put behind the command; `accumulated` as in `describe_fit`."""
    # The estimate may have been too low; whatever it says, the next run needs less than this one.
    gib = scoring_gib(shape, plan) if evaluating else sum(estimate(shape, plan).values())
    if torch.cuda.is_available():
        gib = min(gib, (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB)
    gib /= 1 + MARGIN
    if evaluating:
        size = largest_eval_batch(shape, plan, gib)
        found = [{"per_device_eval_batch_size": size}] if size else []
    else:
        training = replace(plan, eval_batch=0)
        found = remedies(shape, training, gib, rows)
        # It leaves the rest of the recipe as it is.
        compiled = replace(training, compiled=True)
        if plan.may_compile and need_gib(shape, compiled) <= gib and compilation.can_compile():
            found.insert(0, {"compile_layers": True})
    # Else auto_batch would choose the same again.
    chosen = {
        "auto_batch": False,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_checkpointing": plan.checkpointing,
    }
    lines = []
    for settings in found:
        line = as_options((chosen if auto_batch else {}) | settings, accumulated)
        if settings.keys() & {"max_pixels", "load_in_4bit"}:
            line += " (another run: with another --output_dir)"
        lines.append(line)
    return lines
