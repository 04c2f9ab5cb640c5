import re

import numpy as np
import pytest
from contest import noise, rows_of, write_csv
from reports import found, report_on

from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.check import TEST, TRAINING, check, measure_skew
from vqa_sft.data.examples import read_examples
from vqa_sft.data.folds import Deviation
from vqa_sft.data.options import ReadOptions
from vqa_sft.report.check_page import (
    choose_problem_rows,
    choose_samples,
    describe,
    describe_folds,
    say_near,
    say_skew,
    say_tokens,
    shown,
    write_page,
)


@pytest.fixture
def faulty(contest):
    """24 rows, of which 3 cannot be used and 2 more have choices that are equal."""
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
    rows[1] |= {"answer": "z", "question": "How many <script>alert(1)</script> & <b>tags</b>?"}
    rows[2] |= {"path": "images/nowhere.png", "a": '=HYPERLINK("http://evil.example","x")', "answer": "a"}
    rows[3]["path"] = "../outside.png"
    rows[4] |= {"a": "same", "b": "same"}
    rows[5] |= {"a": "같은", "b": "같은", "question": "여기는 어디인가요?"}
    rows[6]["question"] = "Over \x1b[31mred\x1b[0m and \u202eright\nWhere?"
    noise(contest.parent / "outside.png", 99)
    write_csv(contest / "train.csv", rows)
    return contest


def page_of(contest, name="train.csv"):
    write_page(contest / "page.html", [report_on(contest / name)])
    return (contest / "page.html").read_text(encoding="utf-8")


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_table_says_what_is_there_and_lists_errors_before_warnings(faulty):
    text = describe([report_on(faulty / "train.csv")])
    lines = [line.rstrip() for line in text.splitlines()]
    assert "  rows            24 training rows, of which 3 cannot be used" in lines
    assert "  choices a row   4 (all rows)" in lines
    assert "  question types  colour: 21 (87.5%), counting: 1 (4.2%), place: 1 (4.2%), general: 1 (4.2%)" in lines
    assert "  images          23 different; nearly equal ones were not looked for" in lines
    assert "                  PNG: 22" in lines
    assert "  width, px             120      120      120      120      120      120      120" in lines
    problems = [line for line in lines if line.startswith(("  error", "  warning"))]
    assert [line.split(":")[0].split(maxsplit=1) for line in problems] == [
        ["error", "the image lies outside the image folder"],
        ["error", "the answer is none of the choices"],
        ["error", "the image is missing"],
        ["warning", "two choices are equal"],
    ]
    assert "  warning  two choices are equal: rows row_004 ('same'), row_005 ('같은') (2 of 24)" in lines
    assert "           One answer then stands under two letters." in lines
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
    text = describe(check(data, distance=None, prompts=Prompts(), tokens_note="no model"))
    training, test = text.split("test.csv: 24 rows")
    assert "  answers  " in training and "  answers  " not in test
    assert "24 test rows, all of which can be used" in test and "not counted: no model" in test
    assert "the image also stands in the training set: rows row_000 (row_000 there)" in test


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


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(faulty):
    page = page_of(faulty)
    assert page.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"<(script|link|iframe|object|embed|base|form)\b", page)
    assert not re.search(r"\bon\w+\s*=", re.sub(r"<bdi>.*?</bdi>", "", page))
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert "http" not in page.replace("http://evil.example", "")
    assert len(page) < 1_000_000


def test_texts_of_the_data_are_escaped(faulty):
    page = page_of(faulty)
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;tags&lt;/b&gt;?" in page
    assert "=HYPERLINK(&#34;http://evil.example&#34;,&#34;x&#34;)" in page
    assert "\x1b" not in page and "\u202e" not in page and r"Over \x1b[31mred\x1b[0m and \u202eright" in page
    assert "여기는 어디인가요?" in page


def test_joined_emoji_and_lines_stay_and_long_texts_end():
    assert shown("👩\u200d🚀\nnext\ttab") == "👩\u200d🚀\nnext\\ttab"
    assert shown("x" * 700) == "x" * 600 + " ..."


def test_the_answer_is_marked_and_rows_with_problems_show_why(faulty):
    cards = re.findall(r"<article.*?</article>", page_of(faulty), re.DOTALL)
    by_row = {}
    for card in cards:
        by_row.setdefault(re.search(r'class="id">(\w+)<', card)[1], card)
    answer = rows_of(faulty)[7]["answer"].upper()
    assert re.findall(r'class="answer"><span class="letter">(\w)<', by_row["row_007"]) == [answer]
    assert 'class="problem' not in by_row["row_007"] and 'class="answer"' not in by_row["row_001"]
    assert "the answer is none of the choices (&#39;z&#39;)" in by_row["row_001"]
    assert '<div class="no-image">the image is missing</div>' in by_row["row_002"]
    # It exists, and is still not put into a page that others may get.
    assert "<img" not in by_row["row_003"] and "the image lies outside the image folder" in by_row["row_003"]


def test_every_sentence_over_a_plot_says_what_is_seen(faulty):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page_of(faulty))
    assert captions[0].startswith("The answers are not skewed (p = ") or captions[0].startswith(
        "The answers are skewed"
    )
    assert captions[1:] == [
        "The commonest question type is colour: 88%.",
        "The commonest number of images a row is 1: 96%.",
        "Half of the images are wider than 120 pixels, and half are higher than 90.",
    ]


def test_samples_are_spread_over_types_and_rows(faulty):
    report = report_on(faulty / "train.csv")
    samples = dict(choose_samples(report, 8))
    assert list(samples) == ["counting", "colour", "place", "general"]
    assert (samples["counting"], samples["place"], samples["general"]) == ([1], [5], [6]) and len(
        samples["colour"]
    ) == 5
    assert samples["colour"][0] < 6 and samples["colour"][-1] > 18
    assert sum(map(len, dict(choose_samples(report, 48)).values())) == 24


def test_a_few_rows_of_every_kind_of_problem_are_shown_errors_first(faulty):
    rows = rows_of(faulty)
    for row in rows[8:]:
        row["answer"] = ""
    write_csv(faulty / "train.csv", rows)
    report = report_on(faulty / "train.csv")
    assert len(found(report)["no_answer"]) == 16
    chosen = choose_problem_rows(report, 24)
    assert sorted(chosen) == [1, 2, 3, 4, 5, 8, 9, 10] and chosen[-2:] == [4, 5]
