"""Bases that a recipe asks to round to 4 or 8 bit: `load_in_4bit`, `load_in_8bit`.

transformers rounds linear layers. Routed experts, nearly all of a mixture, are one parameter a layer: in 4 bit they are
rounded too, by bitsandbytes' own `replace_parameter_4bit`, and unpacked while their layer computes. In 8 bit they stay.
"""

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from trl import ModelConfig, get_quantization_config

from vqa_sft.console import note
from vqa_sft.errors import InputError
from vqa_sft.models import processes, quantized
from vqa_sft.models.parts import fused_experts, names_beside_decoder


def settings(model_args: ModelConfig, dtype: torch.dtype, config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """TRL's 4- or 8-bit settings, computing in `dtype`; the vision tower, small and hurt most by rounding, stays."""
    quantization = get_quantization_config(model_args)
    if quantization is None:
        return None
    if model_args.load_in_4bit:
        quantization.bnb_4bit_compute_dtype = dtype
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    kept = names_beside_decoder(model)
    if not kept:
        raise InputError(
            f"the vision tower of {type(model).__name__} is not apart from its language model, so a 4- or 8-bit base "
            "would round it too. Remove load_in_4bit and load_in_8bit."
        )
    quantization.llm_int8_skip_modules = [*kept, "lm_head"]  # which must be named once a list is given
    return quantization


def place(
    config: PreTrainedConfig, asked: BitsAndBytesConfig | None, dtype: torch.dtype, device_map: dict | None
) -> dict | None:
    """Where weights are read to: those of a mixture that fits on its GPU only once it is rounded, to the CPU."""
    if not (device_map and rounds_experts(asked)):
        return device_map
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    if not fused_experts(model):
        return device_map
    whole = sum(weight.numel() for weight in model.parameters()) * getattr(dtype, "itemsize", 2)
    free = torch.cuda.mem_get_info(device_map[""])[0]
    return device_map if whole < 0.9 * free else {"": "cpu"}


def rounds_experts(asked: BitsAndBytesConfig | None) -> bool:
    """FSDP and DeepSpeed deal out parameters that they know."""
    return asked is not None and asked.load_in_4bit and not processes.is_sharded()


def finish(model: PreTrainedModel, asked: BitsAndBytesConfig, device_map: dict | None) -> None:
    """Round the experts of a model whose linear layers are rounded, or say that they stay whole and what they take; let
    the model be where `device_map` wants it."""
    experts = fused_experts(model)
    if experts:
        num = sum(weight.numel() for weight in experts.values())
        size = sum(weight.nbytes for weight in experts.values())
        said = f"the routed experts ({num:,} parameters, {size / 2**30:,.2f} GiB)"
        if not rounds_experts(asked):
            field = "load_in_4bit" if asked.load_in_4bit else "load_in_8bit"
            note(f"{field} leaves {said} whole, and rounds linear layers alone.")
            return
        stored = num * (quantized.bytes_a_weight(asked.to_dict()) or 0) / 2**30
        note(f"load_in_4bit rounds {said} to {stored:,.2f} GiB. A layer's are whole while it computes.")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit  # for which nothing else waits

    for name, weight in experts.items():
        path, _, parameter = name.rpartition(".")
        if device_map:
            weight.data = weight.data.to(device_map[""])
        replace_parameter_4bit(
            model.get_submodule(path),
            parameter,
            compress_statistics=asked.bnb_4bit_use_double_quant,
            quant_type=asked.bnb_4bit_quant_type,
        )
    if device_map and getattr(model, "hf_device_map", device_map) != device_map:
        model.to(device_map[""])
        model.hf_device_map = device_map  # accelerate trains no model that was on a CPU
