import csv
from dataclasses import replace

import numpy as np
import pytest
from test_predictions import THREE

from vqa_sft.columns import Columns
from vqa_sft.errors import InputError
from vqa_sft.predictions import Predictions, write_predictions
from vqa_sft.submission import Style, submit, write

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
    write(tmp_path / "s.csv", THREE, Style.from_columns(columns), CHOICES)
    lines = [f"{row_id},{answer}" for row_id, answer in zip("xyz", answers, strict=True)]
    assert (tmp_path / "s.csv").read_text().splitlines() == ["key,label", *lines]


# --- vqa-sft submit ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """x: the first of two, y: the second of three, z: the first of two."""
    write_predictions(tmp_path / "p.parquet", THREE)
    return tmp_path / "p.parquet"


def written(path):
    return path.read_text().splitlines()


def test_without_a_template_letters_or_probabilities_are_written(file, tmp_path):
    submit(file, tmp_path / "s.csv")
    assert written(tmp_path / "s.csv") == ["id,answer", "x,A", "y,B", "z,A"]
    submit(file, tmp_path / "p.csv", answer_format="probabilities")
    rows = list(csv.DictReader(written(tmp_path / "p.csv")))
    for row, probs in zip(rows, THREE.probs, strict=True):
        numbers = [float(row[letter]) for letter in "ABC"]
        assert numbers[: len(probs)] == pytest.approx(probs, abs=1e-6) and sum(numbers) == pytest.approx(1, abs=1e-9)
    assert rows[0]["C"] == "0.000000"  # the row has two choices
    submit(file, tmp_path / "i.csv", answer_format="index_from_1")
    assert written(tmp_path / "i.csv") == ["id,answer", "x,1", "y,2", "z,1"]


def test_a_calibrated_file_is_submitted_with_its_calibration(tmp_path):
    calibrated = replace(THREE, metadata={"calibration": {"temperature": 3.0, "bias": None}})
    write_predictions(tmp_path / "p.parquet", calibrated)
    submit(tmp_path / "p.parquet", tmp_path / "s.csv", answer_format="probabilities")
    first = next(csv.DictReader(written(tmp_path / "s.csv")))
    assert float(first["A"]) == pytest.approx(1 / (1 + np.exp(-0.5 / 3)), abs=1e-6)


def test_rounded_probabilities_of_many_choices_still_sum_to_one(tmp_path):
    logits = np.random.default_rng(0).normal(size=(200, 26))
    many = Predictions([str(i) for i in range(200)], logits.tolist(), [None] * 200)
    write(tmp_path / "s.csv", many, Style.plain("probabilities", 26))
    for row, own in zip(csv.DictReader(written(tmp_path / "s.csv")), logits, strict=True):
        numbers = [float(row[letter]) for letter in Style.plain("probabilities", 26).answers]
        assert abs(sum(numbers) - 1) < 1e-9 and np.argmax(numbers) == own.argmax()


@pytest.mark.parametrize(
    ("template", "answer_format", "lines"),
    [
        ("key,label\nz,a\nx,b\ny,c\n", None, ["key,label", "z,a", "x,a", "y,b"]),
        ("label,key\nA,y\nA,x\nA,z\n", None, ["label,key", "B,y", "A,x", "A,z"]),
        ("id,answer\nx,0\ny,2\nz,1\n", None, ["id,answer", "x,0", "y,1", "z,0"]),
        ("id,answer\nx,0\ny,0\nz,0\n", "index_from_1", ["id,answer", "x,1", "y,2", "z,1"]),
        ("id,answer\nx,\ny,\nz,\n", "letter", ["id,answer", "x,A", "y,B", "z,A"]),
        ("id,answer\nx,(b)\ny,\nz,\n", None, ["id,answer", "x,(a)", "y,(b)", "z,(a)"]),
    ],
)
def test_a_template_fixes_names_columns_rows_case_and_format(file, tmp_path, template, answer_format, lines):
    (tmp_path / "t.csv").write_text(template)
    submit(file, tmp_path / "s.csv", template=tmp_path / "t.csv", answer_format=answer_format)
    assert written(tmp_path / "s.csv") == lines


@pytest.mark.parametrize(
    ("names", "of_choices"),
    [
        ("c,a,b", "abc"),
        ("p3,p1,p2", ["p1", "p2", "p3"]),
        ("2,1,0", "012"),
        ("option_c,option_a,option_b", ["option_a", "option_b", "option_c"]),
        ("B prob,A prob,C prob", ["A prob", "B prob", "C prob"]),
    ],
)
def test_columns_that_are_letters_or_count_go_by_their_names(file, tmp_path, names, of_choices):
    (tmp_path / "t.csv").write_text(f"id,{names}\nz,0,0,0\ny,0,0,0\nx,0,0,0\n")
    submit(file, tmp_path / "s.csv", template=tmp_path / "t.csv")
    assert written(tmp_path / "s.csv")[0] == f"id,{names}"
    rows = {row["id"]: row for row in csv.DictReader(written(tmp_path / "s.csv"))}
    assert [*rows] == ["z", "y", "x"]
    assert [float(rows["y"][name]) for name in of_choices] == pytest.approx(THREE.probs[1], abs=1e-6)


@pytest.fixture
def data(contest, tmp_path):
    """The contest's test.csv and predictions for its rows: always the third choice."""
    ids = [f"row_{i:03d}" for i in range(24)]
    third = Predictions(ids, [[-2.0, -2.0, -0.5, -2.0]] * 24, [None] * 24)
    write_predictions(tmp_path / "third.parquet", third)
    with (contest / "test.csv").open() as file:
        return contest / "test.csv", {row["id"]: row["c"] for row in csv.DictReader(file)}


def test_texts_come_from_the_data(data, tmp_path):
    test, third = data
    submit(tmp_path / "third.parquet", tmp_path / "s.csv", answer_format="text", data=test)
    assert {row["id"]: row["answer"] for row in csv.DictReader(written(tmp_path / "s.csv"))} == third
    (tmp_path / "t.csv").write_text("id,colour\n" + "".join(f"{i},{text}\n" for i, text in third.items()))
    submit(tmp_path / "third.parquet", tmp_path / "t2.csv", template=tmp_path / "t.csv", data=test)
    assert written(tmp_path / "t2.csv") == written(tmp_path / "t.csv")
    with pytest.raises(InputError, match="Texts need --data"):
        submit(tmp_path / "third.parquet", tmp_path / "t3.csv", template=tmp_path / "t.csv")
    with pytest.raises(InputError, match="Give --data"):
        submit(tmp_path / "third.parquet", tmp_path / "t3.csv", answer_format="text")


def test_data_of_other_rows_are_errors(data, file, tmp_path):
    with pytest.raises(InputError, match="test.csv lacks rows x, y, z"):
        submit(file, tmp_path / "s.csv", answer_format="text", data=data[0])
    write_predictions(tmp_path / "p.parquet", Predictions(["row_003"], [[0.0, -1.0]], [None]))
    with pytest.raises(InputError, match="other numbers of choices in row row_003"):
        submit(file, tmp_path / "s.csv", answer_format="text", data=data[0])


@pytest.mark.parametrize(
    ("template", "answer_format", "part"),
    [
        ("id,answer\nx,a\ny,a\n", None, "Nearest is id: it lacks row z (1 of 3)"),
        ("id,answer\nx,a\ny,a\nz,a\nw,a\n", None, "the predictions lack row w (1 of 4)"),
        ("id,answer\nx,a\ny,a\nz,a\nx,a\n", None, "it has more than once row x"),
        ("id,answer\nx,0\ny,0\nz,0\n", None, "every `answer` is '0'"),
        ("id,answer\nx,\ny,\nz,\n", None, "every `answer` is empty"),
        ("id,answer\nx,1\ny,2\nz,1\n", None, "can be read as index_from_0"),
        ("id,answer\nx,1\ny,2\nz,1\n", None, "answer '1' of ['<choice A>', '<choice B>'] is choice 2 or 1"),
        ("id,answer\nx,cat\ny,a\nz,dog\n", None, "such as 'cat'"),
        ("id,answer,usage\nx,a,p\ny,a,p\nz,a,p\n", None, "2 columns beside id: answer, usage. One is an answer, 3 are"),
        ("id,question,note,answer\nx,,,a\ny,What?,,a\nz,,,a\n", None, "question holds 'What?' and is no column of"),
        ("id,a,b,c\nx,0,0,inf\ny,0,0,0\nz,0,0,0\n", None, "c holds 'inf' and is no column of probabilities"),
        ("id\nx\ny\nz\n", None, "0 columns beside id: none"),
        ("id,a,b,c\nx,0,0,0\ny,0,0,0\nz,0,0,0\n", "letter", "has 3 columns for probabilities"),
        ("id,answer\nx,a\ny,a\nz,a\n", "probabilities", "has one column beside id"),
        ("id;answer\nx;a\ny;a\nz;a\n", None, "separated by semicolons"),
        ("id,answer\n", None, "has no rows"),
    ],
)
def test_templates_that_do_not_fit_or_say_two_things_are_errors(file, tmp_path, template, answer_format, part):
    (tmp_path / "t.csv").write_text(template)
    with pytest.raises(InputError) as error:
        submit(file, tmp_path / "s.csv", template=tmp_path / "t.csv", answer_format=answer_format)
    assert part in str(error.value) and not (tmp_path / "s.csv").exists()


def test_nothing_but_a_submission_like_it_is_replaced(file, tmp_path):
    (tmp_path / "t.csv").write_text("id,answer\nx,a\ny,a\nz,a\n")
    (tmp_path / "other.csv").write_text("id,label\nx,b\n")
    for output, part in (
        ("t.csv", "one of the files that are read"),
        ("p.parquet", "must end in .csv"),
        ("other.csv", "has other columns (id, label) than what would be written (id, answer)"),
    ):
        before = (tmp_path / output).read_bytes()
        with pytest.raises(InputError) as error:
            submit(file, tmp_path / output, template=tmp_path / "t.csv")
        assert part in str(error.value) and (tmp_path / output).read_bytes() == before
    with pytest.raises(InputError, match="one of the files"):
        submit(file, tmp_path / "t.csv", template=tmp_path / "t.csv", overwrite=True)
    submit(file, tmp_path / "other.csv", template=tmp_path / "t.csv", overwrite=True)
    submit(file, tmp_path / "other.csv", template=tmp_path / "t.csv")  # an earlier one of ours
    assert written(tmp_path / "other.csv") == ["id,answer", "x,a", "y,b", "z,a"]


def test_probabilities_that_are_no_numbers_are_not_written(tmp_path):
    bad = replace(THREE, choice_logits=[[0.0, float("nan")], [0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(InputError, match="no numbers in row x"):
        write(tmp_path / "s.csv", bad, Style())
    with pytest.raises(InputError, match="every id once"):
        write(tmp_path / "s.csv", replace(THREE, ids=["x", "x", "z"]), Style())
    assert not (tmp_path / "s.csv").exists()
