"""A temperature for choice probabilities, fitted on rows whose answers are known. numpy and scipy, no torch.

probabilities = softmax(choice logits / temperature) (Guo et al. 2017, arXiv 1706.04599, section 4.2). It changes no
answer. Above 1 where a model is too sure of itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import OptimizeResult, minimize_scalar

LOW, HIGH = 0.05, 20.0  # what a temperature may be; few rows, all right, would ask for 0


def fit_temperature(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """The temperature at which the NLL of `answers` is lowest; rows may differ in length."""
    return float(np.exp(_fit(logits, answers).x))


def calibrated_nll(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """The lowest NLL, in nats, that a temperature of at least 1, fitted on the same rows, gives: what is lost in ways
    that a temperature cannot mend. Lower ones do not count: a few rows that are all right would ask for 0."""
    return float(min(_fit(logits, answers, low=1.0).fun, _nlls(logits, answers)(0.0)))


def _fit(logits: Sequence[Sequence[float]], answers: Sequence[int], low: float = LOW) -> OptimizeResult:
    # Convex in 1 / temperature, so there is one lowest point in its logarithm too.
    return minimize_scalar(_nlls(logits, answers), bounds=(np.log(low), np.log(HIGH)), method="bounded")


def _nlls(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> Callable[[float], float]:
    """NLL by the logarithm of the temperature."""
    lengths = np.array([len(row) for row in logits])
    is_own = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(is_own.shape, -np.inf)
    padded[is_own] = np.concatenate([np.asarray(row, dtype=np.float64) for row in logits])
    padded -= padded.max(axis=1, keepdims=True)
    of_answer = padded[np.arange(len(padded)), np.asarray(answers)]

    def nll(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(padded * inverse).sum(axis=1)) - of_answer * inverse))

    return nll
