import itertools

import pytest
import torch
from families import FAMILIES, PLAIN_TEMPLATE
from transformers import PaliGemmaProcessor, SiglipImageProcessor
from trl import ModelConfig

from vqa_sft.batch.collator import TARGET_KEYS, AnswerCollator
from vqa_sft.batch.prompts import Prompts, render_prompt
from vqa_sft.data.examples import load_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.scoring import (
    answer_logits,
    find_letter_ids,
    find_spellings,
    letter_logits,
    same_images_together,
    to_choice_logits,
)
from vqa_sft.questions.letters import choice_to_letter, choices_to_letters


@pytest.fixture(params=FAMILIES)
def road(request, families, contest):
    """Model, processor, letter ids and three rows whose prompts and images differ in length."""
    folder = families(request.param)
    examples, _ = load_examples(str(contest / "train.csv"))
    rows = [examples[i] for i in range(3)]
    rows[1] = rows[1] | {"question": "Which of these is the colour of the square that stands in the image?"}
    rows[2] = rows[2] | {"choices": rows[2]["choices"][:2], "answer": None}
    processor = load_processor(folder)
    model = load_model(ModelConfig(model_name_or_path=folder, dtype=None), "fp32").eval()
    return model, processor, find_letter_ids(processor, 4), rows


def collate(processor, rows):
    return AnswerCollator(processor, Prompts(), 4)(rows)


@torch.no_grad()
def test_a_row_has_the_same_letter_logits_alone_in_a_batch_and_with_either_padding_side(road):
    model, processor, letter_ids, rows = road
    alone = torch.cat([letter_logits(model, collate(processor, [row]), letter_ids) for row in rows])
    for side in ("right", "left"):
        processor.tokenizer.padding_side = side
        together = letter_logits(model, collate(processor, rows), letter_ids)
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_sliced_logits_are_those_of_the_full_sequence(road):
    model, processor, _, rows = road
    batch = collate(processor, rows)
    full = model(**{key: value for key, value in batch.items() if key not in TARGET_KEYS}).logits
    expected = torch.stack([full[i, position] for i, position in enumerate(batch["answer_positions"])])
    torch.testing.assert_close(answer_logits(model, batch), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_family_without_positions_per_row_gives_the_same_logits(road):
    model, processor, _, rows = road
    batch = collate(processor, rows)
    expected = answer_logits(model, batch)

    def old_forward(logits_to_keep=0, **inputs):
        outputs = model(**inputs)
        if not isinstance(logits_to_keep, int):
            outputs.logits = outputs.logits[:, logits_to_keep]  # (B, B, 1, V), as older code does
        return outputs

    torch.testing.assert_close(answer_logits(old_forward, batch), expected)


@torch.no_grad()
def test_a_family_that_gives_all_logits_is_run_once(families, contest):
    road = load_model(ModelConfig(model_name_or_path=families("llava"), dtype=None), "fp32").eval()
    processor = load_processor(families("llava"))
    batch = collate(processor, list(load_examples(str(contest / "train.csv"), ReadOptions(limit=2))[0]))
    calls = []

    def all_logits(logits_to_keep=0, **inputs):
        calls.append(1)
        return road(**inputs)

    torch.testing.assert_close(answer_logits(all_logits, batch), answer_logits(road, batch), atol=2e-5, rtol=1e-5)
    assert len(calls) == 1


def test_a_thinking_template_is_scored_after_its_empty_thought(families):
    processor = load_processor(families("qwen2_5_vl"))
    plain = find_letter_ids(processor, 3)
    processor.chat_template = processor.chat_template.replace(
        '{{- "<|im_start|>assistant\\n" -}}', '{{- "<|im_start|>assistant\\n<think>\\n" -}}'
    ).replace(
        '{{- "<|im_start|>" + message.role + "\\n" -}}',
        '{{- "<|im_start|>" + message.role + "\\n" -}}'
        '{%- if message.role == "assistant" -%}{{- "<think>\\n\\n</think>\\n\\n" -}}{%- endif -%}',
    )
    row = {"question": "Q?", "choices": ["x", "y"], "images": []}
    text = render_prompt(processor, row, (0, 1), Prompts())
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert find_letter_ids(processor, 3).tolist() == plain.tolist()


def test_the_letter_follows_a_generation_prompt_that_no_shown_answer_begins_with(families):
    processor = load_processor(families("qwen2_5_vl"))
    plain = find_letter_ids(processor, 3)
    processor.chat_template = processor.chat_template.replace("assistant\\n", "assistant says\\n")
    row = {"question": "Q?", "choices": ["x", "y"], "images": []}
    assert render_prompt(processor, row, (0, 1), Prompts()).endswith("<|im_start|>assistant says\n")
    assert find_letter_ids(processor, 3).tolist() == plain.tolist()


def test_a_template_that_hides_the_answer_is_refused(families):
    processor = load_processor(families("qwen2_5_vl"))
    hides = "{%- for message in messages if message.role != 'assistant' -%}"
    processor.chat_template = processor.chat_template.replace("{%- for message in messages -%}", hides)
    with pytest.raises(InputError, match="does not show an answer"):
        find_letter_ids(processor, 3)


def test_a_processor_that_writes_the_prompt_itself_is_refused(families):
    tokenizer = load_processor(families("llava")).tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    images = SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=PLAIN_TEMPLATE)
    with pytest.raises(InputError, match=r"PaliGemmaProcessor does not leave prompts as they are: .*sistant:\\n'"):
        find_letter_ids(processor, 3)


def test_a_template_that_shows_no_image_is_refused(families):
    processor = load_processor(families("qwen2_5_vl"))
    processor.chat_template = processor.chat_template.replace("<|image_pad|>", "")
    with pytest.raises(InputError, match="refuses a prompt with an image"):
        find_letter_ids(processor, 3)


def test_letter_ids_are_the_tokens_that_follow_the_prompt(families):
    for family, tokens in (("qwen2_5_vl", ["A", "B", "C"]), ("llava", ["ĠA", "ĠB", "ĠC"])):
        processor = load_processor(families(family))
        ids = find_letter_ids(processor, 3)
        assert processor.tokenizer.convert_ids_to_tokens(ids) == tokens


def test_a_letter_that_is_not_one_token_is_an_error(families):
    processor = load_processor(families("llava"))
    # A prompt that ends with a space: " A" is one token, the space and "A" are two others.
    processor.chat_template = processor.chat_template.replace('"Assistant:"', '"Assistant: "')
    with pytest.raises(InputError, match="the letter 'A' is not one token"):
        find_letter_ids(processor, 3)


def test_an_order_followed_by_its_inverse_is_the_identity():
    values = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist()
    for order in itertools.permutations(range(4)):
        by_letter = torch.tensor([choices_to_letters(values, order)])
        (back,) = to_choice_logits(by_letter, torch.tensor([order]), torch.tensor([4]))
        assert back == pytest.approx(values)


def test_an_oracle_is_right_under_every_order():
    for order in itertools.permutations(range(4)):
        for answer in range(4):
            by_letter = torch.full((1, 4), -9.0)
            by_letter[0, choice_to_letter(answer, order)] = 9.0
            (by_choice,) = to_choice_logits(by_letter, torch.tensor([order]), torch.tensor([4]))
            assert by_choice.index(max(by_choice)) == answer


def test_choice_logits_are_put_back_into_dataset_order():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 6.0, 100.0]])
    orders = torch.tensor([[2, 0, 1], [1, 0, 2]])
    rows = to_choice_logits(logits, orders, torch.tensor([3, 2]))
    # Choice 0 of the first row stands under B, choice 1 under C, choice 2 under A.
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor([1.0, 2.0, 0.0]).log_softmax(0))
    torch.testing.assert_close(torch.tensor(rows[1]), torch.tensor([6.0, 5.0]).log_softmax(0))


@torch.no_grad()
def test_of_a_base_model_the_probabilities_of_all_spellings_of_a_letter_are_summed(road):
    model, processor, letter_ids, rows = road
    spelled = find_spellings(processor, 4)
    assert (spelled == letter_ids[:, None]).any(dim=1).all()  # the one that a run is trained on among them
    for letter, ids in zip("ABCD", spelled.tolist(), strict=True):
        texts = {processor.tokenizer.convert_ids_to_tokens(token) for token in ids if token >= 0}
        assert {text.strip("Ġ▁ ").upper() for text in texts} == {letter} and len(texts) == sum(i >= 0 for i in ids)
    batch = collate(processor, rows)
    probs = answer_logits(model, batch).softmax(dim=-1)
    expected = [[sum(float(row[i]) for i in ids if i >= 0) for ids in spelled.tolist()] for row in probs]
    found = letter_logits(model, batch, spelled).softmax(dim=-1)
    expected = torch.tensor(expected)
    torch.testing.assert_close(found, expected / expected.sum(dim=1, keepdim=True), atol=1e-6, rtol=1e-4)


def test_rows_with_one_image_stand_together_and_keep_their_order_else():
    def row(*paths):
        return [{"bytes": None, "path": path} for path in paths]

    images = [row("a"), row("b"), row(), row("a"), row("a", "b"), row("b"), row(), row("a")]
    assert same_images_together({"images": images}) == [0, 3, 7, 1, 5, 2, 4, 6]
