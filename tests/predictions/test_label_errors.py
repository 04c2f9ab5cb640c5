import csv

import numpy as np
import pytest

from vqa_sft.data.class_probs import NONE_OF_THESE, keep_likely, write_class_probs
from vqa_sft.errors import InputError
from vqa_sft.predictions.file import Predictions, write_predictions
from vqa_sft.predictions.label_errors import suspect, write_label_errors

PROBS = [[0.9, 0.1], [0.05, 0.9, 0.05], [0.3, 0.7], [0.6, 0.4], [0.8, 0.2]]


def scored(answers):
    return Predictions([f"r{i}" for i in range(5)], [np.log(row).tolist() for row in PROBS], answers)


def test_rows_are_ranked_by_the_probability_of_their_answer_and_those_without_one_are_left_out():
    found = suspect(scored([0, 0, 0, 1, None]))
    assert found.ranked == [1, 2, 3, 0]
    np.testing.assert_allclose(found.probability[:4], [0.9, 0.05, 0.3, 0.4], atol=1e-6)


def test_an_answer_is_likely_wrong_where_another_is_as_probable_as_answers_are_on_average():
    found = suspect(scored([0, 0, 0, 1, 0]))  # on average (0.9 + 0.05 + 0.3 + 0.4 + 0.8) / 5 = 0.49
    assert found.is_likely.tolist() == [False, True, True, True, False]
    found = suspect(scored([0, 1, 1, 1, 0]))  # 0.74, which the 0.6 of row 3 does not reach
    assert not found.is_likely.any()


def test_planted_errors_of_a_good_model_come_first():
    rng = np.random.default_rng(0)
    truth, probs = rng.integers(4, size=1000), rng.dirichlet([0.3] * 4, size=1000)
    probs.sort(axis=1)
    probs = np.array([np.roll(row, answer - 3) for row, answer in zip(probs, truth, strict=True)])  # the best is true
    answers = truth.copy()
    answers[:50] = (truth[:50] + 1) % 4
    found = suspect(Predictions([str(i) for i in range(1000)], np.log(probs + 1e-9).tolist(), answers.tolist()))
    assert sum(row < 50 for row in found.ranked[:50]) >= 45


def test_the_table_and_the_csv_hold_the_ranked_rows(tmp_path):
    file, output = tmp_path / "p.parquet", tmp_path / "suspects.csv"
    write_predictions(file, scored([0, 0, 0, 1, None]))
    said = write_label_errors(file, output)
    assert said.startswith("3 of 4 answers are likely errors (75.0%)") and "Wrote 4 rows" in said
    with output.open(newline="") as lines:
        rows = [*csv.DictReader(lines)]
    assert [row["id"] for row in rows] == ["r1", "r2", "r3", "r0"]
    assert rows[0] == {
        "id": "r1", "answer": "A", "probability": "0.0500", "best": "B", "best_probability": "0.9000",
        "is_likely": "yes",
    }  # fmt: skip
    write_predictions(file, scored([None] * 5))
    with pytest.raises(InputError, match="holds no answers"):
        write_label_errors(file, output)


def test_candidates_are_named_by_their_classes(tmp_path):
    candidates = [[2, 1], [1, 2, NONE_OF_THESE], [0, 1], [0, 2], [1, 0]]
    own = scored([0, 2, 0, 1, None])
    own.candidates, own.labels, own.metadata = candidates, [2, 0, 0, 2, None], {"classes": ["cat", "dog", "쥐"]}
    write_predictions(tmp_path / "p.parquet", own)
    write_label_errors(tmp_path / "p.parquet", tmp_path / "suspects.csv")
    with (tmp_path / "suspects.csv").open(newline="", encoding="utf-8") as lines:
        rows = [(row["id"], row["answer"], row["best"]) for row in csv.DictReader(lines)]
    assert rows == [("r1", "none of these", "쥐"), ("r2", "cat", "dog"), ("r3", "쥐", "cat"), ("r0", "쥐", "쥐")]


def test_class_probabilities_are_named_for_what_they_are(tmp_path):
    write_class_probs(tmp_path / "c.parquet", keep_likely(["a"], ["cat", "dog"], np.array([[0.5, 0.5]])))
    with pytest.raises(InputError, match="c.parquet holds class probabilities. Give predictions of candidates"):
        write_label_errors(tmp_path / "c.parquet")
