"""The sets of the ablation, its table against slow references, and one small run of it."""

import csv
import hashlib
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vqa_sft.config.recipe import read_recipe
from vqa_sft.lab import ablation
from vqa_sft.lab.ablation import Scores
from vqa_sft.predictions.metrics import accuracy, ece, nll
from vqa_sft.tiny.numbers import SETS, write_set


def rows_of(folder, name):
    with (folder / name).open(encoding="utf-8") as file:
        return [*csv.DictReader(file)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name in ("digits", "similar", "noisy", "skewed"):
        write_set(folder / name, replace(SETS[name], num_train=400, num_test=20))
    return folder


@pytest.mark.parametrize("name", ["digits", "similar"])
def test_every_test_row_is_there_once_under_each_rotation(sets, name):
    rows = rows_of(sets / name, "test.csv")
    assert len(rows) == 80
    for start in range(0, 80, 4):
        four = rows[start : start + 4]
        assert sorted(row["answer"] for row in four) == list("abcd")
        assert len({row[row["answer"]] for row in four}) == 1  # one right choice, wherever it stands
        assert len({row["path"] for row in four}) == 1
        assert {"".join(sorted(row[letter] for letter in "abcd")) for row in four} == {
            "".join(sorted(four[0][letter] for letter in "abcd"))
        }
        for letter in "abcd":  # every choice has been under every letter
            assert len({row[letter] for row in four}) == 4


def test_wrong_choices_are_alike_and_the_swapped_number_is_among_them(sets):
    for row in rows_of(sets / "similar", "train.csv"):
        right = row[row["answer"]]
        wrong = {row[letter] for letter in "abcd"} - {right}
        assert len(wrong) == 3
        assert right == right[::-1] or right[::-1] in wrong
        for number in wrong - {right[::-1]}:
            assert sum(a != b for a, b in zip(number, right, strict=True)) == 1


def test_images_of_the_test_rows_are_no_training_images(sets):
    def digests(name):
        rows = rows_of(sets / "digits", name)
        return {hashlib.sha256((sets / "digits" / row["path"]).read_bytes()).digest() for row in rows}

    assert len(digests("train.csv")) == 400 and not digests("train.csv") & digests("test.csv")


def test_noise_and_skew_are_in_the_training_rows_alone(sets):
    clean, noisy, skewed = (rows_of(sets / name, "train.csv") for name in ("similar", "noisy", "skewed"))
    wrong = [row["answer"] != other["answer"] for row, other in zip(noisy, clean, strict=True)]
    assert 0.14 < np.mean(wrong) < 0.26  # 0.2, with a standard error of 0.02
    assert 0.71 < np.mean([row["answer"] == "a" for row in skewed]) < 0.84  # 0.7 and a quarter of the rest: 0.775
    for row, other in zip(skewed, clean, strict=True):
        assert row[row["answer"]] == other[other["answer"]]
    tests = [rows_of(sets / name, "test.csv") for name in ("similar", "noisy", "skewed")]
    assert tests[0] == tests[1] == tests[2]


def planted(seed, lift=0.0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(4), size=(3, 50, 4))
    letters = np.stack([rng.permutation(4) for _ in range(50)])
    own = np.take_along_axis(probs, letters[None, ..., None], axis=-1)[..., 0]
    scores = Scores(np.minimum(own + lift, 1.0), probs.max(-1), probs.argmax(-1) == letters, letters, train_s=2.0)
    return scores, probs, letters


def test_the_metrics_of_the_table_are_the_means_over_seeds():
    scores, probs, letters = planted(0)
    flat, answers = probs.reshape(3, 200, 4), letters.ravel()
    for name, metric in (("accuracy", accuracy), ("nll", nll), ("ece", ece)):
        assert scores.values[name] == pytest.approx(np.mean([metric(run, answers) for run in flat]))
    biases = []
    for run in flat:
        right = Counter(int(answer) for row, answer in zip(run, answers, strict=True) if row.argmax() == answer)
        biases.append(max(right[i] / 50 for i in range(4)) - min(right[i] / 50 for i in range(4)))
    assert scores.values["letter bias"] == pytest.approx(np.mean(biases))


def test_all_resamples_at_once_are_the_metrics_of_the_seeds_and_rows_drawn():
    scores, probs, letters = planted(0)
    rng = np.random.default_rng(1)
    drawn = [(rng.integers(3, size=3), rng.integers(50, size=50)) for _ in range(4)]
    seeds = np.array([np.bincount(seeds, minlength=3) for seeds, _ in drawn])
    rows = np.array([np.bincount(rows, minlength=50) for _, rows in drawn])
    found = scores.drawn(seeds, rows)
    for k, (seeds, rows) in enumerate(drawn):
        answers, runs = letters[rows].ravel(), [probs[seed][rows].reshape(-1, 4) for seed in seeds]
        for name, metric in (("accuracy", accuracy), ("nll", nll), ("ece", ece)):
            assert found[name][k] == pytest.approx(np.mean([metric(run, answers) for run in runs]))
        recalls = [[np.mean(run.argmax(1)[answers == i] == i) for i in range(4)] for run in runs]
        assert found["letter bias"][k] == pytest.approx(np.mean([max(of) - min(of) for of in recalls]))
    seeds, rows = ablation.resamples(3, 50)  # as many are drawn as there are
    assert seeds.sum(axis=1).tolist() == [3] * 1000 and rows.sum(axis=1).tolist() == [50] * 1000


def test_differences_compare_the_same_rows():
    """A small lift of every row is far outside the interval of the difference, and well inside that of the values."""
    scores, higher = planted(0)[0], planted(0, lift=0.002)[0]
    low, high = ablation.intervals_of(lambda *drawn: ablation.difference(higher, scores, *drawn), scores)["nll"]
    own_low, own_high = ablation.intervals_of(scores.drawn, scores)["nll"]
    assert low < higher.values["nll"] - scores.values["nll"] < high < 0
    assert own_low < higher.values["nll"] < own_high


def test_every_recipe_of_the_ablation_can_be_read(tmp_path):
    for keys in ablation.RECIPES.values():
        values = ablation.recipe_values(SETS["few"], keys, tmp_path, tmp_path / "run", seed=0, use_cpu=True)
        given = [str(token) for name, value in values.items() for token in (f"--{name}", value)]
        read_recipe(["--config", str(ablation.DIGITS), *given])


@pytest.mark.slow
def test_a_small_ablation_trains_scores_and_writes_its_table(tmp_path, monkeypatch, capsys):
    small = replace(SETS["few"], num_train=24, num_epochs=1, num_test=4)
    monkeypatch.setattr(ablation, "SETS", {"few": small})
    recipes = ["naive", "plain", "soup of three seeds", "defaults"]
    command = ["ablation", "--sets", "few", "--recipes", *recipes, "--seeds", "1", "--jobs", "2", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--work", str(tmp_path)])
    ablation.main()
    table = capsys.readouterr().out
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert lines.keys() > set(recipes)
    assert lines["naive"].count("[") == 4 and lines["defaults"].count("[") == 6
    before = (tmp_path / "few" / "naive" / "seed0" / "test.parquet").stat().st_mtime_ns
    ablation.main()  # nothing is done again
    assert capsys.readouterr().out == table
    assert (tmp_path / "few" / "naive" / "seed0" / "test.parquet").stat().st_mtime_ns == before


def test_what_the_ablation_cannot_do_is_an_error(tmp_path, monkeypatch, capsys):
    for arguments, said in (
        (["--recipes", "soup of three seeds"], "is made of the runs of `plain`"),
        (["--jobs", "0"], "must be at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["ablation", *arguments, "--work", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            ablation.main()
        assert stop.value.code == 2 and said in capsys.readouterr().err
