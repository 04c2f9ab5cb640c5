"""Averages of an adapter's weights over the steps of a training.

    ema    a <- d a + (1 - d) w after every step, with d = min(ema_decay, (1 + n) / (10 + n)) after n steps
    swa    the mean of w over the steps from `swa_start` on (Izmailov et al. 2018)

By the formulas of `torch.optim.swa_utils`, in fp32, beside the weights that are trained and without touching them.
Every evaluation scores the average too, and the best one so far is kept: the run ends with it if its validation NLL,
at the best temperature, is below that of the best checkpoint. Checkpoints hold the average, so that a resumed run has
it. All processes compute the same, which needs whole weights on each of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import TrainerCallback

Weights = dict[str, torch.Tensor]
AVERAGE, BEST = "average.safetensors", "average_best.safetensors"


class AdapterAverage(TrainerCallback):
    """`kind` is "ema" or "swa"; `start` is a share of the steps, or from 1 on a number of them."""

    def __init__(self, kind: str, *, decay: float = 0.99, start: float = 0.5) -> None:
        self.kind, self.decay, self.start = kind, decay, start
        self.weights: Weights = {}
        self.num_averaged = 0
        self.best: Weights = {}
        self.best_nll = float("inf")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if (folder / AVERAGE).is_file():  # resuming
            self.weights, found = read(folder / AVERAGE, args.device)
            self.num_averaged = int(found["num_averaged"])
        if (folder / BEST).is_file():
            self.best, found = read(folder / BEST, "cpu")
            self.best_nll = float(found["nll"])

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        start = self.start if self.start >= 1 else self.start * state.max_steps
        if self.kind == "ema" or state.global_step > start:
            self.update(trained(model))

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter]) -> None:
        """Take the weights of one more step in."""
        if not self.num_averaged:
            self.weights = {name: weight.detach().float().clone() for name, weight in weights.items()}
        else:
            now = [weights[name].detach().float() for name in self.weights]
            number = torch.tensor(self.num_averaged)
            if self.kind == "ema":
                decay = min(self.decay, (1 + self.num_averaged) / (10 + self.num_averaged))
                get_ema_multi_avg_fn(decay)(list(self.weights.values()), now, number)
            else:
                get_swa_multi_avg_fn()(list(self.weights.values()), now, number)
        self.num_averaged += 1

    def keep_if_best(self, nll: float) -> None:
        """Keep a copy of the average if no earlier one had so low a validation NLL."""
        if nll < self.best_nll:
            self.best = {name: weight.cpu().clone() for name, weight in self.weights.items()}
            self.best_nll = nll

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.weights:
            save_file(self.weights, folder / AVERAGE, {"num_averaged": str(self.num_averaged)})
        if self.best:
            save_file(self.best, folder / BEST, {"nll": repr(self.best_nll)})


def read(path: Path, device: torch.device | str) -> tuple[Weights, dict[str, str]]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def put(model: nn.Module, weights: Weights) -> None:
    """Write `weights` into the trained parameters of the model."""
    parameters = trained(model)
    for name, weight in weights.items():
        parameters[name].copy_(weight)


@contextmanager
def swapped(model: nn.Module, weights: Weights) -> Iterator[None]:
    """The model with other `weights`, and then with its own."""
    own = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    put(model, weights)
    try:
        yield
    finally:
        put(model, own)
