"""Averages against their closed forms, and a run that keeps the better of raw and averaged weights."""

import json
import shutil

import pytest
import torch
from contest import write_hard_contest
from safetensors.torch import load_file
from scripts import run_script
from torch import nn
from torch.testing import assert_close

from vqa_sft.runs import folder as run_folder
from vqa_sft.tiny import TINY_PATH
from vqa_sft.training import averaging, validation
from vqa_sft.training.averaging import AVERAGE, BEST, AdapterAverage

pytestmark = pytest.mark.usefixtures("one_thread")


def averages_of(kind, values, **how):
    """The average after each of the values that one weight takes."""
    average, found = AdapterAverage(kind, **how), []
    for value in values:
        average.update({"w": nn.Parameter(torch.tensor([value, -value], dtype=torch.bfloat16))})
        found.append(average.weights["w"][0].item())
    return found


def test_ema_is_its_closed_form():
    # decays after 1, 2, ... steps: 2/11, 3/12, 4/13, then the limit
    decays = [2 / 11, 3 / 12, 0.3, 0.3]
    weights = [1.0]  # of each value in the average
    for decay in decays:
        weights = [decay * weight for weight in weights] + [1 - decay]
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    expected = sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert averages_of("ema", values, decay=0.3)[-1] == pytest.approx(expected, rel=1e-6)


def test_swa_is_the_mean():
    assert averages_of("swa", [1.0, 2.0, 6.0, 7.0]) == pytest.approx([1.0, 1.5, 3.0, 4.0])


def test_other_weights_are_in_the_model_only_for_a_while():
    model = nn.Linear(2, 2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), averaging.swapped(model, {"weight": torch.ones(2, 2)}):
        assert model.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
        raise RuntimeError("stop")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.fixture
def train(tmp_path):
    """`train(key=value, ...)`: six steps of four rows, a checkpoint after each; the run folder."""
    contest = write_hard_contest(tmp_path / "contest")
    values = {"model_name_or_path": TINY_PATH, "train_data": contest / "train.csv", "max_steps": 6, "save_steps": 1}
    values |= {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 20}
    values |= {"validation_data": contest / "validation.csv", "output_dir": tmp_path / "run", "use_cpu": True}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "dataloader_num_workers": 0}
    values |= {"gradient_checkpointing": False, "disable_tqdm": True}

    def run(**changes):
        run_script("sft", *(str(token) for key, value in (values | changes).items() for token in (f"--{key}", value)))
        return tmp_path / "run"

    return run


def adapters(run, steps):
    return [load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors") for step in steps]


def as_saved(name):
    return name.replace(".default", "")


def metrics_of(run):
    return json.loads((run / run_folder.METRICS).read_text())


def test_swa_of_a_run_is_the_mean_of_its_checkpoints(train):
    run = train(averaging="swa", swa_start=2)
    saved = adapters(run, range(3, 7))
    for name, weight in load_file(run / "checkpoint-6" / AVERAGE).items():
        assert_close(weight, torch.stack([adapter[as_saved(name)] for adapter in saved]).mean(dim=0))
    assert not (run / "checkpoint-2" / AVERAGE).exists()


@pytest.mark.parametrize("averages_win", [True, False])
def test_a_run_ends_with_the_average_where_its_nll_is_lower(train, monkeypatch, averages_win):
    whole, asked = validation.predict_examples, []

    def shifted(*args):
        """At the end the raw weights are asked first, then the average; one of them is made worse, for which of them is
        better after six steps depends on the processor."""
        predictions, metrics = whole(*args)
        asked.append(metrics["nll_calibrated"])
        is_worse = (len(asked) == 1) == averages_win
        return predictions, metrics | {"nll_calibrated": asked[-1] + 9 * is_worse}

    monkeypatch.setattr(validation, "predict_examples", shifted)
    run = train(averaging="ema", ema_decay=0.6)
    metrics, final = metrics_of(run), load_file(run / "adapter_model.safetensors")
    best = load_file(run / "checkpoint-6" / BEST)
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    name = "eval_average_nll_calibrated"
    logged = [log[name] for log in state["log_history"] if name in log]
    assert len(logged) == 6 and asked == pytest.approx([state["best_metric"], min(logged)], abs=1e-5)
    for name, nll, is_worse in zip(("raw", "average"), asked, (averages_win, not averages_win), strict=True):
        assert metrics[f"nll_calibrated_{name}"] == pytest.approx(nll + 9 * is_worse, abs=1e-5)
    assert metrics["nll_calibrated"] == min(metrics["nll_calibrated_raw"], metrics["nll_calibrated_average"])
    assert all(torch.equal(final[as_saved(name)], weight) for name, weight in best.items()) == averages_win


def test_a_run_that_goes_on_has_the_average_of_the_run_that_was_not_stopped(train):
    run = train(averaging="ema")
    before = [load_file(run / "checkpoint-6" / name) for name in (AVERAGE, BEST)]
    final = (run / "adapter_model.safetensors").read_bytes()
    (run / run_folder.RUN).unlink()
    for step in (4, 5, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    train(averaging="ema")
    for weights, name in zip(before, (AVERAGE, BEST), strict=True):
        again = load_file(run / "checkpoint-6" / name)
        assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)
    assert (run / "adapter_model.safetensors").read_bytes() == final


def test_without_validation_rows_a_run_ends_with_the_average(train):
    how = {"validation_data": "null", "eval_strategy": "no"}
    run = train(averaging="swa", swa_start=0, **how)
    final = load_file(run / "adapter_model.safetensors")
    for name, weight in load_file(run / "checkpoint-6" / AVERAGE).items():
        assert torch.equal(final[as_saved(name)], weight)
