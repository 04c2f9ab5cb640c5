"""Bases that are quantised themselves against plain transformers and PEFT; and those that cannot be loaded here."""

import csv
import shutil

import pytest
import torch
from peft import PeftModel
from quantised import KINDS, OTHERS, edit_config, edit_weights, save_quantised
from safetensors.torch import load_file
from scripts import run_script
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig

from vqa_sft.batch.prompts import Prompts, render_messages
from vqa_sft.data.examples import load_examples
from vqa_sft.errors import InputError
from vqa_sft.images import open_image
from vqa_sft.models import load as models, quantized
from vqa_sft.models.fast import vision
from vqa_sft.predictions.file import read_predictions

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "smolvlm")


@pytest.fixture(autouse=True)
def no_packed_kernel(monkeypatch):
    """On a CPU with AVX512-BF16 bitsandbytes packs 4-bit weights in blocks of 64 columns; the tiny models have 32."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def quantised(families, tmp_path_factory):
    """`quantised("fp8", "llava")`: the folder of such a checkpoint, made once a module."""
    root, made = tmp_path_factory.mktemp("quantised"), {}

    def folder(kind, family="qwen2_5_vl", **how):
        key = f"{family} {kind} {how}"
        if key not in made:
            made[key] = save_quantised(families(family), kind, root / str(len(made)), **how)
        return made[key]

    return folder


def arguments(name, **more):
    return ModelConfig(**{"model_name_or_path": str(name), "dtype": None, "use_peft": True} | more)


def ours(name, **more):
    return models.load_model(arguments(name, **more), "fp32")


def plain(name):
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))  # compressed-tensors has whole weights from the first pass on
    return model


def assert_same_weights(one, other):
    """Bit for bit, whatever they are stored as."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype == other[name].dtype and weight.shape == other[name].shape, name
        as_bytes = [w.contiguous().reshape(-1).view(torch.uint8) for w in (weight.cpu(), other[name].cpu())]
        assert torch.equal(*as_bytes), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_base_has_the_weights_that_plain_transformers_gives_it(quantised, families, kind, family):
    folder = quantised(kind, family)
    assert_same_weights(ours(folder), plain(folder))
    decoder = {name for name in load_file(f"{folder}/model.safetensors") if "q_proj" in name or "up_proj" in name}
    assert decoder and quantized.describe(quantized.quantization_of(models.read_config(arguments(folder))))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():  # there is something to get wrong
        rounded, whole = ours(folder)(input_ids=ids).logits, plain(families(family))(input_ids=ids).logits
    assert 1e-3 < (rounded - whole).abs().max() < whole.abs().max()


def test_settings_that_stand_at_the_language_model_count_as_well(quantised):
    folder = quantised("fp8", inside_text=True)
    assert_same_weights(ours(folder), plain(folder))
    with pytest.raises(InputError, match=r"quantised itself \(fp8\) and cannot be rounded again"):
        ours(folder, load_in_4bit=True)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_base_that_needs_a_package_or_a_gpu_says_which_before_a_weight_is_read(quantised, monkeypatch, kind):
    folder = quantised(kind)
    with pytest.raises(Exception) as theirs:  # noqa: PT011, B017  each has its own
        plain(folder)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(InputError) as refused:
        ours(folder)
    said = str(refused.value)
    assert " ".join(str(theirs.value).split()) in said and f"is quantised itself ({kind}" in said and "\n" not in said


@pytest.mark.parametrize("method", ["modelopt", "a-method-of-next-year", None])
def test_a_method_that_transformers_does_not_know_is_refused(families, tmp_path, method):
    folder = shutil.copytree(families("qwen2_5_vl"), tmp_path / "base")
    own = {"quant_algo": "FP8"} if method is None else {"quant_method": method, "quant_algo": "FP8"}
    edit_config(folder, lambda config: config.update(quantization_config=own))
    with pytest.raises(InputError, match="which transformers does not load. Or take the checkpoint that it was made"):
        ours(folder)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "qweight"])
def test_numbers_of_8_bit_without_a_word_of_it_in_config_json_are_refused(quantised, families, tmp_path, scale):
    """As old modelopt checkpoints come, and copies whose config.json was edited: the scales would be left out."""
    folder = shutil.copytree(quantised("fp8"), tmp_path / "base")
    edit_config(folder, lambda config: config.pop("quantization_config"))
    edit_weights(folder, lambda weights: {n.replace("weight_scale_inv", scale): w for n, w in weights.items()})
    with pytest.raises(InputError, match=rf"14 unexpected, .* \(.*{scale}"):
        ours(folder)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("kind", ["fp8", "compressed int4", "bitsandbytes 4 bit"])
def test_4_or_8_bit_of_what_is_quantised_is_refused(quantised, kind, bits):
    with pytest.raises(InputError, match=r"is quantised itself .* Remove load_in_4bit and load_in_8bit"):
        ours(quantised(kind), **{bits: True})


def rows_of(contest):
    return list(load_examples(str(contest / "train.csv"))[0])


@torch.no_grad()
def plain_log_probs(model, folder, rows):
    """Of A, B, C and D, row by row."""
    processor, found = AutoProcessor.from_pretrained(folder), []
    ids = [processor.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
    for row in rows:
        messages = render_messages(row, (0, 1, 2, 3), Prompts())
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[open_image(row["images"][0])], return_tensors="pt")
        found.append(model(**inputs).logits[0, -1, ids].float().log_softmax(0))
    return torch.stack(found)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bitsandbytes 8 bit"])
def test_an_adapter_on_a_quantised_base_trains_and_scores_as_with_plain_transformers_and_peft(
    quantised, contest, sft, tmp_path, kind
):
    base, rows = quantised(kind), rows_of(contest)
    options = {"shuffle_choices": False, "per_device_train_batch_size": 24, "max_steps": 2, "logging_steps": 1}
    run = sft(base, tmp_path / "run", **options | {"learning_rate": 1e-2, "gradient_checkpointing": False})

    before = plain_log_probs(plain(base), run, rows)
    expected = -before[range(len(rows)), [row["answer"] for row in rows]].mean()
    with (run / "log.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["loss"]) == pytest.approx(expected.item(), abs=1e-4)

    adapted = plain_log_probs(PeftModel.from_pretrained(plain(base), run).eval(), run, rows)
    assert (adapted - before).abs().max() > 0.01  # it has learned something
    common = ("--data", contest / "train.csv", "--output", tmp_path / "out.csv", "--use_cpu", "--num_workers", 0)
    run_script("predict", "--run", run, *common)
    scored = torch.tensor(read_predictions(tmp_path / "out.parquet").choice_logits)
    assert_close(scored.float(), adapted, atol=1e-4, rtol=0)


def test_all_weights_of_a_quantised_base_cannot_be_trained(quantised, sft, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sft(quantised("fp8"), tmp_path / "run", use_peft=False)
    assert stop.value.code == 2 and "can only be trained through an adapter; set use_peft" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_recipe_ends_with_the_missing_package_before_an_earlier_run_moves_aside(quantised, sft, tmp_path, capsys):
    run = sft(quantised("fp8"), tmp_path / "run", max_steps=1)
    with pytest.raises(SystemExit) as stop:
        sft(quantised("awq"), run, overwrite=True)
    assert stop.value.code == 2 and "pip install gptqmodel" in capsys.readouterr().err
    assert (run / "run.json").is_file()


def test_only_layers_that_hold_whole_weights_alone_are_sped_up():
    """A padded or fused layer keeps its weight's numbers; scales of its own would be of other rows."""
    plain, scaled, packed, rounded = (torch.nn.Linear(4, 4) for _ in range(4))
    scaled.weight_scale = torch.nn.Parameter(torch.ones(4, 1))
    del packed.weight
    packed.weight_packed = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.int32), requires_grad=False)
    rounded.weight = torch.nn.Parameter(rounded.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert [vision.is_plain(layer) for layer in (plain, scaled, packed, rounded)] == [True, False, False, False]
