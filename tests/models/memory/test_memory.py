"""The estimate against peaks measured on GPUs, against what autograd really saves, and what is made of it."""

import copy
import functools
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from measured_memory import B3, B7, B8, LESS, POINTS, shape_of
from peft import get_peft_model
from quantised import FP8, KINDS, OTHERS
from scripts import RECIPES
from trl import ModelConfig, SFTConfig

from vqa_sft.config.fields import read_yaml
from vqa_sft.errors import InputError
from vqa_sft.models import shapes
from vqa_sft.models.load import load_model
from vqa_sft.models.lora import lora_config
from vqa_sft.models.memory import estimate as estimates, fit, needs, out_of_memory
from vqa_sft.models.memory.estimate import (
    estimate,
    need_gib,
    num_tokens,
    scoring_gib,
    trained_bytes,
)
from vqa_sft.models.memory.fit import MARGIN, largest_max_pixels, largest_micro_batch, remedies
from vqa_sft.models.memory.needs import Plan, read_config, read_shape
from vqa_sft.runs import folder as run_folder
from vqa_sft.training import build, survive
from vqa_sft.training.trainer import AnswerTrainer


def allocated_gib(shape, plan):
    """What is measured with max_memory_allocated: without what the allocator keeps beside it."""
    parts = estimate(shape, plan)
    return sum(parts.values()) - parts["fragmentation"]


# --- against measurements ---------------------------------------------------------------------------------------------

# One H200, torch 2.11, bf16, AdamW, LoRA of rank 32 on the seven linear layers, 448 px (256 tokens) a row; peak of
# max_memory_allocated in GiB (docs/measurements/speed.md). Compiled layers keep all that the compiler chooses to keep,
# or as much as the default of activation_memory_budget lets them.
ALL = {"compiled": True}
OLD = {"fused": False}  # before adapters of MLPs were fused; those of attention were in none
H200 = [
    (B7, Plan(16, text_tokens=75, **OLD), 5296, 50.3),
    (B7, Plan(16, text_tokens=75, fast=False), 5296, 51.5),  # packed, with the MLP of the last layer at all places
    (B7, Plan(16, text_tokens=75, fast=False, attention="unfused"), 5296, 59.8),
    (B7, Plan(16, text_tokens=75, **ALL), 5296, 40.4),
    (B7, Plan(16, text_tokens=167, **ALL), 6768, 46.5),
    (B7, Plan(16, text_tokens=219, **ALL), 7604, 50.2),
    (B7, Plan(32, text_tokens=219, **ALL), 15209, 83.5),
    (B7, Plan(16, text_tokens=167, **LESS), 6768, 36.7),
    (B3, Plan(32, text_tokens=219, **ALL), 15209, 57.6),
    (B7, Plan(16, text_tokens=167, shared_tokens=22, **LESS), 6438, 36.9),
    (B7, Plan(4, text_tokens=167, shared_tokens=22, **LESS), 1626, 21.8),
]


@pytest.mark.parametrize("name, plan, tokens, measured_gib", H200)
def test_peaks_measured_on_an_h200(name, plan, tokens, measured_gib):
    shape, plan = shape_of(name), replace(plan, max_pixels=448 * 448, fused_attention=False)
    assert num_tokens(shape, plan) == pytest.approx(tokens, rel=0.001)
    assert allocated_gib(shape, plan) == pytest.approx(measured_gib, rel=0.03)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.model.split('/')[1]} {point.gib}")
def test_every_measured_peak_is_foreseen(point):
    shape = shape_of(point.model, rank=point.rank, adapt_experts=point.adapt_experts)
    assert need_gib(shape, point.plan) == pytest.approx(point.gib, rel=point.within / 100)


@pytest.mark.parametrize("rows, text_tokens, measured_gib", [(16, 75, 17.0), (32, 167, 19.3)])
def test_peaks_of_scoring_measured_on_an_h200(rows, text_tokens, measured_gib):
    """By a model with an adapter and without an optimiser; the second is reserved memory."""
    shape, plan = shape_of(B7), Plan(1, eval_batch=rows, text_tokens=text_tokens, max_pixels=448 * 448)
    states_and_gradients = 0.75 * trained_bytes(shape, plan) / 2**30
    assert scoring_gib(shape, plan) - states_and_gradients == pytest.approx(measured_gib, rel=0.05)


# --- against real models ----------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_published_models():
    totals = {B3: 3_754_622_976, B7: 8_292_166_656, B8: 8_767_123_696}
    for name, total in totals.items():
        shape = shape_of(name)
        assert shape.decoder_linear + shape.decoder_other + shape.tower == total
    layers = 28 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert shape_of(B7).trained == layers and 2 * shape_of(B7, rank=16).trained == layers


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_parameters_are_those_of_a_loaded_model(families, family):
    for values in ({}, {"lora_target_modules": ["q_proj", "down_proj"]}, {"use_peft": False}):
        args = ModelConfig(model_name_or_path=families(family), use_peft=True, lora_r=4, dtype=None)
        args = replace(args, **values)
        config, note = read_config(args)
        shape, model = read_shape(args, config), load_model(args, "fp32")
        assert not note
        assert shape.decoder_linear + shape.decoder_other + shape.tower == sum(p.numel() for p in model.parameters())
        assert shape.tower == sum(p.numel() for p in model.model.visual.parameters())
        if adapter := lora_config(args, model):
            model = get_peft_model(model, adapter)
        assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts, args = {"adapt_tower": True, "adapt_merger": True}, replace(args, use_peft=True)
    shape, model = read_shape(args, config, **parts), load_model(args, "fp32")
    model = get_peft_model(model, lora_config(args, model, **parts))
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) and shape.trains_tower


# --- what follows from what -------------------------------------------------------------------------------------------


def test_more_rows_pixels_text_images_and_rank_need_more():
    shape, plan = shape_of(B7), Plan(4, eval_batch=4, max_pixels=448 * 448)
    for name in ("micro_batch", "max_pixels", "text_tokens", "images"):
        needs = [need_gib(shape, replace(plan, **{name: factor * getattr(plan, name)})) for factor in range(1, 9)]
        assert needs == sorted(needs) and needs[0] < needs[-1]
    assert need_gib(shape_of(B7, rank=16), plan) < need_gib(shape, plan)


@pytest.mark.parametrize("name", [B7, B3, B8])
def test_a_smaller_activation_memory_budget_needs_less_and_more_than_recomputing_all(name):
    shape, plan = shape_of(name), Plan(8, max_pixels=448 * 448, compiled=True)
    needs = [need_gib(shape, replace(plan, memory_budget=budget)) for budget in (1, 0.7, 0.5, 0.2)]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == 4
    assert needs[-1] > need_gib(shape, replace(plan, checkpointing=True, compiled=False))


@pytest.mark.parametrize("name", [B7, B3, B8])
def test_recomputation_quantisation_compilation_and_small_optimisers_need_less(name):
    shape, plan = shape_of(name), Plan(8, max_pixels=448 * 448)
    for less in (
        {"checkpointing": True},
        {"compiled": True},
        {"bits": 8},
        {"optimizer_bytes": 2},
    ):
        assert need_gib(shape, replace(plan, **less)) < need_gib(shape, plan)
    assert need_gib(shape, replace(plan, bits=4)) < need_gib(shape, replace(plan, bits=8))
    assert need_gib(shape, replace(plan, bits=4, nested=True)) < need_gib(shape, replace(plan, bits=4))
    assert need_gib(shape, replace(plan, fast=False, checkpointing=True)) > need_gib(
        shape, replace(plan, checkpointing=True)
    )


def test_training_all_weights_needs_more_and_in_fp16_more_still():
    shape, plan = shape_of(B7, use_peft=False), Plan(1, max_pixels=448 * 448)
    assert shape.trained == shape.decoder_linear + shape.decoder_other + shape.tower
    assert need_gib(shape_of(B7), plan) < need_gib(shape, plan) < need_gib(shape, replace(plan, weight_bytes=4))


def test_what_is_said_to_fit_fits_and_the_next_larger_does_not():
    shape, plan = shape_of(B7), Plan(8, eval_batch=8, max_pixels=448 * 448)
    for gib in (20, 30, 60):
        size = largest_micro_batch(shape, plan, gib)
        assert (
            need_gib(shape, replace(plan, micro_batch=size))
            <= gib
            < need_gib(shape, replace(plan, micro_batch=size + 1))
        )
        pixels = largest_max_pixels(shape, replace(plan, micro_batch=1), gib)
        assert need_gib(shape, replace(plan, micro_batch=1, max_pixels=pixels)) <= gib
        assert need_gib(shape, replace(plan, micro_batch=1, max_pixels=pixels + 28 * 28)) > gib
    assert largest_micro_batch(shape, plan, 10) == largest_max_pixels(shape, plan, 10) == 0


def as_fields(settings):
    names = {"per_device_train_batch_size": "micro_batch", "per_device_eval_batch_size": "eval_batch"}
    names |= {"gradient_checkpointing": "checkpointing", "max_pixels": "max_pixels"}
    fields = {names[key]: value for key, value in settings.items() if key != "load_in_4bit"}
    return fields | ({"bits": 4, "compiled": False} if "load_in_4bit" in settings else {})


@pytest.mark.parametrize("name", [B7, B3, B8])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_remedy_is_enough(name, compiled):
    shape, plan = shape_of(name), Plan(16, eval_batch=32, max_pixels=672 * 672, compiled=compiled)
    for gib in (6, 8, 10, 14, 18, 22, 30, 40, 60, 79):
        if need_gib(shape, plan) <= gib:
            continue
        for settings in remedies(shape, plan, gib, 16):
            changed = replace(plan, **as_fields(settings))
            assert settings and need_gib(shape, changed) <= gib
            assert 16 % changed.micro_batch == 0
    assert remedies(shape, plan, 1, 16) == []
    assert len(remedies(shape, plan, 0.9 * need_gib(shape, plan), 16)) >= 3


# --- vqa-sft memory ---------------------------------------------------------------------------------------------------


def test_a_recipe_of_every_model_has_a_table_within_seconds(run):
    of_model = {read_yaml(str(path))["model_name_or_path"]: path for path in sorted(RECIPES.glob("*.yaml"))}
    for path in of_model.values():
        start = time.process_time()
        code, out, err = run("memory", path)
        assert code == 0 and not err and time.process_time() - start < 30, (path, err)
        assert "language model" in out and "peak that torch reserves" in out
        (peak,) = re.findall(r"peak that torch reserves +([\d.]+)", out)
        parts = re.findall(r"^  \S.{32}\s+([\d.]+)", out.split("In GiB:")[1].split("  peak")[0], re.MULTILINE)
        assert math.isclose(sum(map(float, parts)), float(peak), abs_tol=0.05)


def test_what_is_shown_of_an_image_is_said_by_its_processor_and_by_the_shape_where_there_is_none(run):
    for recipe, says in (
        ("demo", "7,100 pixels, 9 tokens each (Qwen2_5_VL: "),
        ("qwen7b", "200,704 pixels, 256 tokens each ("),
    ):
        _, out, _ = run("memory", RECIPES / f"{recipe}.yaml")
        assert f"images: at most {says}28 px a token)" in out


def test_fields_of_the_recipe_may_be_given_again(run):
    peaks = []
    for more in ((), ("--max_pixels", 50176), ("--text-tokens", 20), ("--gradient_checkpointing", "true")):
        _, out, _ = run("memory", RECIPES / "qwen7b.yaml", "--compile_layers", "false", *more)
        peaks.append(float(re.search(r"reserves +([\d.]+)", out)[1]))
    assert max(peaks[1:]) < peaks[0]


def test_a_gpu_that_is_large_enough_and_one_that_is_not(run):
    code, out, _ = run("memory", RECIPES / "qwen3b_t4.yaml", "--gpu-gib", 14)
    assert code == 0 and "It fits:" in out and "Largest micro-batch" in out and "Largest max_pixels" in out
    code, out, _ = run("memory", RECIPES / "qwen7b.yaml", "--gpu-gib", 24)
    assert code == 1 and "does not fit" in out
    lines = out.split("each line alone:\n")[1].splitlines()
    assert lines and all(line.startswith("  --") for line in lines)
    for line in lines:  # what is said to fit, fits
        assert run("memory", RECIPES / "qwen7b.yaml", "--gpu-gib", 24, *line.split())[0] == 0
    code, out, _ = run("memory", RECIPES / "qwen7b_24gb.yaml", "--gpu-gib", 23.6)
    assert code == 0 and "It fits:" in out and "compiled, activation_memory_budget 0.2" in out
    code, out, _ = run("memory", RECIPES / "qwen7b.yaml", "--gpu-gib", 2)
    assert code == 1 and "Nothing known makes it fit" in out


def test_a_recipe_that_states_accumulation_is_told_it_too(run):
    options = ("--global_batch_size", "null", "--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 16)
    _, out, _ = run("memory", RECIPES / "qwen7b.yaml", "--gpu-gib", 40, *options)
    assert "--per_device_train_batch_size 8 --gradient_accumulation_steps 2" in out


def test_what_cannot_be_said_ends_with_exit_code_2(run, families, tmp_path):
    recipe = RECIPES / "qwen7b.yaml"
    for arguments, says in (
        ((tmp_path / "none.yaml",), "no such yaml"),
        ((tmp_path / "data.csv",), "memory needs a recipe"),
        ((recipe, "--gpu-gib", -1), "--gpu-gib must be above 0"),
        ((recipe, "--gpu-gib", "nan"), "--gpu-gib must be above 0"),
        ((recipe, "--text-tokens", 0), "--text-tokens must be above 0"),
        ((recipe, "--lora_rr", 8), "Did you mean `lora_r`"),
        ((recipe, "--model_name_or_path", tmp_path / "none"), "cannot be loaded: there is no such folder"),
        ((recipe, "--lora_target_modules", "nope"), "has no 'nope' (nearest: "),
    ):
        code, out, err = run("memory", *arguments)
        assert code == 2 and not out and says in err and "Traceback" not in err, err


def published(folder, name, own):
    """A folder with config.json alone: the published shape, quantised as `own` says."""
    config = shapes.shape_config(name)
    config.quantization_config = own
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "own, says, bytes_a_weight",
    [
        (FP8, "(fp8): 1.00 bytes a weight", 1 + 4 / 128**2),
        (OTHERS["awq"] | {"group_size": 128}, "(awq, 4 bit): 0.52 bytes", 0.5 + 2.5 / 128),
        (OTHERS["gptq"] | {"bits": 8, "group_size": -1}, "(gptq, 8 bit): 1.00 bytes", 1),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "(bitsandbytes, 4 bit): 0.52", 0.5 + 65 / 4096),
        ({"load_in_8bit": True}, "(bitsandbytes, 8 bit): 1.00", 1 + 4 / 1024),
        (KINDS["compressed int4"], "(compressed-tensors, 4 bit), and unpacked to whole weights", 2),
        (OTHERS["hqq"], "(hqq); what its weights take is not known, and they are counted as whole ones", 2),
        ({"quant_method": "modelopt"}, "(modelopt); what its weights take is not known", 2),
    ],
)
def test_the_weights_of_a_quantised_base_are_counted_as_they_are_stored(run, tmp_path, own, says, bytes_a_weight):
    base = published(tmp_path / "base", B7, own)
    code, out, err = run("memory", RECIPES / "qwen7b.yaml", "--model_name_or_path", base, "--gpu-gib", 12)
    shape = shape_of(B7)
    expected = (shape.decoder_linear * bytes_a_weight + shape.decoder_other * 2) / 2**30
    counted = float(re.search(r"language model +([\d.]+)", out)[1])
    assert counted == pytest.approx(expected, abs=0.01) and says in out, out + err
    assert "as it is stored" in out and "load_in_4bit" not in out  # cannot be rounded again
    code, _, err = run("memory", RECIPES / "qwen7b.yaml", "--model_name_or_path", base, "--load_in_4bit", "true")
    assert code == 2 and "is quantised itself" in err and "Remove load_in_4bit" in err


@pytest.mark.parametrize("own", [None, FP8])
def test_an_fp8_base_takes_a_byte_a_weight_and_a_scale_a_row(run, tmp_path, own):
    base = published(tmp_path / "base", B7, own) if own else B7
    recipe = (RECIPES / "qwen7b.yaml", "--model_name_or_path", base, "--base_precision", "fp8")
    code, out, err = run("memory", *recipe, "--gpu-gib", 16)
    shape = shape_of(B7)
    expected = (shape.decoder_linear + 4 * shape.decoder_rows + shape.decoder_other * 2) / 2**30
    counted = re.search(r"language model +([\d.]+)(?: +([\d.]+))?", out)
    assert float(counted[1]) == pytest.approx(expected, abs=0.01), out + err
    assert "its language model in FP8, from compute capability 8.9 on" in out and "load_in_4bit" not in out
    assert ("is quantised itself (fp8), and base_precision lets it multiply so" in out) == bool(own)
    loaded = float(re.search(r"before it is rounded +([\d.]+)", out)[1])
    assert loaded < 10 if own else loaded > 15
    assert " compiled" in out  # which a base of a quantised checkpoint is not
    code, _, err = run("memory", RECIPES / "qwen7b.yaml", "--base_precision", "fp8", "--load_in_4bit", "true")
    assert code == 2 and "round the same weights" in err
    base = published(tmp_path / "awq", B7, OTHERS["awq"])
    code, _, err = run("memory", *recipe[:2], base, *recipe[3:])
    assert code == 2 and "cannot be rounded again. Remove base_precision" in err


@pytest.mark.parametrize("how", [{}, {"compiled": True}, {"checkpointing": True}])
def test_an_fp8_base_needs_less_by_about_its_weights(how):
    shape, plan = shape_of(B7), Plan(8, max_pixels=448 * 448, memory_budget=0.7, **how)
    of_whole, of_fp8 = (replace(plan, **one) for one in ({"fused": False}, {"fp8_base": True}))
    less = sum(estimate(shape, of_whole).values()) - sum(estimate(shape, of_fp8).values())
    assert shape.decoder_linear / 2**30 - 2 < less < shape.decoder_linear / 2**30
    one = replace(plan, fp8_base=True, micro_batch=1, checkpointing=True)
    whole = (shape.decoder_linear + shape.decoder_other + shape.tower) * 2 / 2**30
    assert sum(estimate(shape, one).values()) < need_gib(shape, one) == pytest.approx(whole)  # while it is loaded


# --- auto_batch -------------------------------------------------------------------------------------------------------


@functools.cache
def fields_of_trl():
    return SFTConfig(output_dir="unused", bf16=False, report_to="none")


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(gib)`: as if there were a GPU with so much free memory."""
    fields_of_trl()  # which would look for that GPU

    def show(gib):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * 2**30), int(gib * 2**30)))

    return show


def choose(plan, accumulation, shape=None):
    args = copy.copy(fields_of_trl())
    args.per_device_train_batch_size, args.gradient_accumulation_steps = plan.micro_batch, accumulation
    args.gradient_checkpointing = args.activation_checkpointing = plan.checkpointing
    line = fit.choose_batch(args, lambda: (shape or shape_of(B7), plan))
    assert args.gradient_checkpointing == args.activation_checkpointing  # trl reads one, transformers the other
    return args.per_device_train_batch_size, args.gradient_accumulation_steps, args.gradient_checkpointing, line


@pytest.mark.parametrize("rows, accumulation", [(8, 2), (1, 16), (3, 4), (7, 1), (32, 2)])
@pytest.mark.parametrize("gib", [20, 24, 40, 80, 140])
def test_auto_batch_keeps_the_rows_of_a_step_and_takes_the_largest_that_fits(gpu, gib, rows, accumulation):
    gpu(gib)
    plan = Plan(rows, max_pixels=448 * 448)
    size, steps, checkpointing, line = choose(plan, accumulation)
    assert size * steps == rows * accumulation
    chosen = replace(plan, micro_batch=size, checkpointing=checkpointing)
    limit = gib / (1 + MARGIN)
    assert need_gib(shape_of(B7), chosen) <= limit
    larger = [n for n in range(size + 1, rows * accumulation + 1) if rows * accumulation % n == 0]
    assert all(need_gib(shape_of(B7), replace(chosen, micro_batch=n)) > limit for n in larger)
    if checkpointing:  # only where not even one row can do without
        assert need_gib(shape_of(B7), replace(plan, micro_batch=1)) > limit
    assert (
        f"{steps} x {size} with{'out' * (not checkpointing)} gradient_checkpointing" in line and f"{gib}.0 GiB" in line
    )


@pytest.mark.parametrize("gib", [24, 40, 80])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_auto_batch_fits_compiled_and_uncompiled_where_that_is_open(gpu, gib, checkpointing):
    gpu(gib)
    plan = Plan(32, max_pixels=448 * 448, checkpointing=checkpointing, may_compile=True)
    size, _, recomputes, _ = choose(plan, 2)
    for compiled in (False, True):
        chosen = replace(plan, micro_batch=size, checkpointing=recomputes, compiled=compiled)
        assert need_gib(shape_of(B7), chosen) <= gib / (1 + MARGIN)


@pytest.mark.parametrize("checkpointing, smaller", [(False, "compiled"), (True, "uncompiled")])
def test_what_fits_uncompiled_and_compiled_is_known_before_the_first_step(gpu, monkeypatch, checkpointing, smaller):
    plan = Plan(16, max_pixels=448 * 448, checkpointing=checkpointing)
    needs = lambda *, compiles: (shape_of(B7), replace(plan, compiled=compiles))  # noqa: E731
    need = {"uncompiled": need_gib(*needs(compiles=False)), "compiled": need_gib(*needs(compiles=True))}
    assert smaller == min(need, key=need.get)
    between = (need["uncompiled"] + need["compiled"]) / 2 * (1 + MARGIN)
    for gib, expected in ((1, set()), (between, {smaller}), (max(need.values()) * 1.2, set(need))):
        gpu(gib / 2)  # the rest is the model's already
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda half=gib / 2: int(half * 2**30))
        assert fit.fits(needs) == ("uncompiled" in expected, "compiled" in expected)


def test_auto_batch_says_what_would_fit_where_nothing_does(gpu):
    gpu(14)
    with pytest.raises(InputError, match="--load_in_4bit true"):
        choose(Plan(8, max_pixels=448 * 448), 2)
    gpu(10)
    with pytest.raises(InputError, match="--max_pixels"):
        choose(Plan(8, max_pixels=2688 * 2688, bits=4), 2)
    gpu(2)
    with pytest.raises(InputError, match="a smaller model"):
        choose(Plan(8, max_pixels=448 * 448), 2)


def test_auto_batch_changes_nothing_without_a_gpu(families, sft, tmp_path, capsys):
    sft(families("qwen2_5_vl"), tmp_path / "run", auto_batch=True, max_steps=1)
    assert "auto_batch: there is no GPU; nothing is changed." in capsys.readouterr().out


def test_what_auto_batch_chooses_is_what_the_trainer_does(families, sft, tmp_path, capsys, monkeypatch):
    seen = {}

    def choose(args, needs):
        seen["plan"] = needs()[1]
        args.per_device_train_batch_size, args.gradient_accumulation_steps = 2, 4
        args.gradient_checkpointing = args.activation_checkpointing = True
        return "chosen"

    def train(self, **kwargs):
        train_really(self, **kwargs)
        seen["recomputes"] = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        seen["rows"] = self.args.train_batch_size, self.args.gradient_accumulation_steps, self.state.global_step

    train_really = AnswerTrainer.train
    monkeypatch.setattr(fit, "choose_batch", choose)
    monkeypatch.setattr(AnswerTrainer, "train", train)
    values = {"global_batch_size": 8, "per_device_train_batch_size": 8, "gradient_checkpointing": False}
    sft(families("qwen2_5_vl"), tmp_path / "run", auto_batch=True, **values)
    assert "chosen" in capsys.readouterr().out and seen["recomputes"] and seen["rows"] == (2, 4, 3)
    plan = seen["plan"]
    assert (plan.micro_batch, plan.images, plan.attention, plan.compiled) == (8, 1, "repeated", False)
    assert 20 < plan.text_tokens < 300 and plan.max_pixels < 1000 * 1000


def test_auto_batch_leaves_spread_weights_alone(gpu, monkeypatch):
    gpu(80)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert choose(Plan(8), 2)[:3] == (8, 2, False)


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs_out(monkeypatch):
    """`runs_out(evaluating=False)`: training, or an evaluation in it, finds no memory."""
    monkeypatch.setattr(estimates, "LIBRARIES_GIB", 0)  # nearly all that a tiny model needs

    def arrange(evaluating=False):
        def train(self, **kwargs):
            self.model.train(not evaluating)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(AnswerTrainer, "train", train)

    return arrange


def fails(capsys, function, *args, **values):
    with pytest.raises(SystemExit) as stop:
        function(*args, **values)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error and "Tried to allocate" not in error
    assert error.count("error:") == 1
    return error


@pytest.mark.parametrize("fast", [True, False])
def test_running_out_of_memory_ends_with_what_to_change(families, sft, tmp_path, capsys, runs_out, fast):
    runs_out()
    model, run_dir = families("qwen2_5_vl"), tmp_path / "run"
    # Where the end of an epoch depends on the micro-batch, it is left to the user.
    values = {"global_batch_size": 8, "gradient_checkpointing": False, "dataloader_drop_last": True}
    error = fails(capsys, sft, model, run_dir, fast=fast, **values)
    assert "the memory of GPU 0 ran out in training" in error and "starts again" in error
    assert "  --gradient_checkpointing true\n" in error


def test_whole_weights_that_run_out_of_memory_are_told_of_smaller_batches_alone(
    families, sft, tmp_path, capsys, runs_out
):
    runs_out()
    # After 2 rows at a time, and 1; whole weights cannot be quantised.
    error = fails(capsys, sft, families("llava"), tmp_path / "llava", use_peft=False)
    assert "lower per_device_train_batch_size" in error


def test_running_out_of_memory_in_an_evaluation_blames_the_evaluation(families, sft, tmp_path, capsys, runs_out):
    runs_out(evaluating=True)
    values = {"validation_fraction": 0.25, "per_device_eval_batch_size": 64}
    error = fails(capsys, sft, families("qwen2_5_vl"), tmp_path / "run", **values)
    assert "ran out in evaluation" in error and "--per_device_eval_batch_size" in error


def test_changes_always_need_less_than_the_run_that_failed():
    shape, plan = shape_of(B7), Plan(16, max_pixels=448 * 448)
    how = {"evaluating": False, "accumulated": None}
    lines = out_of_memory._changes(shape, plan, 16, auto_batch=False, **how)
    assert lines[0] == "--per_device_train_batch_size 8" and "--gradient_checkpointing true" in lines
    assert any(line.startswith("--max_pixels") and "another run" in line for line in lines)
    # What auto_batch chose once it would choose again.
    lines = out_of_memory._changes(shape, plan, 16, auto_batch=True, **how)
    assert lines[0] == "--auto_batch false --per_device_train_batch_size 8 --gradient_checkpointing false"


def test_compiled_layers_are_named_first_where_they_are_enough_and_to_be_had(monkeypatch):
    monkeypatch.setattr(out_of_memory.compilation, "can_compile", lambda: True)
    how = {"evaluating": False, "accumulated": None}
    shape, plan = shape_of(B7), Plan(16, max_pixels=448 * 448, may_compile=True)
    lines = out_of_memory._changes(shape, plan, 16, auto_batch=False, **how)
    assert lines[:2] == ["--compile_layers true", "--per_device_train_batch_size 8"]
    lines = out_of_memory._changes(shape, plan, 16, auto_batch=True, **how)
    assert lines[0].startswith("--auto_batch false --per_device_train_batch_size 16 ")
    assert lines[0].endswith(" --compile_layers true")
    # Compiled already, or never; and what is computed again is not less where it is compiled.
    for other in ({"compiled": True, "may_compile": False}, {"may_compile": False}, {"checkpointing": True}):
        lines = out_of_memory._changes(shape, replace(plan, **other), 16, auto_batch=False, **how)
        assert lines and not any("compile_layers" in line for line in lines)
    monkeypatch.setattr(out_of_memory.compilation, "can_compile", lambda: False)  # no C compiler
    assert "--compile_layers" not in out_of_memory._changes(shape, plan, 16, auto_batch=False, **how)[0]


def test_a_long_run_that_has_not_compiled_yet_is_told_that_compiled_layers_fit(
    families, sft, tmp_path, capsys, runs_out, monkeypatch
):
    runs_out()
    # As on a GPU that compiles, and with so many rows that compilation is counted on.
    monkeypatch.setattr(out_of_memory.compilation, "can_compile", lambda: True)
    monkeypatch.setattr(out_of_memory, "MARGIN", 0.0)  # of a tiny model that is more than compilation saves
    monkeypatch.setattr(needs, "attention_of", lambda *args: "grouped")
    monkeypatch.setattr(build.speedups, "pays_compilation", lambda *args: True)
    values = {"global_batch_size": 8, "gradient_checkpointing": False, "dataloader_drop_last": True}
    model = families("qwen2_5_vl")
    error = fails(capsys, sft, model, tmp_path / "uncompiled", **values)
    assert "each line alone:\n  --compile_layers true\n" in error
    monkeypatch.setattr(survive.compilation, "is_compiled", lambda model: True)  # after the switch
    error = fails(capsys, sft, model, tmp_path / "compiled", **values)
    assert "each line alone:\n" in error and "compile_layers" not in error


ONE_OF_TWO = """
import time, torch.distributed as dist
from vqa_sft.errors import ProcessError, exits_with_message

@exits_with_message
def main():
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 1:
        raise ProcessError("the memory ran out here")
    dist.barrier()  # waits for the other for ever

main()
"""


def test_a_process_that_fails_alone_says_so_and_the_others_do_not_hang(tmp_path):
    (tmp_path / "script.py").write_text(ONE_OF_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 1
    assert ended.stderr.count("error: the memory ran out here") == 1 and "exitcode  : 2" in ended.stderr


def test_a_run_goes_on_with_other_micro_batches_of_the_same_global_batch(tmp_path):
    values = {"global_batch_size": 16, "per_device_train_batch_size": 8, "max_pixels": 200704}
    run_folder.start(tmp_path / "run", values, overwrite=False)
    (tmp_path / "run" / run_folder.RUN).write_text("{}")

    def check(**changes):
        run_folder.check(tmp_path / "run", values | changes, overwrite=False, inputs=[])

    check(per_device_train_batch_size=2, gradient_checkpointing=True, auto_batch=True)
    for changes in ({"max_pixels": 100352}, {"global_batch_size": 8, "per_device_train_batch_size": 4}):
        with pytest.raises(InputError, match="another recipe"):
            check(**changes)
    values = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    run_folder.start(tmp_path / "run", values, overwrite=False)
    check(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    with pytest.raises(InputError, match="another recipe"):
        check(per_device_train_batch_size=4)
