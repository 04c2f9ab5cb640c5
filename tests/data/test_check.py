import json

import numpy as np
import pytest
from contest import noise, rows_of, write_csv
from PIL import Image
from reports import found, report_on
from scipy.stats import chisquare

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts, builtin_prompts
from vqa_sft.data.check import (
    TEST,
    TRAINING,
    VALIDATION,
    as_dict,
    check,
    count_tokens,
    measure_skew,
)
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.models.load import load_processor

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
    assert not report.num_bad and all("shuffled" in problem.mend for problem in report.problems)
    assert report.loaded.notes[-1].endswith(
        "never shuffled: 2 of 24 rows keep the order of their choices, such as row_002 ('Both A and B'); "
        "1 of 24 rows keep their last choice, such as row_005 ('None of the above')"
    )
    assert stream_examples(str(contest / "train.csv")).notes[-1] == report.loaded.notes[-1]


def test_counts_and_sizes_are_those_of_the_rows(faulty):
    report = report_on(faulty / "train.csv")
    assert report.num_choices == {4: 24} and report.images_per_row == {1: 24}
    assert report.question_types == {"colour": 24}
    (data,) = as_dict([report])["data"]
    assert data["images"]["distinct"] == 23 and data["images"]["formats"] == {"PNG": 21}
    assert data["images"]["width_px"] == dict.fromkeys(("min", "p5", "p25", "median", "p75", "p95", "max"), 120)
    assert data["images"]["megapixels"]["max"] == 120 * 90 / 1e6


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
    train, validation, test = check(data, distance=10, prompts=Prompts())
    assert found(train) == found(validation) == {}
    assert found(test) == {"in_training": ["row_020 (row_003 there)"], "near_training": ["row_021 (row_005 there)"]}
    assert not test.num_bad and as_dict([train, validation, test])["clean"]


def test_nearly_equal_images_are_counted(contest):
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
    Image.open(contest / rows[5]["path"]).resize((90, 68)).save(contest / rows[9]["path"])
    (contest / rows[7]["path"]).write_bytes((contest / rows[8]["path"]).read_bytes())  # equal, not nearly
    data = [(TRAINING, read_examples(str(contest / "train.csv")))]
    assert check(data, distance=10, prompts=Prompts())[0].near_groups == [2]
    (report,) = check(data, distance=None, prompts=Prompts())
    assert report.near_groups is None and len(report.images) == 23


# --- Tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Rows with no, one and three images of several sizes, with and without a hint."""
    sizes = [(200, 64), (31, 400), (100, 100), (333, 250), (640, 480)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, "white").save(tmp_path / f"{i}.png")
    rows = [
        {"images": ["0.png"], "question": "How many?", "choices": ["one", "two"], "hint": ""},
        {"images": [], "question": "무슨 색인가요?", "choices": ["빨강", "파랑", "초록"], "hint": "A long hint. " * 20},
        {"images": ["1.png", "2.png", "0.png"], "question": "Which?", "choices": list("wxyz"), "hint": ""},
        {"images": ["3.png"], "question": "{question}\n\nWhy?", "choices": ["<b>", "c d " * 30], "hint": "x"},
        {"images": ["4.png"], "question": "What does the sign say?", "choices": ["a", "b"], "hint": ""},
    ]
    lines = [json.dumps({"id": f"r{i}", "answer": "b"} | row, ensure_ascii=False) for i, row in enumerate(rows)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "mixed.jsonl"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "smolvlm"])
def test_tokens_are_counted_as_the_collator_makes_them(families, mixed, family):
    processor = load_processor(families(family))
    prompts = builtin_prompts("both", by_type=True)
    loaded = read_examples(str(mixed))
    collator = AnswerCollator(processor, prompts, num_letters=4)
    expected = [int(collator([row])["attention_mask"].sum()) for row in loaded.examples]
    (report,) = check([(TRAINING, loaded)], distance=None, prompts=prompts, processor=processor, max_length=expected[1])
    assert report.tokens.tolist() == expected
    counted = as_dict([report])["data"][0]["tokens"]
    assert counted["rows"] == 5 and counted["max"] == max(expected)
    assert counted["cut_rows"] == sum(number > expected[1] for number in expected)


def test_tokens_are_counted_at_the_pixel_limits_and_without_rows_that_cannot_be_used(families, mixed):
    (mixed.parent / "4.png").unlink()
    processor = load_processor(families("qwen2_5_vl"), max_pixels=28 * 28 * 4, min_pixels=28 * 28)
    report = report_on(mixed, processor)
    collator = AnswerCollator(processor, Prompts(), num_letters=4)
    expected = [int(collator([report.loaded.examples[i]])["attention_mask"].sum()) for i in range(4)]
    assert report.tokens.tolist() == expected


def test_a_processor_whose_short_cut_is_wrong_is_asked_itself(families, mixed, monkeypatch):
    processor = load_processor(families("llava"))
    examples, prompts = read_examples(str(mixed)).examples.select([0]), Prompts()
    expected = count_tokens(processor, examples, [[(200, 64)]], prompts)
    wrong = {"num_image_tokens": [99]}
    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", lambda self, image_sizes: wrong)
    assert count_tokens(processor, examples, [[(200, 64)]], prompts).tolist() == expected.tolist()


def test_control_tokens_of_the_model_are_an_error(families, contest):
    rows = rows_of(contest)
    rows[2]["c"] = "a <|image_pad|>"
    rows[3]["question"] += " <image>"  # none of Qwen's
    write_csv(contest / "train.csv", rows)
    report = report_on(contest / "train.csv", load_processor(families("qwen2_5_vl")))
    assert found(report) == {"control_token": ["row_002 (<|image_pad|>)"]}
    assert len(report.tokens) == 23


def test_a_control_token_in_the_prompt_is_an_error_of_the_recipe(families, contest):
    data = [(TRAINING, read_examples(str(contest / "train.csv")))]
    prompts = Prompts(system="Look at <|image_pad|>.")
    with pytest.raises(InputError, match="the prompt holds '<.image_pad.>'"):
        check(data, distance=None, prompts=prompts, processor=load_processor(families("qwen2_5_vl")))


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_the_json_holds_every_row_of_a_problem_under_stable_keys(contest):
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        noise(contest / row["path"], i)
        row["answer"] = "z" if i < 3 else "a"
    write_csv(contest / "train.csv", rows)
    whole = json.loads(json.dumps(as_dict([report_on(contest / "train.csv")])))
    assert whole["clean"] is False
    (data,) = whole["data"]
    assert list(data) == [
        *("role", "name", "notes", "columns", "rows", "usable_rows", "answers", "choices", "question_types"),
        *("images_per_row", "images", "tokens", "tokens_note", "problems"),
    ]
    assert (data["role"], data["rows"], data["usable_rows"]) == ("training", 24, 21)
    assert data["answers"] == {
        "counts": {"A": 21, "B": 0, "C": 0, "D": 0},
        "expected": dict.fromkeys("ABCD", 5.25),
        "largest": {"letter": "A", "share": 1.0, "expected_share": 0.25},
        "p_value": pytest.approx(chisquare([21, 0, 0, 0]).pvalue),
        "skewed": True,
    }
    assert data["choices"] == {"4": 24} and data["images_per_row"] == {"1": 24} and data["tokens"] is None
    (problem,) = data["problems"]
    assert {key: problem[key] for key in ("kind", "severity", "count")} == {
        "kind": "bad_answer",
        "severity": "error",
        "count": 3,
    }
    assert problem["rows"] == [{"row": i, "id": f"row_{i:03d}", "label": f"row_{i:03d} ('z')"} for i in range(3)]
