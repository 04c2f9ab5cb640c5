"""Attention of padded rows with a mask of their own (Gemma 4: images look at themselves both ways) by plain products.

sdpa has no flash kernel for such a mask, writes keys and values out for every query head, and has slow kernels for
heads of 512. For the few hundred tokens of a question with an image two products and a softmax, compiled, are faster.
Scores are in fp32, as in sdpa's kernels.

Registered with transformers' AttentionInterface as `MASKED`.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, shape_wrapper
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MASKED = "vqa_sft_masked"
MAX_TOKENS = 1024  # the scores of more take more memory than the time is worth


def masked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` (B, H, T, D), `key` and `value` (B, H_kv, S, D), `attention_mask` (B or 1, 1, T, S), true where a token
    may look -> (B, T, H, D)."""
    batch, heads, length, width = query.shape
    groups, others = heads // key.shape[1], key.shape[2]
    if query.dtype != value.dtype:  # under autocast the rotation of fp32 tables may leave fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    is_known = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    if not is_known or dropout or others > MAX_TOKENS or value.shape[-1] != width:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # The heads that share a key are one product.
    rows = query.reshape(batch * key.shape[1], groups * length, width)
    keys, values = (x.reshape(batch * key.shape[1], others, width) for x in (key, value))
    mask = attention_mask.expand(batch, 1, length, others)
    output = Attend.apply(rows, keys, values, mask, scaling or width**-0.5)
    return output.view(batch, heads, length, width).transpose(1, 2), None


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (N, I, K) times b (N, K, J) -> (N, I, J) in fp32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


class Attend(torch.autograd.Function):
    """query (N, G T, D), key and value (N, S, D) with N = B H_kv, mask (B, 1, T, S) -> (N, G T, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        batch, _, length, others = mask.shape
        scores = (product(query, key.transpose(1, 2)) * scaling).view(batch, -1, length, others)
        probs = torch.softmax(scores.masked_fill(~mask, torch.finfo(torch.float32).min), dim=-1)
        probs = probs.to(value.dtype).view(len(query), -1, others)
        ctx.save_for_backward(query, key, value, probs)
        ctx.scaling = scaling
        return torch.bmm(probs, value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, probs = ctx.saved_tensors
        of_probs = product(grad, value.transpose(1, 2))
        weighted = probs.float() * of_probs
        of_scores = weighted - probs.float() * weighted.sum(dim=-1, keepdim=True)
        of_scores = (of_scores * ctx.scaling).to(query.dtype)
        of_key = torch.bmm(of_scores.transpose(1, 2), query)
        return torch.bmm(of_scores, key), of_key, torch.bmm(probs.transpose(1, 2), grad), None, None


def _count_work(a: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


# The memory budget of compiled layers asks for the work of a product; torch 2.11's own count takes no dtype beside.
flop_registry[torch.ops.aten.bmm] = shape_wrapper(_count_work)
AttentionInterface.register(MASKED, masked_attention)
AttentionMaskInterface.register(MASKED, sdpa_mask)
