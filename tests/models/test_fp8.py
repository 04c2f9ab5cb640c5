"""FP8 checkpoints in blocks, kept in FP8 as on a GPU of compute capability 8.9 and unpacked as elsewhere, against plain
transformers and PEFT with whole weights of the same numbers, in fp32. Keeping them needs no GPU, but for the kernel."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import TINY
from old_layouts import RENAMED, save_layouts
from peft import get_peft_model
from quantised import NOT_IN_FP8, save_fp8
from reference import LEARNING_RATE, TOLERANCE, Reference, quick_or_slow, write_adapter, write_rows
from safetensors.torch import load_file
from scripts import train
from torch.testing import assert_close
from transformers import AutoConfig
from transformers.integrations import finegrained_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from trl import ModelConfig

from vqa_sft.inference.predictor import Predictor
from vqa_sft.models import fp8, fp8_base, quantized
from vqa_sft.models.load import load_model
from vqa_sft.models.lora import lora_config
from vqa_sft.runs.export import export_run

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = [name for name in TINY if name not in NOT_IN_FP8]
KEPT = pytest.mark.parametrize("keeps", [True, False], ids=["kept", "unpacked"])


@pytest.fixture
def gpu(monkeypatch):
    """Lets FP8 weights stay what they are, as if there was a GPU that can multiply them."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr(fp8, "stays_fp8", lambda own, device_map: True)
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", None)
    monkeypatch.setenv("TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR", "0")
    fp8.choose_product.cache_clear()
    yield
    fp8.choose_product.cache_clear()


@pytest.fixture(scope="module")
def rounded(families, tmp_path_factory):
    """`rounded("llava")`: folders of the FP8 checkpoint and of the whole one, made once a module."""
    made = {}

    def folders(family, **how):
        key = f"{family} {how}"
        if key not in made:
            folder, base = tmp_path_factory.mktemp(family), families(family)
            if family in RENAMED:  # as the Hub has them
                base = save_layouts(family, base, folder)[1]
            made[key] = save_fp8(base, folder, **how)
        return made[key]

    return folders


def ours(folder, **options):
    return load_model(ModelConfig(model_name_or_path=folder, dtype=None, use_peft=True), "fp32", **options)


def num_fp8(model):
    return sum(weight.dtype == torch.float8_e4m3fn for weight in model.parameters())


@KEPT
@pytest.mark.parametrize("family", quick_or_slow(FAMILIES))
def test_log_probabilities_and_gradients_are_those_of_whole_weights(gpu, rounded, tmp_path, family, keeps):
    assert_same(*rounded(family), tmp_path, family, keeps)


@KEPT
def test_one_scale_a_layer_and_another_of_what_goes_in_is_read_as_well(gpu, rounded, tmp_path, keeps):
    assert_same(*rounded("mistral3", per_layer=True), tmp_path, "mistral3", keeps)


def assert_same(base, whole, tmp_path, family, keeps):
    adapter, row = write_adapter(whole, tmp_path / "adapter"), write_rows(tmp_path)[1]
    model = ours(base, unpacks_fp8=not keeps)
    assert (num_fp8(model) > 5) == keeps
    expected, found = Reference(family, whole, adapter), Reference(family, whole, adapter, model)
    assert_close(found.choice_log_probs(row), expected.choice_log_probs(row), atol=TOLERANCE, rtol=0)
    of_whole, of_fp8 = expected.gradients(row), found.gradients(row)
    assert of_whole.keys() == of_fp8.keys()
    for name, gradient in of_whole.items():
        assert_close(of_fp8[name], gradient, atol=TOLERANCE * gradient.abs().max().item(), rtol=0, msg=name)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5_moe"])
def test_in_half_precision_weights_that_are_kept_or_unpacked_have_the_numbers_of_whole_ones(
    gpu, rounded, monkeypatch, family
):
    """Of checkpoints that hold what is not FP8 in fp32."""
    monkeypatch.setattr(fp8, "FEW", 3)  # of four experts
    base, whole = (ModelConfig(model_name_or_path=folder, dtype=None, use_peft=True) for folder in rounded(family))
    kept, unpacked = (load_model(base, "bf16", unpacks_fp8=unpacks).eval() for unpacks in (False, True))
    expected, ids = load_model(whole, "bf16").eval(), torch.arange(5, 25)[None]
    of_whole, of_unpacked = expected.state_dict(), unpacked.state_dict()
    assert of_whole.keys() == of_unpacked.keys()
    assert all(torch.equal(weight, of_unpacked[name]) for name, weight in of_whole.items())
    assert {name: weight.dtype for name, weight in of_whole.items()} == {n: w.dtype for n, w in of_unpacked.items()}
    with torch.no_grad():
        assert torch.equal(kept(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("per_layer", [True, False], ids=["a scale a layer", "blocks"])
def test_base_precision_takes_scales_that_fit_and_rounds_blocks_again(gpu, rounded, monkeypatch, capsys, per_layer):
    monkeypatch.setattr(fp8_base, "why_not", lambda device: None)
    folder, whole = rounded("mistral3", per_layer=per_layer)
    args = ModelConfig(model_name_or_path=folder, dtype=None, use_peft=True, lora_dropout=0.0)
    base, weights = ours(folder), load_file(f"{whole}/model.safetensors")
    assert base.is_quantized and quantized.quantization_of(base.config)
    fp8_base.check(folder, base.config)
    model = get_peft_model(base, lora_config(args, base))
    assert fp8_base.round_base(base) == sum(name.endswith("proj.base_layer") for name, _ in model.named_modules())
    assert not base.is_quantized and num_fp8(base) == 0
    assert ("of them were rounded a second time" in capsys.readouterr().out) != per_layer
    errors = []
    for name, layer in base.get_decoder().named_modules():
        if isinstance(layer, fp8_base.FP8Linear):
            expected = weights[f"language_model.model.{name.removesuffix('.base_layer')}.weight"].float()
            found = layer.weight.view(torch.float8_e4m3fn).float() * layer.scale
            errors.append(((found - expected).norm() / expected.norm()).item())
    assert max(errors) < 1e-6 if per_layer else 1e-3 < min(errors) < max(errors) < 0.04


@KEPT
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_a_run_on_fp8_trains_predicts_and_merges_as_on_whole_weights(
    gpu, rounded, tmp_path, monkeypatch, family, keeps
):
    monkeypatch.setattr(fp8, "stays_fp8", lambda own, device_map: keeps)
    base, whole = rounded(family)
    adapter, rows, run = write_adapter(whole, tmp_path / "adapter"), write_rows(tmp_path), tmp_path / "run"
    values = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": LEARNING_RATE}
    values |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "shuffle_choices": False}
    values |= {"answer_format": "index_from_0", "use_cpu": True, "dataloader_num_workers": 0, "disable_tqdm": True}
    train(model_name_or_path=base, train_data=tmp_path / "rows.jsonl", output_dir=run, init_adapter=adapter, **values)
    with (run / "log.csv").open() as file:
        losses = [float(line["loss"]) for line in csv.DictReader(file) if line["loss"]]
    reference = Reference(family, whole, adapter)
    np.testing.assert_allclose(losses, reference.train(rows, num_steps=2), atol=TOLERANCE, rtol=0)

    with torch.no_grad():
        expected = [reference.choice_log_probs(row).numpy() for row in rows]
    assert_log_probs(run, rows, expected)
    export_run(str(run), str(tmp_path / "merged"), dtype="fp32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    shapes = [{n: w.shape for n, w in of.items()} for of in (merged, load_file(f"{whole}/model.safetensors"))]
    assert shapes[0] == shapes[1]  # as the Hub has them
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    assert_log_probs(tmp_path / "merged", rows, expected)


def assert_log_probs(folder, rows, expected):
    predictor = Predictor(str(folder), use_cpu=True)
    for row, theirs in zip(rows, expected, strict=True):
        found = predictor(row["images"], row["question"], row["choices"])
        np.testing.assert_allclose(np.log(found), theirs, atol=TOLERANCE, rtol=0)


def test_a_kernel_that_cannot_be_had_is_named_with_what_is_done_instead(gpu, rounded, capsys):
    ours(rounded("qwen3_vl")[0])
    said = capsys.readouterr().out
    assert "The base stays in FP8: a layer is unpacked while it is used, because the kernel cannot be had (" in said
    assert "pip install kernels==" in said  # the version that transformers takes


def test_a_kernel_that_can_be_had_is_used(gpu, rounded, capsys, monkeypatch):
    kernel = finegrained_fp8.FineGrainedFP8(*[lambda *args, **kwargs: pytest.fail("too early")] * 3)
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", kernel)
    ours(rounded("qwen3_vl")[0])
    assert finegrained_fp8._FINEGRAINED_FP8 is kernel
    assert "The base stays in FP8: layers multiply in FP8" in capsys.readouterr().out


@pytest.mark.parametrize(("capability", "keeps"), [((9, 0), True), ((8, 9), True), ((8, 0), False)])
def test_fp8_stays_where_the_gpu_can_multiply_it(rounded, monkeypatch, capability, keeps):
    own = quantized.quantization_of(AutoConfig.from_pretrained(rounded("qwen3_vl")[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert not fp8.stays_fp8(own, None)  # a run with use_cpu on a machine that has such a GPU
    monkeypatch.setattr(fp8, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda")))
    assert fp8.stays_fp8(own, None) == keeps


def test_an_fp8_base_that_is_loaded_leaves_other_loads_as_they_were(gpu, families, rounded, tmp_path):
    """Qwen3-VL's experts are read in another way while an FP8 checkpoint is loaded."""
    for unpacks in (True, False):
        ours(rounded("qwen3_vl_moe")[0], unpacks_fp8=unpacks)
    model = ours(families("qwen3_vl_moe"))
    model.save_pretrained(tmp_path / "again")
    before, after = (
        load_file(f"{folder}/model.safetensors") for folder in (families("qwen3_vl_moe"), tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
