"""{part: GiB} at the peak of a training step or an evaluation.

The peak comes early in the backward pass, when everything that the forward pass kept is still there:

    weights + adapter, gradients, optimiser + N x (what every layer keeps) + temporaries of one layer + overhead

N is the number of tokens of a micro-batch; rows have no padding (fast/packing.py), and every row is taken to hold
images of max_pixels. With recomputation only the layers' inputs are kept, and one layer at a time. Not known here:
weights spread over GPUs (FSDP, DeepSpeed); stored image features, which need less.
"""

from dataclasses import replace

from vqa_sft.batch.image_rules import area_tokens
from vqa_sft.models.fast import fused_lora
from vqa_sft.models.memory.needs import Plan, Shape

GIB = 2**30
# Fitted to peaks of torch.cuda.max_memory_allocated on one H200 (torch 2.11, transformers 5.23, trl 1.16): the points
# in tests/models/memory/test_memory.py. What layers keep is not fitted, it is counted (`kept_by_layer`).
# Temporaries of one decoder layer, forward or backward, in tensors of (N, intermediate size): the gradients of the
# MLP's three wide tensors and LoRA's share of them; in the forward pass a wide tensor and its fp32 copy.
LAYER = 4.0
# Libraries' workspaces, small tensors, rounding.
LIBRARIES_GIB = 0.4
# Not fitted, counted on fake tensors: temporaries of one block of the vision tower, in tensors of (patches, hidden
# size); the rotation of queries and keys in fp32 is the widest moment.
TOWER = 15.0
# What torch reserves beyond what it hands out, as a share of what comes and goes: 37.7 to 36.7 GiB.
FRAGMENTATION = 0.05
# Copies of the attention weights (T, T) that sdpa keeps where it has no fused kernel; with a mask and grouped heads it
# has none. From 59.8 GiB of the libraries' path to 51.5 with packed rows, docs/measurements/speed.md.
WEIGHTS_KEPT = 3


def image_tokens(shape: Shape, plan: Plan) -> int:
    """Tokens of one image: a token is merge x merge patches of patch_px x patch_px."""
    return area_tokens(plan.max_pixels, shape.patch_px * shape.merge)


def row_tokens(shape: Shape, plan: Plan) -> int:
    return plan.images * image_tokens(shape, plan) + plan.text_tokens


def num_tokens(shape: Shape, plan: Plan) -> int:
    """Tokens of a micro-batch, as all but attention see it."""
    spared = (plan.micro_batch - 1) * plan.shared_tokens if plan.fast else 0
    return plan.micro_batch * row_tokens(shape, plan) - spared


def num_patches(shape: Shape, plan: Plan) -> int:
    return plan.micro_batch * plan.images * image_tokens(shape, plan) * shape.merge**2


def weight_bytes(shape: Shape, plan: Plan) -> tuple[float, float]:
    """Bytes of the language model and of the vision tower; only linear layers of the former are quantised.

    4 bit: half a byte and a constant for every 64 weights: 4 bytes, or with nested quantisation 1 byte and 4 for every
    256 of them (Dettmers et al. 2023, QLoRA, section 3). 8 bit: a byte and an fp32 scale a row.
    """
    linear = shape.decoder_linear * plan.weight_bytes
    if plan.bits == 4:
        linear = shape.decoder_linear * (0.5 + (1 / 64 + 4 / (64 * 256) if plan.nested else 4 / 64))
    elif plan.bits == 8:
        linear = shape.decoder_linear + 4 * shape.decoder_rows
    if plan.stored_bytes is not None:
        linear = shape.decoder_linear * plan.stored_bytes
    return linear + shape.decoder_other * plan.weight_bytes, shape.tower * plan.weight_bytes


def trained_bytes(shape: Shape, plan: Plan) -> float:
    """An adapter's fp32 weights; gradients and optimiser states of what is trained, in its precision; with several
    processes DDP's buckets, which hold the gradients once more."""
    value = plan.weight_bytes if shape.trains_base else 4
    buckets = value if plan.processes > 1 else 0
    own = 0 if shape.trains_base else value
    return shape.trained * (own + value + buckets + plan.optimizer_bytes * value / 4)


def kept_by_layer(shape: Shape, plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per token that one decoder layer keeps for its backward pass: its attention's, its MLP's.

    Uncompiled is what autograd saves in the library's forward, as tests/models/memory counts it. Frozen linear layers
    keep nothing; their adapters keep their input, because PEFT converts it to the adapter's fp32 and autocast back: a
    copy for each. Without that conversion (4 and 8 bit) layers share one. Compiled is what torch.compile's partitioner
    saves: norms, rotations and activations are computed again, layers share inputs. On a memory budget below 1 the
    inputs of linear layers are computed again too, then `up`, then `gate`: that is assumed, and fits measured peaks.
    """
    size, hidden, wide = plan.value_bytes, shape.text.hidden_size, shape.text.intermediate_size
    num_heads, num_key_heads = shape.text.num_attention_heads, shape.text.num_key_value_heads
    query, key = num_heads * shape.head_dim, num_key_heads * shape.head_dim
    keys = key if plan.attention == "grouped" else query
    separate = _converts(shape, plan) or plan.lora_dropout > 0
    copied = size + 1 if plan.lora_dropout else size  # dropout keeps a mask beside every copy

    def copies(*names: str) -> int:
        """How many times the one input of these linear layers is kept."""
        num = sum(name in shape.adapted or shape.trains_base for name in names)
        return num if separate and not plan.compiled else min(num, 1)

    def narrow(*names: str) -> int:
        return size * shape.rank * len(shape.adapted & set(names))

    attention = {
        "inputs of q, k, v": copies("q_proj", "k_proj", "v_proj") * copied * hidden,
        "q, k, v": size * (query + 2 * keys),
        "attention output": size * query,
        # What attention keeps is the same tensor where nothing is converted.
        "input of o": copies("o_proj") * copied * query if separate else 0,
        "log-sum-exp": 4 * num_heads,
        "narrow outputs of adapters": narrow("q_proj", "k_proj", "v_proj", "o_proj"),
    }
    inputs = copies("gate_proj", "up_proj")
    if _is_fused(shape, plan):  # one, with the narrow outputs beside it
        inputs = min(inputs, 1)
    mlp = {
        "inputs of gate and up": inputs * copied * hidden,
        "gate and up": size * 2 * wide,
        "input of down": copies("down_proj") * copied * wide,
        "narrow outputs of adapters": narrow("gate_proj", "up_proj", "down_proj"),
    }
    if plan.attention == "unfused":
        attention["attention weights"] = WEIGHTS_KEPT * size * num_heads * row_tokens(shape, plan)
    if plan.compiled:
        attention["norm: input, 1 / rms"] = size * hidden + 4
        mlp["norm: input, 1 / rms"] = size * hidden + 4
        heads = size * (query + key)
    else:
        attention["norm: input in fp32, 1 / rms"] = 4 * hidden + 4
        mlp["norm: input in fp32, 1 / rms"] = 4 * hidden + 4
        mlp["act(gate)"] = size * wide
        heads = 4 * (query + key)
    if shape.normalises_heads:
        attention["norms of q and k"] = heads + 4 * (num_heads + num_key_heads)
    if shape.trains_base and not plan.compiled:  # a norm whose weight is trained keeps what it is multiplied with
        attention["normed"] = size * (hidden + (query + key if shape.normalises_heads else 0))
        mlp["normed"] = size * hidden
    if plan.compiled and not shape.trains_base:
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


def _is_fused(shape: Shape, plan: Plan) -> bool:
    """Whether the MLP's adapters are inside the products of their base (fast/fused_lora.py)."""
    possible = plan.fast and plan.bits == 16 and not plan.lora_dropout and not shape.trains_base
    return plan.fused and possible and shape.adapted >= set(fused_lora.NAMES)


def _converts(shape: Shape, plan: Plan) -> bool:
    """Whether inputs are converted for every linear layer: fp32 weights that are trained, in half precision."""
    fp32 = not shape.trains_base or plan.weight_bytes == 4
    return fp32 and plan.value_bytes < 4 and plan.bits == 16


def kept_by_tower_block(shape: Shape, plan: Plan) -> float:
    """Bytes per patch that one block of the vision tower keeps where it runs backward: norms' inputs in fp32; q, k, v
    and attention output; the MLP's wide tensors; inputs of its linear layers if they are trained."""
    hidden, wide = shape.tower_hidden, shape.tower_intermediate
    kept = 2 * 4 * hidden + plan.value_bytes * (4 * hidden + (3 if shape.tower_gated else 1) * wide)
    return kept + (plan.value_bytes * (2 * hidden + wide) if shape.trains_tower else 0)


def estimate(shape: Shape, plan: Plan) -> dict[str, float]:
    """GiB of every part at the peak of a training step; their sum is what torch reserves."""
    size, tokens = plan.value_bytes, num_tokens(shape, plan)
    patches = num_patches(shape, plan)
    attention, mlp = (sum(part.values()) for part in kept_by_layer(shape, plan))
    attention, mlp = attention * plan.micro_batch * row_tokens(shape, plan), mlp * tokens
    # speedups.keep_only_answers: the last layer's MLP sees the answers alone.
    num_layers, hidden, wide = shape.text.num_hidden_layers, shape.text.hidden_size, shape.text.intermediate_size
    num_mlps = num_layers - 1 if plan.fast else num_layers
    # The libraries let the gradients begin at every embedding when they recompute, the tower's too.
    tower_runs_backward = shape.trains_tower or (plan.checkpointing and not plan.fast)
    block = patches * kept_by_tower_block(shape, plan) if tower_runs_backward else 0
    if plan.checkpointing:
        kept = tokens * size * hidden * num_layers + max(attention + mlp, block)
        kept_tower = patches * size * shape.tower_hidden * shape.tower_layers if tower_runs_backward else 0
    else:
        kept = num_layers * attention + num_mlps * mlp
        kept += size * shape.trained if _converts(shape, plan) else 0  # autocast's copies of the trained weights
        kept_tower = shape.tower_layers * block
    temporaries = size * tokens * wide * LAYER
    if plan.bits < 16:  # the largest layer in half precision
        temporaries += size * hidden * wide
    # The tower's temporaries come and go before the decoder keeps anything.
    temporaries = max(temporaries, size * patches * shape.tower_hidden * TOWER - kept)
    return _parts(shape, plan, kept=kept, kept_tower=kept_tower, temporaries=temporaries)


def scoring_gib(shape: Shape, plan: Plan) -> float:
    """GiB at the peak of an evaluation: nothing is kept; a decoder layer's temporaries, or the vision tower's."""
    plan = replace(plan, micro_batch=plan.eval_batch)
    patches = num_patches(shape, plan)
    wide = num_tokens(shape, plan) * shape.text.intermediate_size * LAYER
    temporaries = plan.value_bytes * max(wide, patches * shape.tower_hidden * TOWER)
    return sum(_parts(shape, plan, kept=0, kept_tower=0, temporaries=temporaries).values())


def _parts(shape: Shape, plan: Plan, *, kept: float, kept_tower: float, temporaries: float) -> dict[str, float]:
    size, tokens = plan.value_bytes, num_tokens(shape, plan)
    patches = num_patches(shape, plan)
    # Two frames a patch; converted to half precision in the workers if rows are packed.
    pixels = patches * 3 * 2 * shape.patch_px**2 * (size if plan.fast else 4)
    # At the answers alone: in the model's precision, in fp32, and their gradient in both.
    logits = plan.micro_batch * shape.text.vocab_size * 2 * (size + 4)
    language_model, tower = weight_bytes(shape, plan)
    trained = "gradients, optimiser" if shape.trains_base else "adapter, gradients, optimiser"
    parts = {
        "language model": language_model,
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


def need_gib(shape: Shape, plan: Plan) -> float:
    """What torch reserves at the peak of training and of the evaluations between, in GiB."""
    training = sum(estimate(shape, plan).values())
    return max(training, scoring_gib(shape, plan)) if plan.eval_batch else training
