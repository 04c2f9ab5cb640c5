import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from vqa_sft.errors import InputError
from vqa_sft.predictions.ensemble import write_ensemble
from vqa_sft.predictions.file import Predictions, write_predictions
from vqa_sft.predictions.uncertainty import (
    HEADER,
    conformal_sets,
    conformal_threshold,
    describe,
    measure_uncertainty,
    risk_at,
)


def predictions_of(probs, answers=None, prefix="r", **metadata):
    logits = [np.log(row).tolist() for row in probs]
    return Predictions([f"{prefix}{i}" for i in range(len(logits))], logits, answers or [None] * len(logits), metadata)


def test_margin_and_entropy_are_those_by_hand():
    found = measure_uncertainty(predictions_of([[0.5, 0.3, 0.2], [0.25, 0.75], [0.5, 0.5]]))
    assert found.best == [0, 1, 0] and found.agreement == [None] * 3
    assert found.probability.tolist() == pytest.approx([0.5, 0.75, 0.5])
    assert found.margin.tolist() == pytest.approx([0.2, 0.5, 0.0])
    entropies = [-0.5 * math.log(0.5) - 0.3 * math.log(0.3) - 0.2 * math.log(0.2)]
    entropies += [-0.25 * math.log(0.25) - 0.75 * math.log(0.75), math.log(2)]
    assert found.entropy.tolist() == pytest.approx(entropies)


def test_uncertainty_is_of_calibrated_probabilities():
    flat = predictions_of([[0.9, 0.1]], calibration={"temperature": 2.0, "bias": None})
    assert measure_uncertainty(flat).margin[0] == pytest.approx((3 - 1) / (3 + 1))  # square roots of 9 to 1


def test_agreement_is_that_of_equal_scales_and_unknown_of_others():
    scales = [[np.log([0.7, 0.3]).tolist(), np.log([0.2, 0.8]).tolist()]]
    file = replace(predictions_of([[0.45, 0.55]], scales=[1.0, 0.5]), scale_logits=scales, agreement=[0.5])
    for weights, best, agreement in (([1.0, 0.0], 0, None), ([0.5, 0.5], 1, 0.5)):
        weights = dict(zip(("1.0", "0.5"), weights, strict=True))
        found = {"temperature": 1.0, "bias": None, "scale_weights": weights}
        found = measure_uncertainty(replace(file, metadata=file.metadata | {"calibration": found}))
        assert found.best == [best] and found.agreement == [agreement]


def test_the_error_of_the_most_certain_rows_is_that_by_hand():
    is_wrong = np.array([True, False, False, True])
    certainty = np.array([0.1, 0.9, 0.5, 0.3])  # the right ones are the most certain
    assert risk_at(is_wrong, certainty).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 4])
    assert risk_at(is_wrong, -certainty).tolist() == pytest.approx([1, 1, 2 / 3, 2 / 4])


def test_the_threshold_is_the_stated_one_of_the_sorted_scores():
    held_out = predictions_of([[p, 1 - p] for p in (0.9, 0.6, 0.8, 0.7)], [0] * 4)
    # Scores 0.1 0.2 0.3 0.4; the ceil(5 x coverage)-th of them.
    assert conformal_threshold(held_out, 0.4) == pytest.approx(0.2)
    assert conformal_threshold(held_out, 0.41) == pytest.approx(0.3)
    assert conformal_threshold(held_out, 0.8) == pytest.approx(0.4)
    assert conformal_threshold(held_out, 0.9) == math.inf
    rows = predictions_of([[0.7, 0.3], [0.55, 0.45], [0.2, 0.5, 0.3]])
    assert conformal_sets(rows, 0.5) == [[0], [0], [1]]
    assert conformal_sets(rows, 0.2) == [[0], [0], [1]]  # would be empty: the best choice
    assert conformal_sets(rows, 0.7) == [[0, 1], [0, 1], [1, 2]]
    assert conformal_sets(rows, math.inf)[2] == [0, 1, 2]


def exchangeable(num_rows, seed, prefix, **metadata):
    """Rows of one distribution, from a model that is much overconfident."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(4), size=num_rows)
    answers = [int(rng.choice(4, p=row)) for row in probs]
    return predictions_of(probs**3 / (probs**3).sum(axis=1, keepdims=True), answers, prefix, **metadata)


@pytest.mark.parametrize("coverage", [0.7, 0.9, 0.95])
def test_sets_hold_the_answer_as_often_as_was_asked(coverage):
    held, num_held_out, num_rows = [], 500, 500
    for seed in range(20):
        threshold = conformal_threshold(exchangeable(num_held_out, seed, "v"), coverage)
        rows = exchangeable(num_rows, 1000 + seed, "t")
        pairs = zip(conformal_sets(rows, threshold), rows.answers, strict=True)
        held.append(np.mean([answer in found for found, answer in pairs]))
    # Of both draws: the threshold's and the rows'.
    error = math.sqrt(coverage * (1 - coverage) * (1 / num_held_out + 1 / num_rows) / 20)
    assert abs(np.mean(held) - coverage) < 2 * error + 1 / num_held_out


@pytest.fixture
def files(tmp_path):
    """Paths of test rows and of held-out rows."""
    test, held_out = replace(exchangeable(100, 0, "t"), agreement=[0.5] * 100), exchangeable(300, 1, "v")
    for name, file in (("test", test), ("held_out", held_out)):
        write_predictions(tmp_path / f"{name}.parquet", file)
    return tmp_path / "test.parquet", tmp_path / "held_out.parquet"


def test_every_row_has_a_line_and_the_table_has_error_rates_by_coverage(files, tmp_path):
    said = describe(files[0], coverage=0.9, calibrate_on=files[1], output=tmp_path / "d.csv")
    with (tmp_path / "d.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"t{i}" for i in range(100)] and tuple(rows[0]) == HEADER
    assert all(row["best"] in row["set"] and row["agreement"] == "0.5000" for row in rows)
    table = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    test = exchangeable(100, 0, "t")
    error = np.mean([best != answer for best, answer in zip(test.best, test.answers, strict=True)])
    assert table["100%"] == ["100", f"{error:.4f}", f"{error:.4f}"] and table["50%"][0] == "50"
    assert float(table["50%"][1]) < error and float(table["area"][0]) < error
    sizes = np.mean([len(row["set"]) for row in rows])
    assert f"{sizes:.2f} of a row on average" in said and "standard error" in said


def test_without_answers_there_is_no_table_and_without_a_coverage_no_set(files, tmp_path):
    write_predictions(tmp_path / "p.parquet", exchangeable(5, 0, "t"))
    unknown = replace(exchangeable(5, 0, "t"), answers=[None] * 5)
    write_predictions(tmp_path / "u.parquet", unknown)
    assert "area" in describe(tmp_path / "p.parquet") and "area" not in describe(tmp_path / "u.parquet")
    said = describe(tmp_path / "u.parquet", coverage=0.9, calibrate_on=files[1], output=tmp_path / "d.csv")
    assert "Sets for a coverage of 90%" in said and "hold the answer in" not in said


def test_held_out_rows_are_calibrated_as_the_rows_are(files, tmp_path):
    """Else the threshold would be that of other probabilities."""
    calibration = {"temperature": 3.0, "bias": None}
    write_predictions(tmp_path / "c.parquet", exchangeable(2000, 0, "t", calibration=calibration))
    write_predictions(tmp_path / "h.parquet", exchangeable(2000, 1, "v"))
    said = describe(tmp_path / "c.parquet", coverage=0.8, calibrate_on=tmp_path / "h.parquet")
    share = float(said.split("They hold the answer in ")[1].split("%")[0])
    assert share == pytest.approx(80, abs=3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ids": ["t3", *[f"v{i}" for i in range(1, 300)]]}, "share row t3 (1 of 300)"),
        ({"answers": [None, *[0] * 299]}, "has no answer in row v0"),
        ({"metadata": {"orders": "rotations"}}, "was scored with orders rotations"),
        ({"metadata": {"ensemble": {}}}, "was scored with an ensemble"),
    ],
)
def test_held_out_rows_that_say_nothing_are_refused(files, tmp_path, change, part):
    write_predictions(files[1], replace(exchangeable(300, 1, "v"), **change))
    with pytest.raises(InputError) as error:
        describe(files[0], coverage=0.9, calibrate_on=files[1], output=tmp_path / "d.csv")
    assert part in str(error.value) and not (tmp_path / "d.csv").exists()


def test_held_out_rows_with_the_same_numbers_and_other_digests_share_nothing(files, tmp_path):
    numbers = [str(i) for i in range(300)]
    test = replace(exchangeable(100, 0, "t"), ids=numbers[:100], digests=[f"t{i}" for i in range(100)])
    held_out = replace(exchangeable(300, 1, "v"), ids=numbers, digests=[f"v{i}" for i in range(300)])
    for name, file in (("test", test), ("held_out", held_out)):
        write_predictions(tmp_path / f"{name}.parquet", file)
    assert "Sets for a coverage" in describe(files[0], coverage=0.9, calibrate_on=files[1])
    held_out.digests[7] = "t7"  # this one is a row of the test set
    write_predictions(files[1], held_out)
    with pytest.raises(InputError, match="share row 7 .1 of 300."):
        describe(files[0], coverage=0.9, calibrate_on=files[1])


@pytest.mark.parametrize(
    ("test", "held_out", "part"),
    [
        ({"run": "runs/a"}, {"run": "runs/b"}, "was scored by runs/b"),
        ({"run": "runs/a/fold0"}, {"run": "runs/a/fold1"}, "was scored by runs/a/fold1"),
        ({"run": None, "base_model": "x"}, {"run": "runs/a", "base_model": "x"}, "was scored by runs/a"),
        ({"run": None, "base_model": "x"}, {"run": None, "base_model": "y"}, "was scored by y"),
        ({"run": None, "base_model": "x"}, {"run": None, "base_model": "here/x"}, None),
        ({"run": None}, {"run": "runs/a"}, None),
        ({"run": "runs/a", "prompts_digest": "1"}, {"run": "runs/a", "prompts_digest": "2"}, "was scored by runs/a"),
        ({"run": "runs/a"}, {"run": "/moved/a"}, None),
        ({"run": "runs/a/fold0"}, {"run": "/moved/a"}, None),
        ({"run": "runs/a"}, {}, None),
    ],
)
def test_a_note_warns_of_held_out_rows_of_another_run(tmp_path, test, held_out, part):
    write_predictions(tmp_path / "t.parquet", exchangeable(100, 0, "t", **test))
    write_predictions(tmp_path / "v.parquet", exchangeable(300, 1, "v", **held_out))
    asked = {"coverage": 0.9, "calibrate_on": tmp_path / "v.parquet"}
    said = describe(tmp_path / "t.parquet", **asked)
    assert "Sets for a coverage" in said and ("Beware" in said) == (part is not None) and (part or "") in said


def test_held_out_rows_of_another_mean_are_refused(tmp_path):
    write_predictions(tmp_path / "t.parquet", exchangeable(100, 0, "t", ensemble={"average": "mean", "files": []}))
    write_predictions(tmp_path / "v.parquet", exchangeable(300, 1, "v", ensemble={"average": "log", "files": []}))
    with pytest.raises(InputError, match="was scored with an ensemble .log."):
        describe(tmp_path / "t.parquet", coverage=0.9, calibrate_on=tmp_path / "v.parquet")


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ({}, None),
        ({"weights": "0.9,0.1"}, "other weights, views or temperatures"),
        ({"calibrated": True}, "other weights, views or temperatures"),
        ({"runs": ("runs/b", "runs/c")}, "was scored by runs/b, runs/c"),
        ({"runs": ("runs/b", "runs/a")}, None),
    ],
)
def test_held_out_rows_of_an_ensemble_are_combined_as_the_rows_are(tmp_path, how, part):
    how = {"average": "mean", "weights": "mean", "runs": ("runs/a", "runs/b"), "calibrated": False} | how
    for part_of, num_rows, average, weights, runs, is_calibrated in (
        ("t", 100, "mean", "mean", ("runs/a", "runs/b"), False),
        ("v", 300, how["average"], how["weights"], how["runs"], how["calibrated"]),
    ):
        paths = []
        for seed, run in enumerate(runs):
            file = exchangeable(num_rows, seed, part_of, run=run)
            file = replace(file, answers=exchangeable(num_rows, 0, part_of).answers)
            file.metadata |= {"calibration": {"temperature": 2.0, "bias": None}} if is_calibrated else {}
            paths.append(str(tmp_path / f"{part_of}{seed}.parquet"))
            write_predictions(paths[-1], file)
        write_ensemble(paths, tmp_path / f"{part_of}.parquet", average=average, weights=weights)
    asked = {"coverage": 0.9, "calibrate_on": tmp_path / "v.parquet"}
    said = describe(tmp_path / "t.parquet", **asked)
    assert "Sets for a coverage" in said and ("Beware" in said) == (part is not None) and (part or "") in said


def test_options_that_mean_nothing_are_errors_and_nothing_of_others_is_replaced(files, tmp_path):
    with pytest.raises(InputError, match="belong together"):
        describe(files[0], coverage=0.9)
    with pytest.raises(InputError, match="between 0 and 1"):
        describe(files[0], coverage=90, calibrate_on=files[1])
    (tmp_path / "mine.csv").write_text("id,answer\n")
    with pytest.raises(InputError, match="has other columns"):
        describe(files[0], output=tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "id,answer\n"
