"""What fits a GPU of so many GiB: the largest batches and images, and what to change where nothing does."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import SFTConfig

from vqa_sft.errors import InputError
from vqa_sft.models import processes
from vqa_sft.models.memory.estimate import GIB, need_gib, scoring_gib
from vqa_sft.models.memory.images import MAX_PIXELS
from vqa_sft.models.memory.needs import Plan, Shape

MARGIN = 0.08  # what a choice for the user leaves free
MIN_IMAGE_TOKENS = 64  # 224 x 224 px: below it nothing can be read, and it is not offered


def largest_micro_batch(shape: Shape, plan: Plan, gib: float, rows: int | None = None) -> int:
    """Rows of the largest micro-batch that needs at most `gib`, a divisor of `rows` if given; 0: none."""
    sizes = [size for size in range(1, rows + 1) if rows % size == 0] if rows else range(1, 1025)
    return _largest(sizes, gib, lambda size: need_gib(shape, replace(plan, micro_batch=size)))


def largest_eval_batch(shape: Shape, plan: Plan, gib: float) -> int:
    """The largest batch below the plan's own whose evaluation needs at most `gib`; 0: none."""
    return _largest(range(1, plan.eval_batch), gib, lambda size: scoring_gib(shape, replace(plan, eval_batch=size)))


def largest_max_pixels(shape: Shape, plan: Plan, gib: float) -> int:
    """The largest max_pixels that needs at most `gib`, a whole number of tokens, tiles, ...; 0: none that is of use."""
    area = round(shape.token_area)
    sizes = shape.areas or range(MIN_IMAGE_TOKENS * area, MAX_PIXELS + 1, area)
    return _largest(sizes, gib, lambda pixels: need_gib(shape, replace(plan, max_pixels=pixels)))


def _largest(sizes: Sequence[int], gib: float, need: Callable[[int], float]) -> int:
    num_fitting = bisect.bisect_right(sizes, gib, key=need)
    return sizes[num_fitting - 1] if num_fitting else 0


def remedies(shape: Shape, plan: Plan, gib: float, rows: int) -> list[dict[str, Any]]:
    """Settings with which `plan`, which needs more, needs at most `gib`: each of them is enough. Empty: none is known.
    Micro-batches are divisors of `rows`, the rows of one process and optimiser step."""
    recompute, quantise = {"gradient_checkpointing": True}, {"load_in_4bit": True}
    can_recompute, can_quantise = not plan.checkpointing, plan.bits == 16 and not (shape.trains_base or plan.fp8_base)
    # Compiled layers that are computed again may keep more than others (estimate.kept_by_fused_layers).
    recomputed = replace(plan, checkpointing=True, compiled=plan.compiled or plan.may_compile)
    variants = [({}, plan)]
    if can_recompute:
        variants.append((recompute, recomputed))
    if can_quantise:
        variants.append((quantise, replace(plan, bits=4, compiled=False)))
    batches = [(settings, _smaller_batches(shape, variant, gib, rows)) for settings, variant in variants]
    found = [settings | smaller for settings, smaller in batches if smaller is not None]
    if (pixels := largest_max_pixels(shape, plan, gib)) and pixels < plan.max_pixels:
        found.append({"max_pixels": pixels})
    if found:
        return found
    together, smallest = recompute if can_recompute else {}, replace(recomputed, micro_batch=1, eval_batch=0)
    if can_quantise:
        together, smallest = together | quantise, replace(smallest, bits=4, compiled=False)
    if need_gib(shape, smallest) > gib:
        smallest = replace(smallest, max_pixels=largest_max_pixels(shape, smallest, gib))
        together = together | {"max_pixels": smallest.max_pixels}
    if not smallest.max_pixels:
        return []
    asked = replace(smallest, micro_batch=plan.micro_batch, eval_batch=plan.eval_batch)
    smaller = _smaller_batches(shape, asked, gib, rows)
    return [] if smaller is None else [together | smaller]


def _smaller_batches(shape: Shape, plan: Plan, gib: float, rows: int) -> dict[str, Any] | None:
    """The largest batches up to the plan's own that need at most `gib`, as far as they are smaller; None: none do."""
    found = {}
    training = replace(plan, eval_batch=0)
    if need_gib(shape, training) > gib:
        found["per_device_train_batch_size"] = largest_micro_batch(shape, training, gib, rows)
    if plan.eval_batch and scoring_gib(shape, plan) > gib:
        found["per_device_eval_batch_size"] = largest_eval_batch(shape, plan, gib)
    return found if all(found.values()) else None


def as_options(settings: dict[str, Any], rows: int | None = None) -> str:
    """Settings as a command line has them; with `rows` of a process and step, accumulation as well."""
    if rows and "per_device_train_batch_size" in settings:
        size = settings["per_device_train_batch_size"]
        settings = settings | {"gradient_accumulation_steps": rows // size}
    return " ".join(f"--{name} {str(value).lower()}" for name, value in settings.items())


def choose_batch(training_args: SFTConfig, needs: Callable[[], tuple[Shape, Plan]]) -> str:
    """`auto_batch`: set micro-batch, accumulation and recomputation so that training fits the GPU with the smallest
    free memory; the rows of an optimiser step stay. Says what and why. Called by every process before it loads weights;
    all come to the same. Raises InputError where nothing fits."""
    if not torch.cuda.is_available() or training_args.use_cpu:
        return "auto_batch: there is no GPU; nothing is changed."
    if processes.is_sharded():
        return "auto_batch: what FSDP and DeepSpeed spread over GPUs cannot be estimated; nothing is changed."
    shape, plan = needs()
    seen = gather_object([(torch.cuda.mem_get_info()[0], plan.compiled, plan.compiled or plan.may_compile)])
    free_gib, compiled = min(free for free, _, _ in seen) / GIB, all(compiles for _, compiles, _ in seen)
    may_compile = not compiled and any(may for _, _, may in seen)
    rows = plan.micro_batch * training_args.gradient_accumulation_steps
    gib, plan = free_gib / (1 + MARGIN), replace(plan, compiled=compiled, may_compile=may_compile)
    for checkpointing in (False, True):  # recomputation costs a third of the speed
        chosen = replace(plan, checkpointing=checkpointing)
        # Where that is open, the batch fits compiled and not: either may need more (estimate.kept_by_fused_layers).
        either = [chosen, replace(chosen, compiled=True)] if plan.may_compile else [chosen]
        if size := min(largest_micro_batch(shape, one, gib, rows) for one in either):
            chosen = replace(chosen, micro_batch=size)
            break
    else:
        least = replace(plan, micro_batch=1, checkpointing=True)
        changes = " or ".join(map(as_options, remedies(shape, least, gib, 1))) or "a smaller model"
        raise InputError(
            f"one row with gradient_checkpointing needs about {need_gib(shape, least):.1f} GiB, and {free_gib:.1f} GiB "
            f"of the GPU are free. What fits by estimate: {changes}."
        )
    training_args.per_device_train_batch_size = chosen.micro_batch
    training_args.gradient_accumulation_steps = rows // chosen.micro_batch
    # transformers 5.23 reads the second name, trl 1.16 the first.
    training_args.gradient_checkpointing = training_args.activation_checkpointing = chosen.checkpointing
    need = max(need_gib(shape, replace(one, micro_batch=chosen.micro_batch)) for one in either)
    recomputation = "with" if chosen.checkpointing else "without"
    return (
        f"auto_batch: {rows} rows a step and process as {rows // chosen.micro_batch} x {chosen.micro_batch} "
        f"{recomputation} gradient_checkpointing, about {need:.1f} of {free_gib:.1f} GiB."
    )


def fits(needs: Callable[..., tuple[Shape, Plan]]) -> tuple[bool, bool]:
    """Whether a run whose model is loaded fits the GPU of every process by estimate: without compiled layers, and with
    them. `needs` as for `choose_batch`. Called by every process."""
    shape, plan = needs(compiles=False)
    free_gib = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    # An estimate may be 15% too low, and uncompiled steps that do not fit would end a run that compiled ones would not.
    own = [
        need_gib(shape, replace(plan, compiled=compiled)) <= free_gib / (1 + margin)
        for compiled, margin in ((False, 0.15), (True, MARGIN))
    ]
    uncompiled, compiled = (all(of_all) for of_all in zip(*gather_object([own]), strict=True))
    return uncompiled, compiled
