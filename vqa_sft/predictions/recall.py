"""How often a row's class is among its k most likely ones, and how many candidates follow from it. No torch.

The number K of candidates is the smallest whose recall is within half a point of that of MAX_CANDIDATES, or 99%.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqa_sft.console import table
from vqa_sft.data.class_probs import UNKNOWN_LABEL, ClassProbs

RECALL_AT = (1, 5, 10, 25)
MAX_CANDIDATES = 25  # a letter each, and one for "none of these"
TOLERANCE, ENOUGH = 0.005, 0.99
RULE = (
    f"the smallest number whose recall is within {100 * TOLERANCE:.1f} points of that of {MAX_CANDIDATES}, or "
    f"{ENOUGH:.0%}"
)


@dataclass(frozen=True)
class Recall:
    """Of the rows whose class is known."""

    num_rows: int
    curve: np.ndarray  # curve[k]: recall at k, from 0 to the number of classes that are kept one by one
    log_loss: float

    def at(self, k: int) -> float:
        return float(self.curve[min(k, len(self.curve) - 1)])

    def interval(self, k: int) -> tuple[float, float]:
        """95%, by Wilson (1927)."""
        from scipy.stats import binomtest

        found = binomtest(round(self.at(k) * self.num_rows), self.num_rows).proportion_ci(method="wilson")
        return found.low, found.high

    def as_dict(self) -> dict[str, float]:
        return {str(k): self.at(k) for k in RECALL_AT if k < len(self.curve)}


def measure_recall(probs: ClassProbs) -> Recall | None:
    """None where no row's class is known. A class that is not kept one by one is not found."""
    known = probs.take(np.flatnonzero(probs.labels != UNKNOWN_LABEL))
    if not len(known):
        return None
    is_label = known.indices == known.labels[:, None]
    places = np.where(is_label.any(axis=1), is_label.argmax(axis=1), known.num_kept)
    found = np.bincount(places, minlength=known.num_kept + 1)[: known.num_kept]
    curve = np.concatenate([[0.0], np.cumsum(found) / len(known)])
    return Recall(len(known), curve, float(-known.log_prob_of(known.labels).astype(np.float64).mean()))


def choose_num_candidates(recall: Recall) -> int:
    """K, by the rule above; 2 or more."""
    wanted = min(ENOUGH, recall.at(MAX_CANDIDATES) - TOLERANCE)
    largest = min(MAX_CANDIDATES, len(recall.curve) - 1)
    return next((k for k in range(2, largest) if recall.at(k) >= wanted - 1e-12), largest)


def describe_recall(recalls: Sequence[tuple[str, Recall | None]]) -> str:
    """A table of (rows, recall); of rows without known classes a line instead."""
    lines = [["rows", "number", *(f"recall@{k}" for k in RECALL_AT), "log loss"]]
    for name, recall in recalls:
        if recall is None:
            lines.append([name, "no known classes", *[""] * len(RECALL_AT), ""])
            continue
        cells = []
        for k in RECALL_AT:
            low, high = recall.interval(k)
            cells.append(f"{recall.at(k):.1%} ({low:.1%} to {high:.1%})" if k < len(recall.curve) else "")
        lines.append([name, f"{recall.num_rows:,}", *cells, f"{recall.log_loss:.4f}"])
    return table(lines)
