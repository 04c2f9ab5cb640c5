import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from vqa_sft.errors import InputError
from vqa_sft.predictions.compare import describe
from vqa_sft.predictions.file import Predictions, write_predictions


@pytest.fixture
def write(tmp_path):
    """`write("a", "x,A", ...)`: a submission with these lines."""

    def submission(name, *lines, header="id,answer"):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")
        return tmp_path / f"{name}.csv"

    return submission


def test_changed_answers_are_counted_named_and_sorted_by_how_many(write):
    one = write("a", "x,A", "y,A", "z,B", "w,C", "v,D")
    other = write("b", "v,d", "w,A", "z,b", "y,(b)", "x,B")  # in another order, in lower case
    said = describe(one, other)
    assert "3 of 5 answers changed (60.0%)" in said
    lines = [line.split() for line in said.splitlines()]
    assert lines[2:5] == [["from", "to", "rows"], ["A", "B", "2"], ["C", "A", "1"]]
    assert said.endswith("Changed: x, y, w")
    assert describe(one, one).endswith("0 of 5 answers changed (0.0%).")


def test_the_first_twenty_are_named_or_all(write):
    one = write("a", *[f"r{i},A" for i in range(25)])
    other = write("b", *[f"r{i},B" for i in range(25)])
    assert describe(one, other).endswith("r18, r19 ... and 5 more: --all") and "r20" not in describe(one, other)
    assert describe(one, other, show_all=True).endswith("r23, r24")


def test_columns_of_probabilities_are_read_as_their_likeliest(write):
    one = write("a", "x,0.1,0.9", "y,0.6,0.4", header="key,B,A")
    assert "1 of 2 answers changed" in describe(one, write("b", "x,A", "y,A"))
    assert "0 of 2 answers changed" in describe(one, write("d", "x,0.9,A", "y,0.6,B", header="id,sure,answer"))
    with pytest.raises(InputError, match="are no probabilities"):
        describe(write("c", "x,a,b", header="id,B,A"), one)
    with pytest.raises(InputError, match="probabilities are not finite in row y"):
        describe(write("e", "x,0.1,0.9", "y,nan,0.4", header="id,A,B"), one)
    with pytest.raises(InputError, match="ids are not unique: row x"):
        describe(write("f", "x,0.1,0.9", "x,0.2,0.8", header="id,A,B"), one)


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["x,A"], "lacks row y (1 of 2)"),
        (["x,A", "y,A", "z,A"], "lacks row z (1 of 3)"),
        (["x,A", "x,A"], "ids are not unique: row x"),
    ],
)
def test_other_rows_are_errors(write, lines, part):
    with pytest.raises(InputError) as error:
        describe(write("a", "x,A", "y,B"), write("b", *lines))
    assert part in str(error.value)


def test_with_the_data_questions_and_texts_are_shown_and_formats_may_differ(contest, write):
    with (contest / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    letters = write("a", *[f"{row['id']},{'abcd'[i % 4]}" for i, row in enumerate(rows)])
    texts = [f"{row['id']},{row['abcd'[i % 4]] if i else row['d']}" for i, row in enumerate(rows)]
    said = describe(letters, write("b", *texts), data=contest / "test.csv")
    first = rows[0]
    assert "1 of 24 answers changed" in said
    assert f"{first['id']}  {first['question']}\n    A. {first['a']} -> D. {first['d']}" in said
    with pytest.raises(InputError, match="lacks row nowhere"):
        describe(write("c", "nowhere,A"), write("d", "nowhere,B"), data=contest / "test.csv")


@pytest.fixture
def files(tmp_path):
    """Ten rows of two choices; the second model turns rows 0 to 2 from right to wrong, and 3 to 9 the other way."""
    ids, answers = [f"r{i}" for i in range(10)], [0] * 10
    log = np.log([[0.9, 0.1], [0.2, 0.8]]).tolist()
    one = Predictions(ids, [log[0]] * 3 + [log[1]] * 7, answers)
    other = Predictions(ids, [log[1]] * 3 + [np.log([0.95, 0.05]).tolist()] + [log[0]] * 6, answers)
    for name, file in (("one", one), ("other", other)):
        write_predictions(tmp_path / f"{name}.parquet", file)
    return tmp_path / "one.parquet", tmp_path / "other.parquet", one


def test_prediction_files_tell_the_largest_change_and_whether_it_is_for_the_better(files, tmp_path):
    said = describe(*files[:2])
    assert "10 of 10 answers changed" in said
    assert "0.200 -> 0.950, choice A of row r3" in said
    assert "3 right -> wrong, 7 wrong -> right" in said
    p_value = 2 * sum(math.comb(10, k) for k in range(4)) / 2**10
    assert f"p = {p_value:.3g}" in said
    write_predictions(tmp_path / "unknown.parquet", replace(files[2], answers=[None] * 10))
    assert "right" not in describe(tmp_path / "unknown.parquet", tmp_path / "unknown.parquet")
    assert "0 right -> wrong, 0 wrong -> right (McNemar's exact test: p = 1)" in describe(files[0], files[0])
    assert "No probability changed." in describe(files[0], files[0])


def test_texts_are_compared_as_they_are_but_for_case(write):
    said = describe(write("a", "x,red", "y,Blue"), write("b", "x,green", "y,blue"))
    assert "1 of 2 answers changed" in said and "red" in said and "green" in said


def test_letters_are_compared_with_letters_and_with_nothing_else(files, write):
    letters = write("a", *[f"r{i},{'A' if i < 3 else 'B'}" for i in range(10)])
    assert "0 of 10 answers changed" in describe(files[0], letters)
    with pytest.raises(InputError, match="Give --data"):
        describe(files[0], write("b", *[f"r{i},1" for i in range(10)]))
    with pytest.raises(InputError, match="b.csv has other answers than letters"):
        describe(letters, write("b", *[f"r{i},{'A' if i else 'red'}" for i in range(10)]))


# --- Formats and columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["id,prediction,confidence", "id,choice,score"])
def test_an_answer_and_its_confidence_are_no_probabilities(write, header):
    one = write("a", *[f"r{i},0,0.{i + 1}" for i in range(8)], header=header)
    other = write("b", *[f"r{i},1,0.{i + 1}" for i in range(8)], header=header)
    columns = header.removeprefix("id,").replace(",", ", ")
    with pytest.raises(InputError, match=f"which of the columns {columns} is the answer"):
        describe(one, other)
    given = {"columns": {"answer": header.split(",")[1]}, "answer_format": "index_from_0"}
    said = describe(one, other, **given)
    assert "8 of 8 answers changed" in said and said.splitlines()[3].split() == ["A", "B", "8"]


def test_columns_named_after_choices_are_compared_by_these(write, tmp_path):
    rows = ["r0,r0.png,Which?,red,green,blue", "r1,r1.png,Which?,blue,red,green"]
    data = write("test", *rows, header="id,path,question,a,b,c")
    one = write("a", "r0,0.7,0.2,0.1", "r1,0.7,0.2,0.1", header="id,blue,green,red")
    said = describe(one, write("b", "r0,blue", "r1,red"), data=data)
    assert "1 of 2 answers changed" in said and "A. blue -> B. red" in said and "blue is that of 'blue'" in said
    with pytest.raises(InputError, match="--data tells their texts"):
        describe(one, one)


@pytest.mark.parametrize(("answer_format", "cells"), [("index_from_1", "12"), ("index_from_0", "01"), ("letter", "ab")])
def test_a_submission_is_read_as_the_data_of_the_prediction_file_beside_it(files, write, answer_format, cells):
    own = {"id": "id", "column": "answer", "format": answer_format, "is_upper": False}
    write_predictions(files[0], replace(files[2], metadata={"answers": own}))
    best = [0] * 3 + [1] * 7
    submission = write("s", *[f"r{i},{cells[choice]}" for i, choice in enumerate(best)])
    assert "0 of 10 answers changed" in describe(files[0], submission)


def test_prediction_files_of_other_rows_with_the_same_numbers_are_refused(files):
    write_predictions(files[0], replace(files[2], digests=[f"a{i}" for i in range(10)]))
    write_predictions(files[1], replace(files[2], digests=[f"b{i}" for i in range(10)]))
    with pytest.raises(InputError, match="same ids and other questions"):
        describe(*files[:2])
