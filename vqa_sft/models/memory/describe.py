"""What `vqa-sft memory` prints."""

from dataclasses import replace

from vqa_sft.config.recipe import Recipe
from vqa_sft.console import table
from vqa_sft.models import processes
from vqa_sft.models.memory.estimate import estimate, image_tokens, loading_gib, need_gib, num_tokens, scoring_gib
from vqa_sft.models.memory.fit import MARGIN, as_options, largest_max_pixels, largest_micro_batch, remedies
from vqa_sft.models.memory.images import read_images
from vqa_sft.models.memory.needs import Plan, Shape, read_config, read_plan, read_shape, read_stored, with_images

SHARED_TOKENS = 20  # Qwen's template with our own prompt in English: 22
# The CUDA context lies outside of what torch counts: 14.56 GiB of a T4 leave 13.8.
CONTEXT_GIB = 0.76
IN_FP8 = "its language model in FP8, from compute capability 8.9 on (16 bit before)"


def describe_recipe(recipe: Recipe, *, text_tokens: int, images: int, gpu_gib: float | None) -> tuple[str, bool]:
    """A table of what the recipe needs, and whether it fits a GPU of `gpu_gib`."""
    # Its precision is that of the GPU, not of this machine.
    arguments, training_args, model_args = recipe.arguments, recipe.training_args("fp32"), recipe.model_args()
    name, fast = model_args.model_name_or_path, arguments.fast
    config, note = read_config(model_args, trust_remote_code=training_args.trust_remote_code)
    seen, images_line = read_images(model_args, arguments, config)
    asked = {name: recipe.values.get(name) for name in ("bf16", "fp16")}
    precision = "fp16" if asked["fp16"] else "fp32" if asked == {"bf16": False, "fp16": False} else "bf16"
    plan = read_plan(
        training_args,
        model_args,
        precision=precision,
        fast=fast,
        memory_budget=arguments.activation_memory_budget,
        kernels=precision != "fp16",
        # fp16 is for GPUs before compute capability 8.0.
        attention="repeated" if precision == "fp16" else "grouped" if fast and precision == "bf16" else "unfused",
        text_tokens=text_tokens,
        shared_tokens=min(SHARED_TOKENS, text_tokens),
        images=images,
        fp8_base=arguments.base_precision == "fp8",
    )
    plan, stored = read_stored(name, config, plan)
    shape, plan = with_images(read_shape(model_args, config, **arguments.adapted_parts), plan, seen)
    can_compile = fast and plan.bits == 16 and precision == "bf16"
    plans = _compiled_or_not(shape, plan, arguments.compile_layers if can_compile else False)
    lines = [line for line in (note, stored) if line]
    if training_args.use_cpu:
        lines.append("The recipe says use_cpu; this is what it would need on a GPU.")
    if processes.is_sharded():
        lines.append("This is what one GPU would need; what FSDP and DeepSpeed save is not known.")
    bits = IN_FP8 if plan.fp8_base else "as it is stored" if stored else f"{plan.bits} bit"
    lines.append(f"{name}, {bits}, computing in {precision}.")
    if precision == "bf16" and not plan.fp8_base:
        lines[-1] += " For GPUs before Ampere: --fp16 true."
    lines += [*_describe_linear(shape, plan), images_line, describe(shape, plans)]
    fits = True
    if gpu_gib is not None:
        rows = plan.micro_batch * training_args.gradient_accumulation_steps
        worst = max(plans, key=lambda name: need_gib(shape, plans[name]))
        accumulated = None if arguments.global_batch_size is not None else rows
        what = f"{worst.capitalize()}, it" if len(plans) > 1 else "It"
        fits, said = describe_fit(shape, plans[worst], gpu_gib, rows=rows, accumulated=accumulated, what=what)
        lines.append(said)
    return "\n".join(lines), fits


def _compiled_or_not(shape: Shape, plan: Plan, asked: bool | None) -> dict[str, Plan]:
    """The plan by name: compiled, not, or either, which a run decides. Padded rows are compiled where that is asked."""
    compiled = {"compiled": replace(plan, compiled=True)}
    if asked:
        return compiled
    if asked is None and shape.packs_rows:
        return {"uncompiled": replace(plan, may_compile=True)} | compiled
    return {"uncompiled": plan}


def _describe_linear(shape: Shape, plan: Plan) -> list[str]:
    """A line about linear attention, where there is any."""
    if "linear_attention" not in (getattr(shape.text, "layer_types", None) or ()):
        return []
    how = "by the kernels of flash-linear-attention" if plan.kernels else "in plain PyTorch, as old GPUs have to"
    return [f"Linear attention is taken to be computed {how}."]


def describe(shape: Shape, plans: dict[str, Plan]) -> str:
    """A table with a column of GiB for each of the plans, which do the same with the same rows."""
    plan = next(iter(plans.values()))
    columns = [estimate(shape, plan) for plan in plans.values()]
    lines = [("", *plans)] if len(plans) > 1 else []
    lines += [(part, *(f"{column[part]:.2f}" for column in columns)) for part in columns[0]]
    lines.append(("peak that torch reserves", *(f"{sum(column.values()):.2f}" for column in columns)))
    if plan.eval_batch:
        scoring = (f"{scoring_gib(shape, plan):.2f}" for plan in plans.values())
        lines.append((f"in evaluations, {plan.eval_batch} rows at a time", *scoring))
    if plan.fp8_base:
        loading = (f"{loading_gib(shape, plan):.2f}" for plan in plans.values())
        lines.append(("while the base is loaded, before it is rounded", *loading))
    images = f"{plan.images} image{'s' if plan.images > 1 else ''} of {plan.max_pixels:,} px"
    compiled = f", compiled, activation_memory_budget {plan.memory_budget:g}" if plan.compiled else ""
    rows = [
        f"{plan.micro_batch} rows of {images} ({image_tokens(shape, plan):,} tokens) and {plan.text_tokens} tokens "
        f"of text: {num_tokens(shape, plan):,} tokens.",
        f"{shape.trained / 1e6:,.1f} million trained weights, "
        f"{'with' if plan.checkpointing else 'without'} gradient_checkpointing{compiled}. In GiB:",
    ]
    return "\n".join([*rows, table(lines, header=len(plans) > 1, indent=2)])


def describe_fit(
    shape: Shape, plan: Plan, gpu_gib: float, *, rows: int, accumulated: int | None, what: str
) -> tuple[bool, str]:
    """Whether the plan fits a GPU of so many GiB, and in words: what is the most that fits, and what to change. `rows`
    of one process and optimiser step; `accumulated` the same where the recipe states accumulation itself; `what` is
    the plan in a sentence."""
    gib = (gpu_gib - CONTEXT_GIB) / (1 + MARGIN)
    need = need_gib(shape, plan)
    of = f"{need:.1f} of {gpu_gib:g} GiB, of which the CUDA context takes {CONTEXT_GIB} and {MARGIN:.0%} stay free"
    lines = [f"{what} {'fits' if need <= gib else 'does not fit'}: {of}."]
    training = replace(plan, eval_batch=0)
    size, pixels = largest_micro_batch(shape, training, gib), largest_max_pixels(shape, training, gib)
    lines.append(f"Largest micro-batch at {plan.max_pixels:,} px: {size or 'none'}.")
    lines.append(f"Largest max_pixels at {plan.micro_batch} rows: {f'{pixels:,}' if pixels else 'none of use'}.")
    if need > gib:
        changes = remedies(shape, plan, gib, rows)
        lines.append("What fits, each line alone:" if changes else "Nothing known makes it fit; take a smaller model.")
        lines += [f"  {as_options(settings, accumulated)}" for settings in changes]
    return need <= gib, "\n".join(lines)
