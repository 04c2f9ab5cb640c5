"""FP8 checkpoints on a GPU that transformers leaves them in FP8 on: compute capability 8.9 and newer.

transformers multiplies there with a kernel of the Hub. Where it cannot be had, weights stay in FP8 all the same and a
layer's are unpacked while it is used, as the library does in the backward pass in any case: the numbers of whole
weights, which take twice the memory.
"""

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from accelerate import PartialState
from transformers import FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FineGrainedFP8, Fp8Dequantize
from transformers.integrations.moe import _grouped_mm
from transformers.quantizers import AutoHfQuantizer

from vqa_sft.console import note
from vqa_sft.models import quantized

# Mixtures whose checkpoints hold experts as (E, in, out), and whose layers as (E, out, in).
TURNED = "qwen3_vl_moe"
FEW = 16  # experts that are unpacked at once: their numbers are in fp32 for a moment
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@contextmanager
def reading(config: PreTrainedConfig, *, device_map: dict | None, unpacks: bool) -> Iterator[dict[str, Any]]:
    """While an FP8 checkpoint is loaded: what `from_pretrained` must be told of it; nothing of another checkpoint.
    `unpacks`: the weights are asked for whole."""
    own = quantized.quantization_of(config)
    if own is None or quantized.method_of(own) != "fp8":
        yield {}
        return
    keeps = not unpacks and stays_fp8(own, device_map)
    if keeps:
        note(f"The base stays in FP8: {choose_product()}.")
    with _turned_experts(keeps):
        yield {} if keeps else {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def stays_fp8(own: dict[str, Any], device_map: dict | None) -> bool:
    """Whether transformers would leave the weights in FP8, and the GPU that it looks at is used at all."""
    quantizer = AutoHfQuantizer.from_config(copy.deepcopy(own), pre_quantized=True)
    quantizer.validate_environment(device_map=device_map)
    return not quantizer.quantization_config.dequantize and PartialState().device.type != "cpu"


@functools.cache
def choose_product() -> str:
    """Load the kernel of the Hub, or let layers be unpacked while they are used; says which, and why."""
    try:
        finegrained_fp8.load_finegrained_fp8_kernel()
    except Exception as error:  # a package that is missing or too old, no network, no build for this torch
        # Private, and the one place where both kinds of layers look.
        finegrained_fp8._FINEGRAINED_FP8 = FineGrainedFP8(_product, _no_product, _grouped_product)
        os.environ["TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR"] = "1"  # which would come from the Hub too
        reason = (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")
        return f"a layer is unpacked while it is used, because the kernel cannot be had ({reason})"
    return "layers multiply in FP8, which their inputs are rounded to"


def _product(
    inputs: torch.Tensor,  # (..., K)
    weight: torch.Tensor,  # (N, K)
    scales: torch.Tensor,
    block_size: list[int] | None,
    dtype: torch.dtype,
    activation_scale: torch.Tensor | None = None,  # of inputs that are rounded, which they are not here
) -> torch.Tensor:
    return F.linear(inputs, _whole(weight, scales, block_size, dtype))


def _grouped_product(
    inputs: torch.Tensor,  # (T, K), sorted by expert
    weight: torch.Tensor,  # (E, N, K)
    scales: torch.Tensor,
    *,
    offsets: torch.Tensor,  # (E,): where the rows of an expert end
    tokens_per_expert: torch.Tensor,
    block_size: list[int] | None,
) -> torch.Tensor:
    whole = torch.empty_like(weight, dtype=inputs.dtype)
    for part, of_some, scales_of_some in zip(*(t.split(FEW) for t in (whole, weight, scales)), strict=True):
        part.copy_(_whole(of_some, scales_of_some, block_size, inputs.dtype))
    return _grouped_mm(inputs, whole.transpose(-2, -1), offs=offsets)


def _whole(
    weight: torch.Tensor, scales: torch.Tensor, block_size: list[int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rounded once, as when it is unpacked at loading; the library's backward pass rounds the scales as well."""
    return finegrained_fp8._dequantize_fp8_weight(weight, scales, block_size, torch.float32).to(dtype)


def _no_product(*args: Any, **kwargs: Any) -> NoReturn:
    """Of single tokens, as a model that writes has them; ours answers in one forward pass."""
    raise NotImplementedError("experts_implementation=batched_mm needs the FP8 kernel of the Hub")


class _Unpack(Fp8Dequantize):
    """The library's, which leaves the scales of what is not called weight beside what they belonged to."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        unpacked = super().convert(input_dict, **kwargs)
        return {name: weight for name, weight in unpacked.items() if not name.endswith("_scale_inv")}


@contextmanager
def _turned_experts(keeps: bool) -> Iterator[None]:
    """Let the scales of Qwen3-VL's experts be read: transformers 5.23 turns their weights and not their scales, so that
    Qwen3-VL-30B-A3B-Instruct-FP8 does not load (huggingface/transformers#44230). Goes when that is closed."""
    plain = conversion_mapping.get_checkpoint_conversion_mapping(TURNED)
    turn = functools.partial(Transpose, 1, 2, check_dims=True)
    if keeps:
        own = plain + [WeightConverter(f"{name}_scale_inv", f"{name}_scale_inv", [turn()]) for name in EXPERTS]
    else:
        unpack = functools.partial(_Unpack, TURNED)  # with any quantizer, tensors come as they are stored
        own = [WeightConverter([name, f"{name}_scale_inv"], name, [unpack(), turn()]) for name in EXPERTS]
    conversion_mapping.register_checkpoint_conversion_mapping(TURNED, own, overwrite=True)
    try:
        yield
    finally:
        conversion_mapping.register_checkpoint_conversion_mapping(TURNED, plain, overwrite=True)


def finish(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """What transformers 5.23 leaves to do of unpacked weights: those that were not FP8 have the checkpoint's `dtype`,
    and saving would round the others to FP8 again, without saying so in config.json."""
    in_fp32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, weight in model.named_parameters():
        if isinstance(dtype, torch.dtype) and weight.dtype.itemsize > 1 and in_fp32.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)
    read = {(type(step), *step.target_patterns) for step in getattr(model, "_weight_conversions", None) or ()}
    plain = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [step for step in plain if (type(step), *step.target_patterns) in read] or None
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
