"""What an adapter goes to in mixtures of experts, and in models that hear as well as see."""

import re

import pytest
import torch
from families import TINY, skeleton as build_skeleton
from peft import get_peft_model
from trainers import build_trainer
from trl import ModelConfig

from vqa_sft.config.recipe import read_recipe
from vqa_sft.errors import InputError
from vqa_sft.models.load import load_model
from vqa_sft.models.lora import describe_experts, lora_config
from vqa_sft.models.parts import vision_layers
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
    assert "keeps a second copy of the experts" in describe_experts(model, config, checkpoints=False)
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


def test_rounding_to_4_bit_says_that_fused_experts_stay_whole(families, capsys):
    args = ModelConfig(model_name_or_path=families("qwen3_vl_moe"), dtype="bfloat16", use_peft=True, load_in_4bit=True)
    model = load_model(args, "bf16")
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    assert experts and {weight.dtype for weight in experts} == {torch.bfloat16}
    size = sum(weight.numel() for weight in experts) * 2 / 2**30
    assert f"load_in_4bit leaves the routed experts whole ({size:,.2f} GiB)" in capsys.readouterr().out
