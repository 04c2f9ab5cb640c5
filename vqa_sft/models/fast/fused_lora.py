"""MLPs and attention whose adapters are fused into the products of their frozen base: each layer W + s B A, with x
(T, K), W (N, K).

    as PEFT has it    y = x Wᵀ + s (x Aᵀ) Bᵀ       two wide tensors (T, N), and a third for their sum
    here              y = [x, x Aᵀ] [W, s B]ᵀ       one; the rank is a few more columns of one product

Wide tensors are what LoRA costs: on an H200 the MLP of Qwen2.5-VL-7B takes 5 to 7% longer with three of them. W is a
view of a buffer with its adapter's columns or rows, which are written again before every forward.

    gate, up    fused forward, a product each; one for both was no faster
    q, k, v     fused forward and backward, in one product: [W, sB, 0, 0]
                                                            [W', 0, s'B', 0]
                                                            [W", 0, 0, s"B"]
    down, o     fused backward, whose wide tensor is the gradient of its input

Exact: the same sum in another order. For MLPs of gate, up and down and attention of q, k, v and o with one plain
adapter each (no dropout, bias or DoRA) on a base that is neither quantised nor trained; others stay as they are.
Layers go PEFT's own way while it has their adapter disabled, merged, scaled or unloaded, or others active. The base
cannot be saved by transformers' `save_pretrained`, for q, k and v share a buffer; `vqa-sft export` writes a merged one.
Goes when PEFT learns it.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

from vqa_sft.models.fast import vision
from vqa_sft.models.fast.adapter_state import adapter_of, has_only

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MULTIPLE = 8  # of columns, which kernels of half precision want


@dataclass
class Writes:
    """Places in the buffers, and the adapters' weights for them: As into rows, sBs into columns."""

    rows: list[torch.Tensor] = field(default_factory=list)
    a: list[torch.Tensor] = field(default_factory=list)
    columns: list[torch.Tensor] = field(default_factory=list)
    b: list[torch.Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def add_rows(self, place: torch.Tensor, layer: Linear) -> None:
        self.rows.append(place)
        self.a.append(_weights(layer)[0])

    def add_columns(self, place: torch.Tensor, layer: Linear) -> None:
        _, b, scale = _weights(layer)
        self.columns.append(place)
        self.b.append(b)
        self.scales.append(scale)

    @torch.no_grad()
    def write(self) -> None:
        """What an optimiser has changed, by three calls for all layers: Python takes longer for a copy than a GPU."""
        if self.rows:
            torch._foreach_copy_(self.rows, self.a)
            torch._foreach_copy_(self.columns, torch._foreach_mul(self.b, self.scales))


def fuse(decoder: nn.Module) -> tuple[int, int]:
    """Fuse MLPs and attention of a decoder's layers in place; how many of each. Nothing of it is saved."""
    writes, num_mlps, num_attentions = Writes(), 0, 0
    for layer in getattr(decoder, "layers", ()):  # of Llama 4 it is a whole causal model
        num_mlps += fuse_mlp(layer, writes)
        num_attentions += fuse_attention(layer, writes)
        # Buffers are a little larger than the weights whose place the allocator would else keep for others.
        torch.cuda.empty_cache()
    if num_mlps or num_attentions:
        # Not by a hook: a CUDA graph of the forward (graphs.py) then holds it as well.
        decoder.forward = partial(_forward_refreshed, writes, decoder.forward)
    return num_mlps, num_attentions


def _forward_refreshed(writes: Writes, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    writes.write()
    return forward(*args, **kwargs)


def fuse_mlp(layer: nn.Module, writes: Writes) -> bool:
    """Whether the layer's MLP is of the kind that is known, and now has its weights in buffers with its adapters', for
    which there are `writes`."""
    mlp = getattr(layer, "mlp", None)
    if _children(mlp) - {"act_fn"} != {*MLP} or not hasattr(mlp, "act_fn"):
        return False
    gate, up, down = (getattr(mlp, name) for name in MLP)
    if not all(map(is_plain, (gate, up, down))) or any(_bias(layer) is not None for layer in (gate, up, down)):
        return False
    num_inputs, middle = gate.in_features, gate.in_features + _rank(gate)
    mlp.wide_gate, mlp.wide_up = (_beside([layer], columns=_rank(gate) + _rank(up)) for layer in (gate, up))
    mlp.wide_down = _beside([down], rows=_rank(down))
    mlp.fused = tuple(map(adapter_of, (gate, up, down)))
    writes.add_columns(mlp.wide_gate[:, num_inputs:middle], gate)
    writes.add_columns(mlp.wide_up[:, middle:], up)
    writes.add_rows(mlp.wide_down[down.out_features :], down)
    mlp.forward = types.MethodType(_forward_mlp, mlp)
    return True


def fuse_attention(layer: nn.Module, writes: Writes) -> bool:
    """As `fuse_mlp`, of attention whose projections are given one and the same tensor."""
    attention = getattr(layer, "self_attn", None)
    if _children(attention) - {"q_norm", "k_norm"} != {*ATTENTION}:
        return False
    *ins, out = (getattr(attention, name) for name in ATTENTION)
    if not all(map(is_plain, (*ins, out))) or _bias(out) is not None:
        return False
    biases = [_bias(layer) for layer in ins]
    kinds = {(layer.in_features, layer.base_layer.weight.dtype, _bias(layer) is None) for layer in ins}
    if len(kinds) > 1:
        return False
    ranks = sum(map(_rank, ins))
    attention.wide_qkv = _beside(ins, columns=-(-ranks // MULTIPLE) * MULTIPLE)
    attention.bias_qkv = None if biases[0] is None else torch.cat([bias.data for bias in biases])
    attention.wide_o = _beside([out], rows=_rank(out))
    attention.fused = tuple(map(adapter_of, (*ins, out)))
    row, column = 0, ins[0].in_features
    for layer in ins:
        block = attention.wide_qkv[row : row + layer.out_features, column : column + _rank(layer)]
        writes.add_columns(block, layer)
        row, column = row + layer.out_features, column + _rank(layer)
    writes.add_rows(attention.wide_o[out.out_features :], out)
    attention.forward = types.MethodType(_forward_attention, attention)
    return True


def _children(module: nn.Module | None) -> set[str]:
    return set() if module is None else {name for name, _ in module.named_children()}


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
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def _is_as_fused(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether what the buffers hold is what PEFT is asked for."""
    return all(has_only(getattr(module, name), adapter) for name, adapter in zip(names, module.fused, strict=True))


def _weights(layer: Linear) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A (r, K), B (N, r) and their factor."""
    (adapter,) = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]


def _rank(layer: Linear) -> int:
    return _weights(layer)[0].shape[0]


def _bias(layer: Linear) -> torch.Tensor | None:
    return layer.base_layer.bias


def _beside(layers: Sequence[Linear], *, rows: int = 0, columns: int = 0) -> torch.Tensor:
    """A buffer (N + rows, K + columns) of zeros but for the weights (N of all, K), which become views of it."""
    bases = [layer.base_layer for layer in layers]
    num_outputs = [len(base.weight) for base in bases]
    wide = F.pad(torch.cat([base.weight.data for base in bases]), (0, columns, 0, rows))
    for base, weight in zip(bases, wide[: sum(num_outputs)].split(num_outputs), strict=True):
        base.weight.data = weight[:, : base.in_features]
    torch._dynamo.mark_static(wide)  # as a parameter is: no graph asks for its sizes
    return wide


def _forward_mlp(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The library's own forward, (..., K) -> (..., K), which finds gate and up computed."""
    if not _is_as_fused(mlp, MLP):
        return type(mlp).forward(mlp, x)
    (gate_a, gate_b, gate_scale), (up_a, up_b, up_scale) = _weights(mlp.gate_proj), _weights(mlp.up_proj)
    dtype = mlp.wide_gate.dtype
    with torch.autocast(x.device.type, enabled=False):  # all is converted here
        a = torch.cat([gate_a, up_a]).to(dtype)
        gate, up = GateUp.apply(x.to(dtype), a, gate_b * gate_scale, up_b * up_scale, mlp.wide_gate, mlp.wide_up)
    stand_in = _StandIn(mlp, x, {"gate_proj": gate, "up_proj": up}, {"down_proj": mlp.wide_down})
    return type(mlp).forward(stand_in, x)


def _forward_attention(attention: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The library's own forward, which finds q, k and v computed."""
    if not _is_as_fused(attention, ATTENTION):
        return type(attention).forward(attention, hidden_states, *args, **kwargs)
    known = dict(zip(ATTENTION, _project(attention, hidden_states), strict=False))
    stand_in = _StandIn(attention, hidden_states, known, {"o_proj": attention.wide_o})
    return type(attention).forward(stand_in, hidden_states, *args, **kwargs)


class _StandIn:
    """What stands for a module during one call: the layers of `known` give what is computed already of the `given`
    tensor, those of `last` go by `Down`."""

    def __init__(
        self, module: nn.Module, given: torch.Tensor, known: dict[str, torch.Tensor], last: dict[str, torch.Tensor]
    ) -> None:
        self.module = module
        for name, projected in known.items():
            setattr(self, name, _knowing(getattr(module, name), given, projected))
        for name, wide in last.items():
            setattr(self, name, partial(_down, getattr(module, name), wide))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _knowing(layer: nn.Module, given: torch.Tensor, projected: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def project(x: torch.Tensor) -> torch.Tensor:
        return projected if x is given else layer(x)

    return project


def _down(layer: Linear, wide: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(..., N) -> (..., K)"""
    a, b, scale = _weights(layer)
    with torch.autocast(hidden.device.type, enabled=False):
        return Down.apply(hidden.to(wide.dtype), a, (b * scale).to(wide.dtype), wide)


def _project(attention: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(..., K) -> q, k and v"""
    weights = [_weights(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    wide = attention.wide_qkv
    with torch.autocast(x.device.type, enabled=False):
        a = torch.cat([a for a, _, _ in weights]).to(wide.dtype)
        a = F.pad(a, (0, 0, 0, wide.shape[1] - x.shape[-1] - len(a)))
        bs = [b * scale for _, b, scale in weights]
        q, k, v = Joint.apply(x.to(wide.dtype), a, wide, attention.bias_qkv, *bs).split([len(b) for b in bs], dim=-1)
    # v is kept for the backward pass as it is, and would keep the other two, which only norms in compiled layers keep.
    keeps_all = torch.compiler.is_compiling() and hasattr(attention, "q_norm")
    return q, k, v if keeps_all else v.contiguous()


class Joint(torch.autograd.Function):
    """x (..., K), a (R, K) of all layers, their [W, sB] (N, K + R), biases (N,) or None -> (..., N). The sBs, which
    are blocks of that, each below and to the right of the one before, are given for their gradients alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, wide: torch.Tensor, bias: torch.Tensor | None, *bs: torch.Tensor
    ) -> torch.Tensor:
        wide_x = torch.cat([x, F.linear(x, a)], dim=-1)
        ctx.save_for_backward(wide_x, a, wide)
        ctx.blocks = [(b.shape[0], b.shape[1]) for b in bs]
        return F.linear(wide_x, wide, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wide_x, a, wide = ctx.saved_tensors
        num_inputs, shape = a.shape[1], wide_x.shape
        wide_x, grad = wide_x.flatten(0, -2), grad.flatten(0, -2)
        of_wide = grad @ wide
        narrow = of_wide[:, num_inputs:]
        x = torch.addmm(of_wide[:, :num_inputs], narrow, a)
        of_bs, found = grad.T @ wide_x[:, num_inputs:], []  # of which each layer has a block
        row = column = 0
        for num_outputs, rank in ctx.blocks:
            found.append(of_bs[row : row + num_outputs, column : column + rank])
            row, column = row + num_outputs, column + rank
        return x.view(*shape[:-1], num_inputs), narrow.T @ wide_x[:, :num_inputs], None, None, *found


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
