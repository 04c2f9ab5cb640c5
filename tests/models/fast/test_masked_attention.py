"""Attention by plain products against sdpa."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vqa_sft.models.fast import masked_attention


class Module(torch.nn.Module):
    num_key_value_groups = 3
    is_causal = True


def outputs_and_gradients(attend, mask, **options):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (6, 2, 2))
    output, _ = attend(Module(), query, key, value, mask, scaling=0.7, **options)
    return [output, *torch.autograd.grad((output**3).sum(), (query, key, value))]


@pytest.fixture
def image_mask():
    """Causal, but tokens 2 to 4 look at one another; the second row has two tokens of padding."""
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[:, :, 2:5, 2:5] = True
    mask[1, :, :, 7:] = False
    return mask


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "traced"])
def test_products_give_the_outputs_and_gradients_of_sdpa(image_mask, is_compiled):
    attend = masked_attention.masked_attention
    if is_compiled:
        attend = torch.compile(attend, dynamic=True, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(sdpa_attention_forward, image_mask)
    for got, wanted in zip(outputs_and_gradients(attend, image_mask), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_many_tokens_or_no_mask_stay_with_sdpa(image_mask, monkeypatch):
    monkeypatch.setattr(masked_attention, "Attend", None)  # nobody asks for it
    outputs_and_gradients(masked_attention.masked_attention, None)
    monkeypatch.setattr(masked_attention, "MAX_TOKENS", 8)
    outputs_and_gradients(masked_attention.masked_attention, image_mask)


def test_a_mask_of_each_head_and_values_of_another_width_stay_with_sdpa(image_mask):
    of_heads = image_mask.repeat(1, 6, 1, 1)
    of_heads[:, 1, :, 0] &= torch.arange(9) == 0
    expected = outputs_and_gradients(sdpa_attention_forward, of_heads)
    for got, wanted in zip(outputs_and_gradients(masked_attention.masked_attention, of_heads), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    query, key, value = (torch.randn(2, heads, 9, width) for heads, width in ((6, 8), (2, 8), (2, 4)))
    wanted, _ = sdpa_attention_forward(Module(), query, key, value, image_mask)
    got, _ = masked_attention.masked_attention(Module(), query, key, value, image_mask)
    torch.testing.assert_close(got, wanted)
