"""Linear attention (gated delta rule, Qwen3.5) that a compiled layer holds in one graph.

    the library   projections, a transposed depthwise convolution, fla's function, at which a graph ends
    here          the convolution as a sum of shifted products, which is compiled with what is around it, and
                  the kernels of fla (flash-linear-attention) as one operator that a graph takes as it is

The backward pass computes again what the forward pass of the kernels would keep, 0.1 GB a layer for 7,000 tokens.
Exact: the same kernels, the same sum of four products in fp32. Goes when the library's function can be compiled.
"""

import types
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DTYPES = (torch.bfloat16, torch.float16)  # of the kernels: fla's own function, passed by here, may refuse fp32
PARTS = {"conv1d", "norm", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}


def speed_up_linear_attention(decoder: nn.Module) -> int:
    """Change the layers with linear attention in place; how many. None without flash-linear-attention."""
    try:
        import fla.ops.gated_delta_rule.chunk  # noqa: F401
    except ImportError:
        return 0
    return use_operator(getattr(decoder, "layers", ()))


def use_operator(layers: Iterable[nn.Module]) -> int:
    """The same, whether its kernels are there or not."""
    modules = [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]
    known = [module for module in modules if _is_known(module)]
    for module in known:
        module.forward = types.MethodType(_forward, module)
    return len(known)


def _is_known(module: nn.Module) -> bool:
    return (
        {name for name, _ in module.named_children()} == PARTS
        and module.activation == "silu"
        and type(module.conv1d) is nn.Conv1d  # no adapter, whose part of the convolution would be left out
        and module.conv1d.bias is None
        and module.conv1d.groups == module.conv1d.in_channels
    )


def _forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """(B, T, K) -> (B, T, K)"""
    if cache_params is not None or kwargs.get("cu_seq_lens_q") is not None:
        return type(module).forward(module, hidden_states, cache_params, attention_mask, **kwargs)
    if attention_mask is not None:
        hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    mixed = module.in_proj_qkv(hidden_states)
    if mixed.dtype not in DTYPES:
        return type(module).forward(module, hidden_states, attention_mask=attention_mask, **kwargs)
    mixed = convolve(mixed, module.conv1d.weight[:, 0])
    query, key, value = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    query, key = (x.unflatten(-1, (module.num_k_heads, module.head_k_dim)) for x in (query, key))
    value = value.unflatten(-1, (module.num_v_heads, module.head_v_dim))
    beta = module.in_proj_b(hidden_states).sigmoid()
    decay = -module.A_log.float().exp() * F.softplus(module.in_proj_a(hidden_states).float() + module.dt_bias)
    attended = gated_delta_rule(query, key, value, decay, beta)
    gate = module.in_proj_z(hidden_states)
    normed = module.norm(attended.reshape(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim))
    return module.out_proj(normed.reshape(*hidden_states.shape[:2], -1))


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """SiLU of a causal depthwise convolution: x (B, T, C), weight (C, width) -> (B, T, C). Summed in fp32."""
    length, width = x.shape[1], weight.shape[1]
    padded, weight = F.pad(x, (0, 0, width - 1, 0)), weight.float()
    total = sum(padded[:, step : step + length].float() * weight[:, step] for step in range(width))
    return F.silu(total.to(x.dtype))


# --- The kernels as one operator --------------------------------------------------------------------------------------


class _Context:
    """What a `torch.autograd.Function` keeps between its two passes."""

    saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def run_kernels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """What flash-linear-attention gives for query and key (B, T, K heads, D), value (B, T, V heads, D), decay and beta
    (B, T, V heads): (B, T, V heads, D), and what its backward pass needs."""
    from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction

    context = _Context()
    output, _ = ChunkGatedDeltaRuleFunction.forward(
        context,
        q=query,
        k=key,
        v=value,
        g=decay,
        beta=beta,
        scale=query.shape[-1] ** -0.5,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=True,
    )
    return output, context


def run_kernels_backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value, decay and beta."""
    from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction

    return ChunkGatedDeltaRuleFunction.backward(context, grad, None)[:5]


@torch.library.custom_op("vqa_sft::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """`run_kernels` without what the backward pass needs."""
    return run_kernels(query, key, value, decay, beta)[0].contiguous()


@torch.library.custom_op("vqa_sft::gated_delta_rule_backward", mutates_args=())
def _backward_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, context = run_kernels(query, key, value, decay, beta)
    q, k, v, g, b = (part.contiguous() for part in run_kernels_backward(context, grad))
    return q, k, v, g, b


@gated_delta_rule.register_fake
def _(*inputs: torch.Tensor) -> torch.Tensor:
    return inputs[2].new_empty(inputs[2].shape)


@_backward_of.register_fake
def _(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _backward_of(*ctx.saved_tensors, grad.contiguous())


gated_delta_rule.register_autograd(_differentiate, setup_context=_save)
