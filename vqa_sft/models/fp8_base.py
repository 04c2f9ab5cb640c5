"""A frozen base whose products are computed in FP8 (`base_precision: fp8`), on compute capability 8.9 and newer.

    y  = x Wᵀ        x in FP8, a scale for each token; W in FP8 (e4m3), a scale s for each output
    dx = (dy s) W    the same bytes of W: its scales go into dy, before that is rounded with a scale for each token

A weight takes one byte, and is kept once. The kernel wants both sides with the summed dimension contiguous, which
W (N, K) has forward and not backward, so every backward pass copies it transposed: 233 MB read and as much written for
a decoder layer of Qwen2.5-VL-7B. A second layout kept would take the memory of bf16. Gradients are e4m3 as well: where
each token has a scale, the third bit of mantissa is worth more than the range of e5m2. The error of a product, by
emulation: 3.7% in e4m3, 5.9% in e5m2 (tests/models/test_fp8_base.py).

For the linear layers of the decoder's layers, those that choose experts aside, with plain LoRA or none. Adapters,
norms, attention, the head, the vision tower and routed experts stay. These layers do not have their adapters fused
(fast/fused_lora.py): a product in FP8 cannot take them in. A second product that adds to the first would read and write
once more what is wide; that is what the sum costs as well, which compiled layers compute inside the activation.

torchao's FP8 training keeps whole weights, and its FP8 inference has no backward pass (pytorch/ao#4376, read in
November 2026). Elsewhere than on a GPU the same numbers are multiplied as fp32: an emulation, for tests.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from peft.tuners.lora import Linear as LoraLinear, LoraLayer
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import finegrained_fp8

from vqa_sft.console import note
from vqa_sft.errors import InputError
from vqa_sft.models import fp8, processes, quantized
from vqa_sft.models.fast import vision
from vqa_sft.models.lora import LEFT_OUT
from vqa_sft.models.parts import decoder_layers

FP8 = torch.float8_e4m3fn
CAPABILITY = (8, 9)
# transformers' own layers in FP8.
OF_CHECKPOINTS = (finegrained_fp8.FP8Linear, finegrained_fp8.FP8Experts, finegrained_fp8.FP8Embedding)
# Modules inside of which weights are trained, or are copies of those that are.
TRAINED = {"modules_to_save", "original_module"}


def check(name: str, config: PreTrainedConfig) -> None:
    """Raises InputError where the checkpoint is quantised, but for FP8."""
    own = quantized.quantization_of(config)
    if own is not None and quantized.method_of(own) != "fp8":
        raise InputError(
            f"the model {name!r} is quantised itself ({quantized.describe(own)}) and cannot be rounded again. Remove "
            "base_precision."
        )


def why_not(device: torch.device) -> str | None:
    """Why no layer can multiply in FP8 here."""
    if device.type != "cuda":
        return "that needs a GPU"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "that needs a GPU of compute capability 8.9 or newer"
    return "FSDP and DeepSpeed deal out weights that they know" if processes.is_sharded() else None


def round_base(base: nn.Module) -> int:
    """Let the linear layers of the decoder's layers multiply in FP8, in place and one after another; how many do. Says
    so, and which do not. Called where they have their adapters, and are on the device that will use them."""
    if reason := why_not(PartialState().device):
        note(f"base_precision: fp8: no layer is rounded, {reason}.")
        return 0
    found, kept = Counter[str](), Counter[str]()
    for layer in decoder_layers(base.get_decoder()):
        _round_layer(layer, found, kept)
        if torch.cuda.is_available():  # what whole weights leave is of another size than what comes
            torch.cuda.empty_cache()
    if found["layers"] and not any(isinstance(module, OF_CHECKPOINTS) for module in base.modules()):
        base.is_quantized = False  # nothing is left of what transformers rounds, and compiled layers are possible
    sizes = f"{found['bytes before'] / 2**30:.2f} GiB became {found['bytes after'] / 2**30:.2f}"
    note(f"base_precision: fp8: {found['layers']} linear layers multiply in FP8, {sizes}.")
    if twice := found["with blocks"]:
        note(f"base_precision: fp8: {twice} of them were rounded a second time: their scales were those of blocks.")
    for reason, times in kept.items():
        note(f"base_precision: fp8: {times} linear layers stay as they are: {reason}.")
    return found["layers"]


def _round_layer(layer: nn.Module, found: Counter[str], kept: Counter[str]) -> None:
    for parent, name, linear in [*_linear_layers(layer)]:
        if reason := _why_whole(parent, linear):
            kept[reason] += 1
            continue
        rounded = FP8Linear.of(linear)
        setattr(parent, name, rounded)
        found["layers"] += 1
        found["with blocks"] += has_blocks(linear)
        found["bytes before"] += linear.weight.nbytes
        found["bytes after"] += rounded.weight.nbytes + rounded.scale.nbytes


def _linear_layers(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of the base's linear layers."""
    for path, module in layer.named_modules():
        names = path.split(".")
        is_beside = any(name.startswith("lora_") or name in LEFT_OUT | TRAINED for name in names)
        if isinstance(module, nn.Linear) and not is_beside:
            yield layer.get_submodule(".".join(names[:-1])), names[-1], module


def _why_whole(parent: nn.Module, linear: nn.Module) -> str | None:
    if not (vision.is_plain(linear) or type(linear) is finegrained_fp8.FP8Linear):
        return "a weight of another kind"
    if linear.weight.requires_grad:
        return "they are trained"
    if isinstance(parent, LoraLayer) and (type(parent) is not LoraLinear or parent.lora_variant or parent.merged):
        return "their adapter needs whole weights"
    if any(size % 16 for size in linear.weight.shape):
        return "a width is no multiple of 16"
    return None


def has_blocks(linear: nn.Module) -> bool:
    """Whether it is of an FP8 checkpoint with scales for blocks: rows of such have no scales of their own."""
    return type(linear) is finegrained_fp8.FP8Linear and linear.weight_scale_inv.numel() > 1


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K) in FP8 and the scale (T, 1) of every row, fp32, whose product it is."""
    # Numbers stand here, because those of a module are inputs of a graph that is compiled for any shape. The least is
    # for rows of zeros: times other scales it still is a normal fp32 number.
    largest = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-30)
    return (x.float() * (448.0 / largest)).to(FP8).contiguous(), largest / 448.0


def multiply(
    left: torch.Tensor,  # (T, K) in FP8
    left_scales: torch.Tensor,  # (T, 1)
    right: torch.Tensor,  # (N, K), the bytes of numbers in FP8
    right_scales: torch.Tensor,  # (1, N)
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product (T, N) of both in `dtype`. All but T are multiples of 16."""
    numbers = right.view(FP8)
    if left.device.type != "cuda":
        return emulate(left, left_scales, numbers, right_scales).to(dtype)
    scales = {"scale_a": left_scales, "scale_b": right_scales}
    # Scales of rows are had with bf16 alone.
    return torch._scaled_mm(left, numbers.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True).to(dtype)


def emulate(
    left: torch.Tensor, left_scales: torch.Tensor, right: torch.Tensor, right_scales: torch.Tensor
) -> torch.Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return (left.float() * left_scales) @ (right.float().T * right_scales)


class Product(torch.autograd.Function):
    """x (T, K), the bytes of W (N, K) in FP8 and their scales (N, 1) -> x Wᵀ (T, N). Neither x nor y is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return multiply(*quantise(x), weight, scale.T, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        numbers, scales = quantise(grad * scale.T)
        ones = torch.ones(1, weight.shape[1], device=weight.device)
        return multiply(numbers, scales, weight.T.contiguous(), ones, grad.dtype), None, None


class FP8Linear(nn.Module):
    """A frozen linear layer in FP8. Its weight (N, K) holds bytes, which no `.to(dtype)` of a model, no PEFT and no
    broadcast takes for numbers; `scale` (N, 1) is a parameter because DDP sends buffers before every step."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Module) -> "FP8Linear":
        """A layer of the same weights. The numbers of an FP8 checkpoint with one scale a layer are taken as they are;
        those with a scale for each block are rounded a second time, for their scales do not fit the rows."""
        weight = linear.weight.data
        if has_blocks(linear):
            numbers, scales = quantise(
                fp8._whole(weight, linear.weight_scale_inv.data, linear.block_size, torch.float32)
            )
        elif weight.dtype == FP8:
            numbers, scales = weight, linear.weight_scale_inv.data.float().reshape(1, 1).repeat(len(weight), 1)
        else:
            numbers, scales = quantise(weight)
        return cls(numbers, scales, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)"""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = Product.apply(x.flatten(0, -2), self.weight, self.scale)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
