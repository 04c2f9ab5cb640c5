"""Images of the page's rows that training had too."""

from dataclasses import replace

import pytest
from contest import noise, rows_of, write_csv
from PIL import Image
from test_report_page import cards_of, make_run, page_of, scored

from vqa_sft.report.report_groups import make_groups
from vqa_sft.report.report_inputs import read_inputs
from vqa_sft.report.report_leakage import add_leakage


@pytest.fixture
def leaky(contest):
    """24 images of which no two are alike, but for two: row_016 has that of row_000, row_017 nearly that of row_001."""
    for i, row in enumerate(rows_of(contest)):
        noise(contest / row["path"], i)
    (contest / "images/016.png").write_bytes((contest / "images/000.png").read_bytes())
    Image.open(contest / "images/001.png").resize((100, 75)).save(contest / "images/017.png")
    return contest


def test_images_of_training_are_found_among_those_of_validation(leaky):
    write_csv(leaky / "last.csv", rows_of(leaky)[16:])
    parts = ["train"] * 16 + ["validation"] * 8
    run = make_run(leaky, leaky / "<b>run", parts, validation="last.csv", folds_file="folds.csv", fold=0)
    page, said = page_of(leaky, run, data=None)
    note = "was trained with the image of 1 of these 8 rows, and with nearly the image of 1."
    assert note in said and note in page and "<b>" not in page and "Image in training too: 2 of 2" in page
    cards = cards_of(page)
    assert "Training row <bdi>row_000</bdi> has the same image." in cards["row_016"]
    assert "Training row <bdi>row_001</bdi> has nearly the same image." in cards["row_017"]
    assert "the same image" not in cards["row_018"]
    groups = {line.label: line.num_rows for group in groups_of(leaky, run) for line in group.lines}
    assert (groups["the same"], groups["nearly the same"], groups["not there"]) == (1, 1, 6)


def groups_of(contest, run):
    inputs = read_inputs([str(run)])
    add_leakage(inputs)
    return [group for group in make_groups(inputs) if group.title == "image in training"]


def test_images_of_training_are_found_among_those_of_a_test_set(leaky):
    rows = rows_of(leaky)
    write_csv(leaky / "train.csv", rows[:16])
    run = make_run(leaky, leaky / "run", ["train"] * 16)
    write_csv(leaky / "other.csv", rows[15:])  # one row is of training itself
    file = scored(leaky, seed=1, name="other.csv", metadata={"run": str(run)})
    assert (
        "was trained with the image of 2 of these 9 rows, and with nearly the image of 1."
        in page_of(leaky, file, data="other.csv")[1]
    )
    write_csv(leaky / "other.csv", rows[18:])
    file = scored(leaky, seed=1, name="other.csv", metadata={"run": str(run)})
    none = "was trained with no image of these rows, nor nearly the same one."
    assert none in page_of(leaky, file, data="other.csv")[1]
    write_csv(leaky / "train.csv", rows[:15])
    assert "were not compared: the run in" in page_of(leaky, file, data="other.csv")[1]


def test_images_of_training_are_found_between_folds(leaky):
    for fold in (0, 1):
        parts = ["validation" if i % 2 == fold else "train" for i in range(24)]
        make_run(leaky, leaky / "run" / f"fold{fold}", parts, folds_file="folds.csv", fold="all")
    (leaky / "run" / "fold0" / "validation.parquet").rename(leaky / "run" / "out_of_fold.parquet")
    none = "was trained with no image of these rows, nor nearly the same one."
    assert none in page_of(leaky, leaky / "run", data=None)[1]  # both pairs lie in one fold
    (leaky / "images/003.png").write_bytes((leaky / "images/000.png").read_bytes())
    said = page_of(leaky, leaky / "run", data=None)[1]
    assert "was trained with the image of 3 of these 24 rows, and with nearly the image of 0." in said


def test_nothing_is_said_of_rows_without_images(leaky):
    run = make_run(leaky, leaky / "run", ["train"] * 16 + ["validation"] * 8)
    for image, num_notes in ((("path",), 1), ((), 0)):
        inputs = read_inputs([str(run)])
        [loaded] = inputs.data.sources
        inputs.data.sources = [replace(loaded, columns=replace(loaded.columns, image=image))]
        add_leakage(inputs)
        assert len(inputs.notes) == num_notes
