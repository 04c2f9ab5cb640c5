import pytest
import torch
from transformers import AutoModelForImageTextToText as Auto, Llama4Config, LlavaConfig
from transformers.integrations import sdpa_attention
from trl import ModelConfig

from vqa_sft import model as models
from vqa_sft.errors import InputError


@pytest.fixture
def gpu(monkeypatch):
    """`gpu((7, 5))`: as if the machine had a GPU of that compute capability."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_the_gpu_chooses_the_precision_when_the_recipe_says_nothing(gpu, capability, precision):
    gpu(capability)
    assert models.choose_precision({}) == precision
    assert models.choose_precision({"use_cpu": True}) == "fp32"
    assert models.choose_precision({"bf16": False, "fp16": False}) == "fp32"
    assert models.choose_precision({"fp16": True}) == "fp16"


def test_a_precision_that_the_device_does_not_compute_in_is_refused_in_training(gpu):
    with pytest.raises(InputError, match="fp16 is set, and this device computes in fp32 or bf16"):
        models.choose_precision({"fp16": True})
    gpu((7, 5))
    with pytest.raises(InputError, match="bf16 is set"):
        models.choose_precision({"bf16": True})


def test_a_run_is_scored_in_the_precision_it_was_trained_in_where_the_device_can(gpu, capsys):
    gpu((8, 0))
    assert models.choose_precision({}, trained="fp32") == "fp32"
    gpu((7, 5))
    assert models.choose_precision({}, trained="bf16") == "fp16"
    assert "trained in bf16" in capsys.readouterr().out


def test_grouped_attention_stays_out_of_the_slow_kernel_on_old_gpus_only(gpu, monkeypatch):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", original := sdpa_attention.use_gqa_in_sdpa)
    gpu((8, 0))
    models.avoid_math_attention()
    assert sdpa_attention.use_gqa_in_sdpa is original
    gpu((7, 5))
    models.avoid_math_attention()
    key = torch.zeros(1, 1, 1, 8)
    assert original(None, key, key) and not sdpa_attention.use_gqa_in_sdpa(None, key, key)


def test_weights_come_in_the_precision_they_train_in(families):
    args = ModelConfig(model_name_or_path=families("llava"), dtype=None, use_peft=True)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert models.load_model(args, precision).dtype == dtype
    # The gradient scaler refuses fp16 weights that are themselves trained.
    whole = ModelConfig(model_name_or_path=families("llava"), dtype=None, use_peft=False)
    assert models.load_model(whole, "fp16").dtype == torch.float32


def test_what_stands_beside_the_language_model_is_found_at_any_depth():
    with torch.device("meta"):
        llava = Auto.from_config(LlavaConfig())
        llama4 = Auto.from_config(Llama4Config())
    assert models.names_beside_decoder(llava) == ["model.vision_tower", "model.multi_modal_projector"]
    assert models.names_beside_decoder(llama4) == ["vision_model", "multi_modal_projector"]
    tower, merger = models.vision_layers(llama4)
    assert len(tower) == 34 * 6 and merger == ["multi_modal_projector.linear_1"]
    pattern = models.lora_config(ModelConfig(use_peft=True), llama4).target_modules
    assert "lm_head" not in pattern and "router" not in pattern and "q_proj" in pattern
