"""A recipe's run by graphs against one without: losses of every step, and what is trained. A CPU has no graphs:
tests/captures.py stands for them."""

import functools
import json
import types

import pytest
import torch
from captures import Capture
from contest import rows_of, write_csv
from gradients import compiler, road_of
from safetensors.torch import load_file
from torch.testing import assert_close

from vqa_sft.models.families import tower_of
from vqa_sft.models.fast import attention, compilation, graphs, speedups
from vqa_sft.training import build, compile_later


class Counted(Capture):
    """One for the decoder, then one for the tower."""

    made: list["Counted"] = []

    def __init__(self):
        super().__init__()
        self.num_replays = 0
        Counted.made.append(self)

    def replay(self, run, outputs):
        self.num_replays += 1
        return Capture.replay(run, outputs)


@pytest.fixture
def able(monkeypatch):
    """Packed rows go as on a GPU that has a kernel for them, and by what stands for its graphs."""
    monkeypatch.setattr(Counted, "made", [])
    monkeypatch.setattr(attention, "uses_varlen", lambda base: True)
    monkeypatch.setattr(graphs, "CudaCapture", Counted)


@pytest.fixture
def run_of(sft, contest, tmp_path):
    """`run_of(family, has_graphs, key=value, ...)`: the losses of 10 steps and the trained weights. Texts of many
    lengths, the same ones in every epoch."""
    words = "of the square that stands in the image, " * 3
    rows = [row | {"question": f"Which colour? {words[: 9 * i]}"} for i, row in enumerate(rows_of(contest)[:12])]
    write_csv(contest / "train.csv", rows)
    usual = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    usual |= {"num_train_epochs": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "validation_fraction": 0.25}
    usual |= {"gradient_checkpointing": False, "shuffle_choices": False, "lora_dropout": 0}

    def run(model, has_graphs, **values):
        with pytest.MonkeyPatch.context() as patched:
            if not has_graphs:
                patched.setattr(speedups, "prepare_graphs", lambda trainer: lambda: None)
            folder = sft(model, tmp_path / str(has_graphs), **usual | values)
        (last,) = folder.glob("checkpoint-*[05]")
        state = json.loads((last / "trainer_state.json").read_text())
        losses = [log["loss"] for log in state["log_history"] if "loss" in log]
        return losses, load_file(last / "adapter_model.safetensors")

    return run


def assert_same_run(found, expected):
    assert len(found[0]) == len(expected[0]) >= 10 and max(found[0]) - min(found[0]) > 0.1
    assert found[0] == pytest.approx(expected[0], abs=1e-4)
    assert_close(found[1], expected[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_run_by_graphs_has_the_losses_and_weights_of_one_without(families, able, run_of, family):
    expected, found = (run_of(families(family), has_graphs) for has_graphs in (False, True))
    decoder, tower = Counted.made
    assert decoder.count >= 2 and decoder.num_replays >= 2 * 6  # forward and backward
    assert tower.count >= 1 and tower.num_replays >= 6
    assert_same_run(found, expected)


def test_a_run_that_is_compiled_later_goes_by_graphs_then(families, able, run_of, monkeypatch):
    model, mlps = families("qwen2_5_vl"), []
    expected = run_of(model, False, max_steps=20, num_train_epochs=8)

    def layers_to_compile(base):  # attention over packed rows is no graph on a CPU
        mlps[:] = [layer.mlp for layer in base.get_decoder().layers]
        return mlps

    monkeypatch.setattr(compile_later, "layers_to_compile", layers_to_compile)
    compile_layers = functools.partial(compilation.compile_layers, backend="aot_eager")
    monkeypatch.setattr(compilation, "compile_layers", compile_layers)
    monkeypatch.setattr(compilation, "can_compile", lambda: True)
    monkeypatch.setattr(compilation, "expect", lambda *args: compilation.Expected(0.0, 0.5))
    monkeypatch.setattr(compilation, "remember", lambda *args: None)
    monkeypatch.setattr(build, "fits", lambda needs: (True, True))
    monkeypatch.setattr(speedups, "may_compile_later", lambda trainer: True)
    with compiler():
        found = run_of(model, True, max_steps=20, num_train_epochs=8)
    assert mlps and all(mlp._compiled_call_impl is not None for mlp in mlps)
    decoder, tower = Counted.made
    # From step 14 on, in which every shape comes once as it is.
    assert decoder.count >= 1 <= tower.count and 1 <= decoder.num_replays <= 2 * 2 * 7
    assert_same_run(found, expected)


def refuse(kind, trainer, base, monkeypatch):
    decoder = base.get_decoder()
    if kind == "no kernel":
        monkeypatch.setattr(attention, "uses_varlen", lambda base: False)
    elif kind == "padded rows":
        decoder.config._attn_implementation = "sdpa"
    elif kind == "two processes":
        trainer.accelerator.num_processes = 2
    elif kind == "weights that are spread":
        monkeypatch.setattr(speedups.processes, "is_sharded", lambda: True)
    elif kind in speedups.KEEP_LESS:
        setattr(trainer.args, kind, True)
    elif kind == "all weights":
        trainer.model = base
    elif kind == "a trained tower":
        next(tower_of(base).parameters()).requires_grad_()
    elif kind == "an 8-bit base":
        base.is_loaded_in_8bit = True
    elif kind == "dropout":
        decoder.layers[1].mlp.dropout = torch.nn.Dropout(0.05)


SAID = {"an 8-bit base": "products of an 8-bit base wait", "dropout": "lora_dropout: 0 allows them"}
SILENT = ("no kernel", "padded rows", "two processes", "weights that are spread", "a trained tower", "all weights")


@pytest.mark.parametrize("kind", [None, *SILENT, *speedups.KEEP_LESS, *SAID])
def test_runs_that_have_no_graphs_keep_their_forward(families, contest, able, monkeypatch, capsys, kind):
    model, *_ = road_of(families("qwen2_5_vl"), contest)
    base = model.get_base_model()
    speedups.pack_rows(base, "fp32")
    speedups.speed_up(model)
    args, accelerator = types.SimpleNamespace(gradient_checkpointing=False), types.SimpleNamespace(num_processes=1)
    trainer = types.SimpleNamespace(model=model, args=args, accelerator=accelerator)
    refuse(kind, trainer, base, monkeypatch)
    before = base.get_decoder().forward, tower_of(base).forward
    capsys.readouterr()
    speedups.prepare_graphs(trainer)()
    assert ((base.get_decoder().forward, tower_of(base).forward) == before) == (kind is not None)
    said = capsys.readouterr().out
    assert SAID[kind] in said if kind in SAID else not said
