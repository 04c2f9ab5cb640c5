"""Adapters of routed experts beside the products of their frozen base: y = W x + s B (A x), expert by expert.

PEFT adds s B A to the weights of all experts in every forward pass, and the backward pass needs the gradient of all of
them: with Qwen3-VL-30B-A3B tensors of 58 GB in bf16, for adapters of 2.5. Here rows are sorted by expert, and each of
the three products takes the rows of an expert by its own weight (`torch.nn.functional.grouped_mm`).

Exact: the same sum in another order, which is not rounded to the precision of W on the way. For experts of gate and up
in one parameter and down in another, both with one plain adapter, on a base that is not quantised; others stay as they
are, and go PEFT's own way while it has theirs disabled, merged or scaled, or others active.
"""

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from vqa_sft.models.fast.adapter_state import adapter_of, has_only
from vqa_sft.models.parts import fused_experts

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# What transformers' decorator of experts says of those that are known.
KIND = {"has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_transposed": False}
MULTIPLE_BYTES = 16  # of a row that grouped_mm takes


def speed_up_experts(decoder: nn.Module) -> int:
    """Let the routed experts of a decoder's layers compute their adapters beside their base; of how many layers."""
    wrappers: list[ParamWrapper] = []
    for module in decoder.modules():
        if isinstance(module, ParamWrapper) and (found := _known(module)):
            module.forward = types.MethodType(_forward, module)
            module.wrapper_of = found
            wrappers += [wrapper for (wrapper,) in found.values()]
    if wrappers:
        for wrapper in wrappers:
            b, dtype = _by_expert(wrapper), _weight(wrapper).dtype
            wrapper.beside = adapter_of(wrapper)
            wrapper.wide_b = torch.empty(b.shape, dtype=dtype, device=b.device)
            torch._dynamo.mark_static(wrapper.wide_b)  # as a parameter is
        decoder.forward = partial(_forward_refreshed, wrappers, decoder.forward)
    return len(wrappers) // 2


def copied_bytes(module: nn.Module) -> int:
    """What the copy of an adapter's B takes, 0 where there is none."""
    return module.wide_b.nbytes if hasattr(module, "wide_b") else 0


def _forward_refreshed(wrappers: Sequence[ParamWrapper], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Write the Bs, which an optimiser changes, in the order that the products want. Not in the layers: compiled ones
    (torch 2.11) would leave them as they are, which the products refuse."""
    if current := [wrapper for wrapper in wrappers if has_only(wrapper, wrapper.beside)]:
        with torch.no_grad():
            torch._foreach_copy_([wrapper.wide_b for wrapper in current], [*map(_by_expert, current)])
    return forward(*args, **kwargs)


def _by_expert(wrapper: ParamWrapper) -> torch.Tensor:
    """B (E, r, out); PEFT has it as (out, r E), the experts last."""
    (adapter,) = wrapper.active_adapters
    b = wrapper.lora_B[adapter].weight
    return b.detach().view(len(b), -1, wrapper.num_experts).permute(2, 1, 0)


def _weight(wrapper: ParamWrapper) -> torch.Tensor:
    return getattr(wrapper.get_base_layer(), wrapper.parameter_name)


def _known(outer: ParamWrapper) -> dict[str, list[ParamWrapper]] | None:
    """Of the outermost wrapper of a layer's experts, the wrapper of each parameter, in lists so that they are no
    submodules; None where anything is of another kind."""
    wrappers: dict[str, list[ParamWrapper]] = {}
    module: nn.Module = outer
    while isinstance(module, ParamWrapper):
        wrappers[module.parameter_name] = [module]
        module = module.base_layer
    if not _is_known(module) or set(wrappers) != {GATE_UP, DOWN}:
        return None
    return wrappers if all(_is_plain(wrapper) for (wrapper,) in wrappers.values()) else None


def _is_known(experts: nn.Module) -> bool:
    is_parallel = getattr(experts, "_is_expert_parallel", True)
    return not is_parallel and all(getattr(experts, name, None) == value for name, value in KIND.items())


def serves(model: PreTrainedModel, config: LoraConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all that `config` adapts of the model's routed experts will have products of its own on such a device."""
    names = config.target_parameters or []
    experts = {name.rpartition(".")[0] for name in fused_experts(model) if name.endswith(tuple(names))}
    is_known = all(_is_known(model.get_submodule(name)) for name in experts)
    has_both = {name.rpartition(".")[2] for name in names} == {GATE_UP, DOWN}
    return is_known and has_both and can_use(device, dtype, config.r)


def _is_plain(wrapper: ParamWrapper) -> bool:
    weight = _weight(wrapper)
    adapter, *others = wrapper.active_adapters
    return (
        not others
        and adapter in wrapper.lora_A
        and not wrapper.merged
        and not wrapper.disable_adapters
        and wrapper.num_experts > 1
        and weight.ndim == 3
        and not weight.requires_grad
        and can_use(weight.device, weight.dtype, wrapper.r[adapter])
    )


def can_use(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Whether there are such products: on GPUs from compute capability 8.0 on, in bf16, for multiples of 8."""
    if dtype not in (torch.bfloat16, torch.float32) or rank * dtype.itemsize % MULTIPLE_BYTES:
        return False
    return device.type != "cuda" or dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)


def _forward(outer: ParamWrapper, hidden: torch.Tensor, experts_of: torch.Tensor, weights: torch.Tensor) -> Any:
    """hidden (T, H), the k experts of each token (T, k) and their weights (T, k) -> (T, H)."""
    if not all(has_only(wrapper, wrapper.beside) for (wrapper,) in outer.wrapper_of.values()):
        return type(outer).forward(outer, hidden, experts_of, weights)
    experts = outer.get_base_layer()
    num_tokens, num_chosen = experts_of.shape
    sorted_experts, order = experts_of.flatten().sort()
    # As transformers counts them: bincount would wait for the GPU.
    counted = sorted_experts.int() if hidden.is_cuda else sorted_experts.float()
    counts = counted.histc(bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    ends = counts.cumsum(0, dtype=torch.int32)  # (E,) the row after the last one of each expert

    with torch.autocast(hidden.device.type, enabled=False):  # all is converted here
        rows = hidden[order // num_chosen]  # (T k, H), those of an expert together
        rows = experts._apply_gate(_adapted(outer.wrapper_of[GATE_UP][0], rows, ends))
        rows = _adapted(outer.wrapper_of[DOWN][0], rows, ends)
        rows = rows * weights.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return rows[back].view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden.dtype)


def _adapted(wrapper: ParamWrapper, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows (S, in) sorted by expert -> (S, out), with W (E, out, in) and A (E, r, in)."""
    weight = _weight(wrapper)
    (adapter,) = wrapper.active_adapters
    a, b, scale = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight, wrapper.scaling[adapter]
    a = a.view(wrapper.num_experts, -1, a.shape[1]).to(weight.dtype)
    rows = rows.to(weight.dtype)
    narrow = scale * F.grouped_mm(rows, a.transpose(1, 2), offs=ends)  # (S, r)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends) + TimesB.apply(narrow, b, wrapper.wide_b, ends)


class TimesB(torch.autograd.Function):
    """narrow (S, r), B as `wide` (E, r, out) -> (S, out). B as PEFT has it, (out, r E), is given for its gradient
    alone."""

    @staticmethod
    def forward(
        ctx: Any, narrow: torch.Tensor, b: torch.Tensor, wide: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(narrow, wide, ends)
        ctx.dtype = b.dtype
        return F.grouped_mm(narrow, wide, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        narrow, wide, ends = ctx.saved_tensors
        of_b = F.grouped_mm(narrow.T, grad, offs=ends)  # (E, r, out)
        of_narrow = F.grouped_mm(grad, wide.transpose(1, 2), offs=ends)
        return of_narrow, of_b.permute(2, 1, 0).flatten(1).to(ctx.dtype), None, None
