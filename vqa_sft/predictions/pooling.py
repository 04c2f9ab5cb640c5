"""Pooling several sets of probabilities for the same rows, of models or of image scales. numpy and scipy only.

    experts (M sets, N rows, C choices), 0 where a row has fewer choices; weights (M,), not negative, summing to 1

`mean` pools probabilities (a linear opinion pool), `log` their logarithms (a logarithmic pool: the normalised geometric
mean).
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

TINY = float(np.finfo(np.float32).tiny)


def own_choices(lengths: Sequence[int]) -> np.ndarray:
    """(N, C), true where a row of so many choices has one."""
    return np.arange(max(lengths)) < np.asarray(lengths)[:, None]


def experts_of_scales(scale_logits: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """(S, N, C) from log-probabilities of N rows, of each S lists with a number for each of its choices."""
    is_own = own_choices([len(row[0]) for row in scale_logits])
    experts = np.full((len(scale_logits[0]), *is_own.shape), -np.inf)
    for scale, expert in enumerate(experts):
        expert[is_own] = np.concatenate([row[scale] for row in scale_logits])
    experts = np.exp(experts - experts.max(axis=2, keepdims=True))
    return np.maximum(experts / experts.sum(axis=2, keepdims=True), TINY * is_own)


def log_rows(probs: np.ndarray, lengths: Sequence[int]) -> list[list[float]]:
    """Logarithms of probabilities (N, C), in each row as many as it has choices."""
    return [np.log(row[:length]).tolist() for row, length in zip(probs, lengths, strict=True)]


def pool(experts: np.ndarray, weights: Sequence[float], average: str) -> np.ndarray:
    """Probabilities (N, C) of the experts (M, N, C) together; the weights sum to 1."""
    if average != "log":
        return np.tensordot(np.asarray(weights), experts, axes=1)
    is_own = experts[0] > 0
    logs = np.tensordot(np.asarray(weights), np.log(np.where(is_own, experts, 1.0)), axes=1)
    pooled = np.where(is_own, np.exp(logs - np.where(is_own, logs, -np.inf).max(axis=1, keepdims=True)), 0.0)
    return np.maximum(pooled / pooled.sum(axis=1, keepdims=True), TINY * is_own)


def learn_weights(experts: np.ndarray, answers: Sequence[int], average: str) -> np.ndarray:
    """The weights (M,), not negative and summing to 1, with the lowest NLL of the pool on these rows. Those below a
    millionth are 0."""
    rows, answers = np.arange(len(answers)), np.asarray(answers)
    of_answer = experts[:, rows, answers]  # (M, N)
    logs = np.log(np.where(experts[0] > 0, experts, 1.0)) if average == "log" else None

    def mean_loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        pooled = np.maximum(weights @ of_answer, TINY)
        return -np.log(pooled).mean(), -(of_answer / pooled).mean(axis=1)

    def log_loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        probs = pool(experts, weights, "log")
        slope = probs.copy()
        slope[rows, answers] -= 1
        return -np.log(probs[rows, answers]).mean(), (logs * slope).sum(axis=(1, 2)) / len(rows)

    start = np.full(len(experts), 1 / len(experts))
    how = {"bounds": [(0, 1)] * len(start), "options": {"ftol": 1e-12}}
    how |= {
        "constraints": {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": lambda weights: start * 0 + 1}
    }
    # Both are convex in the weights.
    found = minimize(log_loss if average == "log" else mean_loss, start, jac=True, method="SLSQP", **how).x
    found = np.where(found < 1e-6, 0.0, found)
    return found / found.sum()
