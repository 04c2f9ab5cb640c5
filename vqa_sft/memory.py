"""What a recipe needs on one GPU, from the shape of its model: no weights, no GPU, seconds on a laptop.

    shape = read_shape(model_args, config)             counted on the meta device, with the adapter
    plan = read_plan(training_args, model_args, ...)   rows, pixels, precision, recomputation
    estimate(shape, plan)                              {part: GiB}; `need_gib` is their peak, scoring included

The peak comes early in the backward pass, when everything that the forward pass kept is still there:

    weights + adapter, gradients, optimiser + N x (what every layer keeps) + temporaries of one layer + overhead

N is the number of tokens of a micro-batch; rows have no padding (packing.py), and every row is taken to hold pictures
of max_pixels. With recomputation only the layers' inputs are kept, and one layer at a time. For Qwen2.5-VL and
Qwen3-VL. Not known here: weights spread over GPUs (FSDP, DeepSpeed); features from a cache, which need less.
"""

import bisect
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, PreTrainedConfig, ProcessorMixin
from trl import ModelConfig, SFTConfig

from vqa_sft import benchmark, launch, packing
from vqa_sft.collator import render_prompt
from vqa_sft.errors import InputError, ProcessError, explains
from vqa_sft.model import LOADING_ERRORS, decoder_name, lora_config
from vqa_sft.prompts import Prompts

GIB = 2**30
# Fitted, each to one number, to peaks of torch.cuda.max_memory_allocated on one H200 (torch 2.11, transformers 5.23,
# trl 1.16): the points in tests/test_memory.py. What layers keep is not fitted, it is counted (`kept_by_layer`).
# Temporaries of one decoder layer's backward pass, in tensors of (N, intermediate size): the gradients of the MLP's
# three wide tensors, LoRA's share of them, fp32 copies.
BACKWARD = {"eager": 6.0, "compiled": 4.0}
# Libraries' workspaces, small tensors, rounding.
LIBRARIES_GIB = 0.4
# Not fitted: temporaries of one block of the picture tower, in tensors of (patches, hidden size); the rotation of
# queries and keys in fp32 is the widest moment. Counted in the library's forward on fake tensors.
TOWER = 15.0
# Guessed: what torch reserves beyond what it hands out, as a share of what comes and goes.
FRAGMENTATION = 0.03
# The CUDA context lies outside of what torch counts: 14.56 GiB of a T4 leave 13.8.
CONTEXT_GIB = 0.76
# What a choice for the user leaves free.
MARGIN = 0.08

TEXT_TOKENS = 160  # of a row, template included
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
    pictures: int = 1  # of a row
    checkpointing: bool = False
    compiled: bool = False
    fast: bool = True
    groups_heads: bool = True  # the attention kernel takes fewer keys than queries; old GPUs repeat them
    lora_dropout: float = 0.0
    value_bytes: int = 2  # of an activation
    weight_bytes: int = 2  # of a weight that is not quantised
    bits: int = 16
    nested: bool = False  # quantisation constants are quantised as well
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
        if name in benchmark.SHAPES:
            return benchmark.shape_config(name), f"{name} is not on this machine; its published shape is used."
    with explains(LOADING_ERRORS, f"the configuration of {name!r} cannot be loaded"):
        return AutoConfig.from_pretrained(name, **source), ""


def read_shape(model_args: ModelConfig, config: PreTrainedConfig) -> Shape:
    """Count the model's parameters, those of its adapter included, on the meta device."""
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
    adapter = lora_config(model_args, model)
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
    adam = next((size for name, size in OPTIMIZER_BYTES.items() if name in str(training_args.optim)), 8)
    # As load_model has it: the gradient scaler refuses fp16 weights.
    weights = "fp32" if precision == "fp16" and not model_args.use_peft else model_args.dtype or precision
    return Plan(
        micro_batch=training_args.per_device_train_batch_size,
        eval_batch=training_args.per_device_eval_batch_size if str(training_args.eval_strategy) != "no" else 0,
        checkpointing=training_args.gradient_checkpointing,
        lora_dropout=model_args.lora_dropout if model_args.use_peft else 0.0,
        value_bytes=4 if precision == "fp32" else 2,
        weight_bytes=4 if weights in ("fp32", "float32") else 2,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        nested=model_args.use_bnb_nested_quant,
        optimizer_bytes=adam,
        processes=training_args.world_size,
        **more,
    )


def pixel_limit(model_args: ModelConfig) -> int:
    """The largest picture (width x height) that the model's own processor shows."""
    try:
        processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, local_files_only=True)
        return processor.size["longest_edge"]
    except (*LOADING_ERRORS, AttributeError):
        return MAX_PIXELS


def measure_rows(
    processor: ProcessorMixin, examples: datasets.Dataset, prompts: Prompts, most: int = 200
) -> dict[str, int]:
    """The most text tokens and the most pictures among the first rows, as fields of a Plan."""
    rows = list(examples.select(range(min(most, len(examples)))))
    texts = [render_prompt(processor, row, range(len(row["choices"])), prompts) for row in rows]
    # The place of a picture is one token here.
    longest = max(len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return {"text_tokens": longest, "pictures": max(len(row["images"]) for row in rows)}


# --- the parts --------------------------------------------------------------------------------------------------------


def picture_tokens(shape: Shape, plan: Plan) -> int:
    """Tokens of one picture: a token is merge x merge patches of patch_px x patch_px."""
    return plan.max_pixels // (shape.patch_px * shape.merge) ** 2


def num_tokens(shape: Shape, plan: Plan) -> int:
    """Tokens of a micro-batch."""
    return plan.micro_batch * (plan.pictures * picture_tokens(shape, plan) + plan.text_tokens)


def weight_bytes(shape: Shape, plan: Plan) -> tuple[float, float]:
    """Bytes of the language model and of the picture tower.

    4 bit: half a byte and a constant for every 64 weights: 4 bytes, or with nested quantisation 1 byte and 4 for every
    256 of them (Dettmers et al. 2023, QLoRA, section 3). 8 bit: a byte and an fp32 scale a row. Embeddings, head,
    norms, biases and the picture tower stay as they are.
    """
    linear = shape.decoder_linear * plan.weight_bytes
    if plan.bits == 4:
        linear = shape.decoder_linear * (0.5 + (1 / 64 + 4 / (64 * 256) if plan.nested else 4 / 64))
    elif plan.bits == 8:
        linear = shape.decoder_linear + 4 * shape.decoder_rows
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

    Uncompiled is what autograd saves in the library's forward (tests/test_memory.py counts it there). Compiled is what
    torch.compile's partitioner saves: norms, rotations and activations are computed again. Frozen linear layers keep
    nothing; their adapters keep their input, because PEFT converts it to the adapter's fp32 and autocast back: a copy
    for each. Without that conversion (4 and 8 bit) layers share one.
    """
    size, hidden, wide = plan.value_bytes, shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    keys = key if plan.groups_heads else query
    copies = {"q_proj k_proj v_proj": 0, "o_proj": 0, "gate_proj up_proj": 0, "down_proj": 0}
    for names in copies:
        num = sum(name in shape.adapted or shape.trains_base for name in names.split())
        separate = _converts(shape, plan) or plan.lora_dropout > 0
        copies[names] = num if separate and not plan.compiled else min(num, 1)
    for_qkv, for_o, for_wide, for_down = copies.values()
    copied = size + 1 if plan.lora_dropout else size  # dropout keeps a mask beside every copy
    narrow = size * shape.rank * len(shape.adapted & set("q_proj k_proj v_proj o_proj".split()))
    narrow_mlp = size * shape.rank * len(shape.adapted & set("gate_proj up_proj down_proj".split()))
    attention = {
        "inputs of q, k, v": for_qkv * copied * hidden,
        "q, k, v": size * (query + 2 * keys),
        "attention output": size * query,
        # What attention keeps is the same tensor where nothing is converted.
        "input of o": for_o * copied * query if _converts(shape, plan) or plan.lora_dropout else 0,
        "log-sum-exp": 4 * shape.heads,
        "narrow outputs of adapters": narrow,
    }
    mlp = {
        "inputs of gate and up": for_wide * copied * hidden,
        "gate and up": size * 2 * wide,
        "input of down": for_down * copied * wide,
        "narrow outputs of adapters": narrow_mlp,
    }
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
        attention["normed"], mlp["normed"] = size * hidden, size * hidden
    return attention, mlp


def _converts(shape: Shape, plan: Plan) -> bool:
    """Whether inputs are converted for every linear layer: fp32 weights that are trained, in half precision."""
    fp32 = not shape.trains_base or plan.weight_bytes == 4
    return fp32 and plan.value_bytes < 4 and plan.bits == 16


def kept_by_tower_block(shape: Shape, plan: Plan) -> float:
    """Bytes per patch that one block of the picture tower keeps where it runs backward: norms' inputs in fp32; q, k, v
    and attention output; the MLP's wide tensors; inputs of its linear layers if they are trained."""
    hidden, wide = shape.tower_hidden, shape.tower_intermediate
    kept = 2 * 4 * hidden + plan.value_bytes * (4 * hidden + (3 if shape.tower_gated else 1) * wide)
    return kept + (plan.value_bytes * (2 * hidden + wide) if shape.trains_tower else 0)


def estimate(shape: Shape, plan: Plan) -> dict[str, float]:
    """GiB of every part at the peak of a training step; their sum is what torch reserves."""
    size, tokens = plan.value_bytes, num_tokens(shape, plan)
    patches = plan.micro_batch * plan.pictures * picture_tokens(shape, plan) * shape.merge**2
    attention, mlp = (tokens * sum(part.values()) for part in kept_by_layer(shape, plan))
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
    temporaries = size * tokens * shape.intermediate * BACKWARD["compiled" if plan.compiled else "eager"]
    if plan.bits < 16:  # the largest layer in half precision
        temporaries += size * shape.hidden * shape.intermediate
    # The tower's temporaries come and go before the decoder keeps anything.
    temporaries = max(temporaries, size * patches * shape.tower_hidden * TOWER - kept)
    return _parts(shape, plan, kept=kept, kept_tower=kept_tower, temporaries=temporaries)


def scoring_gib(shape: Shape, plan: Plan) -> float:
    """GiB at the peak of an evaluation: nothing is kept, and the picture tower's temporaries are the largest."""
    plan = replace(plan, micro_batch=plan.eval_batch)
    patches = plan.micro_batch * plan.pictures * picture_tokens(shape, plan) * shape.merge**2
    wide = num_tokens(shape, plan) * shape.intermediate * BACKWARD["eager"]
    temporaries = plan.value_bytes * max(wide, patches * shape.tower_hidden * TOWER)
    return sum(_parts(shape, plan, kept=0, kept_tower=0, temporaries=temporaries).values())


def _parts(shape: Shape, plan: Plan, *, kept: float, kept_tower: float, temporaries: float) -> dict[str, float]:
    size, tokens = plan.value_bytes, num_tokens(shape, plan)
    patches = plan.micro_batch * plan.pictures * picture_tokens(shape, plan) * shape.merge**2
    # Two frames a patch; converted to half precision in the workers if rows are packed.
    pixels = patches * 3 * 2 * shape.patch_px**2 * (size if plan.fast else 4)
    # At the answers alone: as they come, in fp32, and their gradient in both.
    logits = plan.micro_batch * shape.vocabulary * 2 * (size + 4)
    language_model, tower = weight_bytes(shape, plan)
    trained = "gradients, optimiser" if shape.trains_base else "adapter, gradients, optimiser"
    parts = {
        "language model": language_model,
        "picture tower": tower,
        trained: trained_bytes(shape, plan),
        "kept for the backward pass": kept,
        "kept by the picture tower": kept_tower,
        "temporaries": temporaries,
        "pictures, embeddings, logits": pixels + 2 * tokens * size * shape.hidden + logits,
        "libraries": LIBRARIES_GIB * GIB,
    }
    if not kept_tower:
        del parts["kept by the picture tower"]
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


def largest_max_pixels(shape: Shape, plan: Plan, gib: float) -> int:
    """The largest max_pixels that needs at most `gib`, a whole number of tokens; 0: none that is of use."""
    token_px = (shape.patch_px * shape.merge) ** 2
    sizes = range(MIN_PICTURE_TOKENS * token_px, MAX_PIXELS + 1, token_px)
    fitting = bisect.bisect_right(sizes, gib, key=lambda pixels: need_gib(shape, replace(plan, max_pixels=pixels)))
    return sizes[fitting - 1] if fitting else 0
