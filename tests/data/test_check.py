import numpy as np
import pytest
from contest import noise, rows_of, write_csv
from PIL import Image
from reports import found, report_on
from scipy.stats import chisquare

from vqa_sft.data.check import TEST, TRAINING, VALIDATION, check, measure_skew, quantiles
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.options import ReadOptions

# --- The answers ------------------------------------------------------------------------------------------------------


def test_the_skew_of_rows_with_as_many_choices_is_pearsons_chi_square():
    skew = measure_skew({(4, 0): 30, (4, 1): 14, (4, 2): 25, (4, 3): 11})
    assert skew.counts == [30, 14, 25, 11] and skew.expected == [20, 20, 20, 20]
    assert skew.p_value == pytest.approx(chisquare([30, 14, 25, 11]).pvalue) == pytest.approx(0.00705, abs=1e-5)
    assert skew.skewed and skew.largest == ("A", 30 / 80, 20 / 80)


def test_even_answers_are_not_skewed():
    assert not measure_skew({(3, 0): 40, (3, 1): 43, (3, 2): 37}).skewed


def test_the_skew_of_rows_with_different_numbers_of_choices_is_what_chance_would_give():
    answers = {(2, 0): 40, (2, 1): 60, (4, 0): 16, (4, 1): 14, (4, 2): 6, (4, 3): 14}
    skew = measure_skew(answers)
    assert skew.expected == [62.5, 62.5, 12.5, 12.5]
    # As often as not preferring a letter gives counts that are as unlikely.
    rng = np.random.default_rng(0)
    drawn = np.hstack([rng.multinomial(100, [1 / 2] * 2, 20_000), np.zeros((20_000, 2))])
    drawn += rng.multinomial(50, [1 / 4] * 4, 20_000)
    inverse = np.linalg.pinv(np.cov(drawn.T))
    off = [difference @ inverse @ difference for difference in drawn - skew.expected]
    ours = (np.array(skew.counts) - skew.expected) @ inverse @ (np.array(skew.counts) - skew.expected)
    assert skew.p_value == pytest.approx(np.mean(np.array(off) >= ours), abs=0.02)


def test_few_rows_do_not_tell_and_rare_letters_count_together():
    assert measure_skew({(4, 0): 3, (4, 1): 1}).p_value is None
    many = {(3, 0): 100, (3, 1): 90, (3, 2): 110}
    rare = measure_skew(many | {(26, 25): 1})
    assert rare.p_value == pytest.approx(measure_skew(many).p_value, abs=0.02)


# --- Problems ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(contest):
    """The contest with one row of each of these problems, and every other row fine."""
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
    rows[1]["answer"] = "z"
    rows[2]["path"] = "images/nowhere.png"
    (contest / "images/003.png").write_bytes(b"")
    rows[4]["b"] = rows[4]["a"]
    rows[6]["id"] = rows[5]["id"]
    # Row 8 asks the same of the image of row 7, offers its answer and says otherwise.
    choices = {"a": "green", "b": "red", "c": "blue", "d": "black"}
    rows[7] |= choices | {"answer": "b"}
    rows[8] |= choices | {"answer": "a", "path": rows[7]["path"]}
    write_csv(contest / "train.csv", rows)
    return contest


def test_every_problem_is_found_with_the_rows_that_have_it(faulty):
    report = report_on(faulty / "train.csv")
    problems = found(report)
    assert list(problems)[-2:] == ["equal_choices", "answers_differ"]  # warnings come last
    assert problems["bad_answer"] == ["row_001 ('z')"] and problems["duplicate_id"] == ["row_005"]
    assert len(problems["missing_image"]) == len(problems["empty_image"]) == 1
    assert problems["equal_choices"] == ["row_004 ('black')"]
    assert problems["answers_differ"] == [
        "row_007 ('red', and 'green' in row_008)",
        "row_008 ('green', and 'red' in row_007)",
    ]
    assert len(problems) == 6 and report.num_rows == 24 and report.num_bad == 4


def test_choices_that_refer_to_others_are_warned_of_and_counted(contest):
    rows = rows_of(contest)
    rows[2]["c"] = "Both A and B"
    rows[3] |= dict(zip("abcd", "①②③④", strict=True))
    rows[5]["d"] = "None of the above"
    write_csv(contest / "train.csv", rows)
    report = report_on(contest / "train.csv")
    problems = found(report)
    assert problems["keeps_order"] == ["row_002 ('Both A and B')", "row_003 ('①')"]
    assert problems["keeps_last"] == ["row_005 ('None of the above')"]
    assert not report.num_bad and all("shuffled" in problem.fix for problem in report.problems)
    assert report.loaded.notes[-1].endswith(
        "never shuffled: 2 of 24 rows keep the order of their choices, such as row_002 ('Both A and B'); "
        "1 of 24 rows keep their last choice, such as row_005 ('None of the above')"
    )
    assert stream_examples(str(contest / "train.csv")).notes[-1] == report.loaded.notes[-1]


def test_counts_and_sizes_are_those_of_the_rows(faulty):
    report = report_on(faulty / "train.csv")
    assert report.num_choices == {4: 24} and report.images_per_row == {1: 24}
    assert report.question_types == {"colour": 24}
    assert len(report.images) == 23 and report.formats == {"PNG": 21}
    names = ("min", "p5", "p25", "median", "p75", "p95", "max")
    assert quantiles(report.sizes["width_px"]) == dict.fromkeys(names, 120)
    assert quantiles(report.sizes["megapixels"])["max"] == 120 * 90 / 1e6


def test_another_answer_is_no_problem_where_it_was_not_offered(contest):
    rows = rows_of(contest)[:6]
    for row in rows:
        row |= {"path": rows[0]["path"], "question": "Which of these is shown?"}
    for i, row in enumerate(rows[:4]):  # every answer is offered once
        row |= {letter: f"thing {4 * i + k}" for k, letter in enumerate("abcd")}
    # The same answer under another letter, and in another case.
    rows[4] |= {"a": "one", "b": "two", "c": "three", "d": "four", "answer": "a"}
    rows[5] |= {"a": "Two", "b": "ONE ", "c": "three", "d": "four", "answer": "b"}
    write_csv(contest / "train.csv", rows)
    assert found(report_on(contest / "train.csv")) == {}


def test_the_same_answer_to_another_question_or_hint_is_no_problem(contest):
    rows = [row | {"a": "1", "b": "2", "c": "3", "d": "4"} for row in rows_of(contest)[:3]]
    for i, row in enumerate(rows):
        row |= {"path": rows[0]["path"], "hint": f"hint {i}", "answer": "abc"[i]}
    write_csv(contest / "train.csv", rows)
    assert found(report_on(contest / "train.csv")) == {}
    write_csv(contest / "train.csv", [row | {"hint": ""} for row in rows])
    assert len(found(report_on(contest / "train.csv"))["answers_differ"]) == 3


def test_images_of_the_test_and_validation_rows_are_looked_for_in_the_training_rows(contest):
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
    (contest / "images/copy.png").write_bytes((contest / rows[3]["path"]).read_bytes())
    Image.open(contest / rows[5]["path"]).convert("RGB").save(contest / "images/again.jpg", quality=60)
    rows[20]["path"], rows[21]["path"] = "images/copy.png", "images/again.jpg"
    for name, part in (("train", rows[:12]), ("validation", rows[12:18]), ("test", rows[18:])):
        write_csv(contest / f"{name}.csv", part)
    data = [
        (role, read_examples(str(contest / f"{name}.csv"), ReadOptions(answers="optional")))
        for role, name in ((TRAINING, "train"), (VALIDATION, "validation"), (TEST, "test"))
    ]
    train, validation, test = check(data, distance=10)
    assert found(train) == found(validation) == {}
    assert found(test) == {"in_training": ["row_020 (row_003 there)"], "near_training": ["row_021 (row_005 there)"]}
    assert not test.num_bad and not train.num_bad and not validation.num_bad


def test_nearly_equal_images_are_counted(contest):
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
    Image.open(contest / rows[5]["path"]).resize((90, 68)).save(contest / rows[9]["path"])
    (contest / rows[7]["path"]).write_bytes((contest / rows[8]["path"]).read_bytes())  # equal, not nearly
    data = [(TRAINING, read_examples(str(contest / "train.csv")))]
    assert check(data, distance=10)[0].near_groups == [2]
    (report,) = check(data, distance=None)
    assert report.near_groups is None and len(report.images) == 23
