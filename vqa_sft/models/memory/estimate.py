"""What a recipe needs on one GPU, from the shape of its model: no weights, no GPU, seconds on a laptop.

    shape = read_shape(model_args, config)             counted on the meta device, with the adapter
    plan = read_plan(training_args, model_args, ...)   rows, pixels, precision, recomputation
    estimate(shape, plan)                              {part: GiB}; `need_gib` is their peak, scoring included

The peak comes early in the backward pass, when everything that the forward pass kept is still there:

    weights + adapter, gradients, optimiser + N x (what every layer keeps) + temporaries of one layer + overhead

N is the number of tokens of a micro-batch; rows have no padding (packing.py), and every row is taken to hold images
of max_pixels. With recomputation only the layers' inputs are kept, and one layer at a time. For Qwen2.5-VL and
Qwen3-VL. Not known here: weights spread over GPUs (FSDP, DeepSpeed); features from a cache, which need less.
"""

import bisect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import torch
from accelerate.utils import gather_object
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, PreTrainedConfig, ProcessorMixin
from trl import ModelConfig, SFTConfig

from vqa_sft.batch.prompts import Prompts
from vqa_sft.batch.template import render_prompt
from vqa_sft.errors import InputError, ProcessError, explains
from vqa_sft.models import processes as launch, quantized
from vqa_sft.models.fast import attention, fused_lora as lora, packing, speedups as speed
from vqa_sft.models.load import DTYPES, LOADING_ERRORS, decoder_name, lora_config
from vqa_sft.models.shapes import SHAPES, shape_config
from vqa_sft.runs.checkpoints import goes_on

GIB = 2**30
# Fitted to peaks of torch.cuda.max_memory_allocated on one H200 (torch 2.11, transformers 5.23, trl 1.16): the points
# in tests/test_memory.py. What layers keep is not fitted, it is counted (`kept_by_layer`).
# Temporaries of one decoder layer, forward or backward, in tensors of (N, intermediate size): the gradients of the
# MLP's three wide tensors and LoRA's share of them; in the forward pass a wide tensor and its fp32 copy.
LAYER = 4.0
# Libraries' workspaces, small tensors, rounding.
LIBRARIES_GIB = 0.4
# Not fitted: temporaries of one block of the vision tower, in tensors of (patches, hidden size); the rotation of
# queries and keys in fp32 is the widest moment. Counted in the library's forward on fake tensors.
TOWER = 15.0
# What torch reserves beyond what it hands out, as a share of what comes and goes: 37.7 to 36.7 GiB, docs/speed.md.
FRAGMENTATION = 0.05
# Copies of the attention weights (T, T) that sdpa keeps where it has no fused kernel; with a mask and grouped heads it
# has none. From 59.8 GiB of the libraries' path to 51.5 with packed rows, docs/speed.md.
WEIGHTS_KEPT = 3
# The CUDA context lies outside of what torch counts: 14.56 GiB of a T4 leave 13.8.
CONTEXT_GIB = 0.76
# What a choice for the user leaves free.
MARGIN = 0.08

TEXT_TOKENS = 160  # of a row, template included
SHARED_TOKENS = 20  # Qwen's template with our own prompt in English: 22
MAX_PIXELS = 12_845_056  # the processors' own limit, where a recipe sets none and the processor is not at hand
MIN_PICTURE_TOKENS = 64  # 224 x 224 px: below it nothing can be read, and it is not offered
# Bytes of the optimiser per trained fp32 value: AdamW keeps two fp32 values; what is not named here, as AdamW.
OPTIMIZER_BYTES = {"8bit": 2, "lion": 4, "adafactor": 0, "sgd": 0}


@dataclass(frozen=True)
class Shape:
    """What the model of a recipe has, as far as memory depends on it. Widths in values, parameters in numbers."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    normalises_heads: bool  # Qwen3: a norm over each head's queries and keys
    tower_layers: int
    tower_hidden: int
    tower_intermediate: int
    tower_gated: bool  # Qwen2.5: gate, up and down; Qwen3: two layers
    patch_px: int
    merge: int  # merge x merge patches are one token
    decoder_linear: int  # weights of the decoder's linear layers: what 4 and 8 bit shrink
    decoder_rows: int  # their output features, each with a scale in 8 bit
    decoder_other: int  # embeddings, head, norms, biases
    tower: int
    trained: int
    rank: int
    adapted: frozenset[str]  # linear layers of a decoder layer with an adapter, by their names
    trains_tower: bool
    trains_base: bool  # no adapter: all weights


@dataclass(frozen=True)
class Plan:
    """What is done with the model, as far as memory depends on it."""

    micro_batch: int
    eval_batch: int = 0  # 0: no validation
    max_pixels: int = MAX_PIXELS
    text_tokens: int = TEXT_TOKENS
    shared_tokens: int = 0  # of the text: all rows begin with them, and packed rows hold them once
    images: int = 1  # of a row
    checkpointing: bool = False
    compiled: bool = False
    memory_budget: float = 1.0  # of compiled layers, see speed.speed_up
    fast: bool = True
    rides: bool = True  # lora.py, where it can be had
    # The kernel takes fewer keys than queries; keys are "repeated" for it (old GPUs); "unfused": (T, T) is kept.
    attention: Literal["grouped", "repeated", "unfused"] = "grouped"
    lora_dropout: float = 0.0
    value_bytes: int = 2  # of an activation
    weight_bytes: int = 2  # of a weight that is not quantised
    bits: int = 16
    nested: bool = False  # quantisation constants are quantised as well
    stored_bytes: float | None = None  # of a linear layer's weight, in a checkpoint that is quantised itself
    optimizer_bytes: int = 8
    processes: int = 1


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(model_args: ModelConfig, *, trust_remote_code: bool = False) -> tuple[PreTrainedConfig, str]:
    """The model's configuration, and a note where it is a published shape and not the model's own."""
    name = model_args.model_name_or_path
    source = {"revision": model_args.model_revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, **source), ""
    except LOADING_ERRORS:  # not on this machine
        if name in SHAPES:
            return shape_config(name), f"{name} is not on this machine; its published shape is used."
    with explains(LOADING_ERRORS, f"the configuration of {name!r} cannot be loaded"):
        return AutoConfig.from_pretrained(name, **source), ""


def read_shape(model_args: ModelConfig, config: PreTrainedConfig, **adapted_parts: bool) -> Shape:
    """Count the model's parameters, those of its adapter included, on the meta device; `adapted_parts` are those of
    `lora_config`."""
    if config.model_type not in packing.MODELS:
        known = " and ".join(packing.MODELS)
        raise InputError(f"the memory of {config.model_type} cannot be estimated; {known} can.")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision, decoder = config.text_config, config.vision_config, decoder_name(model)
    linear = [module for module in model.get_submodule(decoder).modules() if type(module) is torch.nn.Linear]
    num_linear = sum(layer.weight.numel() for layer in linear)
    num_tower = sum(parameter.numel() for parameter in model.model.visual.parameters())
    num_all = sum(parameter.numel() for parameter in model.parameters())
    gated = hasattr(model.model.visual.blocks[0].mlp, "gate_proj")
    adapter = lora_config(model_args, model, **adapted_parts)
    if adapter is not None:
        with explains(ValueError, "the recipe does not fit the model"), torch.device("meta"):
            get_peft_model(model, adapter)  # changes the model itself
    first = model.get_submodule(decoder).layers[0]
    named = [name.rpartition(".")[2] for name, module in first.named_modules() if isinstance(module, LoraLayer)]
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        normalises_heads=hasattr(first.self_attn, "q_norm"),
        tower_layers=vision.depth,
        tower_hidden=vision.hidden_size,
        tower_intermediate=vision.intermediate_size,
        tower_gated=gated,
        patch_px=vision.patch_size,
        merge=vision.spatial_merge_size,
        decoder_linear=num_linear,
        decoder_rows=sum(layer.out_features for layer in linear),
        decoder_other=num_all - num_linear - num_tower,
        tower=num_tower,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        rank=model_args.lora_r,
        adapted=frozenset(named),
        trains_tower=any(parameter.requires_grad for parameter in model.model.visual.parameters()),
        trains_base=adapter is None,
    )


def read_plan(training_args: SFTConfig, model_args: ModelConfig, *, precision: str, **more: Any) -> Plan:
    """The plan of a recipe; `more` are fields of Plan that these two do not know."""
    optimizer = next((size for name, size in OPTIMIZER_BYTES.items() if name in training_args.optim.value), 8)
    # As load_model has it: the gradient scaler refuses fp16 weights.
    weights = "fp32" if precision == "fp16" and not model_args.use_peft else model_args.dtype or precision
    return Plan(
        micro_batch=training_args.per_device_train_batch_size,
        eval_batch=training_args.per_device_eval_batch_size if training_args.eval_strategy != "no" else 0,
        checkpointing=training_args.gradient_checkpointing,
        lora_dropout=model_args.lora_dropout if model_args.use_peft else 0.0,
        value_bytes=4 if precision == "fp32" else 2,
        weight_bytes=4 if weights in ("fp32", "float32") else 2,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        nested=model_args.use_bnb_nested_quant,
        optimizer_bytes=optimizer,
        processes=training_args.world_size,
        **more,
    )


def read_stored(name: str, config: PreTrainedConfig, plan: Plan) -> tuple[Plan, str]:
    """The plan with what a checkpoint that is quantised itself stores, and a note that says so. Raises InputError where
    the recipe asks for 4 or 8 bit of it."""
    own = quantized.quantization_of(config)
    if own is None:
        return plan, ""
    quantized.check_asked(name, own, is_asked=plan.bits < 16)
    note = f"{name} is quantised itself ({quantized.describe(own)})"
    stored = quantized.bytes_a_weight(own)
    if quantized.method_of(own) == "compressed-tensors":
        note += ", and unpacked to whole weights when it is loaded"
    elif stored is None:
        note += "; what its weights take is not known, and they are counted as whole ones"
    else:
        note += f": {stored:.2f} bytes a weight of the language model's linear layers"
    if quantized.method_of(own) in quantized.FP8:
        note += ". GPUs before compute capability 8.9 unpack them to 16 bit"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            stored = None
    # Such layers are neither compiled nor fused with their adapters, and cannot be rounded again.
    bits = 4 if stored is not None and stored < 1 else 8
    return replace(plan, bits=bits, stored_bytes=stored or plan.weight_bytes), f"{note}."


def pixel_limit(model_args: ModelConfig) -> int:
    """The largest image (width x height) that the model's own processor shows."""
    try:
        processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, local_files_only=True)
        return processor.size["longest_edge"]
    except (*LOADING_ERRORS, AttributeError):
        return MAX_PIXELS


def read_needs(
    training_args: SFTConfig,
    model_args: ModelConfig,
    processor: ProcessorMixin,
    examples: datasets.Dataset | None,
    prompts: Prompts,
    *,
    precision: str,
    fast: bool,
    compiles: bool,
    memory_budget: float,
    **adapted_parts: bool,
) -> tuple[Shape, Plan]:
    """Shape and plan of a run that is about to start: its longest row, pixels, and what this GPU can do."""
    config, _ = read_config(model_args, trust_remote_code=training_args.trust_remote_code)
    shape = read_shape(model_args, config, **adapted_parts)
    plan = read_plan(
        training_args,
        model_args,
        precision=precision,
        fast=fast,
        memory_budget=memory_budget,
        attention=attention_of(training_args.device, precision, fast),
        max_pixels=processor.image_processor.size["longest_edge"],
    )
    plan, _ = read_stored(model_args.model_name_or_path, config, plan)
    compiles = compiles and plan.bits == 16 and plan.attention == "grouped" and speed.can_compile()
    return shape, replace(plan, compiled=compiles, **(measure_rows(processor, examples, prompts) if examples else {}))


def attention_of(device: torch.device, precision: str, fast: bool) -> str:
    """How a GPU goes about attention, as a field of Plan."""
    if fast and attention.can_use_varlen(device, DTYPES[precision]):
        return "grouped"
    old = device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)
    return "repeated" if fast or old else "unfused"


def measure_rows(
    processor: ProcessorMixin, examples: datasets.Dataset, prompts: Prompts, most: int = 200
) -> dict[str, int]:
    """The most text tokens and images among the first rows, and how many tokens they share, as fields of a Plan."""
    rows = list(examples.select(range(min(most, len(examples)))))
    texts = [render_prompt(processor, row, range(len(row["choices"])), prompts) for row in rows]
    # The place of an image is one token here.
    start = os.path.commonprefix(texts).partition(getattr(processor, "image_token", "\0"))[0]
    shared, *lengths = (len(ids) for ids in processor.tokenizer([start, *texts], add_special_tokens=False)["input_ids"])
    return {
        "text_tokens": max(lengths),
        "shared_tokens": shared if len(rows) > 1 else 0,
        "images": max(len(row["images"]) for row in rows),
    }


# --- the parts --------------------------------------------------------------------------------------------------------


def image_tokens(shape: Shape, plan: Plan) -> int:
    """Tokens of one image: a token is merge x merge patches of patch_px x patch_px."""
    return plan.max_pixels // (shape.patch_px * shape.merge) ** 2


def row_tokens(shape: Shape, plan: Plan) -> int:
    return plan.images * image_tokens(shape, plan) + plan.text_tokens


def num_tokens(shape: Shape, plan: Plan) -> int:
    """Tokens of a micro-batch, as all but attention see it."""
    spared = (plan.micro_batch - 1) * plan.shared_tokens if plan.fast else 0
    return plan.micro_batch * row_tokens(shape, plan) - spared


def weight_bytes(shape: Shape, plan: Plan) -> tuple[float, float]:
    """Bytes of the language model and of the vision tower.

    4 bit: half a byte and a constant for every 64 weights: 4 bytes, or with nested quantisation 1 byte and 4 for every
    256 of them (Dettmers et al. 2023, QLoRA, section 3). 8 bit: a byte and an fp32 scale a row. Embeddings, head,
    norms, biases and the vision tower stay as they are.
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
    processes DDP's buckets, which hold the gradients once more. Gradients stay while micro-batches accumulate."""
    value = plan.weight_bytes if shape.trains_base else 4
    buckets = value if plan.processes > 1 else 0
    own = 0 if shape.trains_base else value
    return shape.trained * (own + value + buckets + plan.optimizer_bytes * value / 4)


def kept_by_layer(shape: Shape, plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes per token that one decoder layer keeps for its backward pass: its attention's, its MLP's.

    Uncompiled is what autograd saves in the library's forward (tests/test_memory.py counts it there). Frozen linear
    layers keep nothing; their adapters keep their input, because PEFT converts it to the adapter's fp32 and autocast
    back: a copy for each. Without that conversion (4 and 8 bit) layers share one. Compiled is what torch.compile's
    partitioner saves: norms, rotations and activations are computed again, layers share inputs. On a memory budget
    below 1 the inputs of linear layers are computed again too, then `up`, then `gate`: that is assumed, and fits the
    peaks measured on an H200 at 0.7, 0.4 and 0.2 (docs/speed.md).
    """
    size, hidden, wide = plan.value_bytes, shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
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
        "log-sum-exp": 4 * shape.heads,
        "narrow outputs of adapters": narrow("q_proj", "k_proj", "v_proj", "o_proj"),
    }
    inputs = copies("gate_proj", "up_proj")
    if _rides(shape, plan):  # one, with the narrow outputs beside it
        inputs = min(inputs, 1)
    mlp = {
        "inputs of gate and up": inputs * copied * hidden,
        "gate and up": size * 2 * wide,
        "input of down": copies("down_proj") * copied * wide,
        "narrow outputs of adapters": narrow("gate_proj", "up_proj", "down_proj"),
    }
    if plan.attention == "unfused":
        attention["attention weights"] = WEIGHTS_KEPT * size * shape.heads * row_tokens(shape, plan)
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
        attention["norms of q and k"] = heads + 4 * (shape.heads + shape.key_heads)
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


def _rides(shape: Shape, plan: Plan) -> bool:
    """Whether the MLP's adapters are inside the products of their base (lora.py)."""
    possible = plan.fast and plan.bits == 16 and not plan.lora_dropout and not shape.trains_base
    return plan.rides and possible and shape.adapted >= set(lora.NAMES)


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
    patches = plan.micro_batch * plan.images * image_tokens(shape, plan) * shape.merge**2
    attention, mlp = (sum(part.values()) for part in kept_by_layer(shape, plan))
    attention, mlp = attention * plan.micro_batch * row_tokens(shape, plan), mlp * tokens
    # speed.keep_only_answers: the last layer's MLP sees the answers alone.
    num_mlps = shape.layers - 1 if plan.fast else shape.layers
    # The libraries let the gradients begin at every embedding when they recompute, the tower's too.
    tower_runs_backward = shape.trains_tower or (plan.checkpointing and not plan.fast)
    block = patches * kept_by_tower_block(shape, plan) if tower_runs_backward else 0
    if plan.checkpointing:
        kept = tokens * size * shape.hidden * shape.layers + max(attention + mlp, block)
        kept_tower = patches * size * shape.tower_hidden * shape.tower_layers if tower_runs_backward else 0
    else:
        kept = shape.layers * attention + num_mlps * mlp
        kept += size * shape.trained if _converts(shape, plan) else 0  # autocast's copies of the trained weights
        kept_tower = shape.tower_layers * block
    temporaries = size * tokens * shape.intermediate * LAYER
    if plan.bits < 16:  # the largest layer in half precision
        temporaries += size * shape.hidden * shape.intermediate
    # The tower's temporaries come and go before the decoder keeps anything.
    temporaries = max(temporaries, size * patches * shape.tower_hidden * TOWER - kept)
    return _parts(shape, plan, kept=kept, kept_tower=kept_tower, temporaries=temporaries)


def scoring_gib(shape: Shape, plan: Plan) -> float:
    """GiB at the peak of an evaluation: nothing is kept; a decoder layer's temporaries, or the vision tower's."""
    plan = replace(plan, micro_batch=plan.eval_batch)
    patches = plan.micro_batch * plan.images * image_tokens(shape, plan) * shape.merge**2
    wide = num_tokens(shape, plan) * shape.intermediate * LAYER
    temporaries = plan.value_bytes * max(wide, patches * shape.tower_hidden * TOWER)
    return sum(_parts(shape, plan, kept=0, kept_tower=0, temporaries=temporaries).values())


def _parts(shape: Shape, plan: Plan, *, kept: float, kept_tower: float, temporaries: float) -> dict[str, float]:
    size, tokens = plan.value_bytes, num_tokens(shape, plan)
    patches = plan.micro_batch * plan.images * image_tokens(shape, plan) * shape.merge**2
    # Two frames a patch; converted to half precision in the workers if rows are packed.
    pixels = patches * 3 * 2 * shape.patch_px**2 * (size if plan.fast else 4)
    # At the answers alone: as they come, in fp32, and their gradient in both.
    logits = plan.micro_batch * shape.vocabulary * 2 * (size + 4)
    language_model, tower = weight_bytes(shape, plan)
    trained = "gradients, optimiser" if shape.trains_base else "adapter, gradients, optimiser"
    parts = {
        "language model": language_model,
        "vision tower": tower,
        trained: trained_bytes(shape, plan),
        "kept for the backward pass": kept,
        "kept by the vision tower": kept_tower,
        "temporaries": temporaries,
        "images, embeddings, logits": pixels + 2 * tokens * size * shape.hidden + logits,
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


# --- what fits --------------------------------------------------------------------------------------------------------


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def largest_micro_batch(shape: Shape, plan: Plan, gib: float, rows: int | None = None) -> int:
    """Rows of the largest micro-batch that needs at most `gib`, a divisor of `rows` if given; 0: none."""
    sizes = divisors(rows) if rows else range(1, 1025)
    fitting = bisect.bisect_right(sizes, gib, key=lambda size: need_gib(shape, replace(plan, micro_batch=size)))
    return sizes[fitting - 1] if fitting else 0


def largest_eval_batch(shape: Shape, plan: Plan, gib: float) -> int:
    """The largest batch below the plan's own whose evaluation needs at most `gib`; 0: none."""
    sizes = range(1, plan.eval_batch)
    fitting = bisect.bisect_right(sizes, gib, key=lambda size: scoring_gib(shape, replace(plan, eval_batch=size)))
    return sizes[fitting - 1] if fitting else 0


def largest_max_pixels(shape: Shape, plan: Plan, gib: float) -> int:
    """The largest max_pixels that needs at most `gib`, a whole number of tokens; 0: none that is of use."""
    token_px = (shape.patch_px * shape.merge) ** 2
    sizes = range(MIN_PICTURE_TOKENS * token_px, MAX_PIXELS + 1, token_px)
    fitting = bisect.bisect_right(sizes, gib, key=lambda pixels: need_gib(shape, replace(plan, max_pixels=pixels)))
    return sizes[fitting - 1] if fitting else 0


def remedies(shape: Shape, plan: Plan, gib: float, rows: int) -> list[dict[str, Any]]:
    """Settings with which `plan`, which needs more, needs at most `gib`: each of them is enough. Empty: none is known.

    Micro-batches are divisors of `rows`, the rows of one process and optimiser step.
    """
    recompute, quantise = {"gradient_checkpointing": True}, {"load_in_4bit": True}
    can_recompute, can_quantise = not plan.checkpointing, plan.bits == 16 and not shape.trains_base
    recomputed = replace(plan, checkpointing=True)
    variants = [({}, plan)]
    variants += [(recompute, recomputed)] * can_recompute
    variants += [(quantise, replace(plan, bits=4, compiled=False))] * can_quantise
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


def fit_batch(shape: Shape, plan: Plan, gib: float, rows: int) -> Plan | None:
    """The plan with the largest micro-batch that divides `rows` and needs at most `gib`: without recomputation if one
    does, for it costs a third of the speed; None if nothing fits."""
    for checkpointing in (False, True):
        candidate = replace(plan, checkpointing=checkpointing)
        if size := largest_micro_batch(shape, candidate, gib, rows):
            return replace(candidate, micro_batch=size)
    return None


# --- for `vqa-sft memory` ---------------------------------------------------------------------------------------------


def expected_precision(values: dict[str, Any]) -> str:
    """The precision that a recipe's `values` come to on a GPU that is not at hand: bf16 unless they say otherwise."""
    if values.get("bf16") is False and values.get("fp16") is False:
        return "fp32"
    return "fp16" if values.get("fp16") else "bf16"


def describe_recipe(
    values: dict[str, Any],
    training_args: SFTConfig,
    model_args: ModelConfig,
    *,
    fast: bool,
    compile_layers: bool | None,
    memory_budget: float,
    max_pixels: int | None,
    states_global_batch: bool,
    text_tokens: int,
    images: int,
    gpu_gib: float | None,
    **adapted_parts: bool,
) -> tuple[str, bool]:
    """What `vqa-sft memory` prints, and whether the recipe fits; `values` are those of the recipe."""
    config, note = read_config(model_args, trust_remote_code=training_args.trust_remote_code)
    shape, precision = read_shape(model_args, config, **adapted_parts), expected_precision(values)
    plan = read_plan(
        training_args,
        model_args,
        precision=precision,
        max_pixels=max_pixels or pixel_limit(model_args),
        fast=fast,
        memory_budget=memory_budget,
        # fp16 is for GPUs before compute capability 8.0.
        attention="repeated" if precision == "fp16" else "grouped" if fast and precision == "bf16" else "unfused",
        text_tokens=text_tokens,
        shared_tokens=min(SHARED_TOKENS, text_tokens),
        images=images,
    )
    name = model_args.model_name_or_path
    plan, stored = read_stored(name, config, plan)
    plans = {"uncompiled": plan, "compiled": replace(plan, compiled=True)}
    if not fast or plan.bits < 16 or precision != "bf16" or compile_layers is False:
        del plans["compiled"]
    elif compile_layers:
        del plans["uncompiled"]
    lines = [line for line in (note, stored) if line]
    if training_args.use_cpu:
        lines.append("The recipe says use_cpu; this is what it would need on a GPU.")
    if launch.is_sharded():
        lines.append("This is what one GPU would need; what FSDP and DeepSpeed save is not known.")
    bits = "as it is stored" if stored else f"{plan.bits} bit"
    lines.append(f"{name}, {bits}, computing in {precision}.")
    if precision == "bf16":
        lines[-1] += " For GPUs before Ampere: --fp16 true."
    lines.append(describe(shape, plans))
    fits = True
    if gpu_gib is not None:
        rows = plan.micro_batch * training_args.gradient_accumulation_steps
        first = next(iter(plans.values()))  # that which needs more
        accumulated = None if states_global_batch else rows
        fits, said = describe_fit(shape, first, gpu_gib, rows=rows, accumulated=accumulated, is_open=len(plans) > 1)
        lines.append(said)
    return "\n".join(lines), fits


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
    images = f"{plan.images} image{'s' * (plan.images > 1)} of {plan.max_pixels:,} px"
    compiled = f", compiled, activation_memory_budget {plan.memory_budget:g}" if plan.compiled else ""
    rows = [
        f"{plan.micro_batch} rows of {images} ({image_tokens(shape, plan):,} tokens) and {plan.text_tokens} tokens "
        f"of text: {num_tokens(shape, plan):,} tokens.",
        f"{shape.trained / 1e6:,.1f} million trained weights, "
        f"{'with' if plan.checkpointing else 'without'} gradient_checkpointing{compiled}. In GiB:",
    ]
    table = ["  " + line[0].ljust(34) + "".join(cell.rjust(12) for cell in line[1:]) for line in lines]
    return "\n".join([*rows, *table])


def describe_fit(
    shape: Shape, plan: Plan, gpu_gib: float, *, rows: int, accumulated: int | None, is_open: bool
) -> tuple[bool, str]:
    """Whether the plan fits a GPU of so many GiB, and in words: what is the most that fits, and what to change.

    `rows` of one process and optimiser step; `accumulated` the same where the recipe states accumulation itself;
    `is_open`: layers may yet be compiled.
    """
    gib = (gpu_gib - CONTEXT_GIB) / (1 + MARGIN)
    need = need_gib(shape, plan)
    what = "Uncompiled, it" if is_open else "It"
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


# --- for recipes/sft.py -----------------------------------------------------------------------------------------------


def choose_batch(training_args: SFTConfig, needs: Callable[[], tuple[Shape, Plan]]) -> str:
    """`auto_batch`: set micro-batch, accumulation and recomputation so that training fits the GPU with the smallest
    free memory; the rows of an optimiser step stay. Says what and why. `needs()` is `read_needs` of the run.

    Called by every process before it loads weights; all come to the same. Raises InputError where nothing fits.
    """
    if not torch.cuda.is_available() or training_args.use_cpu:
        return "auto_batch: there is no GPU; nothing is changed."
    if launch.is_sharded():
        return "auto_batch: what FSDP and DeepSpeed spread over GPUs cannot be estimated; nothing is changed."
    shape, plan = needs()
    seen = gather_object([(torch.cuda.mem_get_info()[0], plan.compiled)])
    free_gib, compiled = min(free for free, _ in seen) / GIB, all(compiles for _, compiles in seen)
    rows = plan.micro_batch * training_args.gradient_accumulation_steps
    gib, plan = free_gib / (1 + MARGIN), replace(plan, compiled=compiled)
    chosen = fit_batch(shape, plan, gib, rows)
    if chosen is None:
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
    recomputation = "with" if chosen.checkpointing else "without"
    return (
        f"auto_batch: {rows} rows a step and process as {rows // chosen.micro_batch} x {chosen.micro_batch} "
        f"{recomputation} gradient_checkpointing, about {need_gib(shape, chosen):.1f} of {free_gib:.1f} GiB."
    )


def halve_batch(training_args: SFTConfig, *, states_global_batch: bool, auto_batch: bool) -> dict[str, Any] | None:
    """Settings with which a training whose memory ran out goes on: half the micro-batch or less, the same rows a step.

    None at one row; for several processes, of which the others would wait for ever; and where the rows that are
    dropped at the end of an epoch depend on the micro-batch.
    """
    size = training_args.per_device_train_batch_size
    if size == 1 or training_args.world_size > 1 or launch.is_sharded() or training_args.dataloader_drop_last:
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
) -> Iterator[None]:
    """Where the GPU's memory runs out: a ProcessError that says what to change, and where the run goes on."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        evaluating, changes = is_evaluating(), []
        if not launch.is_sharded():
            with suppress(InputError):  # a family whose memory is not known here
                shape, plan = needs()
                rows = plan.micro_batch * training_args.gradient_accumulation_steps
                changes = _changes(
                    shape,
                    plan,
                    rows,
                    evaluating=evaluating,
                    accumulated=None if states_global_batch else rows,
                    auto_batch=auto_batch,
                )
        changes = changes or ["lower per_device_train_batch_size or max_pixels, or set gradient_checkpointing: true"]
        if training_args.process_index:  # where all run out, the main process is the one to say so
            time.sleep(2)
        raise ProcessError(
            f"the memory of GPU {training_args.local_process_index} ran out in "
            f"{'evaluation' if evaluating else 'training'}. What fits by estimate, each line alone:\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nThe same command with it {goes_on(training_args.output_dir)}"
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
        found = remedies(shape, replace(plan, eval_batch=0), gib, rows)
    # Else auto_batch would choose the same again.
    chosen = {
        "auto_batch": False,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_checkpointing": plan.checkpointing,
    }
    lines = []
    for settings in found:
        line = as_options((chosen if auto_batch else {}) | settings, accumulated)
        is_other = bool(settings.keys() & {"max_pixels", "load_in_4bit"})
        lines.append(line + " (another run: with another --output_dir)" * is_other)
    return lines
