import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantised import edit_config, edit_weights
from safetensors.torch import load_file
from scripts import run_script
from transformers import AutoModelForImageTextToText as Auto, Llama4Config, LlavaConfig
from transformers.integrations import sdpa_attention
from trl import ModelConfig

from vqa_sft.errors import InputError
from vqa_sft.models import load as models
from vqa_sft.models.lora import lora_config
from vqa_sft.models.parts import names_beside_decoder, vision_layers
from vqa_sft.tiny.build import build_tokenizer


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
    assert names_beside_decoder(llava) == ["model.vision_tower", "model.multi_modal_projector"]
    assert names_beside_decoder(llama4) == ["vision_model", "multi_modal_projector"]
    tower, merger = vision_layers(llama4)
    assert len(tower) == 34 * 6 and merger == ["multi_modal_projector.linear_1"]
    pattern = lora_config(ModelConfig(use_peft=True), llama4).target_modules
    assert "lm_head" not in pattern and "router" not in pattern and "q_proj" in pattern


def changed(base, folder, change):
    """A copy of a checkpoint with its weights changed: `change` takes them by name and returns them."""
    shutil.copytree(base, folder)
    edit_weights(folder, change)
    return folder


def without(weights, part):
    return {name: weight for name, weight in weights.items() if part not in name}


def load(folder):
    return models.load_model(ModelConfig(model_name_or_path=str(folder), dtype=None, use_peft=True), "fp32")


@pytest.mark.parametrize(
    ("family", "lost", "says"),
    [
        (
            "qwen2_5_vl",
            "visual.blocks",
            r"24 missing, which would be random \(model.visual.blocks.0.attn.proj.bias, .*, \.\.\.\)",
        ),
        (
            "llava",
            "multi_modal_projector.linear_2",
            r"2 missing, which would be random \(model.multi_modal_projector.linear_2.bias, ",
        ),
        ("smolvlm", "lm_head", r"1 missing, which would be random \(lm_head.weight\)"),  # its embeddings are not tied
        ("qwen3_vl", "language_model.layers.2.", r"11 missing, which would be random \(model.language_model.layers.2"),
    ],
)
def test_a_base_whose_weights_are_missing_is_refused_with_their_names(families, tmp_path, family, lost, says):
    folder = changed(families(family), tmp_path / "base", lambda weights: without(weights, lost))
    with pytest.raises(InputError, match=f"does not hold the weights of .*: {says}"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "added"),
    [
        ("qwen2_5_vl", "visual.blocks.0.attn.q_norm.weight"),  # a norm that the class does not compute
        ("llava", "language_model.model.layers.2.mlp.up_proj.weight"),  # config.json says two layers
        ("qwen3_vl", "model.language_model.layers.0.self_attn.q_proj.bias"),
        ("smolvlm", "model.vision_model.head.weight"),
    ],
)
def test_a_base_with_weights_that_its_class_would_leave_out_is_refused(families, tmp_path, family, added):
    folder = changed(families(family), tmp_path / "base", lambda weights: weights | {added: torch.zeros(32)})
    with pytest.raises(InputError, match=r"1 unexpected, .* \(.*" + added.rpartition("model.")[2]):
        load(folder)


@pytest.mark.parametrize("part", ["mtp.layers.0.mlp.up_proj", "model.draft.fc", "value_head.summary"])
def test_a_head_that_stands_apart_is_left_out_and_named_in_one_line(families, tmp_path, capsys, part):
    base = families("qwen3_vl")
    folder = changed(base, tmp_path / "base", lambda weights: weights | {f"{part}.weight": torch.zeros(4, 4)})
    states = [load(name).state_dict() for name in (base, folder)]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
    assert (
        f"holds 1 weights of parts that Qwen3VLForConditionalGeneration does not use: {part}" in capsys.readouterr().out
    )


def test_weights_of_another_shape_are_refused_with_both(families, tmp_path):
    def change(weights):
        name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
        return weights | {name: weights[name][:, :60].clone()}

    folder = changed(families("llava"), tmp_path / "base", change)
    with pytest.raises(InputError, match=r"1 of another shape \(.*down_proj.weight \(32, 60\) for \(32, 64\)\)"):
        load(folder)


# As the Hub has them since transformers 4.52, and as it had them before.
LAYOUTS = {
    "qwen2_5_vl": [("visual.", "model.visual."), ("model.", "model.language_model."), ("lm_head.", "lm_head.")],
    "llava": [
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_old_and_new_names_of_weights_load_alike(families, tmp_path, family):
    def renamed(way):
        def change(weights):
            found = {}
            for name, weight in weights.items():
                pair = next(pair for pair in LAYOUTS[family] if name.startswith(pair[0]))
                found[name.replace(*pair, 1) if way == "new" else name] = weight
            return found

        return change

    old, new = (changed(families(family), tmp_path / way, renamed(way)) for way in ("old", "new"))
    assert load_file(old / "model.safetensors").keys() != load_file(new / "model.safetensors").keys()
    old, new = load(old).state_dict(), load(new).state_dict()
    assert all(torch.equal(weight, new[name]) for name, weight in old.items())


def test_positions_that_old_releases_saved_and_tied_heads_are_no_missing_or_unexpected_weights(families, tmp_path):
    saved = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    saved["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    load(changed(families("llava"), tmp_path / "llava", lambda weights: weights | saved))
    tied = changed(families("qwen2_5_vl"), tmp_path / "tied", lambda weights: without(weights, "lm_head"))

    def tie(config):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    edit_config(tied, tie)
    model = load(tied)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_runs_that_are_no_adapters_load_as_they_did(families, sft, contest, tmp_path):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", use_peft=False, max_steps=1)
    run_script(
        "predict", "--run", run, "--data", contest / "test.csv", "--output", tmp_path / "out.csv", "--use_cpu",
        "--num_workers", 0,
    )  # fmt: skip
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 25


def test_an_adapter_of_a_larger_base_is_refused_and_not_cut(families, tmp_path):
    """PEFT leaves out what has no place."""
    base = load(families("qwen3_vl"))
    targets = r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj"
    get_peft_model(base, LoraConfig(target_modules=targets, r=2)).save_pretrained(tmp_path / "adapter")
    smaller = changed(
        families("qwen3_vl"), tmp_path / "small", lambda weights: without(weights, "language_model.layers.2")
    )
    edit_config(smaller, lambda config: config["text_config"].update(num_hidden_layers=2))
    with pytest.raises(InputError, match=r"another base than .*: 4 of its weights have no place in it"):
        models.add_adapter(load(smaller), str(tmp_path / "adapter"))
    models.add_adapter(load(families("qwen3_vl")), str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("family", "field", "names", "says"),
    [
        ("qwen2_5_vl", "modules_to_save", ["nope"], "has no 'nope' .nearest: "),
        ("qwen2_5_vl", "target_modules", ["q_proj", "v_porj"], "has no 'v_porj' .nearest: v_proj"),
        ("llava", "target_modules", ["qproj"], "has no 'qproj' .nearest: q_proj"),
        ("llava", "target_modules", ["self_attention.q_proj"], "nearest: self_attn.q_proj"),
        ("smolvlm", "modules_to_save", ["lm_head", "embed_token"], "has no 'embed_token' .nearest: embed_tokens"),
        ("smolvlm", "modules_to_save", ["head"], "nearest: lm_head"),  # PEFT would take whatever ends in head
        ("qwen3_vl", "target_parameters", ["mlp.experts.gate_up"], "has no 'mlp.experts.gate_up' .nearest: "),
        ("qwen3_vl", "target_modules", [r".*\.layer\.\d+\.q_proj"], "no module of the model matches"),
        ("qwen3_vl", "target_modules", ["(q_proj"], "is no regular expression"),
    ],
)
def test_names_of_modules_that_match_nothing_are_refused_with_the_nearest(families, family, field, names, says):
    args = {"model_name_or_path": families(family), "dtype": None, "use_peft": True, f"lora_{field}": names}
    model = models.build_skeleton(ModelConfig(**args))
    with pytest.raises(InputError, match=f"lora_{field}: .*{says}"):
        lora_config(ModelConfig(**args), model)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["q_proj"], 3),
        (["self_attn.q_proj", "v_proj"], 6),
        ([r".*language_model.*\.(k|v)_proj"], 6),
        (["all-linear"], 39),
    ],
)
def test_names_that_match_are_adapted_a_single_one_too(families, targets, adapted):
    """TRL makes a text of a list of one, which PEFT would take for a pattern of whole names."""
    args = ModelConfig(model_name_or_path=families("qwen3_vl"), dtype=None, use_peft=True, lora_target_modules=targets)
    model = models.build_skeleton(args)
    with torch.device("meta"):
        peft = get_peft_model(model, lora_config(args, model))
    assert sum(name.endswith("lora_A.default.weight") for name, _ in peft.named_parameters()) == adapted


def test_a_recipe_with_an_unknown_name_ends_before_a_weight_is_loaded(families, sft, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("a weight was loaded"))
    with pytest.raises(SystemExit) as stop:
        sft(families("llava"), tmp_path / "run", lora_modules_to_save="nope")
    assert stop.value.code == 2 and "has no 'nope' (nearest: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def with_config(families, tmp_path):
    """`with_config(key=value)`: a checkpoint whose config.json says that too."""

    def build(**changed):
        folder = tmp_path / "changed"
        shutil.copytree(families("qwen2_5_vl"), folder)
        edit_config(folder, lambda config: config.update(changed))
        return str(folder)

    return build


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model_type": "udop"}, r"is an encoder-decoder \(udop\)"),
        ({"model_type": "qwen2"}, r"\(qwen2\) is no model of images and text that transformers knows"),
        (
            {
                "model_type": "internvl_chat",
                "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
            },
            "brings code of its own. Set trust_remote_code: true",
        ),
        ({"model_type": "qwen99_vl"}, "does not recognize this architecture"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line_with_the_reason(with_config, changed, says):
    folder = with_config(**changed)
    with pytest.raises(InputError, match=says) as refused:
        models.build_skeleton(ModelConfig(model_name_or_path=folder, use_peft=True))
    assert "\n" not in str(refused.value)


def test_a_model_of_text_alone_is_refused_by_its_processor(tmp_path):
    build_tokenizer(["Which digit is this?"] * 4).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="has no processor for images and text, .* Take a vision-language model"):
        models.load_processor(str(tmp_path))


def test_where_weights_do_not_fit_the_first_that_does_not_is_named(tmp_path):
    """As torch says it, under ZeRO-3: all of them, below a line that ends with a colon."""
    error = RuntimeError(
        "Error(s) in loading state_dict for Net:\n\tsize mismatch for a: (2,), (3,).\n\tsize mismatch for b."
    )
    said = str(models.cannot_load(str(tmp_path), error))
    assert said.endswith("cannot be loaded: Error(s) in loading state_dict for Net: size mismatch for a: (2,), (3,).")
