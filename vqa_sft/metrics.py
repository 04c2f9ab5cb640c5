"""Accuracy, NLL and ECE of choice probabilities. numpy only, no torch."""

from collections.abc import Sequence

import numpy as np


def accuracy(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Share of rows whose likeliest choice is the answer; ties go to the first choice. Rows may differ in length."""
    return float(np.mean([int(np.argmax(row)) == answer for row, answer in zip(probs, answers, strict=True)]))


def nll(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Mean negative log-likelihood of the answers, in nats."""
    # A probability that underflowed to 0 would make the mean infinite and hide everything else.
    of_answer = np.array([row[answer] for row, answer in zip(probs, answers, strict=True)])
    return float(-np.log(np.maximum(of_answer, np.finfo(np.float32).tiny)).mean())


def ece(probs: Sequence[Sequence[float]], answers: Sequence[int], num_bins: int = 15) -> float:
    """Expected calibration error with equal-width bins of the top probability (Guo et al. 2017, arXiv 1706.04599)."""
    confidence = np.array([max(row) for row in probs])
    correct = np.array([int(np.argmax(row)) == answer for row, answer in zip(probs, answers, strict=True)])
    # Bins are (low, high]: a confidence of exactly 1 belongs to the last one.
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = [
        (bins == b).mean() * abs(confidence[bins == b].mean() - correct[bins == b].mean())
        for b in range(num_bins)
        if (bins == b).any()
    ]
    return float(sum(gaps))


def softmax(logits: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Probabilities of rows that may differ in length."""
    rows = [np.asarray(row, dtype=np.float64) for row in logits]
    return [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows]


def all_metrics(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, float]:
    return {"accuracy": accuracy(probs, answers), "nll": nll(probs, answers), "ece": ece(probs, answers)}
