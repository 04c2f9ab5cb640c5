"""`fold: all`: every fold in its own folder, killed and started again, and one file of predictions out of fold."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from contest import write_hard_contest
from scripts import RECIPES, run_script

from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.folds import write_folds
from vqa_sft.errors import InputError
from vqa_sft.predictions.calibration import calibrate_run, read_calibration
from vqa_sft.predictions.file import read_predictions
from vqa_sft.predictions.metrics import accuracy, bootstrap, ece, nll, softmax
from vqa_sft.runs import checkpoints, folder as run_folder, hub
from vqa_sft.runs.out_of_fold import METRICS, OUT_OF_FOLD, write_out_of_fold
from vqa_sft.tiny import TINY_PATH
from vqa_sft.training import saving
from vqa_sft.training.trainer import AnswerTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """`arguments(output_dir, key=value, ...)`: three folds of 20 to 24 rows, of which four are always trained on."""
    folder = tmp_path_factory.mktemp("folds")
    contest = write_hard_contest(folder / "contest")
    train = contest / "train.csv"
    with train.open() as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    write_folds(folder / "folds.csv", ids, [-1 if i < 4 else i % 3 for i in range(len(ids))])
    values = {"model_name_or_path": TINY_PATH, "train_data": train, "folds_file": folder / "folds.csv", "fold": "all"}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "num_train_epochs": 2}
    values |= {"gradient_checkpointing": False, "disable_tqdm": True, "dataloader_num_workers": 0}

    def tokens(output_dir, **changes):
        given = values | {"output_dir": output_dir} | changes
        return [str(token) for key, value in given.items() for token in (f"--{key}", value)]

    return tokens


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run of all folds that was not disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_script("sft", *arguments(run))
    return run


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def results(run):
    """All that a run has learnt and answered, in bytes."""
    names = [f"fold{fold}/adapter_model.safetensors" for fold in range(3)] + [OUT_OF_FOLD]
    return {name: (run / name).read_bytes() for name in names if not name.endswith("parquet")} | {
        name: read_predictions(run / name).choice_logits for name in names if name.endswith("parquet")
    }


def test_every_row_of_a_fold_is_answered_by_the_run_that_did_not_see_it(whole):
    together = read_predictions(whole / OUT_OF_FOLD)
    assert len(together.ids) == 20 and together.ids == sorted(together.ids)  # in the order of the data
    for fold in range(3):
        own = read_predictions(whole / f"fold{fold}" / run_folder.VALIDATION)
        for row_id, logits in zip(own.ids, own.choice_logits, strict=True):
            assert together.choice_logits[together.ids.index(row_id)] == logits
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 20 and not list(whole.glob("fold*/report.html"))
    content = json.loads((whole / METRICS).read_text())
    assert content["nll"] == pytest.approx(nll(softmax(together.choice_logits), together.answers))
    assert content["nll_95"][0] < content["nll"] < content["nll_95"][1]
    assert [*content["folds"]] == ["fold0", "fold1", "fold2"]


def test_all_folds_end_with_one_temperature_from_the_rows_out_of_fold(whole):
    found = read_calibration(whole, {"orders": "identity"})
    assert 0.05 <= found.temperature <= 20
    assert not [*whole.glob("fold*/calibration.json")] and read_calibration(whole / "fold1", {}) == found
    assert "from 20 rows of" in calibrate_run(whole)
    assert read_calibration(whole, {}) == found


def num_steps(run):
    """Steps that lie in whole checkpoints, of all folds together."""
    saved = [checkpoints.last_whole_checkpoint(run / f"fold{fold}") for fold in range(3)]
    return sum(int(path.rpartition("-")[2]) for path in saved if path)


@pytest.mark.slow
def test_folds_at_once_are_those_one_after_another(arguments, whole, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(RECIPES / "sft.py"), *arguments(run, folds_at_once=2)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=True)
    assert results(run) == results(whole)
    assert read_calibration(run, {}) == read_calibration(whole, {}) and (run / "report.html").is_file()
    assert not [*run.glob("fold*/calibration.json")] and not [*run.glob("fold*/report.html")]
    said = ended.stdout.splitlines()
    assert all(any(line.startswith(f"fold{fold}: Saved to {run}/fold{fold}") for line in said) for fold in range(3))
    assert sum("out of fold" in line for line in said) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_at_once", [1, 2])
def test_folds_that_are_killed_and_started_again_end_as_if_they_had_not_been(
    arguments, whole, tmp_path, request, num_at_once
):
    """Ten times: `pytest tests/recipes/test_folds_run.py -s -k killed --kills 10`."""
    run, rng, num_kills = tmp_path / "run", random.Random(0), request.config.getoption("kills")
    command = [sys.executable, str(RECIPES / "sft.py"), *arguments(run, folds_at_once=num_at_once)]
    for kill in range(num_kills):
        process = subprocess.Popen(command, env=ENVIRONMENT, process_group=0)
        # Spread over the run, each at a random moment: while it loads, trains, evaluates or saves.
        while num_steps(run) < num_steps(whole) * kill / (num_kills + 1) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1 if kill else 8))
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"\nKilled with {num_steps(run)} of {num_steps(whole)} steps saved.")
    run_script("sft", *arguments(run))
    assert results(run) == results(whole)


def test_a_run_out_of_time_saves_and_says_what_is_left(arguments, whole, tmp_path, capsys, monkeypatch):
    run, steps = tmp_path / "run", []

    def is_over(self):
        steps.append(1)
        return len(steps) == 6  # before fold 0, and after its fifth step

    with monkeypatch.context() as patch:
        patch.setattr(saving.SaveAndStop, "is_over", is_over)
        run_script("sft", *arguments(run, time_budget_h=1))
    said = capsys.readouterr().out
    assert f"Time is up. {run}/fold0 resumes with the same command, then {run}/fold1, {run}/fold2" in said
    assert checkpoints.last_whole_checkpoint(run / "fold0").endswith("checkpoint-5")
    assert not run_folder.is_finished(run / "fold0") and not (run / "fold1").exists()
    run_script("sft", *arguments(run, time_budget_h=1))
    said = capsys.readouterr().out
    assert "Resuming from" in said and "out of fold" in said
    assert results(run) == results(whole)


def test_a_sigterm_begins_no_other_fold(arguments, tmp_path, capsys, monkeypatch):
    def compute_loss(self, *args, **kwargs):
        if self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)  # in the last step of fold 0, which then needs no more
        return loss(self, *args, **kwargs)

    run, loss = tmp_path / "run", AnswerTrainer.compute_loss
    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute_loss)
    values = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
    with pytest.raises(SystemExit) as stop:
        run_script("sft", *arguments(run, **values))
    assert stop.value.code == 143 and run_folder.is_finished(run / "fold0") and not (run / "fold1").exists()
    assert f"SIGTERM. {run}/fold1 resumes with the same command, then {run}/fold2." in capsys.readouterr().out


def test_overwriting_moves_the_runs_of_all_folds_aside_before_the_first_begins(
    arguments, tmp_path, monkeypatch, capsys
):
    run, steps = tmp_path / "run", []
    run_script(
        "sft", *arguments(run, max_steps=1, save_strategy="no", eval_strategy="no", load_best_model_at_end=False)
    )
    monkeypatch.setattr(saving.SaveAndStop, "is_over", lambda self: steps.append(1) or len(steps) == 3)
    run_script("sft", *arguments(run, time_budget_h=1, overwrite=True))
    assert "resumes with the same command without --overwrite, then" in capsys.readouterr().out
    assert all((run / f"fold{fold}.old" / run_folder.RUN).is_file() for fold in range(3))
    assert not any(run_folder.is_finished(run / f"fold{fold}") for fold in range(3))


def test_folds_that_do_not_go_together_are_refused(arguments, whole, tmp_path, capsys):
    write_folds(tmp_path / "none.csv", ["hard_000"], [-1])
    with pytest.raises(SystemExit) as stop:
        run_script("sft", *arguments(tmp_path / "run", folds_file=tmp_path / "none.csv"))
    assert stop.value.code == 2 and "has no fold but -1" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    rows = (other / "fold1" / "rows.csv").read_text().splitlines(keepends=True)
    (other / "fold1" / "rows.csv").write_text("".join(rows[:-1]))
    with pytest.raises(InputError, match="were trained on other rows"):
        write_out_of_fold(other, [other / f"fold{fold}" for fold in range(3)])


@pytest.mark.parametrize("num_at_once", [1, 2])
def test_a_file_of_folds_that_has_changed_is_refused_and_what_is_out_of_fold_stays(
    arguments, whole, tmp_path, capsys, num_at_once
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    ids = [row["id"] for row in csv.DictReader((run / "fold0" / "rows.csv").read_text().splitlines())]
    how = {"folds_file": tmp_path / "folds.csv", "folds_at_once": num_at_once}
    for folds, message in (
        ([-1 if i < 4 else (i + 1) % 3 for i in range(len(ids))], "fold0 was trained: other folds of rows"),
        ([-1 if i < 4 else i % 2 for i in range(len(ids))], "holds fold2, which"),
    ):
        write_folds(tmp_path / "folds.csv", ids, folds)
        with pytest.raises(SystemExit) as stop:
            run_script("sft", *arguments(run, **how))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert (run / OUT_OF_FOLD).read_bytes() == (whole / OUT_OF_FOLD).read_bytes()


def test_each_fold_is_pushed_to_a_repository_of_its_own(arguments, tmp_path):
    recipe = read_recipe(arguments(tmp_path / "mine", push_to_hub=True))
    assert [run.values["hub_model_id"] for run in recipe.runs()] == ["mine-fold0", "mine-fold1", "mine-fold2"]


def test_folds_are_pushed_again_with_the_temperature_that_they_share(arguments, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    pushed = []
    monkeypatch.setattr(hub, "push_run", lambda folder, **_: pushed.append(read_calibration(folder, {})) or "address")
    run_script("sft", *arguments(tmp_path / "run", push_to_hub=True))  # each fold is whole already
    assert len(pushed) == 3 and pushed[0] is not None
    assert {one.temperature for one in pushed} == {read_calibration(tmp_path / "run", {}).temperature}


def test_a_budget_leaves_time_for_what_a_pause_takes(monkeypatch):
    now_s = time.monotonic()
    budget = saving.SaveAndStop(1000, now_s)
    budget.longest_pause_s, budget.longest_gap_s = 100, 20
    for later_s, over in ((0, False), (710, False), (730, True)):  # 60 + 2 x 100 + 20 s are reserved
        monkeypatch.setattr(time, "monotonic", lambda later_s=later_s: now_s + later_s)
        assert budget.is_over() == over


def test_resampled_metrics_are_those_of_the_rows_drawn():
    probs = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.3, 0.1], [0.5, 0.5]] * 10
    answers = [0, 0, 2, 1] * 10
    found = bootstrap(probs, answers, num_resamples=400)
    for name, metric in (("accuracy", accuracy), ("nll", nll), ("ece", ece)):
        rng, values = random.Random(1), []
        for _ in range(400):
            rows = [rng.randrange(40) for _ in range(40)]
            values.append(metric([probs[i] for i in rows], [answers[i] for i in rows]))
        values.sort()
        assert found[name] == pytest.approx((values[10], values[389]), abs=0.06)
