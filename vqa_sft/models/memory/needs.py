"""What memory depends on: the shape of a model, counted on the meta device, and the plan of what is done with it."""

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import datasets
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import is_flash_linear_attention_available
from trl import ModelConfig, SFTConfig

from vqa_sft.batch.prompts import Prompts, render_prompt
from vqa_sft.config.training import RecipeArguments
from vqa_sft.errors import explains
from vqa_sft.models import fp8_base, quantized
from vqa_sft.models.families import PACKED
from vqa_sft.models.fast import attention, compilation, fused_lora, packing
from vqa_sft.models.load import DTYPES, LOADING_ERRORS, cannot_load
from vqa_sft.models.lora import lora_config
from vqa_sft.models.memory.count import Bytes, Counted, How
from vqa_sft.models.memory.images import MAX_PIXELS, Images, patch_and_merge, see_images
from vqa_sft.models.parts import decoder_layers, vision_layers, vision_parameters
from vqa_sft.models.shapes import SHAPES, shape_config

TEXT_TOKENS = 160  # of a row, template included
NUM_MEASURED = 200  # rows whose texts are counted
# Bytes of the optimiser per trained fp32 value: AdamW keeps two fp32 values; what is not named here, as AdamW.
OPTIMIZER_BYTES = {"8bit": 2, "lion": 4, "adafactor": 0, "sgd": 0}


@dataclass(frozen=True)
class Shape:
    """What the model of a recipe has, as far as memory depends on it. Widths in values, parameters in numbers."""

    text: PreTrainedConfig  # of the language model
    decoder: torch.nn.Module = field(repr=False)  # the language model on the meta device, with its adapter
    packs_rows: bool  # rows have no padding (fast/packing.py)
    is_plain: bool  # layers of attention and an MLP of gate, up and down, whose rows are packed
    has_fast_tower: bool  # fast/vision.py
    normalises_heads: bool  # Qwen3: a norm over each head's queries and keys
    tower_layers: int
    tower_hidden: int
    tower_intermediate: int
    tower_gated: bool  # Qwen2.5: gate, up and down; others: two layers
    patch_px: int
    frames: int  # of an image in pixel_values: Qwen-VL has every one twice
    token_area: float  # pixels of an image token
    decoder_linear: int  # weights of the decoder's linear layers: what 4 and 8 bit shrink
    decoder_rows: int  # their output features, each with a scale in 8 bit
    decoder_other: int  # embeddings, head, norms, biases, routed experts
    largest_linear: int  # weights of the largest of them
    tower: int  # and what leads from it to the language model
    trained: int
    rank: int
    adapted: frozenset[str]  # linear layers of a decoder layer with an adapter, by their names
    trains_tower: bool
    trains_base: bool  # no adapter: all weights
    areas: tuple[int, ...] = ()  # that images can be limited to; empty: any number of tokens
    counted: dict[How, Counted] = field(default_factory=dict, repr=False, compare=False)  # by `count_layers` so far
    compiled: dict[How, tuple[Bytes | None, ...]] = field(default_factory=dict, repr=False, compare=False)


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
    may_compile: bool = False  # where it is not: that is open yet
    kernels: bool = True  # of flash-linear-attention, where there is linear attention
    memory_budget: float = 1.0  # of compiled layers, see speedups.speed_up
    fast: bool = True
    fused: bool = True  # fast/fused_lora.py, where it can be had
    fused_attention: bool = True  # and there; peaks were measured before
    # The kernel takes fewer keys than queries; keys are "repeated" for it (old GPUs); "unfused": (T, T) is kept.
    attention: Literal["grouped", "repeated", "unfused"] = "grouped"
    lora_dropout: float = 0.0
    value_bytes: int = 2  # of an activation
    weight_bytes: int = 2  # of a weight that is not quantised
    bits: int = 16
    fp8_base: bool = False  # models/fp8_base.py
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
    try:
        return AutoConfig.from_pretrained(name, **source), ""
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from error


_SHAPES: dict[str, Shape] = {}  # by what they are read from


def read_shape(model_args: ModelConfig, config: PreTrainedConfig, **adapted_parts: bool) -> Shape:
    """Count the model's parameters, those of its adapter included, on the meta device; `adapted_parts` are those of
    `lora_config`. The same is counted once in a process, and what its layers keep: a start of a training asks for it
    up to three times."""
    key = repr((model_args, config.to_dict(), adapted_parts))
    if key not in _SHAPES:
        _SHAPES[key] = _read_shape(model_args, config, **adapted_parts)
    return _SHAPES[key]


def _read_shape(model_args: ModelConfig, config: PreTrainedConfig, **adapted_parts: bool) -> Shape:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    decoder = model.get_decoder()
    text = config.get_text_config(decoder=True)
    linear = [module for module in decoder.modules() if type(module) is torch.nn.Linear]
    num_linear = sum(layer.weight.numel() for layer in linear)
    num_tower = sum(parameter.numel() for parameter in vision_parameters(model))
    num_all = sum(parameter.numel() for parameter in model.parameters())
    largest, tower = max(layer.weight.numel() for layer in linear), _read_tower(model)
    adapter = lora_config(model_args, model, **adapted_parts)
    if adapter is not None:
        with explains(ValueError, "the recipe does not fit the model"), torch.device("meta"):
            get_peft_model(model, adapter)  # changes the model itself
    first = decoder_layers(decoder)[0]
    named = [name.rpartition(".")[2] for name, module in first.named_modules() if isinstance(module, LoraLayer)]
    packs_rows = packing.why_not(config) is None
    return Shape(
        text=text,
        decoder=decoder,
        packs_rows=packs_rows,
        is_plain=packs_rows and all(hasattr(getattr(first, "mlp", None), name) for name in fused_lora.MLP),
        has_fast_tower=config.model_type in PACKED,
        normalises_heads=hasattr(getattr(first, "self_attn", None), "q_norm"),
        **tower,
        decoder_linear=num_linear,
        decoder_rows=sum(layer.out_features for layer in linear),
        decoder_other=num_all - num_linear - num_tower,
        largest_linear=largest,
        tower=num_tower,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        rank=model_args.lora_r,
        adapted=frozenset(named),
        trains_tower=any(parameter.requires_grad for parameter in vision_parameters(model)),
        trains_base=adapter is None,
    )


def _read_tower(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a Shape about the vision tower and its images; widths of 0 for a model without one."""
    modules = dict(model.named_modules())
    blocks: dict[Any, list[torch.nn.Module]] = {}
    for name in vision_layers(model)[0]:
        block = re.search(r"\.(\d+)\.", name)  # its number
        blocks.setdefault(block and block[1], []).append(modules[name])
    layers = next(iter(blocks.values()), [])
    wide = max((layer.in_features for layer in layers), default=0)
    patch_px, merge = patch_and_merge(model.config)
    return {
        "tower_layers": len(blocks),
        "tower_hidden": min((layer.in_features for layer in layers), default=0),
        "tower_intermediate": wide,
        "tower_gated": sum(layer.out_features == wide for layer in layers) > 1,
        "patch_px": patch_px,
        "frames": getattr(model.config.vision_config, "temporal_patch_size", 1),
        "token_area": (patch_px * merge) ** 2,
    }


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


def with_images(shape: Shape, plan: Plan, images: Images) -> tuple[Shape, Plan]:
    """Both with the images that are shown."""
    pixels = images.pixels or round(images.tokens * shape.token_area)  # some processors do not say
    area = shape.token_area
    if pixels // area != images.tokens:  # tokens that end lines, tiles that overlap, ...
        area = pixels / images.tokens
    return replace(shape, token_area=area, areas=images.areas), replace(plan, max_pixels=pixels)


def read_stored(name: str, config: PreTrainedConfig, plan: Plan) -> tuple[Plan, str]:
    """The plan with what a checkpoint that is quantised itself stores, and a note about it. Raises InputError where
    the recipe asks for 4 or 8 bit of it."""
    own = quantized.quantization_of(config)
    if own is None:
        return plan, ""
    if plan.fp8_base:
        fp8_base.check(name, config)
        said = f"{name} is quantised itself ({quantized.describe(own)}), and base_precision lets it multiply so."
        return replace(plan, stored_bytes=quantized.bytes_a_weight(own)), said
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
        kernels=is_flash_linear_attention_available(),
        fp8_base=arguments.base_precision == "fp8" and fp8_base.why_not(training_args.device) is None,
    )
    shape, plan = with_images(shape, plan, see_images(processor))
    plan, _ = read_stored(model_args.model_name_or_path, config, plan)
    can_compile = plan.bits == 16 and plan.attention == "grouped"
    compiles = compiles and can_compile and compilation.can_compile()
    may_compile = can_compile and shape.packs_rows and arguments.fast
    open_yet = may_compile and arguments.compile_layers is None and not compiles
    rows: dict[str, Any] = measure_rows(processor, examples, prompts) if examples else {}
    return shape, replace(plan, compiled=compiles, may_compile=open_yet, **rows)


def attention_of(device: torch.device, precision: str, fast: bool) -> Literal["grouped", "repeated", "unfused"]:
    """The kind of attention that a GPU computes, as a field of Plan."""
    if fast and attention.can_use_varlen(device, DTYPES[precision]):
        return "grouped"
    old = device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)
    return "repeated" if fast or old else "unfused"


def measure_rows(
    processor: ProcessorMixin, examples: datasets.Dataset, prompts: Prompts, most: int = NUM_MEASURED
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
