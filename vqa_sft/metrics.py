"""Accuracy, NLL and ECE of choice probabilities. numpy only, no torch."""

from collections.abc import Sequence

import numpy as np


def accuracy(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Share of rows whose likeliest choice is the answer; ties go to the first choice. Rows may differ in length."""
    return float(np.mean([int(np.argmax(row)) == answer for row, answer in zip(probs, answers, strict=True)]))


def nll(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Mean negative log-likelihood of the answers, in nats."""
    return nll_of(np.array([row[answer] for row, answer in zip(probs, answers, strict=True)]))


def nll_of(of_answer: np.ndarray) -> float:
    """The same from the probabilities of the answers."""
    # A probability that underflowed to 0 would make the mean infinite and hide everything else.
    return float(-np.log(np.maximum(of_answer, np.finfo(np.float32).tiny)).mean())


def ece(probs: Sequence[Sequence[float]], answers: Sequence[int], num_bins: int = 15) -> float:
    """Expected calibration error with equal-width bins of the top probability (Guo et al. 2017, arXiv 1706.04599)."""
    confidence = np.array([max(row) for row in probs])
    correct = np.array([int(np.argmax(row)) == answer for row, answer in zip(probs, answers, strict=True)])
    return ece_of(confidence, correct, num_bins)


def ece_of(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15) -> float:
    """The same from the top probability of each row, and whether that choice is the answer."""
    # Bins are (low, high]: a confidence of exactly 1 belongs to the last one.
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=num_bins)  # sums, of which the means differ so
    return float(np.abs(gaps).sum() / len(confidence))


def softmax(logits: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Probabilities of rows that may differ in length."""
    rows = [np.asarray(row, dtype=np.float64) for row in logits]
    return [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows]


def all_metrics(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, float]:
    return {"accuracy": accuracy(probs, answers), "nll": nll(probs, answers), "ece": ece(probs, answers)}


def bootstrap(
    probs: Sequence[Sequence[float]], answers: Sequence[int], num_resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The middle 95% of every metric over rows drawn anew with replacement (Efron 1979, the percentile interval).

    Rows count as independent; several questions about one picture are not quite.
    """
    rng = np.random.default_rng(seed)
    confidence = np.array([max(row) for row in probs])
    correct = np.array([int(np.argmax(row)) == answer for row, answer in zip(probs, answers, strict=True)])
    of_answer = np.array([row[answer] for row, answer in zip(probs, answers, strict=True)])
    found: dict[str, list[float]] = {"accuracy": [], "nll": [], "ece": []}
    for _ in range(num_resamples):
        rows = rng.integers(len(correct), size=len(correct))
        found["accuracy"].append(float(correct[rows].mean()))
        found["nll"].append(nll_of(of_answer[rows]))
        found["ece"].append(ece_of(confidence[rows], correct[rows]))
    low_high = {name: np.percentile(values, [2.5, 97.5]) for name, values in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in low_high.items()}
