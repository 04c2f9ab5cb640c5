"""Checkpoints that are quantised themselves (FP8, GPTQ, AWQ, ...): what they need of a machine, and what they take."""

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from vqa_sft.errors import InputError

# Where a checkpoint that is quantised can be of no use.
REMEDY = "Or take the checkpoint that it was made from, with load_in_4bit: true where memory is short."
FP8 = ("fp8", "fbgemm_fp8")
BITSANDBYTES = "bitsandbytes"


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The checkpoint's own settings, which may stand at its language model; None where it is not quantised."""
    own = getattr(config, "quantization_config", None)
    own = own or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return own if own is None or isinstance(own, dict) else own.to_dict()


def describe(own: dict[str, Any]) -> str:
    """ "fp8", "gptq, 4 bit", "bitsandbytes, 8 bit"."""
    bits, method = bits_of(own), method_of(own) or "by a method that it does not name"
    return method if bits is None or method in FP8 else f"{method}, {bits} bit"


def method_of(own: dict[str, Any]) -> str | None:
    """As transformers names it. A checkpoint of bitsandbytes need not say more than its bits."""
    method = own.get("quant_method")
    if own.get("load_in_4bit") or own.get("load_in_8bit"):
        return BITSANDBYTES
    return method if method is None else str(getattr(method, "value", method))


def bits_of(own: dict[str, Any]) -> int | None:
    """Bits of a weight as it is stored; None where they are not known."""
    if own.get("load_in_4bit") or method_of(own) == "mxfp4":
        return 4
    if own.get("load_in_8bit") or method_of(own) in FP8:
        return 8
    groups = own.get("config_groups")  # of compressed-tensors
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups} or {own.get("bits", own.get("w_bit"))}
    bits = bits.pop() if len(bits) == 1 else None
    return bits if bits in (2, 3, 4, 5, 6, 8) else None


def bytes_a_weight(own: dict[str, Any]) -> float | None:
    """Of a quantised linear layer in memory, with scales (2 bytes a group, 4 a block of FP8) and zero points of as
    many bits as a weight; None where it is not known, or the weights are whole there. bitsandbytes in 4 bit: see
    `memory.estimate.weight_bytes`."""
    bits, method = bits_of(own), method_of(own)
    if own.get("load_in_4bit"):
        return 0.5 + (1 / 64 + 4 / (64 * 256) if own.get("bnb_4bit_use_double_quant") else 4 / 64)
    if own.get("load_in_8bit") or method in FP8:
        rows, columns = own.get("weight_block_size") or (1, 1024)  # without blocks, a scale a row or a layer
        return 1 + 4 / (rows * columns)
    group = own.get("group_size")
    if bits is None or method not in ("gptq", "awq") or type(group) is not int:
        return None
    return bits / 8 + (2 + bits / 8) / group if group > 0 else bits / 8  # -1: a scale a row


def check(name: str, config: PreTrainedConfig, *, device_map: dict | None = None, is_asked: bool = False) -> None:
    """Raises InputError where the checkpoint is quantised and cannot be loaded on this machine, before a weight is
    read: a method that transformers does not know, a package or a GPU that is missing; or where the recipe asks for
    4 or 8 bit (`is_asked`) of what is quantised."""
    own = quantization_of(config)
    if own is None:
        return
    check_asked(name, own, is_asked=is_asked)
    what = f"the model {name!r} is quantised itself ({describe(own)})"
    if method_of(own) not in {*AUTO_QUANTIZER_MAPPING, BITSANDBYTES}:
        # transformers would only warn, and read numbers of 4 or 8 bit as if they were weights.
        raise InputError(f"{what}, which transformers does not load. {REMEDY}")
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(own), pre_quantized=True)
        quantizer.validate_environment(device_map=device_map, weights_only=True)
    except Exception as error:  # whatever the package of the method raises, above all ImportError and RuntimeError
        said = (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")
        raise InputError(f"{what} and cannot be loaded here: {said}. {REMEDY}") from error


def check_asked(name: str, own: dict[str, Any], *, is_asked: bool) -> None:
    """Raises InputError where the recipe asks for 4 or 8 bit of what is quantised."""
    if is_asked:
        raise InputError(
            f"the model {name!r} is quantised itself ({describe(own)}) and cannot be rounded again. Remove "
            "load_in_4bit and load_in_8bit."
        )


def unpack(model: PreTrainedModel) -> None:
    """Let a model of compressed-tensors have its whole weights now, and not at its first forward pass: PEFT wants to
    see them, and the hook of the pass is not called under its adapter."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        from compressed_tensors.offload import as_single_threaded

        with as_single_threaded():  # processes do not wait for each other here
            compressor.decompress_model(model)
