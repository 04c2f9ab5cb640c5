"""A recipe's run by graphs against one without: losses of every step, and what is trained. A CPU has no graphs:
tests/captures.py stands for them."""

import json
import types

import pytest
import torch
from captures import Capture
from contest import rows_of, write_csv
from gradients import road_of
from safetensors.torch import load_file
from torch.testing import assert_close

from vqa_sft.models.families import tower_of
from vqa_sft.models.fast import attention, graphs, speedups


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


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_run_by_graphs_has_the_losses_and_weights_of_one_without(sft, families, contest, tmp_path, able, family):
    words = "of the square that stands in the image, " * 3
    rows = [row | {"question": f"Which colour? {words[: 9 * i]}"} for i, row in enumerate(rows_of(contest)[:12])]
    write_csv(contest / "train.csv", rows)
    # Rows of one order alone: no text is of another length in another epoch.
    values = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    values |= {"num_train_epochs": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "validation_fraction": 0.25}
    values |= {"gradient_checkpointing": False, "shuffle_choices": False, "lora_dropout": 0}
    losses, weights = {}, {}
    for has_graphs in (False, True):
        with pytest.MonkeyPatch.context() as patched:
            if not has_graphs:
                patched.setattr(speedups, "prepare_graphs", lambda trainer: lambda: None)
            run = sft(families(family), tmp_path / str(has_graphs), **values)
        state = json.loads((run / "checkpoint-10" / "trainer_state.json").read_text())
        losses[has_graphs] = [log["loss"] for log in state["log_history"] if "loss" in log]
        weights[has_graphs] = load_file(run / "checkpoint-10" / "adapter_model.safetensors")
    decoder, tower = Counted.made
    assert decoder.count >= 2 and decoder.num_replays >= 2 * 6  # forward and backward
    assert tower.count >= 1 and tower.num_replays >= 6
    assert len(losses[True]) == 10 and max(losses[True]) - min(losses[True]) > 0.1
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    assert_close(weights[True], weights[False], atol=1e-4, rtol=1e-3)


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
    elif kind == "recomputation":
        trainer.args.gradient_checkpointing = True
    elif kind == "a trained tower":
        next(tower_of(base).parameters()).requires_grad_()
    elif kind == "an 8-bit base":
        base.is_loaded_in_8bit = True
    elif kind == "dropout":
        decoder.layers[1].mlp.dropout = torch.nn.Dropout(0.05)


SAID = {"an 8-bit base": "products of an 8-bit base wait", "dropout": "lora_dropout: 0 allows them"}
SILENT = ("no kernel", "padded rows", "two processes", "weights that are spread", "recomputation", "a trained tower")


@pytest.mark.parametrize("kind", [None, *SILENT, *SAID])
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
