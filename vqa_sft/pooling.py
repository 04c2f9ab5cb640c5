"""Several sets of probabilities for the same rows, of models or of picture scales -> one set. numpy and scipy only.

    experts (M sets, N rows, C choices), 0 where a row has fewer choices; weights (M,), none below 0 and 1 together

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
    experts = np.zeros((len(scale_logits[0]), *is_own.shape))
    for scale, expert in enumerate(experts):
        expert[is_own] = np.maximum(np.exp(np.concatenate([row[scale] for row in scale_logits])), TINY)
    return experts


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
    """The weights (M,), none below 0 and 1 together, with the lowest NLL of the pool on these rows."""
    if average == "log":
        return _learn_log(experts, np.asarray(answers))
    of_answer = experts[:, np.arange(len(answers)), answers]  # (M, N)
    weights = np.full(len(experts), 1 / len(experts))
    # Expectation-maximisation for mixture weights (Dempster, Laird and Rubin 1977): no step raises the NLL, which is
    # convex in the weights.
    for _ in range(5_000):
        shares = weights[:, None] * of_answer
        new = (shares / shares.sum(axis=0)).mean(axis=1)
        if np.abs(new - weights).max() < 1e-9:
            break
        weights = new
    return new


def _learn_log(experts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    is_own, rows = experts[0] > 0, np.arange(len(answers))
    logs = np.log(np.where(is_own, experts, 1.0))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:  # convex
        probs = pool(experts, weights, "log")
        slope = probs.copy()
        slope[rows, answers] -= 1
        return -np.log(probs[rows, answers]).mean(), (logs * slope).sum(axis=(1, 2)) / len(rows)

    start = np.full(len(experts), 1 / len(experts))
    simplex = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": lambda weights: np.ones(len(weights))}
    found = minimize(loss, start, jac=True, method="SLSQP", bounds=[(0, 1)] * len(start), constraints=[simplex]).x
    return np.maximum(found, 0) / np.maximum(found, 0).sum()
