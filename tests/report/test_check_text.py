import numpy as np
import pytest
from contest import noise, rows_of, write_csv
from reports import make_faulty, report_on

from vqa_sft.data.check import TEST, TRAINING, check, measure_skew
from vqa_sft.data.examples import read_examples
from vqa_sft.data.folds import Deviation
from vqa_sft.data.options import ReadOptions
from vqa_sft.report.check_text import describe, say_near, say_skew, say_tokens
from vqa_sft.report.folds_text import describe_folds


@pytest.fixture
def faulty(contest):
    return make_faulty(contest)


def test_the_table_says_what_is_there_and_lists_errors_before_warnings(faulty):
    text = describe([report_on(faulty / "train.csv")])
    lines = [line.rstrip() for line in text.splitlines()]
    assert "  rows            24 training rows, of which 3 cannot be used" in lines
    assert "  choices a row   4 (all rows)" in lines
    assert "  question types  colour: 21 (87.5%), counting: 1 (4.2%), place: 1 (4.2%), general: 1 (4.2%)" in lines
    assert "  images          23 different; nearly equal ones were not looked for" in lines
    assert "                  PNG: 22" in lines
    assert ["width,", "px", *["120"] * 7] in [line.split() for line in lines]
    problems = [line for line in lines if line.startswith(("  error", "  warning"))]
    assert [line.split(":")[0].split(maxsplit=1) for line in problems] == [
        ["error", "the image lies outside the image folder"],
        ["error", "the answer is none of the choices"],
        ["error", "the image is missing"],
        ["warning", "two choices are equal"],
    ]
    assert "  warning  two choices are equal: rows row_004 ('same'), row_005 ('같은') (2 of 24)" in lines
    assert "           Two letters then stand for one answer." in lines
    assert lines[-1] == "3 rows with errors: a run stops at them; 2 rows with warnings."


def test_a_clean_set_says_so(contest):
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
    text = describe([report_on(contest / "train.csv")])
    assert "24 training rows, all of which can be used" in text
    assert text.endswith("No row has an error; none with warnings.")


def test_test_rows_have_a_part_of_their_own_without_answers(contest):
    data = [(TRAINING, read_examples(str(contest / "train.csv")))]
    data.append((TEST, read_examples(str(contest / "test.csv"), ReadOptions(answers="optional"))))
    text = describe(check(data, distance=None, tokens_note="no model"))
    training, test = text.split("test.csv: 24 rows")
    assert "  answers  " in training and "  answers  " not in test
    assert "24 test rows, all of which can be used" in test and "not counted: no model" in test
    assert "the image is also in the training set: rows row_000 (row_000 there)" in test


def test_nothing_that_a_terminal_obeys_is_printed(faulty):
    rows = rows_of(faulty)
    rows[1]["id"] = "x\x1b[2J\u202e"
    write_csv(faulty / "train.csv", rows)
    text = describe([report_on(faulty / "train.csv")])
    assert "\x1b" not in text and "\u202e" not in text and r"x\x1b[2J\u202e" in text


def test_the_sentence_about_skew_names_the_letter_and_the_evidence():
    skewed = measure_skew({(4, 0): 30, (4, 1): 14, (4, 2): 25, (4, 3): 11})
    assert say_skew(skewed) == (
        "The answers are skewed (p = 0.007): A answers 37.5% of the rows, 25.0% if no letter were preferred"
    )
    assert say_skew(measure_skew({(3, 0): 40, (3, 1): 43, (3, 2): 37})).startswith(
        "The answers are not skewed (p = 0.80)"
    )
    assert say_skew(measure_skew({(2, 0): 2})).startswith("Too few rows to tell whether the answers are skewed: A")


def test_the_sentences_about_duplicates_and_tokens(contest):
    report = report_on(contest / "train.csv")
    report.near_groups = [4, 2, 2]
    assert say_near(report) == "8 in 3 groups of nearly the same image, the largest of 4"
    report.tokens, report.max_length = np.array([100, 200, 300, 1_000]), 250
    assert say_tokens(report) == (
        "Half of the prompts have more than 200 tokens, the longest has 1,000; a max_length of 250 would cut 2 (50.0%)"
    )


def test_folds_are_shown_with_their_groups_and_how_even_they_are():
    text = describe_folds([0, 0, 1, 1, 1], [0, 0, 1, 2, 3], Deviation(0.5, 1.0, 0.5), Deviation(2.0, 1.5, 1.0))
    lines = text.splitlines()
    assert [line.split() for line in lines[:3]] == [["fold", "rows", "groups"], ["0", "2", "1"], ["1", "3", "3"]]
    assert lines[4].startswith("5 rows in 4 groups") and lines[4].endswith("1 have several rows, the largest 2.")
    assert "split: 0.5 rows of a stratum" in lines[5] and "same rows: 2.0 rows of a stratum" in lines[6]
