"""What an adapter goes to in mixtures of experts, and in models that hear as well as see."""

import re

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from families import TINY, skeleton as build_skeleton
from peft import get_peft_model
from reference import TOLERANCE, Reference, quick_or_slow, write_adapter, write_rows
from torch.testing import assert_close
from trainers import build_trainer
from transformers import AutoModelForImageTextToText
from trl import ModelConfig

from vqa_sft.config.recipe import read_recipe
from vqa_sft.errors import InputError
from vqa_sft.inference.predictor import Predictor
from vqa_sft.models import rounded
from vqa_sft.models.load import load_model
from vqa_sft.models.lora import describe_experts, lora_config
from vqa_sft.models.parts import fused_experts, vision_layers
from vqa_sft.models.scoring import answer_logits

MIXTURES = ["qwen3_vl_moe", "qwen3_5_moe", "qwen4_exp", "gemma4_moe", "glm4v_moe", "kimi_k25", "llama4"]
ARGS = ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0)


@pytest.fixture
def skeleton(families):
    return lambda family: build_skeleton(families(family))


def adapt(model, **asked):
    """Names of the layers and parameters that get an adapter, and how many values it trains."""
    with torch.device("meta"):
        adapted = get_peft_model(model, lora_config(ARGS, model, **asked))
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    names = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    return names, sum(weight.numel() for weight in trained.values())


@pytest.mark.parametrize("family", MIXTURES)
def test_routed_experts_get_adapters_where_they_are_asked_for_and_the_line_says_how_many(skeleton, family):
    model = skeleton(family)
    plain_line = describe_experts(model, lora_config(ARGS, model))
    line = describe_experts(model, lora_config(ARGS, model, adapt_experts=True))
    (plain, num_plain), (asked, num_asked) = adapt(skeleton(family)), adapt(skeleton(family), adapt_experts=True)
    assert not any(".experts" in name for name in plain)
    assert asked - plain and all(re.search(r"\.experts(\.base_layer)?$", name) for name in asked - plain)
    said = f"{num_asked - num_plain:,} parameters"
    assert plain_line.startswith("No adapter for the routed experts (") and f"would train {said}" in plain_line
    assert line.startswith("Adapters of the routed experts (") and line.endswith(f"have {said}.")


def test_adapted_experts_are_kept_twice_unless_layers_are_computed_again(families, skeleton, contest, tmp_path):
    model = skeleton("qwen3_vl_moe")
    config = lora_config(ARGS, model, adapt_experts=True)
    assert "keeps a second copy of the experts" in describe_experts(model, config, is_kept=True)
    trainer, examples, _ = build_trainer(families("qwen3_vl_moe"), contest, tmp_path, 2, adapt_experts=True)
    trainer.model.train()
    (size,) = {weight.numel() for name, weight in trainer.model.named_parameters() if name.endswith("gate_up_proj")}
    batch = trainer.data_collator(list(examples))
    assert size in sizes_kept(trainer.model, batch)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert size not in sizes_kept(trainer.model, batch)


def sizes_kept(model, batch):
    """Sizes of the tensors that a forward pass keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda kept: kept):
        answer_logits(model, batch)
    return kept


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_get_no_adapter_and_shared_experts_do(skeleton, family):
    model = skeleton(family)
    names, _ = adapt(model)
    chooses = re.compile(r"\b(router|gate|shared_expert_gate|indexer)\b")
    assert not any(map(chooses.search, names))
    shared = {name for name, _ in model.named_modules() if re.search(r"shared_experts?\.up_proj$", name)}
    # PEFT 0.21 cannot adapt those of GLM-4.5V alone (families.py).
    assert shared <= names or family == "glm4v_moe"


def test_the_router_of_gemma_4_is_a_linear_layer_within_the_router(skeleton):
    model = skeleton("gemma4_moe")
    routers = [name for name, _ in model.named_modules() if name.endswith("router.proj")]
    assert routers and adapt(model)[0].isdisjoint(routers)


@pytest.mark.parametrize("family", TINY)
def test_no_family_adapts_what_is_outside_its_language_model_unasked(skeleton, family):
    names, _ = adapt(skeleton(family))
    assert names and all(re.search(r"language_model|text_model", name) for name in names)


def test_the_tower_of_a_model_that_hears_as_well_is_the_one_that_sees(skeleton):
    model = skeleton("gemma4")
    tower, merger = vision_layers(model)
    assert any("audio_tower" in name for name, _ in model.named_modules())
    assert tower and all(name.startswith("model.vision_tower.encoder.layers.") for name in tower)
    assert merger == ["model.embed_vision.embedding_projection"]


@pytest.mark.parametrize("field", ["adapt_tower", "adapt_merger"])
def test_layers_in_whose_place_peft_adapts_experts_are_refused(skeleton, field):
    with pytest.raises(InputError, match=f"{field}: PEFT would adapt the experts of GLM-4.5V in their place"):
        lora_config(ARGS, skeleton("glm4v_moe"), **{field: True})


def test_experts_that_cannot_be_adapted_are_refused(skeleton):
    with pytest.raises(InputError, match="Qwen3VLForConditionalGeneration has no routed experts"):
        lora_config(ARGS, skeleton("qwen3_vl"), adapt_experts=True)
    model = skeleton("qwen3_vl_moe")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(InputError, match="quantised itself"):
        lora_config(ARGS, model, adapt_experts=True)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout: PEFT has none for the parameters of experts"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_target_parameters": "experts.down_proj"}, "Keep one of the two"),
        ({"lora_target_modules": "q_proj"}, "adapt_experts: lora_target_modules names all layers"),
        ({"use_peft": False}, "adapt_experts: full fine-tuning trains all weights"),
        ({"vision_learning_rate": 1e-5}, "nothing outside the language model is trained"),
    ],
)
def test_fields_that_do_not_go_with_adapted_experts_are_refused(contest, tmp_path, values, says):
    values = {"model_name_or_path": "x", "train_data": contest / "train.csv", "output_dir": tmp_path} | values
    with pytest.raises(InputError, match=says):
        read_recipe(["--adapt_experts", "true", *(f"--{name}={value}" for name, value in values.items())])


@pytest.fixture
def no_packed_kernel(monkeypatch):
    """On a CPU with AVX512-BF16 bitsandbytes packs 4-bit weights in blocks of 64 columns; the tiny models have 32."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def in_4_bit(folder, **more):
    return ModelConfig(model_name_or_path=folder, dtype=None, use_peft=True, load_in_4bit=True, lora_r=4, **more)


def plain_in_4_bit(folder, *, nested=False):
    """Plain transformers' 4 bit, whose experts are whole, with weights that were rounded by hand."""
    model = build_skeleton(folder)
    asked = rounded.settings(in_4_bit(folder, use_bnb_nested_quant=nested), torch.float32, model.config)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, quantization_config=asked).eval()
    for weight in fused_experts(model).values():
        numbers, scales = quantize_4bit(weight.data, quant_type="nf4", compress_statistics=nested)
        weight.data = dequantize_4bit(numbers, scales)
    return model


@pytest.mark.parametrize("family", [*MIXTURES, *quick_or_slow(name for name in TINY if name not in MIXTURES)])
def test_4_bit_has_the_log_probabilities_and_gradients_of_plain_transformers_with_experts_rounded_by_hand(
    families, tmp_path, no_packed_kernel, one_thread, capsys, family
):
    folder = families(family)
    plain, row = plain_in_4_bit(folder), write_rows(tmp_path)[1]
    adapter = write_adapter(folder, tmp_path / "adapter")
    num = sum(weight.numel() for weight in fused_experts(plain).values())
    model = load_model(in_4_bit(folder), "fp32")
    whole, stored = (num * bytes_a_weight / 2**30 for bytes_a_weight in (4, 0.5 + 4 / 64))
    said = f"load_in_4bit rounds the routed experts ({num:,} parameters, {whole:,.2f} GiB) to {stored:,.2f} GiB"
    assert (said in capsys.readouterr().out) == (family in MIXTURES)
    assert not fused_experts(model)  # nothing whole is left
    assert sum(weight.dtype == torch.uint8 for weight in model.parameters()) > 5
    expected, found = Reference(family, folder, adapter, plain), Reference(family, folder, adapter, model)
    assert_close(found.choice_log_probs(row), expected.choice_log_probs(row), atol=TOLERANCE, rtol=0)
    of_plain, of_ours = expected.gradients(row), found.gradients(row)
    for weight, gradient in of_plain.items():
        assert_close(of_ours[weight], gradient, atol=TOLERANCE * gradient.abs().max().item(), rtol=0, msg=weight)


def test_a_run_on_experts_in_4_bit_trains_and_predicts_as_with_experts_rounded_by_hand(
    families, contest, sft, tmp_path, no_packed_kernel, one_thread
):
    folder = families("qwen3_vl_moe")
    options = {"load_in_4bit": True, "max_steps": 2, "learning_rate": 1e-2, "use_bnb_nested_quant": True}
    run = sft(folder, tmp_path / "run", **options)
    with torch.no_grad():
        row = write_rows(tmp_path)[0]
        plain = Reference("qwen3_vl_moe", folder, str(run), plain_in_4_bit(folder, nested=True))
        expected = plain.choice_log_probs(row).numpy()
    found = Predictor(str(run), use_cpu=True)(row["images"], row["question"], row["choices"])
    np.testing.assert_allclose(np.log(found), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("names", ["down_proj", "all-linear"])
def test_names_of_a_recipe_are_layers_and_not_experts_in_4_bit(families, no_packed_kernel, names):
    args = in_4_bit(families("llama4"), lora_target_modules=[names])
    model = load_model(args, "fp32")
    adapted = get_peft_model(model, lora_config(args, build_skeleton(families("llama4"))))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained and not any("experts" in name.split(".") for name in trained)


def test_a_mixture_that_fits_on_its_gpu_only_once_it_is_rounded_is_read_to_the_cpu(families, monkeypatch):
    asked = rounded.settings(in_4_bit("x"), torch.float32, build_skeleton(families("qwen3_vl_moe")).config)
    gpu, size = {"": 0}, {}
    for family in ("qwen3_vl_moe", "qwen3_vl"):
        size[family] = sum(4 * weight.numel() for weight in build_skeleton(families(family)).parameters())
    for family, free, expected in (
        ("qwen3_vl_moe", 1.5, gpu),
        ("qwen3_vl_moe", 0.5, {"": "cpu"}),
        ("qwen3_vl", 0.5, gpu),
    ):
        config = build_skeleton(families(family)).config
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free * size[family]: (free, free))
        assert rounded.place(config, asked, torch.float32, gpu) == expected
        assert rounded.place(config, asked, torch.float32, None) is None


def test_experts_in_4_bit_take_no_adapter_of_their_own(families):
    with pytest.raises(InputError, match="load_in_4bit rounds the experts, and an adapter of their own"):
        lora_config(in_4_bit("x"), build_skeleton(families("qwen3_vl_moe")), adapt_experts=True)


def test_rounding_to_8_bit_says_that_fused_experts_stay_whole(families, capsys):
    args = ModelConfig(model_name_or_path=families("qwen3_vl_moe"), dtype="bfloat16", use_peft=True, load_in_8bit=True)
    experts = fused_experts(load_model(args, "bf16"))
    assert experts and {weight.dtype for weight in experts.values()} == {torch.bfloat16}
    num = sum(weight.numel() for weight in experts.values())
    said = f"load_in_8bit leaves the routed experts ({num:,} parameters, {num * 2 / 2**30:,.2f} GiB) whole"
    assert said in capsys.readouterr().out
