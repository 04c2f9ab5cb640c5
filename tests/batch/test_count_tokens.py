import json

import datasets
import pytest
import torch
from contest import rows_of, write_csv
from PIL import Image
from reports import found, report_on

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.count_tokens import count_tokens, prompt_checks, relative_lengths, uneven_tokens
from vqa_sft.batch.prompts import Prompts, builtin_prompts
from vqa_sft.data.check import TRAINING, check
from vqa_sft.data.examples import read_examples
from vqa_sft.errors import InputError
from vqa_sft.models.load import load_processor
from vqa_sft.report.check_json import as_dict


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
    (report,) = check([(TRAINING, loaded)], distance=None, max_length=expected[1], **prompt_checks(processor, prompts))
    assert report.tokens.tolist() == expected
    counted = as_dict([report])["data"][0]["tokens"]
    assert counted["rows"] == 5 and counted["max"] == max(expected)
    assert counted["cut_rows"] == sum(number > expected[1] for number in expected)


def test_tokens_are_counted_at_the_pixel_limits_and_without_rows_that_cannot_be_used(families, mixed):
    (mixed.parent / "4.png").unlink()
    processor = load_processor(families("qwen2_5_vl"), max_pixels=28 * 28 * 4, min_pixels=28 * 28)
    report = report_on(mixed, **prompt_checks(processor, Prompts()))
    collator = AnswerCollator(processor, Prompts(), num_letters=4)
    expected = [int(collator([report.loaded.examples[i]])["attention_mask"].sum()) for i in range(4)]
    assert report.tokens.tolist() == expected


def test_a_processor_whose_short_cut_is_wrong_is_asked_itself(families, mixed, monkeypatch):
    processor = load_processor(families("llava"))
    examples, prompts = read_examples(str(mixed)).examples.select([0]), Prompts()
    expected = count_tokens(processor, prompts, examples, [[(200, 64)]])
    wrong = {"num_image_tokens": [99]}
    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", lambda self, image_sizes: wrong)
    assert count_tokens(processor, prompts, examples, [[(200, 64)]]).tolist() == expected.tolist()


def test_control_tokens_of_the_model_are_an_error(families, contest):
    rows = rows_of(contest)
    rows[2]["c"] = "a <|image_pad|>"
    rows[3]["question"] += " <image>"  # none of Qwen's
    write_csv(contest / "train.csv", rows)
    report = report_on(contest / "train.csv", **prompt_checks(load_processor(families("qwen2_5_vl")), Prompts()))
    assert found(report) == {"control_token": ["row_002 (<|image_pad|>)"]}
    assert len(report.tokens) == 23


def test_a_control_token_in_the_prompt_is_an_error_of_the_recipe(families):
    with pytest.raises(InputError, match="the prompt holds '<.image_pad.>'"):
        prompt_checks(load_processor(families("qwen2_5_vl")), Prompts(system="Look at <|image_pad|>."))


def test_uneven_tokens_differ_between_rows_about_as_their_tokens_do(families, mixed):
    processor = load_processor(families("qwen2_5_vl"))
    examples = read_examples(str(mixed)).examples
    counted = AnswerCollator(processor, Prompts(), num_letters=4)([*examples])["attention_mask"].sum(dim=1)
    estimated = torch.tensor(uneven_tokens(processor, examples))
    differences = [numbers - numbers.float().mean() for numbers in (counted, estimated)]
    assert differences[0].abs().max() > 150
    assert (differences[0] - differences[1]).abs().max() < 40
    (mixed.parent / "4.png").unlink()  # the collator says so when the row comes
    assert uneven_tokens(processor, examples)[:4] == estimated[:4].tolist()


def test_relative_lengths_count_images_before_characters():
    texts = [("a?", ["x", "yy"], None, 1), ("a longer question?", ["x", "y"], "and a context", 0), ("b?", ["x"], "", 2)]
    rows = [
        {"question": q, "choices": c, "context": context, "images": [{"path": "a.png", "bytes": None}] * number}
        for q, c, context, number in texts
    ]
    examples = datasets.Dataset.from_list(rows)
    assert relative_lengths(examples) == [1_000_005, 33, 2_000_003]
    assert relative_lengths(examples.select([2, 0])) == [2_000_003, 1_000_005]
