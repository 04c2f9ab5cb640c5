"""Attention over rows that follow one another in one long row, without padding.

    lengths 5, 3, 4 -> q, k, v (1, H, 12, D), cu_seq_lens [0, 5, 8, 12] -> every row attends to itself alone

With a `shared_prefix` (packing.py) the tokens that all rows begin with are once in q, k and v; the rows are written
out for the attention alone.

Registered with transformers' AttentionInterface under two names. The vision tower asks for `TOWER`, whose name holds
"flash": then the library makes one call a layer and does not loop over windows in Python. On a GPU of compute
capability 8.0 or newer, in half precision, the call goes to `torch.nn.attention.varlen`; elsewhere to one sdpa call for
all rows of one length; without `cu_seq_lens_q` to the library's own sdpa. Goes when that learns `cu_seq_lens`.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODER = "vqa_sft_packed"
TOWER = "vqa_sft_packed_flash"

_CAUSAL = {True: {"window_size": (-1, 0)}, False: {}}
_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # not in torch 2.11

_lengths: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def can_use_varlen(device: torch.device, dtype: torch.dtype, head_dims: Iterable[int] = ()) -> bool:
    """Whether `torch.nn.attention.varlen` works there."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.flash_sdp_enabled()
        and all(dim <= 256 and dim % 8 == 0 for dim in head_dims)  # as flash attention has kernels for
    )


def uses_varlen(model: torch.nn.Module) -> bool:
    """Whether its packed rows go by that kernel, as `speedups.pack_rows` has decided."""
    return any(getattr(module, "use_varlen", False) for module in model.modules())


def packed_attention(  # noqa: PLR0913  the signature is transformers' own
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    shared_prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` (1, H, T, D), `key` and `value` (1, H_kv, T, D), `cu_seq_lens_q` (rows + 1,) int32, `max_length_q` at
    least the longest row -> (1, T, H, D)."""
    if shared_prefix is not None:
        query, key, value = (WriteOut.apply(x, *shared_prefix) for x in (query, key, value))
        output, _ = packed_attention(
            module, query, key, value, None, scaling, dropout, is_causal, cu_seq_lens_q, max_length_q
        )
        return TakeOwn.apply(output, *shared_prefix[:2]), None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if query.dtype != value.dtype:  # under autocast the rotation of fp32 tables may leave fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if getattr(module, "use_varlen", False) and value.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
        gqa = _GQA if q.shape[1] != k.shape[1] else {}
        length = max_length_q
        # One tensor for both: some kernels take causal rows only if queries and keys have the same.
        cu = cu_seq_lens_q
        output = varlen_attn(q, k, v, cu, cu, length, length, scale=scaling, **_CAUSAL[bool(is_causal)], **gqa)
        return output[None], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return _by_length(query, key, value, cu_seq_lens_q, scaling, bool(is_causal)), None


def tower_attention(*args: Any, shared_prefix: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The prefix is the decoder's, though it reaches every module."""
    return packed_attention(*args, **kwargs)


class WriteOut(torch.autograd.Function):
    """Packed row (1, H, N, D) -> rows written out (1, H, M, D). Backward, the copies of a token are summed in fp32 and
    in a fixed order, which indexing would not do."""

    @staticmethod
    def forward(
        ctx: Any, row: torch.Tensor, places: torch.Tensor, own: torch.Tensor, copies: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(own, copies)
        return row[:, :, places]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own, copies = ctx.saved_tensors
        if not len(copies):
            raise RuntimeError("rows in several orders have no gradients")
        shared = grad[:, :, copies].sum(dim=2, dtype=torch.float32).to(grad.dtype)  # (1, H, B, P, D) -> (1, H, P, D)
        return torch.cat([shared, grad[:, :, own[copies.shape[1] :]]], dim=2), None, None, None


class TakeOwn(torch.autograd.Function):
    """Rows written out (1, M, H, D) -> packed row (1, N, H, D); of a shared token, its first copy."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places, own)
        return rows[:, own]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        places, own = ctx.saved_tensors
        is_first = own[places] == torch.arange(len(places), device=places.device)
        return grad[:, places] * is_first[:, None, None], None, None


def _by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_lens: torch.Tensor, scaling: float, causal: bool
) -> torch.Tensor:
    """One sdpa call for all rows of one length: (1, H, T, D) -> (1, T, H, D)."""
    num_heads, num_tokens, head_dim = query.shape[1:]
    outputs, places = [], []
    for length, starts in _starts_of_length(cu_seq_lens).items():
        if len(starts) * length == num_tokens:  # all of one length, as the windows of most images are
            rows, place = [x[0].view(num_heads, -1, length, head_dim) for x in (query, key, value)], None
        else:
            place = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
            rows = [x[0][:, place].view(num_heads, -1, length, head_dim) for x in (query, key, value)]
        rows = [x.transpose(0, 1) for x in rows]  # (rows, H, length, D)
        output = F.scaled_dot_product_attention(*rows, scale=scaling, is_causal=causal)
        outputs.append(output.transpose(1, 2).reshape(-1, num_heads, head_dim))  # (rows * length, H, D)
        places.append(place)
    if len(outputs) == 1 and places[0] is None:
        return outputs[0][None]
    back = torch.empty(num_tokens, dtype=torch.int64, device=query.device)
    back[torch.cat(places)] = torch.arange(num_tokens, device=query.device)
    return torch.cat(outputs)[back][None]


def _starts_of_length(cu_seq_lens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Where the rows of every length start; kept as long as the tensor lives, for every layer asks."""
    known = _lengths.get(cu_seq_lens)
    if known is None:
        edges = cu_seq_lens.tolist()
        starts: dict[int, list[int]] = {}
        for start, end in zip(edges, edges[1:], strict=False):
            starts.setdefault(end - start, []).append(start)
        known = {length: torch.tensor(found, device=cu_seq_lens.device) for length, found in starts.items()}
        _lengths[cu_seq_lens] = known
    return known


def _mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The library's own, but none for one row without padding: of packed rows it would be one of all their tokens,
    which nobody reads."""
    if batch_size == 1 and q_length == kv_length and kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, **kwargs)


for _name, _attention in ((DECODER, packed_attention), (TOWER, tower_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
