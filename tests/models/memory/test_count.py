"""What layers keep is counted as autograd saves it, for every family, kernel and kind of adapter."""

from dataclasses import replace

import pytest
import torch
from families import QUICK, TINY
from measured_memory import B7, shape_of
from peft import get_peft_model
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig

from vqa_sft.config.training import RecipeArguments
from vqa_sft.errors import InputError
from vqa_sft.models import shapes
from vqa_sft.models.fast import compilation, fused_lora
from vqa_sft.models.lora import lora_config
from vqa_sft.models.memory import count
from vqa_sft.models.memory.estimate import (
    counted,
    estimate,
    kept_by_compiled_kinds,
    kept_by_compiled_layer,
    need_gib,
    scoring_gib,
)
from vqa_sft.models.memory.images import read_images, see_images
from vqa_sft.models.memory.kernels import choose_all
from vqa_sft.models.memory.needs import Plan, read_shape, with_images
from vqa_sft.models.parts import decoder_layers

E4B, B30 = "google/gemma-4-E4B-it", "Qwen/Qwen3-VL-30B-A3B-Instruct"


@torch.library.custom_op("vqa_sft_tests::flash", mutates_args=())
def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (1, T, H, D) and log-sum-exp (1, H, T) in fp32, as of a fused attention; their values do not matter."""
    output = query.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return output, torch.zeros(query.shape[:3])


@flash.register_fake
def _(query, key, value):
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim), query.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("vqa_sft_tests::flash_backward", mutates_args=())
def flash_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@flash_backward.register_fake
def _(grad, query, key, value, kept):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def keep_as_flash_does(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def flash_gradients(ctx, grad, _):
    query, key, value, *kept = ctx.saved_tensors
    return flash_backward(grad, query, key, value, kept)


flash.register_autograd(flash_gradients, setup_context=keep_as_flash_does)


def attend_like_flash(module, query, key, value, *args, **kwargs):
    return flash(query, key, value)[0], None


AttentionInterface.register("keeps_like_flash", attend_like_flash)


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def small(request, monkeypatch):
    """The name of a shape whose widths are all different, small enough for a CPU."""
    text = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"intermediate_size": 448, "vocab_size": 1000, "head_dim": 128, "tie_word_embeddings": False}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 52, "num_heads": 2, "out_hidden_size": 256}
    if request.param == "qwen3_vl":
        text["num_attention_heads"] = 3
        vision["deepstack_visual_indexes"] = [0]
    monkeypatch.setitem(shapes.SHAPES, "small", (request.param, text, vision))
    return "small"


def saved_bytes(name, how, num_tokens=40, *, fused=False):
    """What autograd saves for one decoder layer, per token: counted, under autocast to bf16, without the weights."""
    args = small_args(name, how)
    model = AutoModelForImageTextToText.from_config(shapes.shape_config(name), dtype=torch.bfloat16)
    adapter = lora_config(args, model)
    if adapter is not None:
        get_peft_model(model, adapter)
    if fused:
        assert fused_lora.fuse(model.get_decoder())
    layer, text = model.get_decoder().layers[1], model.config.text_config
    text._attn_implementation = "keeps_like_flash"
    hidden = torch.randn(1, num_tokens, text.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotation = 2 * (torch.randn(1, num_tokens, 128, dtype=torch.bfloat16),)
    forward = layer.forward
    if how.get("compiled"):
        torch.compiler.reset()  # what other tests of the process compiled for such layers
        forward = torch.compile(forward, backend="aot_eager_decomp_partition")
    found = {}

    def count(tensor):
        if num_tokens in tensor.shape:  # neither a weight nor autocast's copy of one
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        forward(hidden, position_embeddings=rotation, attention_mask=None)
    own = {tensor.untyped_storage().data_ptr() for tensor in rotation}  # of all layers together
    return sum(size for place, (size, _) in found.items() if place not in own) / num_tokens


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lora_target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"use_peft": False},
        {"compiled": True},
    ],
    ids=["LoRA", "LoRA on some", "all weights", "compiled"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_a_layer_keeps_is_what_autograd_saves(small, how, fused):
    shape = read_shape(small_args(small, how), shapes.shape_config(small))
    plan = Plan(1, compiled=how.get("compiled", False), fused=fused)
    if plan.compiled:
        kept = sum(sum(part.values()) for part in kept_by_compiled_layer(shape, plan))
        assert kept_by_compiled_kinds(shape, plan)[0].token == kept
    else:
        kept = counted(shape, plan).kinds[0].kept.token  # the last layer is another kind
    fused = fused and how in ({}, {"compiled": True})
    assert kept == saved_bytes(small, how, fused=fused)


def small_args(name, how):
    args = ModelConfig(model_name_or_path=name, use_peft=True, lora_r=8, lora_dropout=0.0)
    return replace(args, **{key: value for key, value in how.items() if key != "compiled"})


# --- every family -----------------------------------------------------------------------------------------------------


def of_tiny(families, family, **values):
    """Shape and plan of a tiny family, with the images of its processor."""
    args = ModelConfig(model_name_or_path=families(family), use_peft=True, lora_r=8, lora_dropout=0.0)
    shape = read_shape(replace(args, **values), AutoConfig.from_pretrained(families(family)))
    return with_images(shape, Plan(2), see_images(AutoProcessor.from_pretrained(families(family))))


MARKS = {True: pytest.mark.medium, False: pytest.mark.slow}
FAMILIES = [pytest.param(name, marks=MARKS[name in QUICK]) for name in TINY]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_estimated(families, family):
    shape, plan = of_tiny(families, family)
    assert sum(kind.num_layers for kind in counted(shape, plan).kinds) == len(decoder_layers(shape.decoder))
    odd = {"lora_dropout": 0.1, "kernels": False, "value_bytes": 4, "weight_bytes": 4}
    for how in ({}, {"checkpointing": True}, {"bits": 4}, {"compiled": True}, odd):
        needs = [sum(estimate(shape, replace(plan, micro_batch=rows, **how)).values()) for rows in (1, 2, 4, 8)]
        assert needs == sorted(needs) and 0 < needs[0] < needs[-1] < 2
    scoring = [scoring_gib(shape, replace(plan, eval_batch=rows)) for rows in (1, 8)]
    assert 0 < scoring[0] < scoring[1] < 2
    assert need_gib(of_tiny(families, family, use_peft=False)[0], plan) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_without_values_is_what_autograd_saves_with_them(families, family):
    """Of a whole decoder, linear attention in PyTorch; kernels of attention are replaced as they are in the count."""
    shape, plan = of_tiny(families, family)
    plan, length = replace(plan, kernels=False, fused=False), 128
    model = AutoModelForImageTextToText.from_pretrained(families(family), dtype=torch.bfloat16)
    get_peft_model(model, lora_config(ModelConfig(use_peft=True, lora_r=8, lora_dropout=0.0), model))
    decoder, kind = model.get_decoder().train(), "grouped" if shape.packs_rows else "masked"
    decoder.config._attn_implementation = f"vqa_sft_counted_{kind}"
    own = {weight.untyped_storage().data_ptr() for weight in [*decoder.parameters(), *decoder.buffers()]}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for name, module in decoder.named_modules():
        if name.endswith(".indexer"):
            module.forward = choose_all
    for layer in decoder_layers(decoder):
        layer.forward = inside(torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), layer.forward)
    # As every layer but the first has it.
    decoder.get_input_embeddings().register_forward_hook(lambda module, given, output: output.requires_grad_())
    ids, rest = torch.ones(1, length, dtype=torch.int64), {}
    if kind == "masked":
        rest["attention_mask"] = torch.ones_like(ids)
    with torch.autocast("cpu", torch.bfloat16):
        decoder(input_ids=ids, use_cache=False, **rest)
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)
    found = counted(shape, replace(plan, fast=False))
    kept = sum(kind.num_layers * kind.kept.of(length, length) for kind in found.kinds)
    # Not all that layers are given is saved: a mask is copied for attention.
    assert 0.99 * kept <= total <= 1.01 * (kept + found.shared.of(length, length))


def inside(context, forward):
    def run(*args, **kwargs):
        with context:
            return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "qwen3_vl_moe", "gemma4_unified"])
@pytest.mark.parametrize("budget", [1, 0.7])
def test_what_compiled_layers_keep_is_counted_for_any_number_of_tokens(families, monkeypatch, family, budget):
    shape, plan = of_tiny(families, family)
    plan, before = replace(plan, compiled=True, memory_budget=budget), compilation.num_compilations()
    found = kept_by_compiled_kinds(shape, plan)
    rows, length = 11, 601
    monkeypatch.setattr(count, "COMPILED_ROWS", rows)
    monkeypatch.setattr(count, "COMPILED_LENGTH", length)
    monkeypatch.setattr(count, "COMPILED_TOKENS", rows * length)
    others = kept_by_compiled_kinds(replace(shape, compiled={}), plan)
    for one, other in zip(found, others, strict=True):
        if one is not None:  # the last layer of packed rows
            assert one.of(rows * length, length) == pytest.approx(other.of(rows * length, length), rel=1e-3)
    assert found[0].token > 0 and compilation.num_compilations() == before


# --- what is special in some ------------------------------------------------------------------------------------------


def test_kernels_of_linear_attention_keep_less_than_pytorch_does():
    shape, plan = shape_of("Qwen/Qwen3.5-9B"), Plan(4, max_pixels=448 * 448)
    linear, full = counted(shape, plan).kinds
    assert (linear.num_layers, full.num_layers) == (24, 8)
    # Query and key of 16 heads, value of 32, their chunk matrices, all of 128 (64) values in bf16; norms, decay, beta.
    kernel = 2 * (2 * 16 * 128 + 32 * 128 + 32 * 64) + 4 * 2 * 16 + (4 + 2) * 32
    plain = counted(shape, replace(plan, kernels=False)).kinds[0]
    assert kernel < linear.kept.token < plain.kept.token
    assert need_gib(shape, plan) + 5 < need_gib(shape, replace(plan, kernels=False))


def test_routed_experts_stay_whole_in_4_bit_and_keep_what_their_tokens_are():
    shape, plan = shape_of(B30), Plan(1, max_pixels=448 * 448)
    experts = 48 * 128 * 3 * 2048 * 768
    assert experts * 2 / 2**30 < estimate(shape, replace(plan, bits=4))["language model"] < 57
    # Eight experts a token: their inputs, gate and up, what is multiplied, and outputs.
    assert counted(shape, plan).kinds[0].kept.token > 8 * 2 * (2 * 768 + 768)
    experts_of_layer, adapted = 128 * 3 * 2048 * 768 * 2, shape_of(B30, rank=8, adapt_experts=True)
    added, beside = (counted(adapted, replace(plan, fused=fused)).kinds[0].kept for fused in (False, True))
    assert added.fixed > experts_of_layer  # PEFT adds base and adapter before the product
    assert beside.fixed < experts_of_layer / 10
    # The Bs of rank 8 once more in bf16; a rank of 12 takes PEFT's way again.
    assert counted(adapted, plan).copies == 48 * 128 * 8 * (2 * 768 + 2048) * 2
    by_peft = counted(shape_of(B30, rank=12, adapt_experts=True), plan)
    assert by_peft.copies == 0 and by_peft.kinds[0].kept.fixed > experts_of_layer


def test_layers_that_share_keys_and_embeddings_of_each_layer_are_counted_once():
    shape, plan = shape_of(E4B), Plan(1, max_pixels=280 * 48**2)
    found = counted(shape, plan)
    assert sum(kind.num_layers for kind in found.kinds) == 42
    assert found.shared.token > 42 * 256 * 2  # embeddings of each layer
    *_, sharing_window, sharing_full = found.kinds
    assert (sharing_window.num_layers, sharing_full.num_layers) == (15, 3)
    assert sharing_window.kept.token < found.kinds[0].kept.token


def test_compiled_layers_that_are_computed_again_keep_what_torch_2_11_does_not_let_go():
    """Counted there with `aot_eager_decomp_partition`: a wide tensor and three of the rank at a budget of 0.7."""
    shape, plan = shape_of(B7), Plan(16, max_pixels=448 * 448, checkpointing=True, memory_budget=0.7)
    more = estimate(shape, replace(plan, compiled=True))["kept for the backward pass"]
    less = estimate(shape, replace(plan, compiled=True, fused=False))["kept for the backward pass"]
    tokens = 16 * (256 + plan.text_tokens)
    assert (more - less) * 2**30 == pytest.approx(27 * tokens * 2 * (18944 + 3 * 32), rel=1e-3)


@pytest.mark.parametrize(
    "name, limit, pixels, tokens",
    [
        ("OpenGVLab/InternVL3_5-4B-HF", 1003520, 1003520, 1280),  # four tiles and a thumbnail
        ("OpenGVLab/InternVL3_5-4B-HF", 600000, 448 * 448, 256),  # two tiles need a third
        (E4B, None, 645120, 280),
        (E4B, 322560, 322560, 140),
        ("mistralai/Ministral-3-8B-Instruct-2512-BF16", 451584, 672 * 672, 600),
        ("Qwen/Qwen3.5-4B", 147456, 147456, 144),
    ],
)
def test_images_of_published_shapes_have_the_tokens_that_their_processors_give_them(name, limit, pixels, tokens):
    arguments = RecipeArguments(train_data="train.csv", max_pixels=limit)
    seen, line = read_images(ModelConfig(model_name_or_path=name), arguments, shapes.shape_config(name))
    assert (seen.pixels, seen.tokens) == (pixels, tokens)
    assert f"{pixels:,} pixels, {tokens:,} tokens each" in line


def test_a_model_that_cannot_do_without_values_is_refused_in_one_line(families, monkeypatch):
    shape, plan = of_tiny(families, "qwen2_5_vl")

    def look(layer, hidden, *args, **kwargs):
        return hidden if float(hidden.sum()) > 0 else -hidden

    monkeypatch.setattr(type(decoder_layers(shape.decoder)[0]), "forward", look)
    with pytest.raises(InputError, match="memory of qwen2_5_vl_text cannot be estimated: its layers do not run on"):
        estimate(replace(shape, counted={}), plan)
