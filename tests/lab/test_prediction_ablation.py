"""What each way of predicting is worth: its rows, its commands and its table."""

import argparse
import csv

import numpy as np
import pytest

from vqa_sft.errors import InputError
from vqa_sft.lab import prediction_ablation
from vqa_sft.lab.prediction_ablation import FIRST, difference, together, write_rows
from vqa_sft.predictions.file import Predictions
from vqa_sft.tiny.numbers import SETS, TaskSet


def test_digits_are_asked_about_again_with_other_wrong_choices(tmp_path):
    task = TaskSet("", 30, 1, 1, num_test=10)
    write_rows(tmp_path, task, 25)
    with (tmp_path / "test.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len({row["id"] for row in rows}) == 25 and len({row["path"] for row in rows}) == 10
    again = [row for row in rows if row["path"] == rows[0]["path"]]
    assert len({tuple(sorted(row[letter] for letter in "abcd")) for row in again}) > 1
    assert len({row[row["answer"]] for row in again}) == 1  # the digit stays what it is
    with (tmp_path / "folds.csv").open() as file:
        assert sorted({row["fold"] for row in csv.DictReader(file)}) == ["0", "1", "2"]


def test_a_difference_compares_the_same_rows():
    rng = np.random.default_rng(0)
    hard = rng.exponential(size=2000)  # what a row costs whoever answers it
    mean, low, high = map(
        float, difference(hard - 0.01, hard).replace("[", "").replace("]", "").replace(",", "").split()
    )
    assert mean == low == high == pytest.approx(-0.01)


def test_lines_without_temperatures_have_the_weights_of_scales_all_the_same():
    scale_logits = [[np.log([0.7, 0.3]).tolist(), np.log([0.2, 0.8]).tolist()]]
    known = {"temperature": 2.0, "bias": None, "scale_weights": {"0.5": 0.0, "1.0": 1.0}}
    metadata = {"scales": [1.0, 0.5], "calibration": known}
    file = Predictions(["x"], [[-0.5, -0.6]], [0], metadata, scale_logits=scale_logits)
    raw, calibrated, answers = together([file, file])
    assert raw[0] == pytest.approx([0.7, 0.3]) and answers == [0]
    tempered = np.sqrt([0.7, 0.3])
    assert calibrated[0] == pytest.approx(tempered / tempered.sum())


@pytest.mark.slow
def test_the_table_has_a_line_for_every_way_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SETS, "few", TaskSet("a handful", 60, 1))
    arguments = [
        "--sets",
        "few",
        "--rows",
        "20",
        "--views",
        FIRST,
        "three scales",
        "--work",
        str(tmp_path),
        "--use_cpu",
    ]
    monkeypatch.setattr("sys.argv", ["prediction_ablation", *arguments, "--jobs", "2"])
    prediction_ablation.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "---" not in line]
    names = [line.split("|")[1].strip() for line in lines]
    of_run = ("one fold", "three folds", "trained on sizes")
    views = (FIRST, "three scales", "three scales, equal weights")
    assert names == ["", *(f"{run}, {way}" for run in of_run for way in views)]
    assert all(len(line.split("|")) == 10 for line in lines)
    monkeypatch.setattr(prediction_ablation, "train_command", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(prediction_ablation, "run_all", lambda commands, args: commands and pytest.fail("done again"))
    prediction_ablation.main()


def test_commands_do_not_wait_for_slower_ones_and_one_that_fails_is_named(tmp_path):
    args = argparse.Namespace(use_cpu=True, jobs=2, work=tmp_path)
    note = "import sys, time; time.sleep(float(sys.argv[1])); open(sys.argv[2], 'a').write(sys.argv[1] + ' ')"
    commands = [["-c", note, seconds, str(tmp_path / "done")] for seconds in ("3", "0.1", "0.2", "0.3")]
    prediction_ablation.run_all(commands, args)
    assert (tmp_path / "done").read_text() == "0.1 0.2 0.3 3 "
    with pytest.raises(InputError, match="exit code 7; .*job1.log says why"):
        prediction_ablation.run_all([["-c", ""], ["-c", "raise SystemExit(7)"]], args)
