"""`vqa-sft score`, `diff` and `uncertainty` of tables of class probabilities. No torch."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqa_sft.console import table
from vqa_sft.data.class_probs import UNKNOWN_LABEL, ClassProbs
from vqa_sft.errors import InputError, printable
from vqa_sft.predictions.class_metrics import METRICS, differences, with_intervals
from vqa_sft.predictions.class_tables import labelled, read_aligned, read_table, with_labels
from vqa_sft.predictions.compare import name_changed, say_changes
from vqa_sft.predictions.metrics import describe
from vqa_sft.predictions.score import split_name
from vqa_sft.predictions.submission import check_table, write_table
from vqa_sft.predictions.uncertainty import COVERAGES, risk_at

NAMES = {"accuracy": "accuracy", "top_5": "top-5", "nll": "log loss", "macro_f1": "macro F1", "ece": "ECE"}
HEADER = ("id", "best", "probability", "margin", "entropy")
SHOWN = 20


def score_classes(items: Sequence[str], answers: str | None = None, **options: Any) -> str:
    """A table of rows and METRICS with 95% intervals, a line for each file; the labels are its own, or those of the
    file of `answers`. Rows without a label do not count, and are counted."""
    lines, notes = [["", "rows", *NAMES.values()]], []
    for item in items:
        name, path = split_name(item)
        read = read_table(path)
        known = labelled(read if answers is None else with_labels(read, name, answers, **options), name)
        if len(known) < len(read):
            notes.append(f"{name}: {len(read) - len(known):,} of {len(read):,} rows have no label and do not count.")
        lines.append([name, f"{len(known):,}", *describe(with_intervals(known), METRICS)])
    return "\n".join([*notes, table(lines)])


def diff_classes(one: str, other: str, *, show_all: bool = False) -> str:
    """How many rows have another class first, from what to what; where labels are known, how log loss and accuracy
    differ, with the intervals of paired resamples, and McNemar's test."""
    before, after = read_aligned([one, other])
    was, now = before.indices[:, 0], after.indices[:, 0]
    changed = np.flatnonzero(was != now)
    share = len(changed) / len(before)
    parts = [f"{one} -> {other}: {len(changed):,} of {len(before):,} rows have another class first ({share:.1%})."]
    known = np.flatnonzero(before.labels != UNKNOWN_LABEL)
    if len(known):
        found = differences(before.take(known), after.take(known))
        lines = [["", "rows", *NAMES.values()], ["difference", f"{len(known):,}", *describe(found, METRICS, sign="+")]]
        labels = before.labels[known]
        parts.append(table(lines))
        parts.append(say_changes((was[known] == labels).tolist(), (now[known] == labels).tolist()))
    if len(changed):
        pairs = Counter(zip(was[changed].tolist(), now[changed].tolist(), strict=True)).most_common()
        lines = [[*(printable(before.names[place], 40) for place in pair), f"{count:,}"] for pair, count in pairs]
        more = f"\n... and {len(lines) - SHOWN:,} other changes" if len(lines) > SHOWN else ""
        parts.append(table([["from", "to", "rows"], *lines[:SHOWN]], left=2) + more)
        parts.append(name_changed({before.ids[row]: ("", "") for row in changed}, None, show_all))
    return "\n\n".join(parts)


def margins(probs: ClassProbs) -> np.ndarray:
    """The first probability minus the second (N,)."""
    first = np.exp(probs.log_probs[:, :2].astype(np.float64))
    return first[:, 0] - (first[:, 1] if probs.num_kept > 1 else np.exp(probs.tail_each))


def entropies(probs: ClassProbs) -> np.ndarray:
    """Entropy (N,) over all classes, in nats."""
    logs, tail = probs.log_probs.astype(np.float64), np.exp(probs.tail.astype(np.float64))
    each = np.where(tail > 0, probs.tail_each, 0)
    return -(np.exp(logs) * logs).sum(axis=1) - tail * each


def describe_uncertainty(
    file: str | Path, *, with_sets: bool = False, output: str | Path | None = None, overwrite: bool = False
) -> str:
    """The least certain rows; where labels are known, the error rates that are left when the most uncertain rows go to
    somebody else. All rows go to `output`. Raises InputError before it writes."""
    if with_sets:
        raise InputError("--coverage is for prediction files: sets of classes are not made of class probabilities.")
    if output is not None:
        check_table(output, HEADER, [file], overwrite)
    probs = read_table(file)
    numbers = np.exp(probs.log_probs[:, 0].astype(np.float64)), margins(probs), entropies(probs)
    best = probs.indices[:, 0]

    def cells(row: int) -> list[str]:
        return [probs.ids[row], probs.names[best[row]], *(f"{values[row]:.6f}" for values in numbers)]

    least = np.argsort(numbers[1], kind="stable")[:SHOWN]
    lines = [["least margin", *HEADER[1:]]]
    lines += [[printable(row[0]), printable(row[1], 40), *row[2:]] for row in map(cells, least)]
    parts = [table(lines, left=2)]
    known = np.flatnonzero(probs.labels != UNKNOWN_LABEL)
    if len(known):
        is_wrong = best[known] != probs.labels[known]
        curves = [risk_at(is_wrong, numbers[1][known]), risk_at(is_wrong, -numbers[2][known])]
        lines = [["coverage", "rows", "error by margin", "error by entropy"]]
        for share in COVERAGES:
            count = max(1, int(np.ceil(share * len(known) - 1e-9)))
            lines.append([f"{share:.0%}", f"{count:,}", *(f"{curve[count - 1]:.4f}" for curve in curves)])
        parts.append(table(lines))
    if output is not None:
        write_table(output, HEADER, map(cells, range(len(probs))))
        parts.append(f"Wrote {len(probs):,} rows to {output}.")
    return "\n\n".join(parts)
