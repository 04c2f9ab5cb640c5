import csv
from dataclasses import replace

import numpy as np
import pandas
import pytest
from contest import write_csv
from prediction_rows import THREE

from vqa_sft.data.columns import Columns
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.predictions.ensemble import write_ensemble
from vqa_sft.predictions.file import Predictions, answers_as, write_predictions
from vqa_sft.predictions.style import Style
from vqa_sft.predictions.submission import submit, write

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
    write(tmp_path / "s.csv", THREE, Style.plain(None, 3, answers_as(columns)), CHOICES)
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
        (
            "id,answer\nx,1\ny,2\nz,1\n",
            None,
            "answer '1' of ['<choice A>', '<choice B>'] is choice 2 (index_from_0) or 1",
        ),
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
    with pytest.raises(InputError, match="not finite in row x"):
        write(tmp_path / "s.csv", bad, Style())
    with pytest.raises(InputError, match="every id once"):
        write(tmp_path / "s.csv", replace(THREE, ids=["x", "x", "z"]), Style())
    assert not (tmp_path / "s.csv").exists()


# --- As the run's data write their answers ----------------------------------------------------------------------------


def as_the_run(answer_format="letter", is_upper=False, answer="label", row_id="key"):
    """Predictions of a run whose data write their answers so."""
    own = {"id": row_id, "column": answer, "format": answer_format, "is_upper": is_upper}
    return replace(THREE, metadata={"answers": own})


@pytest.mark.parametrize(
    ("own", "lines"),
    [
        (as_the_run(), ["key,label", "x,a", "y,b", "z,a"]),
        (as_the_run(is_upper=True), ["key,label", "x,A", "y,B", "z,A"]),
        (as_the_run("index_from_1"), ["key,label", "x,1", "y,2", "z,1"]),
        (as_the_run("index_from_0"), ["key,label", "x,0", "y,1", "z,0"]),
    ],
)
def test_format_case_and_names_come_from_the_runs_data_through_ensemble_and_submit(tmp_path, own, lines):
    for name in ("p", "q"):
        write_predictions(tmp_path / f"{name}.parquet", own)
    write_ensemble([str(tmp_path / "p.parquet"), str(tmp_path / "q.parquet")], tmp_path / "both.parquet")
    for name in ("p", "both"):
        submit(tmp_path / f"{name}.parquet", tmp_path / f"{name}.csv")
        assert written(tmp_path / f"{name}.csv") == lines


@pytest.mark.parametrize(
    ("template", "own", "lines", "said"),
    [
        ("x,\ny,\nz,\n", as_the_run(), "aba", "written as in the run's data (letter, lower case)"),
        ("x,0\ny,0\nz,0\n", as_the_run("index_from_1"), "121", "written as in the run's data (index_from_1)"),
        ("x,1\ny,2\nz,1\n", as_the_run("index_from_1"), "121", "written as in the run's data (index_from_1)"),
        ("x,?\ny,?\nz,?\n", as_the_run(is_upper=True), "ABA", "written as in the run's data (letter, upper case)"),
        ("x,A\ny,A\nz,A\n", as_the_run(), "ABA", None),
        ("x,0\ny,2\nz,1\n", as_the_run(), "010", None),
        ("x,(a)\ny,(a)\nz,(a)\n", as_the_run(is_upper=True), ["(a)", "(b)", "(a)"], None),
        ("x,A.\ny,\nz,B.\n", as_the_run(), ["A.", "B.", "A."], None),
    ],
)
def test_cells_of_a_template_tell_the_format_and_else_the_runs_data_do(tmp_path, template, own, lines, said):
    write_predictions(tmp_path / "p.parquet", own)
    (tmp_path / "t.csv").write_text("id,answer\n" + template)
    told = submit(tmp_path / "p.parquet", tmp_path / "s.csv", template=tmp_path / "t.csv")
    assert written(tmp_path / "s.csv")[1:] == [f"{i},{cell}" for i, cell in zip("xyz", lines, strict=True)]
    assert ("does not say" in told) == (said is not None) and (said or "") in told


def test_answers_that_are_texts_in_the_runs_data_need_them(tmp_path):
    write_predictions(tmp_path / "p.parquet", as_the_run("text"))
    with pytest.raises(InputError, match="Give --data, the data that were predicted, or another --answer-format"):
        submit(tmp_path / "p.parquet", tmp_path / "s.csv")
    submit(tmp_path / "p.parquet", tmp_path / "s.csv", answer_format="letter")
    write_csv(tmp_path / "test.csv", [row("x", "cat", "dog"), row("y", "1", "2", "3"), row("z", "no", "yes")])
    (tmp_path / "t.csv").write_text("id,answer\nx,\ny,\nz,\n")
    for template in (None, tmp_path / "t.csv"):
        submit(
            tmp_path / "p.parquet", tmp_path / "s.csv", data=tmp_path / "test.csv", template=template, overwrite=True
        )
        assert written(tmp_path / "s.csv")[1:] == ["x,cat", "y,2", "z,no"]


def test_what_is_no_way_to_write_answers_is_a_damaged_file(tmp_path):
    for own in ({"id": "id"}, [], {"id": "i", "column": "a", "format": "roman", "is_upper": True}):
        write_predictions(tmp_path / "p.parquet", replace(THREE, metadata={"answers": own}))
        with pytest.raises(InputError, match="do not say how answers are written"):
            submit(tmp_path / "p.parquet", tmp_path / "s.csv")


# --- Columns of probabilities -----------------------------------------------------------------------------------------


def row(row_id, *choices, question="Which?", **cells):
    names = dict(zip("abcde", [*choices, "", "", ""][:3], strict=False))
    return {"id": row_id, "path": f"{row_id}.png", "question": question} | names | cells


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ("blue,green,red", ["blue", "green", "red"]),
        ("prob_red,prob_blue,prob_green", ["prob_blue", "prob_green", "prob_red"]),
        ("Green (%),Red (%),Blue (%)", ["Blue (%)", "Green (%)", "Red (%)"]),
    ],
)
def test_columns_named_after_choices_hold_these_whatever_their_order_in_a_row(tmp_path, names, named):
    rows = [["red", "green", "blue"], ["blue", "red", "green"], ["green", "blue"]]  # one without red
    write_csv(tmp_path / "test.csv", [row(f"r{i}", *texts) for i, texts in enumerate(rows)])
    logits = [np.log([0.7, 0.2, 0.1]).tolist()] * 2 + [np.log([0.9, 0.1]).tolist()]
    write_predictions(tmp_path / "p.parquet", Predictions(["r0", "r1", "r2"], logits, [None] * 3))
    (tmp_path / "t.csv").write_text(f"id,{names}\nr2,0,0,0\nr0,0,0,0\nr1,0,0,0\n")
    how = {"template": tmp_path / "t.csv", "data": tmp_path / "test.csv"}
    said = submit(tmp_path / "p.parquet", tmp_path / "s.csv", **how)
    found = {line["id"]: [float(line[name]) for name in named] for line in csv.DictReader(written(tmp_path / "s.csv"))}
    for row_id, texts, numbers in zip(("r0", "r1", "r2"), rows, logits, strict=True):
        of_text = dict(zip(texts, np.exp(numbers), strict=True))
        assert found[row_id] == pytest.approx([of_text.get(text, 0) for text in ("blue", "green", "red")], abs=1e-6)
    assert f"{named[0]} is that of 'blue'" in said and f"{named[2]} is that of 'red'" in said
    with pytest.raises(InputError, match="whose texts only --data tells"):
        submit(tmp_path / "p.parquet", tmp_path / "n.csv", template=tmp_path / "t.csv")


@pytest.mark.parametrize("names", ["answer,confidence", "prediction,confidence", "label,score", "yes,maybe", "a,c"])
def test_columns_that_are_named_after_no_choices_are_refused_and_named(tmp_path, names):
    write_csv(tmp_path / "test.csv", [row(f"r{i}", "Yes", "No") for i in range(4)])
    predictions = Predictions([f"r{i}" for i in range(4)], [[-0.1, -2.0]] * 4, [None] * 4)
    write_predictions(tmp_path / "p.parquet", predictions)
    (tmp_path / "t.csv").write_text(f"id,{names}\n" + "".join(f"r{i},0,0\n" for i in range(4)))
    for data in (None, tmp_path / "test.csv"):
        with pytest.raises(InputError, match=f"the columns {names.replace(',', ', ')} are named after neither"):
            submit(tmp_path / "p.parquet", tmp_path / "s.csv", template=tmp_path / "t.csv", data=data)
    assert not (tmp_path / "s.csv").exists()


def test_names_that_are_places_and_texts_are_refused_where_these_differ(tmp_path):
    predictions = Predictions(["r0", "r1"], [[-0.1, -2.0]] * 2, [None] * 2)
    write_predictions(tmp_path / "p.parquet", predictions)
    (tmp_path / "t.csv").write_text("id,1,2\nr0,0,0\nr1,0,0\n")
    how = {"template": tmp_path / "t.csv", "data": tmp_path / "test.csv"}
    write_csv(tmp_path / "test.csv", [row("r0", "1", "2"), row("r1", "2", "1")])
    with pytest.raises(InputError, match="may be places or the texts"):
        submit(tmp_path / "p.parquet", tmp_path / "s.csv", **how)
    write_csv(tmp_path / "test.csv", [row("r0", "1", "2"), row("r1", "1", "2")])
    assert "1 is that of choice A" in submit(tmp_path / "p.parquet", tmp_path / "s.csv", **how)


# --- What readers take for the end of a row ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark", ["\r", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\0"]
)
def test_pandas_and_csv_read_as_many_rows_as_were_written(tmp_path, mark):
    texts = [[f"one{mark}two", "dog"], [f"{mark}1", f"2{mark}", '"3", 4'], ["yes", f"no{mark}{mark}"]]
    style = replace(Style(), answer_format="text", header=("id", f"an{mark}swer"), answers=(f"an{mark}swer",))
    write(tmp_path / "s.csv", THREE, style, texts)
    expected = [texts[0][0], texts[1][1], texts[2][0]]
    table = pandas.read_csv(tmp_path / "s.csv", dtype=str)
    assert table.iloc[:, 1].tolist() == expected and table["id"].tolist() == ["x", "y", "z"]
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1:] == [["x", expected[0]], ["y", expected[1]], ["z", expected[2]]]


def test_ordinary_cells_stand_bare(tmp_path):
    write(
        tmp_path / "s.csv",
        THREE,
        replace(Style(), answer_format="text"),
        [["빨간 cat", "dog"], ["1", "2", "3"], ["", "no"]],
    )
    assert (tmp_path / "s.csv").read_text() == "id,answer\nx,빨간 cat\ny,2\nz,\n"


# --- Data of other rows -----------------------------------------------------------------------------------------------


def test_data_with_the_same_numbers_and_other_questions_are_refused(tmp_path):
    """Without ids, rows are named by their numbers, which other data have too."""
    rows = [row("", "cat", "dog", question=f"Which, {i}?") for i in range(3)]
    without_ids = [{key: cell for key, cell in one.items() if key != "id"} for one in rows]
    write_csv(tmp_path / "one.csv", without_ids)
    write_csv(tmp_path / "other.csv", [one | {"question": "Another?"} for one in without_ids])
    digests = digests_of(read_examples(str(tmp_path / "one.csv"), ReadOptions(answers="optional")).examples)
    predictions = Predictions(["0", "1", "2"], [[-0.1, -2.0]] * 3, [None] * 3, digests=digests)
    write_predictions(tmp_path / "p.parquet", predictions)
    submit(tmp_path / "p.parquet", tmp_path / "s.csv", answer_format="text", data=tmp_path / "one.csv")
    with pytest.raises(InputError, match="same ids and other questions, choices or images in rows 0, 1, 2"):
        submit(tmp_path / "p.parquet", tmp_path / "s.csv", answer_format="text", data=tmp_path / "other.csv")
