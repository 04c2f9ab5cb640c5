"""Classifiers on features of images, with calibrated probabilities of all classes, for training rows out of fold.

    for each fold:  fit on all other folds but one, choose setting and temperature on that one,
                    fit on all other folds, predict the fold
    test rows:      the setting that was best over the folds, fitted on all training rows

So nothing that predicts a row has seen its label, nor has its temperature; of the folds, which are balanced by class,
that cannot be said. A class whose rows all lie in one fold is unknown to what predicts them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from vqa_sft.console import progress

# Rows (n, D) -> logits (n, C), on one device.
Score = Callable[[torch.Tensor], torch.Tensor]
# The penalty of half the squared weights, over the sum of the rows' losses; the strongest first.
PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)
NEIGHBOURS = (5, 20, 100)
SHARPNESS = (0.02, 0.05, 0.1)  # cosines are divided by it
PRIOR_SHARE = 0.01  # of k nearest neighbours' probabilities, so that no class has none
_ITERATIONS = 200
_BLOCK = 8_192  # rows scored at a time
_LOG_TEMPERATURES = (-5.0, 5.0)


class Classifier(ABC):
    """A way to fit, with the settings among which held-out rows choose."""

    label: str  # for the user
    settings: Sequence[Any]

    @abstractmethod
    def fit(
        self, features: torch.Tensor, labels: torch.Tensor, num_classes: int, settings: Sequence[Any]
    ) -> list[Score]:
        """One score for each setting. `features` (N, D), `labels` (N,)."""


class LinearProbe(Classifier):
    """Multinomial logistic regression on standardised features; a setting is the penalty.

    Features are divided by sqrt(D) as well, so that one list of penalties suits every width.
    """

    label = "linear probe"
    settings = PENALTIES

    def fit(
        self, features: torch.Tensor, labels: torch.Tensor, num_classes: int, settings: Sequence[float]
    ) -> list[Score]:
        num_rows, width = features.shape
        seen, targets = labels.unique(return_inverse=True)  # a class without rows would have a bias of -inf
        mean, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6) * math.sqrt(width)
        inputs = (features - mean) / scale
        weight = features.new_zeros(len(seen), width + 1)  # the last column is the bias
        scores = []
        for penalty in settings:  # each starts where the one before ended
            weight = _minimise(inputs, targets, weight, penalty / num_rows)
            scores.append(_linear_score(weight, mean, scale, seen, num_classes, num_rows))
        return scores


def _minimise(inputs: torch.Tensor, targets: torch.Tensor, start: torch.Tensor, penalty: float) -> torch.Tensor:
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=_ITERATIONS,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = F.linear(inputs, weight[:, :-1], weight[:, -1])
        loss = F.cross_entropy(logits, targets) + penalty / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def _linear_score(
    weight: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, seen: torch.Tensor, num_classes: int, num_rows: int
) -> Score:
    def score(features: torch.Tensor) -> torch.Tensor:
        known = F.linear((features - mean) / scale, weight[:, :-1], weight[:, -1])
        # A class without a row has the probability of one row in all.
        logits = known.logsumexp(dim=1, keepdim=True).repeat(1, num_classes) - math.log(num_rows)
        logits[:, seen] = known
        return logits

    return score


class NearestNeighbours(Classifier):
    """Votes of the k training rows of the largest cosine, weighted by softmax(cosine / sharpness); centred features. A
    setting is (k, sharpness)."""

    label = "nearest neighbours"
    settings = [(k, sharpness) for k in NEIGHBOURS for sharpness in SHARPNESS]

    def fit(
        self, features: torch.Tensor, labels: torch.Tensor, num_classes: int, settings: Sequence[tuple[int, float]]
    ) -> list[Score]:
        # Features of one tower have most of their length in common.
        mean = features.mean(dim=0)
        keys = F.normalize(features - mean, dim=1)
        prior = torch.bincount(labels, minlength=num_classes) + 1.0
        prior = PRIOR_SHARE * prior / prior.sum()

        def score(queries: torch.Tensor, k: int, sharpness: float) -> torch.Tensor:
            cosines, rows = (F.normalize(queries - mean, dim=1) @ keys.T).topk(min(k, len(keys)), dim=1)
            votes = (1 - PRIOR_SHARE) * (cosines / sharpness).softmax(dim=1)
            return prior.repeat(len(queries), 1).scatter_add(1, labels[rows], votes).log()

        return [lambda queries, setting=setting: score(queries, *setting) for setting in settings]  # type: ignore[misc]


@dataclass
class ZeroShot(Classifier):
    """Cosines with texts of the classes (C, D), of length 1. Training rows give the temperature alone."""

    texts: torch.Tensor
    label = "names of the classes"
    settings: Sequence[Any] = (100.0,)  # what pairs of encoders are trained with, about

    def fit(
        self, features: torch.Tensor, labels: torch.Tensor, num_classes: int, settings: Sequence[float]
    ) -> list[Score]:
        texts = self.texts.to(features)
        return [lambda rows, scale=scale: scale * F.normalize(rows, dim=1) @ texts.T for scale in settings]  # type: ignore[misc]


def class_texts(
    names: Sequence[str], other_names: Sequence[Sequence[str]], descriptions: Sequence[str]
) -> list[list[str]]:
    """What each class may be called in a text: its names and its description."""
    texts = []
    for place, name in enumerate(names):
        named = [name, *(other_names[place] if other_names else ())]
        described = [descriptions[place]] if descriptions and descriptions[place] else []
        texts.append([f"a photo of {one}." for one in named] + described)
    return texts


def average_texts(encode: Callable[[list[str]], torch.Tensor], texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """The mean of each class's texts, of length 1, (C, D)."""
    encoded = encode([text for of_class in texts for text in of_class])
    means = [part.mean(dim=0) for part in encoded.split([len(of_class) for of_class in texts])]
    return F.normalize(torch.stack(means), dim=-1)


# --- Out of fold ------------------------------------------------------------------------------------------------------


@dataclass
class CrossFit:
    """Probabilities of the training rows, out of fold, and what predicts other rows."""

    out_of_fold: np.ndarray  # (N, C) float32
    setting: Any
    temperature: float
    predict: Callable[[np.ndarray], np.ndarray]  # (n, D) -> (n, C) float32


def cross_fit(
    classifier: Classifier,
    features: np.ndarray,
    labels: Sequence[int],
    fold_of: Sequence[int],
    num_classes: int,
    device: torch.device | str = "cpu",
) -> CrossFit:
    """Fit on `features` (N, D) with folds 0, 1, ..., of which there are three or more."""
    rows, targets = torch.as_tensor(features, device=device), torch.as_tensor(labels, device=device).long()
    folds, num_folds = torch.as_tensor(fold_of, device=device), max(fold_of) + 1
    assert num_folds >= 3  # one is predicted, one chooses, the others train
    probs = np.empty((len(labels), num_classes), np.float32)
    nlls = np.empty((num_folds, len(classifier.settings)))
    temperatures = np.empty_like(nlls)
    for fold in progress(range(num_folds), desc="Folds"):
        chooses, predicted = folds == (fold + 1) % num_folds, folds == fold
        trains = ~(chooses | predicted)
        scores = classifier.fit(rows[trains], targets[trains], num_classes, classifier.settings)
        for number, score in enumerate(scores):
            logits = torch.cat([*_score(score, rows[chooses])])
            temperatures[fold, number], nlls[fold, number] = fit_temperature(logits, targets[chooses])
        best = int(nlls[fold].argmin())
        (score,) = classifier.fit(rows[~predicted], targets[~predicted], num_classes, [classifier.settings[best]])
        probs[predicted.cpu().numpy()] = _probs(score, rows[predicted], temperatures[fold, best])
    # Every fold has chosen once, so these are means over all training rows, out of fold.
    counts = np.bincount(fold_of, minlength=num_folds)
    best = int((counts @ nlls).argmin())
    temperature = float(np.exp(counts @ np.log(temperatures[:, best]) / counts.sum()))
    (score,) = classifier.fit(rows, targets, num_classes, [classifier.settings[best]])

    def predict(others: np.ndarray) -> np.ndarray:
        return _probs(score, torch.as_tensor(others, device=device), temperature)

    return CrossFit(probs, classifier.settings[best], temperature, predict)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The temperature that minimises the mean NLL of softmax(logits / temperature), and that NLL.

    As if there were one more row, whose label is the runner-up: few rows that are all right would else be taken for
    certainty.
    """
    runner_up = logits.topk(2, dim=1).indices[:, 1]
    num_rows = len(labels)

    def nll(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        one_wrong = F.cross_entropy(scaled, runner_up)
        return float((num_rows * F.cross_entropy(scaled, labels) + one_wrong) / (num_rows + 1))

    found = minimize_scalar(nll, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-3})
    return math.exp(found.x), float(found.fun)


def _score(score: Score, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, len(rows), _BLOCK):
        yield score(rows[start : start + _BLOCK])


def _probs(score: Score, rows: torch.Tensor, temperature: float) -> np.ndarray:
    parts = [(logits / temperature).softmax(dim=1).cpu().numpy() for logits in _score(score, rows)]
    return np.concatenate(parts).astype(np.float32)
