"""MLPs whose adapters are fused into the products of their frozen base: each layer W + s B A, with x (T, K), W (N, K).

    as PEFT has it    y = x Wᵀ + s (x Aᵀ) Bᵀ       two wide tensors (T, N), and a third for their sum
    here              y = [x, x Aᵀ] [W, s B]ᵀ       one; the rank is a few more columns of one product

Wide tensors are what LoRA costs: on an H200 the MLP of Qwen2.5-VL-7B takes 5 to 7% longer with three of them. gate and
up are fused forward, down backward, whose wide tensor is the gradient of its input. W is a view of one buffer with its
adapter's columns or rows, which are written again before every forward.

Exact: the same sum in another order. For MLPs of gate, up and down with one plain adapter each (no dropout, bias or
DoRA) on a base that is neither quantised nor trained; others stay as they are. Goes when PEFT learns it.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

from vqa_sft.models.fast import vision

NAMES = ("gate_proj", "up_proj", "down_proj")


def fuse(decoder: nn.Module) -> int:
    """Fuse the MLPs of a decoder's layers in place; how many. Nothing of it is saved."""
    num_fused = 0
    for layer in getattr(decoder, "layers", ()):  # of Llama 4 it is a whole causal model
        num_fused += hasattr(layer, "mlp") and widen(layer.mlp)
        # Buffers are a little larger than the weights whose place the allocator would else keep for others.
        torch.cuda.empty_cache()
    if num_fused:
        # Not by a hook: a CUDA graph of the forward (graphs.py) then holds it as well.
        decoder.forward = partial(_forward_refreshed, decoder, decoder.forward)
    return num_fused


def _forward_refreshed(decoder: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    refresh(decoder)
    return forward(*args, **kwargs)


def widen(mlp: nn.Module) -> bool:
    """Whether the MLP is of the kind that is known, and now has its weights in buffers with its adapters'."""
    layers = [getattr(mlp, name, None) for name in NAMES]
    names = {name for name, _ in mlp.named_children()}
    if names - {"act_fn"} != set(NAMES) or not hasattr(mlp, "act_fn") or not all(map(is_plain, layers)):
        return False
    gate, up, down = layers
    rank = _rank(gate) + _rank(up)
    mlp.wide_gate, mlp.wide_up = (_beside(layer.base_layer, columns=rank) for layer in (gate, up))
    mlp.wide_down = _beside(down.base_layer, rows=_rank(down))
    mlp.forward = types.MethodType(_forward, mlp)
    _refresh_one(mlp)
    return True


def is_plain(layer: nn.Module) -> bool:
    """Whether all that a layer adds to a frozen base is s B A x."""
    if type(layer) is not Linear or not vision.is_plain(layer.base_layer) or len(layer.lora_A) != 1:
        return False
    adapter, *others = layer.active_adapters
    base = layer.base_layer
    return (
        not others
        and adapter in layer.lora_A
        and not layer.merged
        and not layer.disable_adapters
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[adapter], nn.Identity)
        and layer.lora_A[adapter].bias is None
        and layer.lora_B[adapter].bias is None
        and base.bias is None
        and not base.weight.requires_grad
    )


def _weights(layer: Linear) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A (r, K), B (N, r) and their factor."""
    (adapter,) = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]


def _rank(layer: Linear) -> int:
    return _weights(layer)[0].shape[0]


def _beside(base: nn.Linear, *, rows: int = 0, columns: int = 0) -> torch.Tensor:
    """A buffer (N + rows, K + columns) of zeros but for the weight (N, K), which becomes a view of it."""
    weight = base.weight.data
    wide = F.pad(weight, (0, columns, 0, rows))
    base.weight.data = wide[: weight.shape[0], : weight.shape[1]]
    return wide


def refresh(decoder: nn.Module) -> None:
    """Write the adapters, which an optimiser changes, into the buffers."""
    for layer in decoder.layers:
        if hasattr(layer.mlp, "wide_down"):
            _refresh_one(layer.mlp)


@torch.no_grad()
def _refresh_one(mlp: nn.Module) -> None:
    (a, gate_b, gate_scale), (_, up_b, up_scale) = _weights(mlp.gate_proj), _weights(mlp.up_proj)
    num_inputs, middle = a.shape[1], a.shape[1] + a.shape[0]
    torch.mul(gate_b, gate_scale, out=mlp.wide_gate[:, num_inputs:middle])
    torch.mul(up_b, up_scale, out=mlp.wide_up[:, middle:])
    down_a, down_b, _ = _weights(mlp.down_proj)
    mlp.wide_down[down_b.shape[0] :].copy_(down_a)


def _forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (..., K)"""
    (gate_a, gate_b, gate_scale), (up_a, up_b, up_scale) = _weights(mlp.gate_proj), _weights(mlp.up_proj)
    down_a, down_b, down_scale = _weights(mlp.down_proj)
    dtype = mlp.wide_gate.dtype
    x = x.to(dtype)
    with torch.autocast(x.device.type, enabled=False):  # all is converted here
        a = torch.cat([gate_a, up_a]).to(dtype)
        gate, up = GateUp.apply(x, a, gate_b * gate_scale, up_b * up_scale, mlp.wide_gate, mlp.wide_up)
        hidden = mlp.act_fn(gate) * up
        return Down.apply(hidden, down_a, (down_b * down_scale).to(dtype), mlp.wide_down)


class GateUp(torch.autograd.Function):
    """x (..., K), a (R, K) of both, [W, sB, 0] and [W', 0, s'B'] (N, K + R) -> two of (..., N). sB (N, r) and s'B'
    are given for their gradients alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        gate_b: torch.Tensor,
        up_b: torch.Tensor,
        wide_gate: torch.Tensor,
        wide_up: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide_x = torch.cat([x, F.linear(x, a)], dim=-1)
        ctx.save_for_backward(wide_x, a, wide_gate, wide_up)
        ctx.rank = gate_b.shape[1]
        return F.linear(wide_x, wide_gate), F.linear(wide_x, wide_up)

    @staticmethod
    def backward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wide_x, a, wide_gate, wide_up = ctx.saved_tensors
        num_inputs, middle = a.shape[1], a.shape[1] + ctx.rank
        shape = wide_x.shape
        wide_x, gate, up = (tensor.flatten(0, -2) for tensor in (wide_x, gate, up))
        narrow = torch.cat([gate @ wide_gate[:, num_inputs:middle], up @ wide_up[:, middle:]], dim=-1)  # (T, R)
        x = gate @ wide_gate[:, :num_inputs] + up @ wide_up[:, :num_inputs] + narrow @ a
        gate_b, up_b = gate.T @ wide_x[:, num_inputs:middle], up.T @ wide_x[:, middle:]
        return x.view(*shape[:-1], num_inputs), narrow.T @ wide_x[:, :num_inputs], gate_b, up_b, None, None


class Down(torch.autograd.Function):
    """hidden (..., N), sB (K, r), [W; A] (K + r, N) -> (..., K). A (r, N) is given for its gradient alone."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, a: torch.Tensor, b: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        num_outputs = b.shape[0]
        narrow = F.linear(hidden, wide[num_outputs:])
        ctx.save_for_backward(hidden, narrow, b, wide)
        return F.linear(hidden, wide[:num_outputs]) + F.linear(narrow, b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, narrow, b, wide = ctx.saved_tensors
        shape = hidden.shape
        hidden, narrow, grad = (tensor.flatten(0, -2) for tensor in (hidden, narrow, grad))
        of_narrow = grad @ b
        of_hidden = torch.cat([grad, of_narrow], dim=-1) @ wide
        return of_hidden.view(shape), of_narrow.T @ hidden, grad.T @ narrow, None
