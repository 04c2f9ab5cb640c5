import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from trainers import SPELLING, build_trainer

from vqa_sft.batch.collator import TARGET_KEYS
from vqa_sft.batch.prompts import Prompts, render_prompt
from vqa_sft.images import open_image
from vqa_sft.models.fast import speedups
from vqa_sft.models.scoring import answer_logits
from vqa_sft.questions.letters import draw_order
from vqa_sft.training.dealing import order_for_processes
from vqa_sft.training.metrics import letter_metrics
from vqa_sft.training.sampler import BalancedSampler, LengthSampler
from vqa_sft.training.validation import predict_examples


def full_sequence_loss(model, processor, row, order, spelling):
    """The usual supervised loss of one row: answer in the input, shifted labels, all masked but the letter."""
    letter = "ABCD"[order.index(row["answer"])]
    text = render_prompt(processor, row, order, Prompts()) + spelling.format(letter)
    inputs = processor(text=[text], images=[[open_image(image) for image in row["images"]]], return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -1] = inputs["input_ids"][0, -1]
    logits = model(**inputs).logits
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")


def test_dropping_the_last_batch_drops_no_row_of_an_evaluation(families, contest, tmp_path):
    values = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4}
    trainer, examples, _ = build_trainer(families("qwen2_5_vl"), contest, tmp_path, num_rows=7, **values)
    predictions, _ = predict_examples(trainer, examples)
    assert predictions.ids == list(examples["id"]) and "eval_nll" in trainer.evaluate()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_one_accumulated_step_is_the_gradient_of_the_full_sequence_loss(families, contest, tmp_path, family):
    # Seven rows in micro-batches of three: 3 + 3 + 1. A mean of micro-batch means would weigh the last row triply.
    trainer, examples, processor = build_trainer(
        families(family),
        contest,
        tmp_path / "run",
        num_rows=7,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        num_train_epochs=1,
        save_strategy="no",
    )
    losses = [
        full_sequence_loss(trainer.model, processor, row, draw_order(4, 42, 0, row["id"]), SPELLING[family])
        for row in examples
    ]
    expected = torch.stack(losses).sum() / 7
    expected.backward()
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    trainer.model.zero_grad()
    trainer.train()

    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, parameter in trained.items():
        torch.testing.assert_close(before[name] - parameter, gradients[name], atol=1e-5, rtol=1e-3)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_recomputation_begins_with_the_first_step(families, contest, tmp_path):
    trainer, _, _ = build_trainer(
        families("qwen2_5_vl"),
        contest,
        tmp_path / "run",
        num_rows=8,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        save_strategy="no",
    )
    speedups.speed_up_training(trainer, compile_layers=False)
    calls = []
    mlp = trainer.model.get_base_model().get_decoder().layers[0].mlp
    mlp.register_forward_pre_hook(lambda *args: calls.append(trainer.state.global_step))
    trainer.train()
    assert calls == [0, 0, 1, 1]  # forward, and once more on the way back


def test_weights_are_counted_once_and_come_to_the_work_that_the_library_logs(families, contest, tmp_path):
    trainer, examples, _ = build_trainer(families("qwen2_5_vl"), contest, tmp_path / "run", num_rows=3, max_steps=1)
    batch = trainer.data_collator(list(examples))
    assert trainer.floating_point_ops(batch) == transformers.Trainer.floating_point_ops(trainer, batch) > 0
    trainer.model.num_parameters = None
    assert trainer.floating_point_ops(batch)


def test_smoothing_spreads_over_the_letters_and_trains_the_right_one(families, contest, tmp_path):
    """The experiment in which `label_smoothing_factor` of the libraries trains another token: every answer is B. There
    P(B) ends at 0.999 without smoothing and at 0.000 with 0.1."""
    ended = {}
    for smoothing in (0.0, 0.1):
        trainer, examples, _ = build_trainer(
            families("qwen2_5_vl"),
            contest,
            tmp_path / str(smoothing),
            num_rows=8,
            shuffle_choices=False,
            own={"letter_smoothing": smoothing},
            max_steps=40,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            save_strategy="no",
        )
        trainer.train_dataset = examples.map(lambda row: {"answer": 1})
        trainer.train()
        with torch.no_grad():
            logits = answer_logits(trainer.model.eval(), trainer.eval_collator(list(examples)))
        ended[smoothing] = logits[:, trainer.letter_ids].softmax(dim=1).mean(dim=0)
    assert ended[0.0][1] > 0.98
    # A tenth of the target lies on the four letters, a quarter of that on each.
    torch.testing.assert_close(ended[0.1], torch.tensor([0.025, 0.925, 0.025, 0.025]), atol=0.01, rtol=0)


def test_one_forward_gives_loss_and_metrics_in_training_and_evaluation(families, contest, tmp_path, monkeypatch):
    trainer, _, _ = build_trainer(
        families("qwen2_5_vl"), contest, tmp_path / "run", 8, max_steps=2, per_device_train_batch_size=4
    )
    calls = []
    forward = trainer.model.get_base_model().model.forward
    monkeypatch.setattr(
        trainer.model.get_base_model().model, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw)
    )
    trainer.train()
    assert len(calls) == 2
    trainer.evaluate()
    assert len(calls) == 3  # 8 rows in one evaluation batch


def test_only_the_language_model_is_adapted_and_nothing_else_is_trained(families, contest, tmp_path):
    for family, decoder in (("qwen2_5_vl", "language_model"), ("smolvlm", "text_model")):
        trainer, _, _ = build_trainer(families(family), contest, tmp_path / family, 4)
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert trained and all(decoder in name and "lora" in name for name in trained)
        kinds = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
        assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_evaluation_shows_every_choice_under_its_own_letter(families, contest, tmp_path):
    trainer, examples, _ = build_trainer(families("qwen2_5_vl"), contest, tmp_path / "run", 6)
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(examples)):
        batch = next(iter(loader))
        assert batch["answers"].tolist() == examples["answer"][:]
    assert next(iter(trainer.get_train_dataloader()))["orders"].tolist() != [[0, 1, 2, 3]] * 6


def test_predictions_keep_row_order_and_agree_with_the_metrics(families, contest, tmp_path):
    trainer, examples, _ = build_trainer(
        families("qwen2_5_vl"), contest, tmp_path / "run", 10, per_device_eval_batch_size=4
    )
    predictions, metrics = predict_examples(trainer, examples)
    assert list(predictions.ids) == examples["id"][:]
    correct = [best == answer for best, answer in zip(predictions.best, examples["answer"], strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(correct) / 10)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(metrics["nll"], abs=1e-5)


def test_letter_metrics_leave_out_letters_that_a_row_does_not_use():
    from transformers import EvalPrediction

    logits = torch.tensor([[0.0, 1.0, 9.0], [2.0, 0.0, 1.0]]).numpy()
    labels = torch.tensor([[1, 2], [0, 3]]).numpy()
    losses, masses = torch.tensor([[1.0, 2.0], [0.5, 1.0]]).numpy()
    values = letter_metrics(EvalPrediction(predictions=(logits, losses, masses), label_ids=labels))
    assert (values["loss"], values["letters_mass"]) == (1.5, 0.75)
    first = -torch.tensor([0.0, 1.0]).log_softmax(0)[1]
    second = -torch.tensor([2.0, 0.0, 1.0]).log_softmax(0)[0]
    assert values["accuracy"] == 1.0 and values["nll"] == pytest.approx(((first + second) / 2).item())


def test_every_epoch_shows_the_choices_in_new_orders(families, contest, tmp_path):
    trainer, examples, _ = build_trainer(
        families("qwen2_5_vl"), contest, tmp_path / "run", 4, num_train_epochs=3, per_device_train_batch_size=4
    )
    seen, collate = [], trainer.data_collator.__class__.__call__

    class Recorded(trainer.data_collator.__class__):
        def __call__(self, rows):
            batch = collate(self, rows)
            seen.append({row["id"]: tuple(order) for row, order in zip(rows, batch["orders"].tolist(), strict=True)})
            return batch

    trainer.data_collator.__class__ = Recorded
    trainer.train()
    assert seen == [{row["id"]: draw_order(4, 42, epoch, row["id"]) for row in examples} for epoch in range(3)]


def test_processes_ask_each_other_for_their_rows_only_where_these_may_differ(families, contest, tmp_path, monkeypatch):
    trainer, _, _ = build_trainer(families("llava"), contest, tmp_path / "run", 2)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda count, how: {"sum": count + 1}[how])
    batches = [{"ids": ["a", "b"]}, {"ids": ["c"]}]
    assert trainer.get_batch_samples(iter(batches), 2, "cpu")[1] == 6
    trainer.accelerator.even_batches = False
    assert trainer.get_batch_samples(iter(batches), 2, "cpu")[1] == 4


def test_padded_rows_of_like_length_are_in_one_batch_in_an_order_of_seed_and_epoch(families, contest, tmp_path):
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, examples, _ = build_trainer(families("llava"), contest, tmp_path / "run", 24, **how)
    ids = examples["id"][:]
    trainer.lengths = [(7 * number) % 24 for number in range(24)]
    loader, epochs = trainer.get_train_dataloader(), []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append([[trainer.lengths[ids.index(row)] for row in batch["ids"]] for batch in loader])
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(sum(epochs[1], [])) == [*range(24)]
    steps = [first + second for first, second in zip(epochs[0][::2], epochs[0][1::2], strict=True)]
    assert all(step == sorted(step) for step in steps) and steps != sorted(steps)


def test_batches_of_like_length_are_drawn_in_a_random_order_and_none_is_split():
    torch.manual_seed(0)
    lengths = torch.randint(100, 500, (4_003,)).tolist()
    sampler = LengthSampler(lengths, batch_size=8, seed=1)
    order = [*sampler]
    assert sorted(order) == [*range(4_003)] and len(sampler) == 4_003
    batches = [[lengths[row] for row in order[start : start + 8]] for start in range(0, 4_000, 8)]
    padded = sum(8 * max(batch) for batch in batches) / sum(map(sum, batches))
    drawn = [lengths[start : start + 8] for start in range(0, 4_000, 8)]
    assert padded < 1.02 < 1.3 < sum(8 * max(batch) for batch in drawn) / sum(map(sum, drawn))
    longest = torch.tensor([max(batch) for batch in batches], dtype=torch.float)
    assert torch.corrcoef(torch.stack([longest, torch.arange(500.0)]))[0, 1].abs() < 0.2


def test_padded_rows_are_in_the_same_steps_on_any_number_of_processes(families, contest, tmp_path, monkeypatch):
    orders = []
    for number in (1, 2):
        how = {"per_device_train_batch_size": 4 // number}
        trainer, *_ = build_trainer(families("llava"), contest, tmp_path / f"run{number}", 24, **how)
        trainer.lengths = [(7 * place) % 24 for place in range(24)]
        monkeypatch.setattr(type(trainer.args), "world_size", number)
        orders.append([*trainer._get_train_sampler()])
    assert orders[0] == orders[1] and sorted(orders[0]) == [*range(24)]


def loader_of(process, rows, batch_size, sampler=None, tokens=None):
    """That of one of two processes, as accelerate makes it; with `tokens` rows are dealt evenly, in steps of two."""
    drawn = {"sampler": sampler} if sampler else {"shuffle": True, "generator": torch.Generator().manual_seed(1)}
    how = {"num_processes": 2, "process_index": process, "put_on_device": False}
    loader = DataLoader(rows, batch_size, **drawn)
    loader = prepare_data_loader(loader, **how, use_seedable_sampler=True, data_seed=3)
    order_for_processes(loader, 4, tokens)
    return loader


def batches_of(loader, epoch):
    loader.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("how", ["drawn", "dealt", "of like length", "balanced", "balanced and dealt"])
def test_an_epoch_that_is_resumed_has_the_rows_that_it_had_not_yet(how):
    values = [(7 * number) % 24 for number in range(24)]
    sampler = LengthSampler(values, 8, seed=3) if how == "of like length" else None
    sampler = BalancedSampler([0] * 18 + [1] * 6, seed=3) if "balanced" in how else sampler

    def load():
        rows = range(24 if sampler is None else 10_000)  # a sampler knows how many it draws
        return loader_of(1, rows, 2, copy.deepcopy(sampler), values if "dealt" in how else None)

    whole = batches_of(load(), epoch=1)
    assert whole != batches_of(load(), epoch=0)
    assert batches_of(skip_first_batches(load(), 2), epoch=1) == whole[2:]


def test_rows_of_a_step_are_dealt_evenly_to_the_processes_and_stay_in_it():
    torch.manual_seed(0)
    tokens = torch.randint(100, 600, (100,)).tolist()
    drawn, dealt = (
        [batches_of(loader_of(process, range(100), 8, tokens=given), epoch=5) for process in (0, 1)]
        for given in (None, tokens)
    )

    def steps(batches):
        return [[sum(of_process[start : start + 2], []) for of_process in batches] for start in range(0, 7, 2)]

    def unevenness(rows_of_processes):
        totals = [sum(tokens[row] for row in rows) for rows in rows_of_processes]
        return max(totals) / (sum(totals) / 2) - 1

    assert all(len(batch) == 8 for of_process in dealt for batch in of_process)
    assert {row for of_process in dealt for batch in of_process for row in batch} == {*range(100)}
    # The fourth is not whole: accelerate adds rows of the first batches to it.
    drawn, dealt = steps(drawn)[:3], steps(dealt)[:3]
    assert [sorted(sum(step, [])) for step in drawn] == [sorted(sum(step, [])) for step in dealt]
    assert max(map(unevenness, dealt)) < 0.01 < 0.03 < max(map(unevenness, drawn))


def test_the_log_tells_the_accuracy_and_the_letters_share_of_the_vocabulary(families, contest, tmp_path):
    trainer, examples, _ = build_trainer(
        families("llava"), contest, tmp_path / "run", 6, max_steps=1, per_device_train_batch_size=6, logging_steps=1
    )
    batch = trainer.data_collator(list(examples))
    with torch.no_grad():
        probs = answer_logits(trainer.model.eval(), batch).softmax(dim=1)
    letters = probs[:, trainer.letter_ids]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["letters_mass"] == pytest.approx(letters.sum(dim=1).mean().item(), rel=1e-3)
    assert log["accuracy"] == pytest.approx((letters.argmax(dim=1) == batch["answers"]).float().mean().item())


def test_a_mixture_computes_no_loss_that_balances_its_experts(families, contest, tmp_path):
    trainer, examples, _ = build_trainer(families("qwen3_vl_moe"), contest, tmp_path / "run", 4)
    assert not trainer.aux_loss_enabled
    inputs = {name: value for name, value in trainer.data_collator(list(examples)).items() if name not in TARGET_KEYS}
    assert trainer.model(**inputs).aux_loss is None
