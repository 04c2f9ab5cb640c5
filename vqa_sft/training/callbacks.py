"""Callbacks of the trainer: the collator's epoch, examples per second. Curves and averages have their own files."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from vqa_sft.batch.collator import TrainCollator
from vqa_sft.models.fast.compilation import num_compilations


class EpochForCollator(TrainerCallback):
    """Sets the epoch for which the training collator draws orders, also after a resume."""

    def __init__(self, collator: TrainCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch.fill_(int(state.epoch or 0))


class Speed(TrainerCallback):
    """Examples per second and peak memory of training alone: without the first steps, without evaluation."""

    WARM_UP_STEPS = 3

    def __init__(self) -> None:
        self.num_rows = self.num_steps = 0
        self.start_s = self.examples_per_s = self.paused_s = 0.0  # by evaluations

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_steps += 1
        if self.num_steps == self.WARM_UP_STEPS:
            self.num_rows, self.start_s = 0, self.clock_s()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.paused_s += metrics.get("eval_runtime", 0.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.num_steps > self.WARM_UP_STEPS:
            self.examples_per_s = self.num_rows / (self.clock_s() - self.start_s)

    def clock_s(self) -> float:
        """Seconds as if evaluations took none."""
        return now_s() - self.paused_s

    def metrics(self) -> dict[str, float]:
        values = {"train_examples_per_s": self.examples_per_s} if self.examples_per_s else {}
        if torch.cuda.is_available():
            values["peak_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
            values["compilations"] = num_compilations()
        return values


def now_s() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
