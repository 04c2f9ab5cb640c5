"""{part: GiB} at the peak of a training step or an evaluation.

The peak comes early in the backward pass, when everything that the forward pass kept is still there:

    weights + adapter, gradients, optimiser + N x (what every layer keeps) + temporaries of one layer + overhead

N is the number of tokens of a micro-batch; rows have no padding (fast/packing.py), and every row is taken to hold
images of max_pixels. With recomputation only the layers' inputs are kept, and one layer at a time. Not known here:
weights spread over GPUs (FSDP, DeepSpeed); stored image features, which need less.
"""

from collections.abc import Sequence
from dataclasses import replace

from vqa_sft.models.families import head_dim
from vqa_sft.models.fast import fused_lora
from vqa_sft.models.memory.count import Bytes, Counted, How, count_compiled, count_layers
from vqa_sft.models.memory.kernels import WEIGHTS_KEPT, Attention
from vqa_sft.models.memory.needs import Plan, Shape

GIB = 2**30
# Fitted to peaks of torch.cuda.max_memory_allocated on one H200 (torch 2.11, transformers 5.23, trl 1.16): the points
# in tests/models/memory/test_memory.py. What layers keep is not fitted, it is counted (count.py).
# What comes and goes in one decoder layer, as a share of what its backward pass makes, which is counted too.
LAYER = 1.25
# Libraries' workspaces, small tensors, rounding.
LIBRARIES_GIB = 0.4
# Not fitted, counted on fake tensors: temporaries of one block of the vision tower, in tensors of (patches, hidden
# size); the rotation of queries and keys in fp32 is the widest moment.
TOWER = 15.0
# What torch reserves beyond what it hands out, as a share of what comes and goes: 37.7 to 36.7 GiB.
FRAGMENTATION = 0.05


def image_tokens(shape: Shape, plan: Plan) -> int:
    return int(plan.max_pixels / shape.token_area + 1e-6)


def row_tokens(shape: Shape, plan: Plan) -> int:
    return plan.images * image_tokens(shape, plan) + plan.text_tokens


def is_packed(shape: Shape, plan: Plan) -> bool:
    return plan.fast and shape.packs_rows


def num_tokens(shape: Shape, plan: Plan) -> int:
    """Tokens of a micro-batch, as all but attention see it; padded rows are all as long as the longest."""
    spared = (plan.micro_batch - 1) * plan.shared_tokens if is_packed(shape, plan) else 0
    return plan.micro_batch * row_tokens(shape, plan) - spared


def num_patches(shape: Shape, plan: Plan) -> float:
    return plan.micro_batch * plan.images * image_tokens(shape, plan) * shape.token_area / shape.patch_px**2


def is_fused(shape: Shape, plan: Plan) -> bool:
    """Whether MLPs and attention have their adapters inside the products of their base (fast/fused_lora.py)."""
    can = plan.bits == 16 and not plan.fp8_base and not plan.lora_dropout and not shape.trains_base
    return plan.fused and plan.fast and can


def counted(shape: Shape, plan: Plan) -> Counted:
    """What the language model's layers keep and need, by the plan; not compiled."""
    how = _how(shape, plan, plan.attention if shape.packs_rows else "masked")
    if how not in shape.counted:
        shape.counted[how] = count_layers(shape.decoder, how)
    return shape.counted[how]


def kept_by_compiled_kinds(shape: Shape, plan: Plan) -> Sequence[Bytes | None]:
    """What one compiled layer of each kind of `counted` keeps; None: as much as uncompiled, which it is."""
    # Padded rows of families with a fast tower come without a mask (fast/packing.py).
    attention: Attention = plan.attention if shape.packs_rows or shape.has_fast_tower else "products"
    how = replace(_how(shape, plan, attention), memory_budget=plan.memory_budget)
    if how not in shape.compiled:
        shape.compiled[how] = count_compiled(shape.decoder, how)
    return shape.compiled[how]


def _how(shape: Shape, plan: Plan, attention: Attention) -> How:
    return How(
        attention=attention,
        has_kernels=plan.kernels,
        keeps_answers=is_packed(shape, plan),
        fuses_mlp=is_fused(shape, plan),
        fuses_attention=is_fused(shape, plan) and plan.fused_attention,
        converts=plan.bits == 16,
        has_dropout=plan.lora_dropout > 0,
        value_bytes=plan.value_bytes,
        weight_bytes=plan.weight_bytes,
    )


def weight_bytes(shape: Shape, plan: Plan) -> tuple[float, float]:
    """Bytes of the language model and of the vision tower; only linear layers of the former are quantised.

    4 bit: half a byte and a constant for every 64 weights: 4 bytes, or with nested quantisation 1 byte and 4 for every
    256 of them (Dettmers et al. 2023, QLoRA, section 3). 8 bit and an FP8 base: a byte and an fp32 scale a row.
    """
    linear = shape.decoder_linear * plan.weight_bytes
    if plan.bits == 4:
        linear = shape.decoder_linear * (0.5 + (1 / 64 + 4 / (64 * 256) if plan.nested else 4 / 64))
    elif plan.bits == 8 or plan.fp8_base:
        linear = shape.decoder_linear + 4 * shape.decoder_rows
    if plan.stored_bytes is not None:
        linear = shape.decoder_linear * plan.stored_bytes
    return linear + shape.decoder_other * plan.weight_bytes, shape.tower * plan.weight_bytes


def trained_bytes(shape: Shape, plan: Plan) -> float:
    """An adapter's fp32 weights; gradients and optimiser states of what is trained, in its precision; with several
    processes DDP's buckets, beside which there are gradients where micro-batches accumulate."""
    value = plan.weight_bytes if shape.trains_base else 4
    buckets = value if plan.processes > 1 else 0
    own = 0 if shape.trains_base else value
    return shape.trained * (own + value + buckets + plan.optimizer_bytes * value / 4)


def kept_by_compiled_layer(shape: Shape, plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per token that one compiled layer of attention and an MLP keeps: its attention's, its MLP's.

    It is what torch.compile's partitioner saves, as tests/models/memory counts it: norms, rotations and activations are
    computed again, layers share inputs. On a memory budget below 1 the inputs of linear layers are computed again too,
    then `up`, then `gate`: that is assumed, and fits measured peaks: of Qwen2.5-VL-7B within 3%, where `count_compiled`
    is within 4%, of Qwen3-VL-8B within 12%, where that is within 1%.
    """
    size, hidden, wide = plan.value_bytes, shape.text.hidden_size, shape.text.intermediate_size
    num_heads, num_key_heads = shape.text.num_attention_heads, shape.text.num_key_value_heads
    query, key = num_heads * head_dim(shape.text), num_key_heads * head_dim(shape.text)
    keys = key if plan.attention == "grouped" else query
    copied = size + 1 if plan.lora_dropout else size  # dropout keeps a mask beside every copy

    def copies(*names: str) -> int:
        """How many times the one input of these linear layers is kept."""
        return min(1, sum(name in shape.adapted or shape.trains_base for name in names))

    def narrow(*names: str) -> int:
        return size * shape.rank * len(shape.adapted & set(names))

    # PEFT's cast of the attention output to fp32 and autocast's back make a copy of it.
    is_whole = plan.fused_attention and shape.adapted >= {*fused_lora.ATTENTION}
    copies_output = not (is_fused(shape, plan) and is_whole)
    attention = {
        "norm: input, 1 / rms": size * hidden + 4,
        "inputs of q, k, v": copies("q_proj", "k_proj", "v_proj") * copied * hidden,
        "q, k, v": size * (query + 2 * keys),
        "attention output": size * query,
        "input of o": copies_output * copies("o_proj") * copied * query,
        "log-sum-exp": 4 * num_heads,
        "narrow outputs of adapters": narrow("q_proj", "k_proj", "v_proj", "o_proj"),
    }
    mlp = {
        "norm: input, 1 / rms": size * hidden + 4,
        "inputs of gate and up": copies("gate_proj", "up_proj") * copied * hidden,
        "gate and up": size * 2 * wide,
        "input of down": copies("down_proj") * copied * wide,
        "narrow outputs of adapters": narrow("gate_proj", "up_proj", "down_proj"),
    }
    if plan.attention == "unfused":
        attention["attention weights"] = WEIGHTS_KEPT * size * num_heads * row_tokens(shape, plan)
    if shape.normalises_heads:
        attention["norms of q and k"] = size * (query + key) + 4 * (num_heads + num_key_heads)
    if not shape.trains_base:
        _stay_within(plan.memory_budget, attention, mlp)
    return attention, mlp


def _stay_within(budget: float, attention: dict[str, float], mlp: dict[str, float]) -> None:
    """What torch's partitioner leaves out where a layer may keep the share `budget` of what it would, beside its own
    input, which it has to keep."""
    own = attention["norm: input, 1 / rms"]
    limit = own + budget * (sum(attention.values()) + sum(mlp.values()) - own)
    if budget < 1:
        attention |= {"inputs of q, k, v": 0, "input of o": 0}
        mlp |= {"inputs of gate and up": 0, "input of down": 0}
    one = mlp["gate and up"] / 2
    for _ in ("up", "gate"):
        if sum(attention.values()) + sum(mlp.values()) > limit:
            mlp["gate and up"] -= one


def kept_by_tower_block(shape: Shape, plan: Plan) -> float:
    """Bytes per patch that one block of the vision tower keeps where it runs backward: norms' inputs in fp32; q, k, v
    and attention output; the MLP's wide tensors; inputs of its linear layers if they are trained."""
    hidden, wide = shape.tower_hidden, shape.tower_intermediate
    kept = 2 * 4 * hidden + plan.value_bytes * (4 * hidden + (3 if shape.tower_gated else 1) * wide)
    return kept + (plan.value_bytes * (2 * hidden + wide) if shape.trains_tower else 0)


def kept_by_layers(shape: Shape, plan: Plan) -> list[tuple[int, float]]:
    """(layers, bytes that each of them keeps for its backward pass) of every kind."""
    tokens, length = num_tokens(shape, plan), row_tokens(shape, plan)
    if not (plan.compiled and shape.is_plain):
        kinds = counted(shape, plan).kinds
        compiled = kept_by_compiled_kinds(shape, plan) if plan.compiled else len(kinds) * [None]
        kept = [one or kind.kept for one, kind in zip(compiled, kinds, strict=True)]
        return [(kind.num_layers, one.of(tokens, length)) for kind, one in zip(kinds, kept, strict=True)]
    attention, mlp = (sum(part.values()) for part in kept_by_compiled_layer(shape, plan))
    attention, mlp = attention * plan.micro_batch * length, mlp * tokens
    # Autocast's copies of the trained weights.
    has_copies = plan.value_bytes < 4 and (plan.weight_bytes == 4 or not shape.trains_base)
    copies = plan.value_bytes * shape.trained / shape.text.num_hidden_layers if has_copies else 0
    # speedups.keep_only_answers: the last layer's MLP sees the answers alone.
    last = attention if plan.fast else attention + mlp
    return [(shape.text.num_hidden_layers - 1, attention + mlp + copies), (1, last + copies)]


def kept_by_fused_layers(shape: Shape, plan: Plan) -> float:
    """Bytes that compiled layers keep although they are computed again: torch 2.11 (no longer 2.15) does not let go of
    what the functions of fused_lora save. Counted at widths of 4B to 8B: at an activation_memory_budget of 1 two wide
    tensors and their input, at 0.7 one, at 0.2 none. Counted on a CPU; an estimated 5 of the 28 GiB of
    InternVL3.5-8B."""
    if not (plan.compiled and shape.is_plain and is_fused(shape, plan)):
        return 0
    wide = plan.value_bytes * shape.text.intermediate_size
    kept = 3 * plan.value_bytes * shape.rank
    if plan.memory_budget >= 1:
        kept += 2 * wide + plan.value_bytes * shape.text.hidden_size
    elif plan.memory_budget >= 0.5:
        kept += wide
    return (shape.text.num_hidden_layers - 1) * num_tokens(shape, plan) * kept


def estimate(shape: Shape, plan: Plan) -> dict[str, float]:
    """GiB of every part at the peak of a training step; their sum is what torch reserves."""
    size, tokens, length = plan.value_bytes, num_tokens(shape, plan), row_tokens(shape, plan)
    patches, layers = num_patches(shape, plan), kept_by_layers(shape, plan)
    # The libraries let the gradients begin at every embedding when they recompute, the tower's too.
    tower_runs_backward = shape.trains_tower or (plan.checkpointing and not (plan.fast and shape.has_fast_tower))
    block = patches * kept_by_tower_block(shape, plan) if tower_runs_backward else 0
    if plan.checkpointing:
        passed = sum(kind.num_layers * kind.passed.of(tokens, length) for kind in counted(shape, plan).kinds)
        kept = passed + max(*(one for _, one in layers), block) + kept_by_fused_layers(shape, plan)
        kept_tower = patches * size * shape.tower_hidden * shape.tower_layers if tower_runs_backward else 0
    else:
        kept = sum(num * one for num, one in layers)
        kept_tower = shape.tower_layers * block
    kept += counted(shape, plan).shared.of(tokens, length)
    # The tower's temporaries come and go before the decoder keeps anything.
    temporaries = max(_temporaries(shape, plan), size * patches * shape.tower_hidden * TOWER - kept)
    return _parts(shape, plan, kept=kept, kept_tower=kept_tower, temporaries=temporaries)


def _temporaries(shape: Shape, plan: Plan) -> float:
    """Bytes that come and go in one decoder layer."""
    tokens, length = num_tokens(shape, plan), row_tokens(shape, plan)
    most = max(kind.temporaries.of(tokens, length) for kind in counted(shape, plan).kinds)
    if plan.bits < 16:
        return LAYER * most + plan.value_bytes * shape.largest_linear  # in half precision
    if not plan.fp8_base:
        return LAYER * most
    # A transposed copy of a weight; where layers are not compiled, what is rounded in fp32, three times, and in FP8.
    rounded = 0 if plan.compiled else 13 * tokens * shape.largest_linear / shape.text.hidden_size
    return LAYER * most + shape.largest_linear + rounded


def scoring_gib(shape: Shape, plan: Plan) -> float:
    """GiB at the peak of an evaluation: nothing is kept; a decoder layer's temporaries, or the vision tower's."""
    plan = replace(plan, micro_batch=plan.eval_batch)
    tower = plan.value_bytes * num_patches(shape, plan) * shape.tower_hidden * TOWER
    return sum(_parts(shape, plan, kept=0, kept_tower=0, temporaries=max(_temporaries(shape, plan), tower)).values())


def _parts(shape: Shape, plan: Plan, *, kept: float, kept_tower: float, temporaries: float) -> dict[str, float]:
    size, tokens = plan.value_bytes, num_tokens(shape, plan)
    patches = num_patches(shape, plan)
    # Qwen-VL's are converted to half precision in the workers.
    pixels = patches * 3 * shape.patch_px**2 * shape.frames * (size if plan.fast and shape.has_fast_tower else 4)
    # At the answers alone: in the model's precision, in fp32, and their gradient in both.
    logits = plan.micro_batch * shape.text.vocab_size * 2 * (size + 4)
    language_model, tower = weight_bytes(shape, plan)
    trained = "gradients, optimiser" if shape.trains_base else "adapter, gradients, optimiser"
    parts = {
        "language model": language_model + counted(shape, plan).copies,
        "vision tower": tower,
        trained: trained_bytes(shape, plan),
        "kept for the backward pass": kept,
        "kept by the vision tower": kept_tower,
        "temporaries": temporaries,
        "images, embeddings, logits": pixels + 2 * tokens * size * shape.text.hidden_size + logits,
        "libraries": LIBRARIES_GIB * GIB,
    }
    if not kept_tower:
        del parts["kept by the vision tower"]
    parts["fragmentation"] = FRAGMENTATION * (kept + kept_tower + temporaries)
    return {name: value / GIB for name, value in parts.items()}


def loading_gib(shape: Shape, plan: Plan) -> float:
    """GiB of a base that is rounded once it is loaded."""
    return sum(weight_bytes(shape, replace(plan, fp8_base=False))) / GIB


def need_gib(shape: Shape, plan: Plan) -> float:
    """What torch reserves at the peak of training, of the evaluations between and of loading, in GiB."""
    needs = [sum(estimate(shape, plan).values())]
    needs += [scoring_gib(shape, plan)] if plan.eval_batch else []
    needs += [loading_gib(shape, plan)] if plan.fp8_base else []
    return max(needs)
