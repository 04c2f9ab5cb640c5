from dataclasses import replace

import pytest

from vqa_sft.cli import score_table
from vqa_sft.columns import Columns
from vqa_sft.errors import InputError
from vqa_sft.predictions import (
    Predictions,
    read_answers,
    read_predictions,
    with_answers,
    write_predictions,
    write_submission,
)

THREE = Predictions(
    ["x", "y", "z"],
    [[-0.5, -1.0], [-2.0, -0.25, -3.0], [-0.75, -0.75]],
    [0, None, 1],
    {"run": "r", "한": "글"},
    [False, False, False],
)


def test_a_prediction_file_gives_back_what_was_written(tmp_path):
    write_predictions(tmp_path / "new" / "p.parquet", THREE)
    assert read_predictions(tmp_path / "new" / "p.parquet") == THREE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.parquet"]


CHOICES = [["cat", "dog"], ["1", "2", "3"], ["yes", "no"]]


@pytest.mark.parametrize(
    ("answer_format", "is_upper", "answers"),
    [
        (None, False, "aba"),
        ("letter", True, "ABA"),
        ("index_from_0", False, "010"),
        ("index_from_1", False, "121"),
        ("text", False, ["cat", "2", "yes"]),
    ],
)
def test_a_submission_is_written_as_the_data_write_their_answers(tmp_path, answer_format, is_upper, answers):
    columns = Columns("key", ("path",), "question", ("a", "b", "c"), "label", None, answer_format, is_upper)
    write_submission(tmp_path / "s.csv", THREE, columns, CHOICES)
    lines = [f"{row_id},{answer}" for row_id, answer in zip("xyz", answers, strict=True)]
    assert (tmp_path / "s.csv").read_text().splitlines() == ["key,label", *lines]


def test_rows_that_were_answered_without_their_picture_are_marked(tmp_path):
    write_predictions(tmp_path / "p.parquet", replace(THREE, blanked=[False, True, False]))
    assert read_predictions(tmp_path / "p.parquet").blanked == [False, True, False]


def test_answers_are_matched_by_id_and_not_by_position(tmp_path):
    (tmp_path / "a.csv").write_text("id,answer\nz,b\nx,A\nother,c\ny,c\n")
    assert with_answers(THREE, read_answers(tmp_path / "a.csv")).answers == [0, 2, 1]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("id,answer\nx,a\n", "no answer for rows y, z (2 of 3)"),
        ("id,answer\nx,c\ny,a\nz,a\n", "none of the row's choices in row x"),
        ("id,answer\nx,7\ny,a\nz,a\n", "`answer` is no letter in row x"),
        ("key,answer\nx,a\n", "must have the columns id and answer"),
        ("id,answer\nx,a\nx,b\ny,a\nz,a\n", "ids more than once: 4 rows, 3 ids"),
    ],
)
def test_answers_that_do_not_fit_are_named(tmp_path, content, part):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError) as error:
        with_answers(THREE, read_answers(tmp_path / "a.csv"))
    assert part in str(error.value)


def test_a_file_that_is_no_prediction_file_is_an_error(tmp_path):
    (tmp_path / "p.parquet").write_text("hello")
    for name, part in (("none.parquet", "no such prediction file"), ("p.parquet", "not a prediction file")):
        with pytest.raises(InputError, match=part):
            read_predictions(tmp_path / name)


def test_the_score_table_holds_the_metrics_of_every_file(tmp_path):
    write_predictions(tmp_path / "p.parquet", THREE)
    (tmp_path / "a.csv").write_text("id,answer\nx,a\ny,a\nz,a\n")
    table = score_table([f"mine={tmp_path / 'p.parquet'}"], str(tmp_path / "a.csv")).splitlines()
    assert table[0].split() == ["rows", "accuracy", "nll", "ece"]
    assert table[1].split()[:3] == ["mine", "3", "0.6667"]
    with pytest.raises(InputError, match="holds rows without an answer"):
        score_table([str(tmp_path / "p.parquet")], None)
