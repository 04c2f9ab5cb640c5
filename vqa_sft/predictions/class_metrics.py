"""Log loss, accuracy, macro F1 and ECE of tables of class probabilities, with bootstrap intervals. No torch.

Every metric is a function of sums over rows, so that a resample is a product of a sparse matrix with how often each row
was drawn.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array

from vqa_sft.data.class_probs import ClassProbs

METRICS = ("accuracy", "top_5", "nll", "macro_f1", "ece")
NUM_BINS = 15  # those of metrics.ece
NUM_RESAMPLES = 1000
_BLOCK = 6_000_000  # counts at a time: 50 MB


def class_metrics(table: ClassProbs) -> dict[str, float]:
    """METRICS of rows that all have a label. Ties go to the class that stands first; NLL is in nats; macro F1 is the
    mean over classes that a row has or is predicted to have; ECE is `metrics.ece`."""
    sums = _columns_of(table).sum(axis=0)[:, None]
    return {name: float(values[0]) for name, values in _of_sums(sums, len(table), len(table.names)).items()}


def with_intervals(table: ClassProbs, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """`class_metrics` and the middle 95% of each over rows resampled with replacement, as `metrics.with_intervals`."""
    resampled = _resample(table, num_resamples, seed)
    return class_metrics(table) | {f"{name}_95": _middle(values) for name, values in resampled.items()}


def differences(
    before: ClassProbs, after: ClassProbs, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """METRICS of `after` minus those of `before`, with the intervals of the same resamples; the rows are the same."""
    was, now = class_metrics(before), class_metrics(after)
    one, other = (_resample(table, num_resamples, seed) for table in (before, after))
    return {name: now[name] - was[name] for name in was} | {
        f"{name}_95": _middle(other[name] - one[name]) for name in one
    }


def losses_of(table: ClassProbs) -> np.ndarray:
    """Negative log-likelihood (N,) of the labels, in nats; as metrics.py, of a probability of 0 a finite one."""
    floor = np.log(np.finfo(np.float32).tiny)
    return -np.maximum(table.log_prob_of(table.labels).astype(np.float64), floor)


def _middle(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def _resample(table: ClassProbs, num_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """METRICS of each resample (R,). The rows drawn depend on nothing but their number."""
    columns = _columns_of(table).T.tocsr()  # (X, N)
    found = [
        _of_sums(columns @ counts, len(table), len(table.names)) for counts in _draws(len(table), num_resamples, seed)
    ]
    return {name: np.concatenate([values[name] for values in found]) for name in METRICS}


def _draws(num_rows: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is in each of some resamples, (N, R)."""
    rng, size = np.random.default_rng(seed), max(1, _BLOCK // num_rows)
    for start in range(0, num_resamples, size):
        counts = np.empty((num_rows, min(size, num_resamples - start)))
        for column in range(counts.shape[1]):
            counts[:, column] = np.bincount(rng.integers(num_rows, size=num_rows), minlength=num_rows)
        yield counts


def _columns_of(table: ClassProbs) -> csr_array:
    """What is summed over rows, (N, 3 + NUM_BINS + 3 C): right, among the first five, loss; confidence minus
    correctness in its bin; and for each class whether the row is rightly it, is predicted to be it, is labelled so."""
    num_rows, num_classes = len(table), len(table.names)
    labels, best = table.labels.astype(np.int64), table.indices[:, 0].astype(np.int64)
    right = best == labels
    confidence = np.exp(table.log_probs[:, 0].astype(np.float64))
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    in_five = (table.indices[:, :5] == labels[:, None]).any(axis=1)
    ones, first = np.ones(num_rows), 3 + NUM_BINS
    entries = [
        (0 * bins, right), (0 * bins + 1, in_five), (0 * bins + 2, losses_of(table)), (3 + bins, confidence - right),
        (first + labels, right), (first + num_classes + best, ones), (first + 2 * num_classes + labels, ones),
    ]  # fmt: skip
    places, values = (np.concatenate(column) for column in zip(*entries, strict=True))
    rows = np.tile(np.arange(num_rows), len(entries))
    return coo_array((values.astype(float), (rows, places)), (num_rows, first + 3 * num_classes)).tocsr()


def _of_sums(sums: np.ndarray, num_rows: int, num_classes: int) -> dict[str, np.ndarray]:
    """METRICS (R,) from the sums (X, R) of `_columns_of` over as many rows."""
    accuracy, top_5, nll = sums[:3] / num_rows
    gaps, by_class = sums[3 : 3 + NUM_BINS], sums[3 + NUM_BINS :].reshape(3, num_classes, -1)
    right, count = by_class[0], by_class[1] + by_class[2]
    f1 = np.divide(2 * right, count, out=np.zeros_like(right), where=count > 0)
    macro_f1 = f1.sum(axis=0) / (count > 0).sum(axis=0)
    values = (accuracy, top_5, nll, macro_f1, np.abs(gaps).sum(axis=0) / num_rows)
    return dict(zip(METRICS, values, strict=True))
