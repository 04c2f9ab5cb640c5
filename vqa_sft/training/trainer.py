"""`AnswerTrainer`: TRL's SFTTrainer, with one forward that gives the loss and the letter logits.

What is ours: the loss at the answer position, its count of rows over the global batch, two collators, the metrics of
the letters. Everything else (loop, distribution, checkpoints, logging) is the libraries'.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from trl import SFTTrainer

from vqa_sft.batch.collator import AnswerCollator, TrainCollator
from vqa_sft.errors import InputError, ProcessError, printable
from vqa_sft.models import processes
from vqa_sft.models.fast.speedups import base_of
from vqa_sft.models.parts import vision_parameters
from vqa_sft.models.scoring import supervised_logits
from vqa_sft.runs.checkpoints import MARKER, resumes_from
from vqa_sft.training import averaging
from vqa_sft.training.averaging import AdapterAverage, trained
from vqa_sft.training.callbacks import EpochForCollator, Speed, now_s
from vqa_sft.training.dealing import Order, order_for_processes
from vqa_sft.training.loss import LossSettings, answer_loss, end_of_turn_loss, letter_targets, own_logits, smooth
from vqa_sft.training.metrics import letter_metrics
from vqa_sft.training.sampler import BalancedSampler, LengthSampler, RepeatedRows
from vqa_sft.training.saving import MarkWholeCheckpoints, SaveAndStop, keep_worker


class AnswerTrainer(SFTTrainer):
    """`vision_learning_rate` is that of all trained weights outside the language model. Every evaluation scores the
    `average` too. `stop` keeps the loaders' workers from a SIGTERM while it listens. Both are callbacks. `order` is
    that of the training rows."""

    # `compute_loss` divides by the rows of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True
    data_collator: AnswerCollator

    def __init__(
        self,
        *args: Any,
        data_collator: TrainCollator,
        eval_collator: AnswerCollator,
        loss: LossSettings,
        vision_learning_rate: float | None = None,
        average: AdapterAverage | None = None,
        stop: SaveAndStop | None = None,
        order: Order | None = None,
        **kwargs: Any,
    ) -> None:
        order = order or Order()
        self.lengths, self.tokens, self.balanced = order.lengths, order.tokens, order.balanced
        kwargs.setdefault("compute_metrics", letter_metrics)
        super().__init__(*args, data_collator=data_collator, **kwargs)
        processes.spare_ddp(self.accelerator, self.model, self.args.ddp_broadcast_buffers)
        self.eval_collator = eval_collator
        self.loss, self.letter_ids = loss, loss.letter_ids.to(self.args.device)
        self.vision_learning_rate = vision_learning_rate
        self.average, self.stop = average, stop
        self.ids: list[str] = []  # of the rows of the current step
        # Step, what it is, ids, losses (B,) since the last check; tensors, so that a step does not wait for the GPU.
        self.losses: list[tuple[int, str, list[str], torch.Tensor]] = []
        self.speed, self.marks = Speed(), MarkWholeCheckpoints()
        for callback in (average, stop, self.marks, self.speed, EpochForCollator(data_collator)):
            if callback is not None:  # the marker is written after what else is saved
                self.add_callback(callback)
        # TRL casts the adapter of a quantised model to bf16, also under fp16, where the gradient scaler then fails;
        # and fp32 is what the optimiser wants anyway.
        if getattr(self.model, "is_quantized", False) or getattr(self.model, "is_loaded_in_4bit", False):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, with groups of their own for weights that have a learning rate of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.vision_learning_rate is not None:
            vision = set(map(id, vision_parameters(base_of(self.model))))
            groups = list(optimizer.param_groups)
            if not any(id(parameter) in vision for group in groups for parameter in group["params"]):
                raise InputError("vision_learning_rate: nothing outside the language model is trained. Remove it.")
            for group in groups:
                own = [parameter for parameter in group["params"] if id(parameter) in vision]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in vision]
                if own:
                    optimizer.add_param_group(group | {"params": own, "lr": self.vision_learning_rate})
        return optimizer

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler | None:
        if self.lengths is None and self.balanced is None:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if self.lengths is None:
            return BalancedSampler(self.balanced, seed)
        # All rows of a step, so that processes, which wait for each other, have rows of like length too.
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthSampler(self.lengths, rows_a_step, seed, self.balanced)

    def get_train_dataloader(self) -> DataLoader:
        loader, args = super().get_train_dataloader(), self.args
        order_for_processes(loader, args.gradient_accumulation_steps * args.world_size, self.tokens)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of one optimiser step, and the number of rows in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.ids = [row_id for batch in batches for row_id in batch["ids"]]
        num_rows, num_processes = len(self.ids), self.accelerator.num_processes
        self.speed.num_rows += num_rows * num_processes
        if num_processes > 1 and not self.accelerator.even_batches:
            return batches, self.accelerator.reduce(torch.tensor(num_rows, device=device), "sum")
        # Every process has as many, streams without an end too. On the CPU: a copy to the GPU waits for all that it has
        # to do, and then the GPU for the first kernels of the step.
        return batches, torch.tensor(num_rows * num_processes)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Mean loss over the rows of the global batch; with `return_outputs` also, of each row, the letter logits
        (B, L), the loss (B,) and the letters' share of the vocabulary's probability (B,)."""
        logits, *at_letter = supervised_logits(model, inputs).unbind(dim=1)  # (B, V)
        letter_logits = logits[:, self.letter_ids]  # (B, L)
        answers, num_choices = inputs["answers"], inputs["num_choices"]
        smoothing = self.loss.letter_smoothing if self.model.training else 0.0  # evaluations compare with other runs
        if "targets" in inputs:
            targets = smooth(inputs["targets"], num_choices, smoothing)
        else:
            # Rows of an evaluation may have no answer (-1): `letter_metrics` leaves their losses out.
            known = answers if self.model.training else answers.clamp(min=0)
            targets = letter_targets(known, num_choices, letter_logits.shape[1], smoothing)
        losses = answer_loss(logits, letter_logits, targets, num_choices, self.loss.vocabulary_weight)
        if at_letter:
            losses = losses + end_of_turn_loss(at_letter[0], self.loss.end_of_turn)
        if "weights" in inputs:
            losses = losses * inputs["weights"]
        step = self.state.global_step + self.model.training
        what = f"The loss of step {step}" if self.model.training else f"The loss in the evaluation after step {step}"
        self.losses.append((step, what, inputs["ids"], losses.detach()))
        letters_mass = self._log_letters(logits.detach(), letter_logits.detach(), answers, num_choices)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            # DDP averages gradients over processes; the sum over all rows is wanted.
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, (letter_logits, losses, letters_mass)) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises ProcessError where the first step leaves a trained weight without a gradient for which the processes
        would wait for ever."""
        loss = super().training_step(model, *args, **kwargs)
        waits = isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
        if waits and not self.state.global_step:
            weights = trained(self.model).items()
            if bare := [name for name, weight in weights if weight.grad is None]:
                raise ProcessError(
                    f"{len(bare):,} of {len(weights):,} trained weights have no gradient ({bare[0]}, ...), and several "
                    "processes would wait for it. Name other layers, or set ddp_find_unused_parameters: true."
                )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's own estimate for a micro-batch, which would count the weights each time (4 ms for 7B)."""
        return 6 * inputs["input_ids"].numel() * self.num_weights

    @cached_property
    def num_weights(self) -> int:
        """Without embeddings."""
        return self.model.num_parameters(exclude_embeddings=True)

    def _log_letters(
        self, logits: torch.Tensor, letter_logits: torch.Tensor, answers: torch.Tensor, num_choices: torch.Tensor
    ) -> torch.Tensor:
        """How usable the model still is for `generate`: the share of probability that the letters have, (B,)."""
        own = own_logits(letter_logits, num_choices)
        letters_mass = (own.logsumexp(dim=1) - logits.logsumexp(dim=1)).exp()
        if self.model.training:  # evaluation has its own, over all rows at once
            self._metrics["train"]["accuracy"].append((own.argmax(dim=1) == answers).float().mean())
            self._metrics["train"]["letters_mass"].append(letters_mass.mean())
        return letters_mass

    def check_losses(self, weights: bool = False) -> None:
        """Raises InputError, in every process, where a loss since the last check was nan or infinite, with the rows of
        the first one; with `weights`, also where trained weights are. Gradients may overflow: under fp16 they do."""
        bad = self._first_bad_losses()
        if bad is None and weights and not self._has_finite_weights():
            step = self.state.global_step
            bad = step, f"The gradient of step {step}", self.ids
        found = [of_process for of_process in gather_object([bad]) if of_process]
        if found:
            step, what, _ = min(found)
            ids = dict.fromkeys(row_id for other, _, ids in found if other == step for row_id in ids)
            rows = "rows" if len(ids) > 1 else "row"
            raise InputError(
                f"{what} is nan or infinite in {rows} {', '.join(map(printable, ids))}. Look at "
                "them; or lower learning_rate, or take bf16 in place of fp16 (another run: with another --output_dir). "
                f"Nothing of it was saved; the same command {resumes_from(self.args.output_dir)}"
            )

    def _first_bad_losses(self) -> tuple[int, str, list[str]] | None:
        """The step, what is nan or infinite in it, and the ids of its rows."""
        losses, self.losses = self.losses, []
        if not losses:
            return None
        is_finite = torch.cat([values for *_, values in losses]).isfinite().tolist()
        rows = [(step, what, row_id) for step, what, ids, _ in losses for row_id in ids]
        bad = [row for row, finite in zip(rows, is_finite, strict=True) if not finite]
        return (*bad[0][:2], [row_id for step, _, row_id in bad if step == bad[0][0]]) if bad else None

    def _has_finite_weights(self) -> bool:
        # A process has its own part of a spread weight.
        parts = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in trained(self.model).values()]
        return bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_losses()
        # Kept as tensors until here, so that a step does not wait for the GPU or for other processes.
        values = self._metrics["train" if self.model.training else "eval"]
        for name, tensors in values.items():
            values[name] = [self.accelerator.reduce(torch.stack(tensors).mean(), "mean").item()]
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...] | None, torch.Tensor | None]:
        """No loss, letter logits (B, L), losses (B,) and letters' shares (B,), and labels (B, 2): the answer and the
        number of choices of each row.

        The Trainer would average losses by batch; on several processes the last ones hold rows twice. Whatever it
        gathers by row it keeps once, and `letter_metrics` averages that.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return None, outputs, torch.stack([inputs["answers"], inputs["num_choices"]], dim=1)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.check_losses(weights=True)
        metrics = super().evaluate(*args, **kwargs)
        if self.average is not None and self.average.weights and self.state.global_step:
            start_s = now_s()
            with averaging.swapped(self.model, self.average.weights):
                found = self.evaluation_loop(
                    self.get_eval_dataloader(), "Evaluation of the average", metric_key_prefix="eval_average"
                ).metrics
            self.speed.paused_s += now_s() - start_s
            self.average.keep_if_best(found["eval_average_nll_calibrated"])
            self.log(found)
            metrics |= found
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write one with every checkpoint; ours is written when there are metrics."""

    def get_eval_dataloader(self, eval_dataset: str | datasets.Dataset | None = None) -> DataLoader:
        with self._evaluation_collator():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: datasets.Dataset) -> DataLoader:
        with self._evaluation_collator():
            return super().get_test_dataloader(test_dataset)

    def _get_dataloader(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> DataLoader:
        if kwargs.get("is_training") and self.balanced is not None:
            dataset = RepeatedRows(dataset)
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        if self.stop is not None:
            base = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
            base.worker_init_fn = partial(_init_worker, base.worker_init_fn, self.stop.is_listening)
        return loader

    @contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        drops_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # every row is evaluated
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = train_collator, drops_last

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """Epochs, and batches of the next one, that a resumed run has trained. One that was killed after its last step
        has nothing left to train: transformers (5.23) would take another step where that one ended inside an epoch."""
        trained = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, *rest)
        return (num_epochs, 0) if self.state.global_step >= max_steps else trained

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.check_losses(weights=True)
        super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """While it is written, a checkpoint does not count and no older one is deleted: see MarkWholeCheckpoints."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:  # a step may be saved twice, at the end of an epoch
            Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", MARKER).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Checkpoints hold the model's own names. `save_pretrained` writes those of the hub, which the Trainer
        (transformers 5.23) does not find when it resumes or takes the best: it would load nothing."""
        is_checkpoint = output_dir is not None and Path(output_dir).resolve() != Path(self.args.output_dir).resolve()
        if isinstance(self.model, PeftModel) or not is_checkpoint:
            return super()._save(output_dir, state_dict)
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises InputError where the Trainer would only warn, and train from other weights than those of the file."""
        missing = set(load_result.missing_keys) - set(getattr(self.model, "all_tied_weights_keys", ()))
        if missing or load_result.unexpected_keys:
            raise InputError(
                f"a checkpoint in {self.args.output_dir} is of another model: {len(missing)} of the weights are not in "
                f"it, {len(load_result.unexpected_keys)} others are. Start again with --overwrite."
            )


def _init_worker(init: Callable[[int], None] | None, is_listening: torch.Tensor, worker: int) -> None:
    keep_worker(is_listening)
    if init is not None:
        init(worker)
