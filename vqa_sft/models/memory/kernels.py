"""What kernels of GPUs keep for the backward pass, in functions on tensors without values (count.py): attention, and
the chunks of linear attention."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args
from unittest import mock

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from vqa_sft.models.fast.masked_attention import masked_attention

CHUNK = 64  # tokens of linear attention
# Copies of the attention weights (T, T) that sdpa keeps where it has no fused kernel; with a mask and grouped heads it
# has none. From 59.8 GiB of the libraries' path to 51.5 with packed rows, docs/measurements/speed.md.
WEIGHTS_KEPT = 3
# The kernel takes fewer keys than queries; keys are "repeated" for it; "unfused": (T, T) of every head is kept;
# "masked": keys are repeated, and every layer keeps a mask (T, T) of its own; "products": as compiled layers compute
# that (fast/masked_attention.py).
Attention = Literal["grouped", "repeated", "unfused", "masked", "products"]
MASKED = ("masked", "products")
NAME = "vqa_sft_counted_"  # and the kind: attention implementations of transformers


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query (B, H, T, D), keys and values -> (B, T, H, D), and a log-sum-exp. Keeps all of these, and `kept`."""
    batch, num_heads, length, _ = query.shape
    output = value.new_empty(batch, length, num_heads, value.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


def _attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _operator(name: str, function: Callable[..., Any]) -> Any:
    """One operator, as a kernel is: compiled layers take it as it is."""
    operator = torch.library.custom_op(f"vqa_sft::counted_{name}", function, mutates_args=())
    operator.register_fake(function)
    return operator


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, kept = inputs
    ctx.save_for_backward(query, key, value, *output, *kept)
    ctx.num_kept = len(kept)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, *kept = ctx.saved_tensors
    return *ATTENTION_BACKWARD(grad, query, key, value, kept), ctx.num_kept * [None]


ATTENTION = _operator("attention", _attention)
ATTENTION_BACKWARD = _operator("attention_backward", _attention_backward)
ATTENTION.register_autograd(_differentiate, setup_context=_save)


def _attend(
    kind: Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    query, key = query.to(value.dtype), key.to(value.dtype)
    batch, num_heads, length, _ = query.shape
    if kind != "grouped" and key.shape[1] != num_heads:
        key, value = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (key, value))
    shapes: Sequence[tuple[int, ...]] = ()
    if kind == "unfused":
        shapes = WEIGHTS_KEPT * [(batch, num_heads, length, length)]
    elif attention_mask is not None:
        shapes = [(batch, 1, length, length)]
    return ATTENTION(query, key, value, [query.new_empty(shape) for shape in shapes])[0], None


def choose_all(hidden: torch.Tensor, positions: Any, mask: torch.Tensor, *args: Any) -> torch.Tensor:
    return mask


def _mask(kind: Attention, batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> Any:
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool) if kind in MASKED else None


for _kind in get_args(Attention):
    _function = masked_attention if _kind == "products" else partial(_attend, _kind)
    AttentionInterface.register(f"{NAME}{_kind}", _function)
    AttentionMaskInterface.register(f"{NAME}{_kind}", partial(_mask, _kind))


class _DeltaRule(torch.autograd.Function):
    """Linear attention (gated delta rule) as flash-linear-attention 0.5 has it: query and key (B, T, K heads, D), value
    (B, T, V heads, D), g and beta (B, T, V heads). It keeps them, normalised or summed, and a matrix of every chunk;
    the states at the chunks' starts are computed again."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:
        norms = [x.new_empty(x.shape[:-1], dtype=torch.float32) for x in (query, key)]
        copies = [x.new_empty(x.shape) for x in (query, key, value, g)]
        ctx.save_for_backward(*norms, *copies, beta, value.new_empty(*value.shape[:3], CHUNK))
        return value.new_empty(value.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, _, query, key, value, g, beta, _ = ctx.saved_tensors
        batch, length, num_heads, dim = value.shape
        states = [value.new_empty(batch, -(-length // CHUNK), num_heads, key.shape[-1], dim) for _ in range(2)]
        states += [value.new_empty(batch, length, num_heads, width) for width in (key.shape[-1], dim, dim)]
        gradients = tuple(torch.empty_like(x) for x in (query, key, value, g, beta))
        del states
        return gradients


def _delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return _DeltaRule.apply(query, key, value, g, beta), None


@contextmanager
def kernels_of(decoder: nn.Module, *, is_installed: bool) -> Iterator[None]:
    """Replace, in the modules of transformers that the decoder is from, what may call a kernel of another package: by
    PyTorch alone, and linear attention by what its kernels keep if flash-linear-attention `is_installed`."""
    homes = {sys.modules[type(module).__module__] for module in decoder.modules()}
    with ExitStack() as stack:
        for home in homes:
            for name, function in list(vars(home).items()):
                plain = getattr(function, "__wrapped__", None)  # in PyTorch alone
                if name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn") and plain is not None:
                    counted = _delta_rule if is_installed and name == "torch_chunk_gated_delta_rule" else plain
                    stack.enter_context(mock.patch.object(home, name, counted))
        yield
