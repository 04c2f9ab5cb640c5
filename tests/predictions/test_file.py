import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from prediction_rows import THREE

from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.predictions.ensemble import align, take
from vqa_sft.predictions.file import Predictions, read_predictions, with_answers, write_predictions
from vqa_sft.predictions.matched import read_answers
from vqa_sft.predictions.score import score_table


def test_a_prediction_file_gives_back_what_was_written(tmp_path):
    write_predictions(tmp_path / "new" / "p.parquet", THREE)
    assert read_predictions(tmp_path / "new" / "p.parquet") == THREE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.parquet"]


def test_rows_that_were_answered_without_their_image_are_marked(tmp_path):
    write_predictions(tmp_path / "p.parquet", replace(THREE, blanked=[False, True, False]))
    assert read_predictions(tmp_path / "p.parquet").blanked == [False, True, False]


def test_answers_are_matched_by_id_and_not_by_position(tmp_path):
    (tmp_path / "a.csv").write_text("id,answer\nz,b\nx,A\nother,c\ny,c\n")
    assert with_answers(THREE, read_answers(tmp_path / "a.csv", THREE, "p.parquet")).answers == [0, 2, 1]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("id,answer\nx,a\n", "no answer for rows y, z (2 of 3)"),
        ("id,answer\nx,c\ny,a\nz,a\n", "none of the row's choices (letter) in row x"),
        ("id,answer\nx,7\ny,a\nz,a\n", "`answer` is no letter in row x"),
        ("key,answer\nx,a\n", "must have the columns id and answer"),
        ("id,answer\nx,a\nx,b\ny,a\nz,a\n", "ids more than once: 4 rows, 3 ids"),
    ],
)
def test_answers_that_do_not_fit_are_named(tmp_path, content, part):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError) as error:
        with_answers(THREE, read_answers(tmp_path / "a.csv", THREE, "p.parquet"))
    assert part in str(error.value)


def test_a_file_that_is_no_prediction_file_is_an_error(tmp_path):
    (tmp_path / "p.parquet").write_text("hello")
    for name, part in (("none.parquet", "no such prediction file"), ("p.parquet", "not a prediction file")):
        with pytest.raises(InputError, match=part):
            read_predictions(tmp_path / name)
    (tmp_path / "p.csv").write_text("id,answer")
    with pytest.raises(InputError, match="p.csv is not .* That of a submission is beside it: .*p.parquet"):
        read_predictions(tmp_path / "p.csv")


def test_the_score_table_holds_the_metrics_of_every_file(tmp_path):
    write_predictions(tmp_path / "p.parquet", THREE)
    (tmp_path / "a.csv").write_text("id,answer\nx,a\ny,a\nz,a\n")
    table = score_table([f"mine={tmp_path / 'p.parquet'}"], str(tmp_path / "a.csv")).splitlines()
    assert table[0].split() == ["rows", "accuracy", "nll", "brier", "ece", "ece_equal_mass"]
    assert table[1].split()[:3] == ["mine", "3", "0.6667"] and len(table) == 2
    with pytest.raises(InputError, match="holds rows without an answer"):
        score_table([str(tmp_path / "p.parquet")], None)


def test_a_calibrated_file_has_a_line_without_its_calibration_and_one_with_it(tmp_path):
    answers = [0, 0, 1]
    write_predictions(tmp_path / "raw.parquet", replace(THREE, answers=answers))
    calibrated = replace(THREE, answers=answers, metadata={"calibration": {"temperature": 1.3, "bias": None}})
    write_predictions(tmp_path / "p.parquet", calibrated)
    raw = score_table([f"p={tmp_path / 'raw.parquet'}"]).splitlines()[1].split()
    before, after = score_table([f"p={tmp_path / 'p.parquet'}"]).splitlines()[1:]
    assert before.startswith("p, as scored") and before.split()[3:] == raw[1:]
    assert after.startswith("p, temperature 1.30 ") and after.split()[3:] != raw[1:]


def test_probabilities_are_the_softmax_of_tempered_and_shifted_logits():
    calibrated = replace(THREE, metadata={"calibration": {"temperature": 2.0, "bias": [0.0, 1.0, -1.0]}})
    shifted = [[-0.25, 0.5], [-1.0, 0.875, -2.5], [-0.375, 0.625]]
    for row, logits in zip(calibrated.probs, shifted, strict=True):
        whole = sum(math.exp(number) for number in logits)
        assert row.tolist() == pytest.approx([math.exp(number) / whole for number in logits])
    assert THREE.best == [0, 1, 0] and calibrated.best == [1, 1, 1]
    assert [row.sum() for row in THREE.probs] == pytest.approx([1, 1, 1])
    shorter = replace(THREE, metadata={"calibration": {"temperature": 2.0, "bias": [0.0, 1.0]}})
    assert shorter.probs[1][2] / shorter.probs[1][0] == pytest.approx(math.exp(-0.5))  # as if its last were 0
    for metadata in ({}, {"calibration": None}):
        assert replace(THREE, metadata=metadata).probs[0].tolist() == THREE.probs[0].tolist()


def test_logits_of_each_scale_are_kept_and_other_files_have_no_such_column(tmp_path):
    two = [[row, [number / 2 for number in row]] for row in THREE.choice_logits]
    known = replace(THREE, scale_logits=two, metadata={"scales": [1.0, 0.5]})
    write_predictions(tmp_path / "p.parquet", known)
    assert read_predictions(tmp_path / "p.parquet") == known
    write_predictions(tmp_path / "one.parquet", THREE)
    assert "scale_logits" not in pq.read_schema(tmp_path / "one.parquet").names


def test_agreement_is_kept_and_a_file_from_before_it_is_read(tmp_path):
    known = replace(THREE, agreement=[1.0, None, 0.25])
    write_predictions(tmp_path / "p.parquet", known)
    assert read_predictions(tmp_path / "p.parquet") == known
    pq.write_table(pq.read_table(tmp_path / "p.parquet").drop_columns(["agreement"]), tmp_path / "old.parquet")
    assert read_predictions(tmp_path / "old.parquet") == THREE


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ids": ["x", "y", "x"]}, "ids are not unique: row x"),
        ({"choice_logits": [[-0.5, -1.0], [float("nan"), 0.0], [0.0, 0.0]]}, "is damaged: row y"),
        ({"choice_logits": [[-0.5, -1.0], [0.0] * 27, [0.0, 0.0]]}, "is damaged: row y"),
        ({"ids": ["x", None, "z"]}, "1 of 3 rows have no id"),
        ({"metadata": [1]}, "its metadata are no mapping"),
        ({"metadata": {"scales": "x"}}, "`scales` in its metadata"),
        ({"metadata": {"scales": [1.0, 1]}}, "`scales` in its metadata"),
        ({"metadata": {"scales": [1.0, -1.0]}}, "`scales` in its metadata"),
        ({"metadata": {"calibration": {"temperature": 1.0, "scale_weights": {"1.0": 1.0}}}}, "of two at least"),
        ({"metadata": {"run": 7}}, "`run` in its metadata"),
        ({"scale_logits": [[[-0.5, -1.0]]] * 3, "metadata": {"scales": [1.0]}}, "not those of 1 scales"),
        ({"scale_logits": [[[0.0, 0.0]] * 2] * 3, "metadata": {"scales": [0.9, 1.0]}}, "not those of 2 scales"),
        ({"metadata": {"scales": [0.9, 1.0], "calibration": {"temperature": 1, "scale_weights": {"0.9": 0, "1.0": 1}}}},
         "no scale_logits"),
        ({"metadata": {"calibration": 1.3}}, "a temperature from 0.001"),
        ({"metadata": {"calibration": {"temperature": 0}}}, "a temperature from 0.001"),
        ({"metadata": {"calibration": {"temperature": 1.0, "bias": ["a"]}}}, "a temperature from 0.001"),
    ],
)  # fmt: skip
def test_damaged_files_are_errors(tmp_path, change, part):
    write_predictions(tmp_path / "p.parquet", replace(THREE, **change))
    with pytest.raises(InputError, match=part):
        read_predictions(tmp_path / "p.parquet")


CARS = {
    "metadata": {"classes": ["Audi", "BMW", "Kia"], "candidates": "a classifier"},
    "candidates": [[2, 0], [1, 2, 0], [1, -1]],
    "labels": [0, None, 2],
    "answers": [1, 2, 1],
}


def test_candidates_and_labels_are_kept(tmp_path):
    known = Predictions(["x", "y", "z"], [[-0.5, -1.0], [-1.5, -0.5, -1.0], [-0.25, -2.5]], **CARS)
    write_predictions(tmp_path / "p.parquet", known)
    assert read_predictions(tmp_path / "p.parquet") == replace(known, blanked=[False] * 3)
    assert take(known, [2]).candidates == [[1, -1]] and take(known, [2]).labels == [2]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"metadata": {}}, "`classes` in its metadata are no names"),
        ({"candidates": [[2, 0], [1, 2, 3], [1, -1]]}, "candidates or labels of row y"),
        ({"candidates": [[2, 0], [1, 2], [1, -1]]}, "candidates or labels of row y"),
        ({"candidates": [[2, 0], [1, 2, 2], [1, -1]]}, "candidates or labels of row y"),
        ({"candidates": [[2, 0], [1, 2, -2], [1, -1]]}, "candidates or labels of row y"),
        ({"labels": [3, None, 2]}, "candidates or labels of row x"),
        ({"labels": [2, None, 2]}, "candidates or labels of row x"),
        ({"answers": [1, None, 0]}, "candidates or labels of row z"),
    ],
)
def test_candidates_that_do_not_fit_their_classes_or_labels_are_damage(tmp_path, change, part):
    logits = [[-0.5, -1.0], [-1.5, -0.5, -1.0], [-0.25, -2.5]]
    damaged = Predictions(["x", "y", "z"], logits, **(CARS | change))
    write_predictions(tmp_path / "p.parquet", damaged)
    with pytest.raises(InputError, match=part):
        read_predictions(tmp_path / "p.parquet")


def test_damaged_pages_are_an_error(tmp_path):
    write_predictions(tmp_path / "p.parquet", THREE)
    content = bytearray((tmp_path / "p.parquet").read_bytes())
    content[4:40] = b"\xff" * 36  # the header of the first page
    (tmp_path / "p.parquet").write_bytes(content)
    with pytest.raises(InputError, match="is not a prediction file"):
        read_predictions(tmp_path / "p.parquet")


def test_a_folder_that_cannot_be_made_is_an_error():
    with pytest.raises(InputError, match="cannot be written"):
        write_predictions("/proc/nowhere/p.parquet", THREE)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    write_predictions(tmp_path / "p.parquet", THREE)
    with pytest.raises(TypeError):
        write_predictions(tmp_path / "p.parquet", replace(THREE, metadata={"a": object()}))
    with pytest.raises(InputError, match="cannot be written"):
        write_predictions(tmp_path / "p.parquet" / "q.parquet", THREE)
    assert read_predictions(tmp_path / "p.parquet") == THREE and len([*tmp_path.iterdir()]) == 1


# --- Answers beside a prediction file ---------------------------------------------------------------------------------


def as_the_run(answer_format, column="label", row_id="key"):
    own = {"id": row_id, "column": column, "format": answer_format, "is_upper": True}
    return replace(THREE, metadata={"answers": own})


@pytest.mark.parametrize(
    ("answer_format", "content"),
    [
        ("letter", "key,label\nx,a\ny,(c)\nz,B\n"),
        ("index_from_0", "key,label\nz,1\nx,0\ny,2\n"),
        ("index_from_1", "key,label\nx,1\ny,3\nz,2\n"),
        ("index_from_1", "id,answer\nx,1\ny,3\nz,2\n"),  # the usual names, where the run's own are not there
        ("index_from_1", "answer,key,label\n?,x,1\n?,y,3\n?,z,2\n"),
    ],
)
def test_answers_are_read_as_the_runs_data_write_them(tmp_path, answer_format, content):
    (tmp_path / "a.csv").write_text(content)
    predictions = as_the_run(answer_format)
    assert read_answers(tmp_path / "a.csv", predictions, "p") == {"x": 0, "y": 2, "z": 1}


def test_columns_and_format_of_answers_may_be_given(tmp_path):
    (tmp_path / "a.csv").write_text("row;solution;answer\nx;1;B\ny;3;B\nz;2;B\n")
    how = {"columns": {"id": "row", "answer": "solution"}, "answer_format": "index_from_1"}
    assert read_answers(tmp_path / "a.csv", as_the_run("letter"), "p", **how) == {"x": 0, "y": 2, "z": 1}
    with pytest.raises(
        InputError, match="`solution` is no letter in rows x, y, z .3 of 3., such as '1'. Give --answer"
    ):
        read_answers(tmp_path / "a.csv", as_the_run("letter"), "p", columns=how["columns"])


@pytest.mark.parametrize("cells", [("B", "C", "A"), ("2", "3", "1")])
def test_answers_that_are_texts_are_no_letters_and_no_numbers(tmp_path, cells):
    """The choices are letters or numbers themselves, in another order in every row."""
    first, second, third = sorted(cells)
    rows = [[second, first], [first, second, third], [third, first]]
    names = ["x", "y", "z"]
    lines = [f"{i},{i}.png,Which?," + ",".join([*row, ""][:3]) for i, row in zip(names, rows, strict=True)]
    (tmp_path / "test.csv").write_text("\n".join(["key,path,question,a,b,c", *lines]) + "\n")
    texts = [second, third, first]
    (tmp_path / "a.csv").write_text("key,label\n" + "".join(f"{i},{t}\n" for i, t in zip(names, texts, strict=True)))
    predictions = as_the_run("text")
    with pytest.raises(InputError, match="Give --data"):
        read_answers(tmp_path / "a.csv", predictions, "p")
    expected = {"x": 0, "y": 2, "z": 1}
    assert read_answers(tmp_path / "a.csv", predictions, "p", tmp_path / "test.csv") == expected
    lines = [f"{line},{text}" for line, text in zip(lines, texts, strict=True)]
    (tmp_path / "whole.csv").write_text("\n".join(["key,path,question,a,b,c,label", *lines]) + "\n")
    assert read_answers(tmp_path / "whole.csv", predictions, "p") == expected


def test_without_a_known_format_numbers_that_can_be_read_in_two_ways_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id,answer\nx,1\ny,1\nz,1\n")
    with pytest.raises(InputError, match="--answer-format"):
        read_answers(tmp_path / "a.csv", THREE, "p")
    expected = {"x": 0, "y": 0, "z": 0}
    assert read_answers(tmp_path / "a.csv", THREE, "p", answer_format="index_from_1") == expected


def test_answers_of_other_rows_with_the_same_numbers_are_refused(tmp_path):
    lines = [f"{i}.png,Which?,cat,dog,,a" for i in range(3)]
    (tmp_path / "one.csv").write_text("\n".join(["path,question,a,b,c,answer", *lines]) + "\n")
    (tmp_path / "other.csv").write_text("\n".join(["path,question,a,b,c,answer", *lines[::-1]]) + "\n")
    digests = digests_of(read_examples(str(tmp_path / "one.csv")).examples)
    predictions = Predictions(["0", "1", "2"], [[-1.0, -1.0]] * 3, [None] * 3, digests=digests)
    write_predictions(tmp_path / "p.parquet", predictions)
    predictions = read_predictions(tmp_path / "p.parquet")
    assert predictions.digests == digests
    assert read_answers(tmp_path / "one.csv", predictions, "p") == {"0": 0, "1": 0, "2": 0}
    with pytest.raises(InputError, match="same ids and other questions, choices or images in rows 0, 2 "):
        read_answers(tmp_path / "other.csv", predictions, "p")


def test_files_of_earlier_versions_have_no_digests_and_their_ids_alone_count(tmp_path):
    write_predictions(tmp_path / "p.parquet", THREE)
    table = pq.read_table(tmp_path / "p.parquet")
    pq.write_table(table.drop_columns(["digest", "agreement"]), tmp_path / "old.parquet")
    assert read_predictions(tmp_path / "old.parquet") == THREE
    known = replace(THREE, digests=["1", "2", "3"])
    assert align([known, THREE], ["a", "b"])[1].digests == []
    with pytest.raises(InputError, match="a and b have the same ids and other questions, .* in row y "):
        align([known, replace(known, digests=["1", "9", "3"])], ["a", "b"])


def test_a_context_that_only_one_of_two_runs_was_given_does_not_make_other_rows(tmp_path):
    (tmp_path / "t.csv").write_text("path,question,a,b,hint\n1.png,Which?,cat,dog,red\n")
    with_hint, without = (
        read_examples(str(tmp_path / "t.csv"), ReadOptions(answers="optional", columns={"context": name})).examples
        for name in ("hint", None)
    )
    assert digests_of(with_hint) == digests_of(without)
