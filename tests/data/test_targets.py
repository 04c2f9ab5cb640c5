"""Soft targets: what annotators or a teacher say of every choice, from a column to the loss."""

import json

import pytest
import torch
from contest import write_csv
from trainers import build_trainer

from vqa_sft.batch.collator import AnswerCollator, TrainCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.columns import Columns, known_columns
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.models.load import load_processor
from vqa_sft.questions.letters import draw_order
from vqa_sft.training.loss import letter_targets


@pytest.fixture
def voted(contest):
    """Rows with votes: one without any, one without an answer."""
    examples = read_examples(str(contest / "train.csv")).examples
    rows = []
    for row in examples:
        cells = {"id": row["id"], "path": row["images"][0]["path"], "question": row["question"]}
        cells |= dict(zip("abcd", row["choices"], strict=False))
        rows.append(cells | {"answer": "abcd"[row["answer"]], "votes": json.dumps([1, 3, 0, 4])})
    rows[0]["votes"], rows[1]["answer"] = "", ""
    write_csv(contest / "votes.csv", rows)
    return str(contest / "votes.csv")


@pytest.mark.parametrize("read", [read_examples, stream_examples])
def test_votes_become_shares_and_the_largest_answers_a_row_that_has_no_answer(voted, read):
    rows = sorted(read(voted, ReadOptions(columns={"targets": "votes"})).examples, key=lambda row: row["id"])
    assert rows[0]["targets"] is None and rows[1]["answer"] == 3
    assert rows[2]["targets"] == [0.125, 0.375, 0.0, 0.5]
    assert "targets" not in next(
        iter(read(voted, ReadOptions(columns={"answer": "answer"}, keep_rows={"answer": "a"})).examples)
    )


def test_targets_follow_the_order_of_the_choices(families, voted):
    rows = list(read_examples(voted, ReadOptions(columns={"targets": "votes"})).examples)[:3]
    processor = load_processor(families("qwen2_5_vl"))
    batch = TrainCollator(processor, Prompts(), 5, seed=7)(rows)
    for i, row in enumerate(rows):
        order = draw_order(4, 7, 0, row["id"])
        hard = [float(choice == row["answer"]) for choice in range(4)]
        assert batch["targets"][i].tolist() == [(row["targets"] or hard)[choice] for choice in order] + [0.0]
    assert "targets" not in AnswerCollator(processor, Prompts(), 5)(rows)


def gradients(trainer, examples):
    trainer.model.train().zero_grad()
    trainer.compute_loss(trainer.model, trainer.data_collator(list(examples))).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_one_hot_targets_give_the_hard_loss_and_soft_ones_a_mean_of_hard_ones(families, contest, tmp_path):
    trainer, examples, _ = build_trainer(families("qwen2_5_vl"), contest, tmp_path, 4)
    hard = gradients(trainer, examples)
    shares = [0.1, 0.2, 0.3, 0.4]
    one_hot = [row | {"targets": [float(i == row["answer"]) for i in range(4)]} for row in examples]
    mixed = gradients(trainer, [row | {"targets": shares} for row in examples])
    each = [gradients(trainer, [row | {"answer": i} for row in examples]) for i in range(4)]
    for name, gradient in gradients(trainer, one_hot).items():
        torch.testing.assert_close(gradient, hard[name])
        mean = sum(share * of_answer[name] for share, of_answer in zip(shares, each, strict=True))
        torch.testing.assert_close(mixed[name], mean, atol=1e-6, rtol=1e-4)


def test_smoothing_is_of_targets_too():
    from vqa_sft.training.loss import smooth

    answers, num_choices = torch.tensor([1, 0]), torch.tensor([4, 2])
    soft = smooth(torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]), num_choices, 0.2)
    torch.testing.assert_close(soft, torch.tensor([[0.45, 0.45, 0.05, 0.05], [0.9, 0.1, 0, 0]]))
    torch.testing.assert_close(letter_targets(answers, num_choices, 4, 0.2)[1], soft[1])


def test_other_data_of_a_run_need_no_targets(voted):
    trained = Columns("id", ("path",), "question", "choices", "answer", targets="votes")
    assert "targets" not in known_columns(trained, {"targets": "votes", "id": "qid"})


def test_a_recipe_with_targets_trains_and_predicts(families, voted, sft, contest, tmp_path):
    from scripts import run_script

    run = sft(families("qwen2_5_vl"), tmp_path / "run", train_data=voted, columns="{targets: votes}", max_steps=2)
    arguments = ["--run", run, "--data", contest / "train.csv", "--output", tmp_path / "out.csv"]
    run_script("predict", *arguments, "--use_cpu", "--num_workers", "0")
