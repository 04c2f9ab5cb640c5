"""Checkpoints that are quantised themselves (FP8, GPTQ, AWQ, compressed-tensors, bitsandbytes, ...): which, what they
need of this machine, and how many bytes their weights take. transformers loads them."""

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from vqa_sft.errors import InputError

# Where a checkpoint that is quantised can be of no use.
REMEDY = "Or take the checkpoint that it was made from, with load_in_4bit: true where memory is short."
FP8 = ("fp8", "fbgemm_fp8")


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The checkpoint's own settings, which may stand at its language model; None where it is not quantised."""
    own = getattr(config, "quantization_config", None)
    own = own or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return own if own is None or isinstance(own, dict) else own.to_dict()


def describe(own: dict[str, Any]) -> str:
    """ "fp8", "gptq, 4 bit", "bitsandbytes, 8 bit"."""
    bits = bits_of(own)
    method = own.get("quant_method") or ("bitsandbytes" if bits else "by a method that it does not name")
    method = str(getattr(method, "value", method))
    return method if bits is None or method in FP8 else f"{method}, {bits} bit"


def bits_of(own: dict[str, Any]) -> int | None:
    """Bits of a weight as it is stored; None where they are not known."""
    if own.get("load_in_4bit") or own.get("quant_method") == "mxfp4":
        return 4
    if own.get("load_in_8bit") or own.get("quant_method") in FP8:
        return 8
    weights = _weights_of_groups(own)
    bits = {group.get("num_bits") for group in weights} if weights else {own.get("bits", own.get("w_bit"))}
    bits = bits.pop() if len(bits) == 1 else None
    return bits if bits in (2, 3, 4, 5, 6, 8) else None


def bytes_a_weight(own: dict[str, Any]) -> float | None:
    """Of a quantised linear layer, with its scales and zero points; None where it is not known.

    A group of weights has a scale of 2 bytes, and GPTQ and AWQ a zero point of as many bits as a weight. bitsandbytes
    in 4 bit: see `memory.weight_bytes`. FP8: a scale of 4 bytes for a block; without blocks, one a layer or a row.
    """
    bits, method = bits_of(own), own.get("quant_method")
    if bits is None:
        return None
    if own.get("load_in_4bit"):
        return 0.5 + (1 / 64 + 4 / (64 * 256) if own.get("bnb_4bit_use_double_quant") else 4 / 64)
    if method in FP8:
        rows, columns = own.get("weight_block_size") or (1, 1024)
        return 1 + 4 / (rows * columns)
    group = own.get("group_size") or own.get("q_group_size")
    if weights := _weights_of_groups(own):
        group = weights[0].get("group_size")
    if not isinstance(group, int) or group <= 0:  # a scale for each row, of which a wide layer has few
        return bits / 8
    zero_point = bits / 8 if method in ("gptq", "awq") else 0
    return bits / 8 + (2 + zero_point) / group


def _weights_of_groups(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What compressed-tensors says of the weights of each of its groups of layers."""
    groups = own.get("config_groups")
    return [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []


def check(name: str, config: PreTrainedConfig, *, device_map: dict | None = None, is_asked: bool = False) -> None:
    """Raises InputError where the checkpoint is quantised and cannot be loaded on this machine, before a weight is
    read: a method that transformers does not know, a package or a GPU that is missing; or where the recipe asks for
    4 or 8 bit (`is_asked`) of what is quantised."""
    own = quantization_of(config)
    if own is None:
        return
    what = f"the model {name!r} is quantised itself ({describe(own)})"
    if is_asked:
        raise InputError(f"{what}, and cannot be rounded again. Remove load_in_4bit and load_in_8bit.")
    methods = {own.get("quant_method"), "bitsandbytes" if own.get("load_in_4bit") or own.get("load_in_8bit") else None}
    if not methods & {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
        # transformers would go on with a warning, and read numbers of 4 or 8 bit as if they were weights.
        raise InputError(f"{what}, which transformers does not load. {REMEDY}")
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(own), pre_quantized=True)
        quantizer.validate_environment(device_map=device_map, weights_only=True)
    except Exception as error:  # whatever the package of the method raises, above all ImportError and RuntimeError
        raise InputError(f"{what} and cannot be loaded here: {_said(error)} {REMEDY}") from error


def unpack(model: PreTrainedModel) -> None:
    """Let a model of compressed-tensors have its whole weights now, and not at its first forward pass: PEFT wants to
    see them, and the hook of the pass is not called under its adapter."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        from compressed_tensors.offload import as_single_threaded

        with as_single_threaded():  # processes do not wait for each other here
            compressor.decompress_model(model)


def _said(error: Exception) -> str:
    """A library's complaint in one line that ends with a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
