"""What accuracy becomes without the images, and whether that is said."""

from dataclasses import replace

import numpy as np
import pytest

from vqa_sft.errors import InputError
from vqa_sft.predictions.blind import compare, describe, paired
from vqa_sft.predictions.calibration import calibrate_run
from vqa_sft.predictions.compare import describe as diff
from vqa_sft.predictions.ensemble import write_ensemble
from vqa_sft.predictions.file import Predictions, read_predictions, write_predictions
from vqa_sft.predictions.score import score_table
from vqa_sft.predictions.submission import submit

ANSWERS = [0, 1] * 20
IDS = [f"r{i}" for i in range(40)]


def rows(right, images=None, changed=True, answers=ANSWERS):
    """The first `right` rows are answered right, with probability 0.9."""
    best = [(answer or 0) if i < right else 1 - (answer or 0) for i, answer in enumerate(answers)]
    logits = [np.log([0.1, 0.9] if choice else [0.9, 0.1]).tolist() for choice in best]
    metadata = {"run": "runs/a"} | ({"images": images} if images else {})
    of_rows = [changed if isinstance(changed, bool) else i in changed for i in range(40)] if images else []
    return Predictions(IDS, logits, answers, metadata, changed=of_rows)


def test_a_fall_without_the_image_and_with_another_says_that_the_model_looks():
    files = {"original": rows(38), "blank": rows(20, "blank"), "swapped": rows(18, "swapped")}
    found = compare(files, {"most frequent": dict.fromkeys(IDS, 1)})
    assert found["looks"] and found["rows"] == 40 and found["rows_without_image"] == {"rows": 0}
    assert found["says"].startswith("The model looks at the image: accuracy falls from 0.950 to 0.500 without it")
    assert found["images"]["blank"]["fall"] == pytest.approx(0.45)
    assert found["images"]["blank"]["confidence"] == pytest.approx(0.9)
    assert found["baselines"] == {"always A": 0.5, "most frequent": 0.5}
    assert "0.450 [0.300, 0.600]" in describe(found)


@pytest.mark.parametrize("flat", ["blank", "swapped"])
def test_no_fall_in_one_of_both_is_a_warning(flat):
    files = {"original": rows(30)} | {kind: rows(29 if kind == flat else 10, kind) for kind in ("blank", "swapped")}
    found = compare(files, {})
    assert not found["looks"] and found["says"].startswith("Beware: the image hardly matters: accuracy is 0.750 with")
    assert "between 0.000 and 0.075 (95%)" in found["says"]
    # What is left of a blurred image may be enough.
    files = {"original": rows(38), "blank": rows(20, "blank"), "blurred": rows(38, "blurred")}
    assert (
        compare(files, {})["looks"]
        and not compare({kind: files[kind] for kind in ("original", "blurred")}, {})["looks"]
    )


def test_rows_without_image_or_answer_are_counted_apart():
    answers = [None if i >= 35 else answer for i, answer in enumerate(ANSWERS)]
    with_image = {*range(5, 40)}
    files = {"original": rows(30, answers=answers), "blank": rows(20, "blank", with_image, answers)}
    files["swapped"] = rows(20, "swapped", with_image - {5, 6}, answers)
    found = compare(files, {})
    assert (found["rows"], found["unanswered"], found["rows_without_image"]) == (30, 5, {"rows": 5, "accuracy": 1.0})
    assert [values["rows"] for values in found["images"].values()] == [30, 30, 28]
    assert found["images"]["blank"]["accuracy"] == 0.5
    assert "5 rows without an image are not in the table (accuracy 1.000)" in describe(found)
    with pytest.raises(InputError, match="no row has both an answer and an image"):
        compare({"original": rows(30), "blank": rows(30, "blank", False)}, {})


def test_of_a_classification_the_baseline_is_the_classifiers_best_candidate_and_no_letter():
    answers = [1] * 30 + [0] * 6 + [None] * 4
    files = {"original": rows(30, answers=answers), "blank": rows(10, "blank", answers=answers)}
    files = {kind: replace(file, candidates=[[7, 3]] * 40) for kind, file in files.items()}
    found = compare(files, {})
    assert found["baselines"] == {"always the first candidate": pytest.approx(6 / 36)}
    said = describe(found)
    assert "4 rows whose class is unknown or no candidate are left out." in said and "always B" not in said


def test_the_interval_of_a_fall_is_that_of_resampled_pairs():
    rng = np.random.default_rng(0)
    was, now = rng.random(200) < 0.8, rng.random(200) < 0.6
    falls = []
    for _ in range(4000):
        drawn = rng.integers(200, size=200)
        falls.append(was[drawn].mean() - now[drawn].mean())
    np.testing.assert_allclose(paired(was, now), np.percentile(falls, [2.5, 97.5]), atol=0.011)
    assert paired(was, was) == [0, 0]


def test_files_of_blank_images_are_never_taken_for_others_in_silence(tmp_path):
    plain, blank = str(tmp_path / "plain.parquet"), str(tmp_path / "blank.parquet")
    write_predictions(plain, rows(38))
    write_predictions(blank, rows(20, "blank", {*range(30)}))
    assert read_predictions(blank).changed == [True] * 30 + [False] * 10 and not read_predictions(plain).changed
    with pytest.raises(InputError, match=r"images shown in different ways: .*plain.parquet \(original\), .* \(blank\)"):
        write_ensemble([plain, blank], tmp_path / "both.parquet")
    write_predictions(tmp_path / "again.parquet", rows(25, "blank"))
    write_ensemble([blank, str(tmp_path / "again.parquet")], tmp_path / "both.parquet")
    assert read_predictions(tmp_path / "both.parquet").images == "blank"
    (tmp_path / "run.json").touch()
    with pytest.raises(InputError, match="was scored with images blank"):
        calibrate_run(tmp_path, blank)
    assert "blank.parquet, images blank" in score_table([blank])
    assert "blank.parquet was scored with images blank" in diff(plain, blank)
    assert "Beware" in submit(blank, tmp_path / "out.csv") and "Beware" not in submit(plain, tmp_path / "out.csv")
    write_predictions(blank, rows(20, "upside down"))
    with pytest.raises(InputError, match="`images` in its metadata"):
        read_predictions(blank)
