"""Rare classes of a classification: drawn as often as others, or weighted; rows of an evaluation without an answer."""

from collections import Counter

import pytest
import torch
from trainers import build_trainer
from transformers import EvalPrediction

from vqa_sft.tiny import TINY_PATH
from vqa_sft.training.metrics import letter_metrics
from vqa_sft.training.sampler import LengthSampler, draw_balanced

CLASSES = [0] * 80 + [1] * 15 + [2] * 5


def test_every_class_is_drawn_equally_often_and_in_time_every_row_is():
    counted = Counter()
    for epoch in range(10):
        drawn = draw_balanced(CLASSES, torch.Generator().manual_seed(epoch))
        of_class = Counter(CLASSES[row] for row in drawn)
        assert len(drawn) == 100 and sorted(of_class.values()) == [33, 33, 34]
        times = Counter(row for row in drawn if CLASSES[row] == 2)
        assert max(times.values()) - min(times.values()) <= 1 and len(times) == 5
        counted.update(drawn)
    assert {*counted} == {*range(100)}
    assert draw_balanced(CLASSES, torch.Generator().manual_seed(0)) == draw_balanced(
        CLASSES, torch.Generator().manual_seed(0)
    )


def test_balanced_rows_depend_on_seed_and_epoch_and_are_sorted_by_length_all_the_same():
    lengths = [(7 * number) % 50 for number in range(100)]
    sampler, orders = LengthSampler(lengths, batch_size=5, seed=1, classes=CLASSES), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([*sampler])
    assert orders[0] == orders[2] != orders[1]
    batches = [[lengths[row] for row in orders[0][start : start + 5]] for start in range(0, 100, 5)]
    assert all(batch == sorted(batch) for batch in batches)


def test_a_trainer_draws_balanced_classes_where_rows_are_packed(contest, tmp_path):
    trainer, examples, _ = build_trainer(TINY_PATH, contest, tmp_path / "run", 24, per_device_train_batch_size=4)
    trainer.balanced = [0] * 18 + [1] * 6
    loader, ids = trainer.get_train_dataloader(), examples["id"][:]
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append([ids.index(row_id) for batch in loader for row_id in batch["ids"]])
    assert epochs[0] != epochs[1]
    assert all(Counter(trainer.balanced[row] for row in epoch) == {0: 12, 1: 12} for epoch in epochs)


def test_weights_count_in_the_loss_and_not_in_an_evaluation(contest, tmp_path):
    trainer, examples, _ = build_trainer(TINY_PATH, contest, tmp_path / "run", 6)
    weights = [0.5, 0.5, 0.5, 0.5, 2.0, 2.0]
    weighted = list(examples.add_column("weight", weights))
    with torch.no_grad():
        _, (_, plain, _) = trainer.compute_loss(trainer.model, trainer.data_collator(list(examples)), True)
        _, (_, found, _) = trainer.compute_loss(trainer.model, trainer.data_collator(weighted), True)
        count = torch.tensor(6)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(weighted), num_items_in_batch=count)
    torch.testing.assert_close(found, plain * torch.tensor(weights))
    torch.testing.assert_close(loss, (plain * torch.tensor(weights)).sum() / 6)
    assert "weights" not in trainer.eval_collator(weighted)


def test_rows_without_an_answer_count_in_nothing_but_the_share_of_the_others():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [5.0, 0.0]])
    both = EvalPrediction(
        predictions=(logits[:2].numpy(), torch.tensor([1.0, 2.0]).numpy(), torch.tensor([0.5, 1.0]).numpy()),
        label_ids=torch.tensor([[1, 2], [1, 2]]).numpy(),
    )
    three = EvalPrediction(
        predictions=(logits.numpy(), torch.tensor([1.0, 2.0, 9.0]).numpy(), torch.tensor([0.5, 1.0, 0.75]).numpy()),
        label_ids=torch.tensor([[1, 2], [1, 2], [-1, 2]]).numpy(),
    )
    known, found = letter_metrics(both), letter_metrics(three)
    assert found.pop("answerable") == pytest.approx(2 / 3) and "answerable" not in known
    assert found == known and found["accuracy"] == 0.5


def test_training_takes_no_row_without_an_answer(contest, tmp_path):
    trainer, examples, _ = build_trainer(TINY_PATH, contest, tmp_path / "run", 6)
    batch = trainer.data_collator(list(examples))
    batch["answers"][2] = -1
    trainer.model.train()
    with pytest.raises(RuntimeError, match="Class values must be non-negative"):
        trainer.compute_loss(trainer.model, batch)


def test_an_evaluation_takes_rows_without_an_answer(contest, tmp_path):
    trainer, examples, _ = build_trainer(TINY_PATH, contest, tmp_path / "run", 8, per_device_eval_batch_size=4)
    known = trainer.evaluate(examples.select(range(6)))
    found = trainer.evaluate(
        examples.map(lambda row, number: {"answer": row["answer"] if number < 6 else None}, with_indices=True)
    )
    assert found["eval_answerable"] == 0.75
    for name in ("eval_loss", "eval_accuracy", "eval_nll"):
        assert found[name] == pytest.approx(known[name], abs=1e-5)
