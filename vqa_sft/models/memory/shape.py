"""The shape of a model, as far as its memory depends on it: counted on the meta device, with its adapter."""

from dataclasses import dataclass

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from trl import ModelConfig

from vqa_sft.errors import InputError, explains
from vqa_sft.models.families import FAMILIES, head_dim, tower_of
from vqa_sft.models.load import LOADING_ERRORS
from vqa_sft.models.lora import lora_config
from vqa_sft.models.parts import decoder_name
from vqa_sft.models.shapes import SHAPES, shape_config


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
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = " and ".join(FAMILIES)
        raise InputError(f"the memory of {config.model_type} cannot be estimated; {known} can.")
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
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_dim=head_dim(text),
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
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
