"""What memory depends on: the shape of a model, counted on the meta device, and the plan of what is done with it."""

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, ProcessorMixin
from trl import ModelConfig, SFTConfig

from vqa_sft.batch.image_rules import area_tokens
from vqa_sft.batch.image_size import describe_images, largest_image, limit_pixels
from vqa_sft.batch.prompts import Prompts, render_prompt
from vqa_sft.config.training import RecipeArguments
from vqa_sft.errors import InputError, explains
from vqa_sft.models import quantized
from vqa_sft.models.families import PACKED, head_dim, tower_of
from vqa_sft.models.fast import attention, speedups
from vqa_sft.models.load import DTYPES, LOADING_ERRORS
from vqa_sft.models.lora import lora_config
from vqa_sft.models.parts import decoder_name
from vqa_sft.models.shapes import SHAPES, shape_config

TEXT_TOKENS = 160  # of a row, template included
MAX_PIXELS = 12_845_056  # the processors' own limit, where a recipe sets none and the processor is not at hand
# Bytes of the optimiser per trained fp32 value: AdamW keeps two fp32 values; what is not named here, as AdamW.
OPTIMIZER_BYTES = {"8bit": 2, "lion": 4, "adafactor": 0, "sgd": 0}

ESTIMATED = ("qwen2_5_vl", "qwen3_vl")  # families whose peaks were measured


@dataclass(frozen=True)
class Shape:
    """What the model of a recipe has, as far as memory depends on it. Widths in values, parameters in numbers."""

    text: PreTrainedConfig  # of the language model
    head_dim: int
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
    memory_budget: float = 1.0  # of compiled layers, see speedups.speed_up
    fast: bool = True
    fused: bool = True  # fast/fused_lora.py, where it can be had
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
    if config.model_type not in ESTIMATED:
        known = " and ".join(ESTIMATED)
        raise InputError(f"the memory of {config.model_type} cannot be estimated; {known} can.")
    family = PACKED[config.model_type]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision, decoder = config.text_config, config.vision_config, decoder_name(model)
    linear = [module for module in model.get_submodule(decoder).modules() if type(module) is torch.nn.Linear]
    num_linear = sum(layer.weight.numel() for layer in linear)
    num_tower = sum(parameter.numel() for parameter in tower_of(model).parameters())
    num_all = sum(parameter.numel() for parameter in model.parameters())
    adapter = lora_config(model_args, model, **adapted_parts)
    if adapter is not None:
        with explains(ValueError, "the recipe does not fit the model"), torch.device("meta"):
            get_peft_model(model, adapter)  # changes the model itself
    first = model.get_submodule(decoder).layers[0]
    named = [name.rpartition(".")[2] for name, module in first.named_modules() if isinstance(module, LoraLayer)]
    return Shape(
        text=text,
        head_dim=head_dim(text),
        normalises_heads=hasattr(first.self_attn, "q_norm"),
        tower_layers=vision.depth,
        tower_hidden=vision.hidden_size,
        tower_intermediate=vision.intermediate_size,
        tower_gated=len(family.tower_mlp) == 3,
        patch_px=vision.patch_size,
        merge=vision.spatial_merge_size,
        decoder_linear=num_linear,
        decoder_rows=sum(layer.out_features for layer in linear),
        decoder_other=num_all - num_linear - num_tower,
        tower=num_tower,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        rank=model_args.lora_r,
        adapted=frozenset(named),
        trains_tower=any(parameter.requires_grad for parameter in tower_of(model).parameters()),
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
    """The plan with what a checkpoint that is quantised itself stores, and a note about it. Raises InputError where
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


def read_images(model_args: ModelConfig, arguments: RecipeArguments, shape: Shape) -> tuple[int, str]:
    """The largest image (width x height) that is shown with the recipe's limits, and a line about it: from the model's
    processor, or as Qwen-VL's would have it where that is not on this machine."""
    name, limits = model_args.model_name_or_path, (arguments.min_pixels, arguments.max_pixels)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=model_args.model_revision, local_files_only=True)
    except LOADING_ERRORS:
        pixels, token_px = arguments.max_pixels or MAX_PIXELS, shape.patch_px * shape.merge
        tokens = area_tokens(pixels, token_px)
        return pixels, f"images: at most {pixels:,} pixels, {tokens:,} tokens each ({token_px} px a token)"
    limit_pixels(processor, name, *limits)
    return largest_image(processor)[0], describe_images(processor, arguments.max_pixels)


def read_needs(
    training_args: SFTConfig,
    model_args: ModelConfig,
    arguments: RecipeArguments,
    processor: ProcessorMixin,
    examples: datasets.Dataset | None,
    prompts: Prompts,
    *,
    precision: str,
    compiles: bool,
) -> tuple[Shape, Plan]:
    """Shape and plan of a run that is about to start: its longest row, pixels, and what this GPU can do."""
    config, _ = read_config(model_args, trust_remote_code=training_args.trust_remote_code)
    shape = read_shape(model_args, config, **arguments.adapted_parts)
    plan = read_plan(
        training_args,
        model_args,
        precision=precision,
        fast=arguments.fast,
        memory_budget=arguments.activation_memory_budget,
        attention=attention_of(training_args.device, precision, arguments.fast),
        max_pixels=largest_image(processor)[0],
    )
    plan, _ = read_stored(model_args.model_name_or_path, config, plan)
    compiles = compiles and plan.bits == 16 and plan.attention == "grouped" and speedups.can_compile()
    rows: dict[str, Any] = measure_rows(processor, examples, prompts) if examples else {}
    return shape, replace(plan, compiled=compiles, **rows)


def attention_of(device: torch.device, precision: str, fast: bool) -> Literal["grouped", "repeated", "unfused"]:
    """The kind of attention that a GPU computes, as a field of Plan."""
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
