"""Linear attention in one graph against the library's own, with the library's PyTorch in place of fla's kernels."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, torch_chunk_gated_delta_rule

from vqa_sft.models.fast import linear_attention

# An operator runs below autograd; another thread does not.
ELSEWHERE = ThreadPoolExecutor(1)


@pytest.fixture
def kernels(monkeypatch):
    def run(*inputs):
        def differentiable():
            with torch.enable_grad():
                query, key, value, decay, beta = parts = [x.detach().requires_grad_() for x in inputs]
                options = {"g": decay, "beta": beta, "use_qk_l2norm_in_kernel": True}
                output, _ = torch_chunk_gated_delta_rule(query, key, value, **options)
                return output.detach(), (parts, output)

        return ELSEWHERE.submit(differentiable).result()

    def run_backward(context, grad):
        return ELSEWHERE.submit(lambda: torch.autograd.grad(context[1], context[0], grad)).result()

    monkeypatch.setattr(linear_attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(linear_attention, "run_kernels", run)
    monkeypatch.setattr(linear_attention, "run_kernels_backward", run_backward)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    widths = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    layer = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(hidden_size=64, **heads, **widths), 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def test_a_layer_gives_the_outputs_and_gradients_of_the_library(kernels, layer):
    x, mask = torch.randn(3, 70, 64, requires_grad=True), torch.ones(3, 70)
    mask[1, 50:] = 0

    def run(module):
        layer.zero_grad()
        x.grad = None
        output = module(x, attention_mask=mask)
        (output**2).sum().backward()
        return [output.detach(), x.grad.clone(), *(parameter.grad.clone() for parameter in layer.parameters())]

    expected = run(layer)
    assert linear_attention._is_known(layer)
    layer.forward = types.MethodType(linear_attention._forward, layer)
    # fullgraph: an error where the layer would be more than one graph
    for module in (layer, torch.compile(layer, dynamic=True, backend="aot_eager", fullgraph=True)):
        for got, wanted in zip(run(module), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_fp32_stays_with_the_library(layer, monkeypatch):
    x = torch.randn(2, 10, 64)
    expected = layer(x)
    monkeypatch.setattr(linear_attention, "gated_delta_rule", None)  # nobody asks for it
    layer.forward = types.MethodType(linear_attention._forward, layer)
    torch.testing.assert_close(layer(x), expected)


def test_a_convolution_with_an_adapter_stays_with_the_library(layer):
    adapted = get_peft_model(torch.nn.ModuleDict({"layer": layer}), LoraConfig(target_modules=["conv1d"], r=128))
    assert "conv1d" in {name for name, _ in layer.named_children()}
    assert not linear_attention._is_known(adapted.base_model.model["layer"])


def test_a_convolution_by_shifted_products_is_the_convolution():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 11, 6), torch.randn(6, 4)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    slow = torch.nn.functional.conv1d(padded, weight[:, None], groups=6).transpose(1, 2)
    torch.testing.assert_close(linear_attention.convolve(x, weight), torch.nn.functional.silu(slow))


def test_layers_are_changed_only_where_flash_linear_attention_is(layer, monkeypatch):
    decoder = SimpleNamespace(layers=[SimpleNamespace(linear_attn=layer), SimpleNamespace()])
    monkeypatch.setitem(sys.modules, "fla", None)
    assert linear_attention.speed_up_linear_attention(decoder) == 0 and "forward" not in vars(layer)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.gated_delta_rule.chunk"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert linear_attention.speed_up_linear_attention(decoder) == 1
    assert layer.forward.__func__ is linear_attention._forward
