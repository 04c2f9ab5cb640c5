"""Between vision tower and decoder Python waits for no number from the GPU; what the library checks there, the workers
do."""

import pytest
import torch
from captures import NeverWaits
from gradients import assert_same, gradients_of, road_of

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.errors import InputError
from vqa_sft.models.families import tower_of
from vqa_sft.models.fast import attention, speedups
from vqa_sft.models.scoring import answer_logits

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5"]  # with windows, with deepstack, padded


@pytest.fixture(params=FAMILIES)
def packing(request, families, contest):
    """A model, letter ids, rows, and the collators of padded and of packed rows."""
    model, processor, letter_ids, rows = road_of(families(request.param), contest)
    packer = speedups.pack_rows(model.get_base_model(), "fp32")
    packed = AnswerCollator(processor, Prompts(), 4, packer=packer)
    packed.shares_images = False  # as in training
    return model, letter_ids, rows, AnswerCollator(processor, Prompts(), 4), packed


def test_a_step_waits_for_nothing(packing, monkeypatch):
    model, _, rows, _, packed = packing
    batch = packed(rows)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    model.bfloat16()
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.use_varlen = True
    # Stands for the kernel, which takes lengths from the GPU's memory.
    monkeypatch.setattr(attention, "varlen_attn", lambda q, *args, **kwargs: q.clone())
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("tolist waits"))
    with NeverWaits(), pytest.raises((AssertionError, pytest.fail.Exception), match="waits"):
        answer_logits(model, batch)
    speedups.speed_up(model)
    with NeverWaits():
        answer_logits(model, batch).sum().backward()


@pytest.mark.parametrize("chosen", [[2], [3], [0, 2]], ids=["no image", "two images of one row", "one of two"])
def test_rows_have_the_logits_and_gradients_of_the_library(packing, chosen):
    model, letter_ids, rows, padded, packed = packing
    rows = [rows[i] for i in chosen]
    expected = gradients_of(model, padded(rows), letter_ids)
    speedups.speed_up(model)
    assert_same(gradients_of(model, packed(rows), letter_ids), expected)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_trained_tower_has_the_gradients_of_the_library(packing, checkpoints):
    model, letter_ids, rows, padded, packed = packing
    tower_of(model.get_base_model()).requires_grad_(True)
    expected = gradients_of(model, padded(rows), letter_ids)
    assert sum(".visual." in name for name in expected[1]) > 10
    speedups.speed_up(model)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_same(gradients_of(model, packed(rows), letter_ids), expected)


def test_another_number_of_tokens_than_features_is_refused_as_by_the_library(packing):
    model, _, rows, padded, packed = packing
    batch, num_features = padded(rows), packed(rows)["input_ids"].eq(packed.packer.image_token_id).sum()
    place = tuple((batch["input_ids"] == packed.packer.image_token_id).nonzero()[0])
    batch["input_ids"][place] = batch["input_ids"][0, 0]
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        answer_logits(model, batch)
    found = f"{num_features - 1} tokens, {num_features} features"
    with pytest.raises(InputError, match=rf"do not match in rows .* \(5 of 5\): {found}"):
        packed.packer(batch)
    del batch["pixel_values"]
    batch["image_features"] = torch.zeros(num_features - 1, 8)  # from the disk, counted themselves
    packed.packer(batch)


def test_a_template_that_shows_no_image_is_refused(packing):
    _, _, rows, _, packed = packing
    packed.processor.chat_template = packed.processor.chat_template.replace("<|image_pad|>", "")
    with pytest.raises(InputError, match="0 tokens, .* a chat template that shows every image once"):
        packed(rows)


def test_a_template_that_shows_an_image_twice_is_refused(packing):
    _, _, rows, _, packed = packing
    packed.processor.chat_template = packed.processor.chat_template.replace("<|image_pad|>", 2 * "<|image_pad|>")
    with pytest.raises(InputError, match="more than once. Take one that shows every image once"):
        packed(rows)
