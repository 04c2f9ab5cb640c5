"""Training rows that carry their letter, for the token after it: what else there is stays as it is."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from gradients import assert_same
from trainers import SPELLING, build_trainer, prompt_bytes

from vqa_sft.batch.collator import TARGET_KEYS, AnswerCollator, TrainCollator
from vqa_sft.batch.prompts import Prompts, render_prompt
from vqa_sft.data.examples import FEATURES, load_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError
from vqa_sft.images import open_image
from vqa_sft.models.fast import speedups
from vqa_sft.models.load import load_processor
from vqa_sft.models.scoring import answer_logits, find_end_of_turn
from vqa_sft.questions.letters import LETTERS, draw_order


def rows_of(contest, num_rows):
    """Of many lengths; among them one without an image and one with two."""
    rows = list(load_examples(str(contest / "train.csv"), ReadOptions(limit=num_rows))[0])
    rows[1] |= {"question": "Which of these is the colour of the square that stands in the image?"}
    rows[2] |= {"images": []}
    rows[3] |= {"images": rows[3]["images"] + rows[0]["images"]}
    return rows


def full_sequence_loss(model, processor, row, order, spelling):
    """The usual supervised loss of one row, summed over its letter and the token that ends the turn."""
    letter = spelling.format(LETTERS[order.index(row["answer"])])
    text = render_prompt(processor, row, order, Prompts()) + letter + "<|im_end|>"
    images = [[open_image(image) for image in row["images"]]] if row["images"] else None
    inputs = processor(text=[text], images=images, return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    logits = model(**inputs).logits
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(
    ("family", "how"),
    [("qwen2_5_vl", "packed"), ("qwen2_5_vl", "left"), ("qwen3_vl", "packed"), ("llava", "right"), ("smolvlm", "left")],
)
def test_one_accumulated_step_is_the_gradient_of_the_full_sequence_loss(families, contest, tmp_path, family, how):
    # Seven rows in micro-batches of three, as in test_trainer.py.
    values = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    values |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "num_train_epochs": 1}
    trainer, _, processor = build_trainer(families(family), contest, tmp_path, 7, save_strategy="no", **values)
    rows = rows_of(contest, 7)
    trainer.train_dataset = Dataset.from_list(rows, FEATURES)
    orders = [draw_order(4, 42, 0, row["id"]) for row in rows]
    losses = [
        full_sequence_loss(trainer.model, processor, row, order, SPELLING[family])
        for row, order in zip(rows, orders, strict=True)
    ]
    expected = torch.stack(losses).sum() / 7
    expected.backward()
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    trainer.model.zero_grad()

    trainer.data_collator.supervises_end = True
    trainer.loss = replace(trainer.loss, end_of_turn=find_end_of_turn(processor))
    if how == "packed":
        trainer.data_collator.packer = speedups.pack_rows(trainer.model, "fp32")
        speedups.speed_up(trainer.model)
    else:
        processor.tokenizer.padding_side = how
    trainer.train()
    moved = {name: before[name] - parameter.detach() for name, parameter in trained.items()}
    assert_same((torch.zeros(1), moved), (torch.zeros(1), gradients))
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("how", ["packed", "left", "right"])
def test_the_letter_changes_nothing_that_comes_before_it(families, contest, tmp_path, how):
    trainer, _, processor = build_trainer(families("qwen2_5_vl"), contest, tmp_path, 4)
    packer = speedups.pack_rows(trainer.model, "fp32") if how == "packed" else None
    processor.tokenizer.padding_side = how if how != "packed" else "right"
    plain, supervised = (
        TrainCollator(processor, Prompts(), 4, seed=0, supervises_end=ends, packer=packer) for ends in (False, True)
    )
    rows = rows_of(contest, 4)
    with torch.no_grad():
        expected = answer_logits(trainer.model.eval(), plain(rows))
        torch.testing.assert_close(answer_logits(trainer.model, supervised(rows)), expected, atol=2e-5, rtol=1e-5)
    same = [rows[2] | {"id": "x", "answer": answer} for answer in range(3)]  # three letters after one prompt
    with torch.no_grad():
        logits = answer_logits(trainer.model, supervised(same))
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_training_row_is_the_prompt_and_its_letter(families, contest, family, side):
    processor = load_processor(families(family))
    processor.tokenizer.padding_side = side
    rows = rows_of(contest, 4)
    shares = [0.1, 0.2, 0.4, 0.3]  # the reader takes the largest as the answer of a row without one
    rows = [row | {"targets": shares if i == 1 else None} for i, row in enumerate(rows)]
    rows[1]["answer"] = 2
    batch = TrainCollator(processor, Prompts(), 5, seed=0, supervises_end=True)(rows)
    prompts = TrainCollator(processor, Prompts(), 5, seed=0)(rows)
    for i, row in enumerate(rows):
        letter = SPELLING[family].format(LETTERS[draw_order(4, 0, 0, row["id"]).index(row["answer"])])
        assert prompt_bytes(processor, batch, i) == prompt_bytes(processor, prompts, i) + letter.encode()
        shown = batch["input_ids"][i][batch["end_positions"][i]]
        assert processor.tokenizer.decode(shown) == letter
    assert torch.equal(batch["answer_positions"] + 1, batch["end_positions"])
    assert batch["targets"][1].max() == 0.4
    assert "end_positions" not in prompts and "end_positions" not in AnswerCollator(processor, Prompts(), 5)(rows)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_the_end_of_a_turn_is_the_token_after_the_answer(families, family):
    processor = load_processor(families(family))
    assert find_end_of_turn(processor) == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    template = processor.chat_template
    processor.chat_template = template.replace("<|im_end|>", "<|box_end|>")
    assert find_end_of_turn(processor) == processor.tokenizer.convert_tokens_to_ids("<|box_end|>")
    for without in ("", " ", "ok<|im_end|>", "\\n<|im_end|>"):
        processor.chat_template = template.replace("<|im_end|>", without)
        with pytest.raises(InputError, match="does not end a turn by a control token: after an answer it puts"):
            find_end_of_turn(processor)


def test_a_model_so_trained_generates_the_letter_and_stops(families, contest, tmp_path):
    values = {"max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    trainer, examples, processor = build_trainer(families("qwen2_5_vl"), contest, tmp_path, 4, False, **values)
    trainer.train_dataset = examples.map(lambda row, i: {"answer": i % 2}, with_indices=True)
    trainer.data_collator.supervises_end = True
    trainer.loss = replace(trainer.loss, end_of_turn=find_end_of_turn(processor))
    processor.tokenizer.padding_side = "left"  # as `generate` needs it
    batch = trainer.eval_collator(list(examples))
    inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}

    def generated():
        ids = trainer.model.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    assert trainer.loss.end_of_turn not in {token for row in generated() for token in row}
    trainer.train()
    assert generated() == [[trainer.letter_ids[i % 2].item(), trainer.loss.end_of_turn] for i in range(4)]
