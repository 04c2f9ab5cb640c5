"""A temperature for choice probabilities, fitted on rows whose answers are known. numpy and scipy, no torch.

probabilities = softmax(choice logits / temperature) (Guo et al. 2017, arXiv 1706.04599, section 4.2). It changes no
answer. Above 1 where a model is too sure of itself.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import OptimizeResult, minimize_scalar

LOW, HIGH = 0.05, 20.0  # what a temperature may be; few rows, all right, would ask for 0


def fit_temperature(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """The temperature at which the NLL of `answers` is lowest; rows may differ in length."""
    return float(np.exp(_fit(logits, answers).x))


def calibrated_nll(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """The lowest NLL, in nats, that a temperature fitted on the same rows gives."""
    return float(_fit(logits, answers).fun)


def _fit(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> OptimizeResult:
    lengths = np.array([len(row) for row in logits])
    is_own = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(is_own.shape, -np.inf)
    padded[is_own] = np.concatenate([np.asarray(row, dtype=np.float64) for row in logits])
    padded -= padded.max(axis=1, keepdims=True)
    of_answer = padded[np.arange(len(padded)), np.asarray(answers)]

    def nll(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(padded * inverse).sum(axis=1)) - of_answer * inverse))

    # Convex in 1 / temperature, so there is one lowest point in its logarithm too.
    return minimize_scalar(nll, bounds=(np.log(LOW), np.log(HIGH)), method="bounded")
