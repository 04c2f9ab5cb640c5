import csv

import numpy as np

from vqa_sft.lab.planted_errors import SHARE, plant, share_found
from vqa_sft.predictions.file import Predictions


def test_a_share_of_the_answers_is_wrong_and_their_rows_are_known(tmp_path):
    rows = [{"id": f"r{i}", "answer": "abcd"[i % 4]} for i in range(200)]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    planted, answers = plant(tmp_path / "train.csv", tmp_path / "planted.csv", seed=3)
    assert len(planted) == round(SHARE * 200)
    assert {row["id"] for i, row in enumerate(rows) if answers[row["id"]] != i % 4} == planted
    assert plant(tmp_path / "train.csv", tmp_path / "again.csv", seed=3)[0] == planted
    with (tmp_path / "planted.csv").open(newline="") as file:
        assert {row["id"]: "abcd".index(row["answer"]) for row in csv.DictReader(file)} == answers


def test_the_share_found_is_of_as_many_rows_as_answers_are_wrong():
    probs = [[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.6, 0.4]]
    predictions = Predictions(["a", "b", "c", "d"], np.log(probs).tolist(), [0, 0, 0, 0])
    assert share_found(predictions, {"c", "b"}) == 1.0
    assert share_found(predictions, {"c", "d"}) == 0.5
