"""Accuracy, NLL, Brier score and ECE of choice probabilities. numpy only, no torch.

Not scikit-learn's metrics (1.9): they refuse rows with different numbers of choices, and have no ECE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def accuracy(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Share of rows whose most probable choice is the answer; ties go to the first one. Rows may differ in length."""
    return float(_top_choices(probs, answers)[1].mean())


def nll(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Mean negative log-likelihood of the answers, in nats."""
    return float(losses_of(probs, answers).mean())


def losses_of(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood (N,) of each row's answer, in nats."""
    return minus_log(np.array([row[answer] for row, answer in zip(probs, answers, strict=True)]))


def minus_log(of_answer: np.ndarray) -> np.ndarray:
    """The same from the probabilities of the answers, of any shape."""
    # A probability that underflowed to 0 would make the mean infinite and hide everything else.
    return -np.log(np.maximum(of_answer, np.finfo(np.float32).tiny))


def ece(probs: Sequence[Sequence[float]], answers: Sequence[int], num_bins: int = 15) -> float:
    """Expected calibration error with equal-width bins of the top probability (Guo et al. 2017, arXiv 1706.04599)."""
    return ece_of(*_top_choices(probs, answers), num_bins)


def _top_choices(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The top probability (N,) of each row, and whether that choice is the answer (N,)."""
    correct = [int(np.argmax(row)) == answer for row, answer in zip(probs, answers, strict=True)]
    return np.array([max(row) for row in probs]), np.array(correct)


def ece_of(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15) -> float:
    """The same from the top probability of each row, and whether that choice is the answer."""
    # Bins are (low, high]: a confidence of exactly 1 belongs to the last one.
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=num_bins)  # mean gap x rows of each bin
    return float(np.abs(gaps).sum() / len(confidence))


def ece_equal_mass(probs: Sequence[Sequence[float]], answers: Sequence[int], num_bins: int = 15) -> float:
    """The same with bins of equally many rows, give or take one (Nguyen and O'Connor 2015, arXiv 1508.05154).

    Of equal-width bins the last holds most rows of a sure model. Rows of one top probability stay in their order.
    """
    confidence, correct = _top_choices(probs, answers)
    order = np.argsort(confidence, kind="stable")
    return float(_equal_mass((confidence - correct)[order][None], num_bins)[0])


def _equal_mass(gaps: np.ndarray, num_bins: int = 15) -> np.ndarray:
    """ECE (R,) from confidence minus correctness (R, N), each of the R lines sorted by confidence."""
    num_rows = gaps.shape[1]
    starts = np.unique(np.arange(num_bins) * num_rows // num_bins)  # fewer bins where rows are fewer
    return np.abs(np.add.reduceat(gaps, starts, axis=1)).sum(axis=1) / num_rows


def brier(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """Mean over rows of the squared distance to the answer, summed over choices: 0 to 2 (Brier 1950, Verification of
    forecasts expressed in terms of probability, equation 2)."""
    return float(np.mean([_brier_of(row, answer) for row, answer in zip(probs, answers, strict=True)]))


def _brier_of(row: Sequence[float], answer: int) -> float:
    return float(np.square(row).sum() - 2 * row[answer] + 1)


def softmax(
    logits: Sequence[Sequence[float]], temperature: float = 1.0, bias: Sequence[float] | None = None
) -> list[np.ndarray]:
    """softmax(logits / temperature + bias) of rows that may differ in length: as much of the bias as a row has choices,
    0 for choices beyond it."""
    rows = [np.asarray(row, dtype=np.float64) / temperature for row in logits]
    if bias is not None:
        shift = np.zeros(max(len(bias), *map(len, rows)))
        shift[: len(bias)] = bias
        rows = [row + shift[: len(row)] for row in rows]
    rows = [np.exp(row - row.max()) for row in rows]
    return [row / row.sum() for row in rows]


def all_metrics(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, float]:
    """The metrics of a fold, or of all folds."""
    return {"accuracy": accuracy(probs, answers), "nll": nll(probs, answers), "ece": ece(probs, answers)}


def full_metrics(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, float]:
    """accuracy, nll, brier, ece and ece_equal_mass."""
    functions = (accuracy, nll, brier, ece, ece_equal_mass)
    return {function.__name__: function(probs, answers) for function in functions}


def bootstrap(
    probs: Sequence[Sequence[float]], answers: Sequence[int], num_resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The middle 95% of every one of `full_metrics` over rows resampled with replacement (Efron 1979, the percentile
    interval).

    Rows count as independent, although several questions about one image are not quite. ECE is a mean of absolute
    values: chance alone makes it larger, in a resample even more so, and the interval of a well-calibrated model lies
    high.
    """
    values = _resample(probs, answers, num_resamples, seed)
    return {name: _middle(of_metric) for name, of_metric in values.items()}


def differences(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    answers: Sequence[int],
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every one of `full_metrics` of `after` minus that of `before`, with its interval as in `with_intervals`: the
    middle 95% of the differences over the same resamples, each row with both of its predictions."""
    one, other = (_resample(probs, answers, num_resamples, seed) for probs in (before, after))
    was, now = (full_metrics(probs, answers) for probs in (before, after))
    intervals = {f"{name}_95": [*_middle(other[name] - one[name])] for name in one}
    return {name: now[name] - was[name] for name in was} | intervals


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resample(
    probs: Sequence[Sequence[float]], answers: Sequence[int], num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Every one of `full_metrics` of each resample (R,)."""
    rng = np.random.default_rng(seed)
    confidence, correct = _top_choices(probs, answers)
    # In the order of their confidence, so that sorted ranks are sorted confidences. The rows drawn do not depend on the
    # probabilities, so that before and after may be compared.
    order = np.argsort(confidence, kind="stable")
    rank = np.argsort(order)
    confidence, correct, num_rows, num_bins = confidence[order], correct[order], len(order), 15
    losses = losses_of(probs, answers)[order]
    squares = np.array([_brier_of(row, answer) for row, answer in zip(probs, answers, strict=True)])[order]
    gaps = confidence - correct
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)  # as in ece_of
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("accuracy", "nll", "brier", "ece", "ece_equal_mass")}
    block = max(1, 2_000_000 // num_rows)  # resamples at a time: tens of MiB
    for start in range(0, num_resamples, block):
        drawn = rng.integers(num_rows, size=(min(block, num_resamples - start), num_rows))
        rows = np.sort(rank[drawn], axis=1)  # (R, N)
        places = bins[rows] + num_bins * np.arange(len(rows))[:, None]
        sums = np.bincount(places.ravel(), weights=gaps[rows].ravel(), minlength=num_bins * len(rows))
        found["accuracy"].append(correct[rows].mean(axis=1))
        found["nll"].append(losses[rows].mean(axis=1))
        found["brier"].append(squares[rows].mean(axis=1))
        found["ece"].append(np.abs(sums.reshape(-1, num_bins)).sum(axis=1) / num_rows)
        found["ece_equal_mass"].append(_equal_mass(gaps[rows], num_bins))
    return {name: np.concatenate(values) for name, values in found.items()}


def with_intervals(probs: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, Any]:
    """`full_metrics` and their 95% intervals: {"nll": 0.5, ..., "nll_95": [0.4, 0.6], ...}."""
    intervals = bootstrap(probs, answers)
    return full_metrics(probs, answers) | {f"{name}_95": [*interval] for name, interval in intervals.items()}


def describe(values: Mapping[str, Any], names: Sequence[str], sign: str = "") -> list[str]:
    """Cells of a table from `with_intervals`: "0.5000 [0.400, 0.600]"; from `differences` with the sign "+"."""
    intervals = [values[f"{name}_95"] for name in names]
    return [
        f"{values[name]:{sign}.4f} [{low:{sign}.3f}, {high:{sign}.3f}]"
        for name, (low, high) in zip(names, intervals, strict=True)
    ]
