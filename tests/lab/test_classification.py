"""The table of a classification: its ways as plain functions, and its lines from files of a run."""

import numpy as np
import pytest

from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.class_probs import keep_likely, write_class_probs
from vqa_sft.lab import class_sets, classification
from vqa_sft.predictions.file import Predictions, write_predictions

NAMES = ["a", "b", "c", "d", "e"]


def softmax(logits):
    odds = np.exp(np.array(logits) - max(logits))
    return odds / odds.sum()


def held_out_rows(sharpness, num=400, num_inside=320):
    """Choices among three, right as often as their probability says once logits are divided by `sharpness`."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (num, 3))
    answers = [int(rng.choice(3, p=softmax(row))) for row in logits]
    answers = [answer if row < num_inside else None for row, answer in enumerate(answers)]
    shown = [[4, 0, 2]] * num
    return Predictions([str(row) for row in range(num)], (logits * sharpness).tolist(), answers, candidates=shown)


def test_the_model_alone_has_its_temperature_and_the_share_of_candidates_that_hold_the_label():
    test = Predictions(["x"], [[3.0, 0.0, -3.0]], [None], {"classes": NAMES}, candidates=[[1, 3, 0]])
    found = classification.model_alone(held_out_rows(3.0), test).dense()[0]
    expected = np.full(5, 0.2 / 2)
    expected[[1, 3, 0]] = 0.8 * softmax([1.0, 0.0, -1.0])
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_table_gets_its_labels_by_id_and_its_classes_by_name():
    table = keep_likely(["y", "x"], ["b", "a"], np.array([[0.9, 0.1], [0.3, 0.7]]))
    found = classification.with_labels(table, ["a", "b"], {"x": 0, "y": 1})
    assert found.ids == ["x", "y"] and found.labels.tolist() == [0, 1] and found.names == ("a", "b")
    np.testing.assert_allclose(found.dense(), [[0.7, 0.3], [0.1, 0.9]], atol=1e-6)
    with pytest.raises(Exception, match="other classes or rows"):
        classification.with_labels(table, ["a", "b"], {"x": 0})


def test_the_recipe_of_a_run_is_one_that_can_be_read(tmp_path):
    args = classification.parse_args(["--set", "drawn", "--work", str(tmp_path), "--use_cpu"])
    values = classification.recipe_of(args, "cnn")
    recipe = read_recipe([str(token) for name, value in values.items() for token in (f"--{name}", value)])
    assert recipe.arguments.fold == "all" and recipe.arguments.num_candidates == 6
    assert recipe.arguments.candidates == str(tmp_path / "cnn" / "train.parquet")


def test_the_tables_say_what_the_files_of_a_run_hold(tmp_path):
    class_sets.write_numbers(tmp_path / "data", num_train=40, num_test=20)
    names, train, test = class_sets.read_rows(tmp_path / "data")
    (tmp_path / "cnn").mkdir()

    def write(file, rows, right):
        probs = np.full((len(rows), 100), (1 - right) / 99)
        probs[np.arange(len(rows)), [row.label for row in rows]] = right
        write_class_probs(tmp_path / "cnn" / f"{file}.parquet", keep_likely([r.row_id for r in rows], names, probs))

    for file, rows, right in (
        ("train", train, 0.5),
        ("test", test, 0.5),
        ("one_fused", test, 0.8),
        ("all_fused", test, 1),
    ):
        write(file, rows, right)
    for file, rows in (("held_out", train), ("test", test)):
        shown = [[(row.label + step) % 100 for step in range(3)] for row in rows]
        logits, answers = [[9.0, 0.0, 0.0]] * len(rows), [0] * len(rows)
        found = Predictions([r.row_id for r in rows], logits, answers, {"classes": names}, candidates=shown)
        found.labels = [row.label for row in rows]
        write_predictions(tmp_path / "cnn" / f"one_{file}.parquet", found)
    args = classification.parse_args(["--set", "numbers", "--work", str(tmp_path), "--priors", "cnn"])
    lines = classification.describe_set(args).splitlines()
    said = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines if line.startswith("| small CNN: ")}
    assert [*said] == [
        f"small CNN: {way}"
        for way in (
            "prior alone", "prior alone, at its temperature", "model alone, its candidates", "fused",
            "fused, folds and permutations",
        )
    ]  # fmt: skip
    assert said["small CNN: prior alone"][0].startswith("0.6931")
    assert said["small CNN: fused"][0].startswith("0.2231") and said["small CNN: fused"][1].startswith("1.0000")
    empty = {way[len("small CNN: ") :]: [place for place in (3, 4) if not said[way][place].strip(" |")] for way in said}
    assert {way: places for way, places in empty.items() if places} == {
        "prior alone, at its temperature": [3],  # the log loss of a voice is not compared to itself
        "model alone, its candidates": [4],
    }
    assert lines[-1].startswith("| small CNN | 1.000")


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(Exception, match="must be above 0"):
        classification.parse_args(["--set", "drawn", "--epochs", "-1"])
