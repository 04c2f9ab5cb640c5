"""The page that `vqa-sft report` writes of class probabilities: metrics, calibration, the most confused classes.

One file that needs nothing else. No torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vqa_sft.data.class_probs import UNKNOWN_LABEL, ClassProbs
from vqa_sft.errors import InputError
from vqa_sft.files import begins_with, check_output, write_whole
from vqa_sft.predictions.class_metrics import METRICS, differences, with_intervals
from vqa_sft.predictions.class_scores import NAMES
from vqa_sft.predictions.class_tables import align_tables, read_table, with_labels
from vqa_sft.predictions.metrics import describe
from vqa_sft.predictions.score import split_name
from vqa_sft.report.page import render
from vqa_sft.report.report_page import PAGE_START
from vqa_sft.report.report_plots import confidences, reliability

NUM_PAIRS = 30


@dataclass(frozen=True)
class Confused:
    """Rows with this label and this prediction, of all with the label, and those the other way round."""

    label: str
    predicted: str
    num_rows: int
    of_label: int
    other_way: int


def most_confused(table: ClassProbs, most: int = NUM_PAIRS) -> list[Confused]:
    """The commonest pairs of a label and another class that is predicted, of rows that all have a label."""
    size = len(table.names)
    pairs = table.labels.astype(np.int64) * size + table.indices[:, 0]
    found, counts = np.unique(pairs, return_counts=True)
    count_of = dict(zip(found.tolist(), counts.tolist(), strict=True))
    of_label = np.bincount(table.labels, minlength=size)
    wrong = [(-count, pair) for pair, count in count_of.items() if pair // size != pair % size]
    return [
        Confused(
            table.names[pair // size],
            table.names[pair % size],
            -count,
            int(of_label[pair // size]),
            count_of.get(pair % size * size + pair // size, 0),
        )
        for count, pair in sorted(wrong)[:most]
    ]


def write_class_report(
    items: Sequence[str], answers: str | None = None, *, output: str | Path = "report.html", **options: Any
) -> str:
    """`vqa-sft report` of class probabilities. Raises InputError before anything is written."""
    names, paths = zip(*map(split_name, items), strict=True)
    kind = "page of `vqa-sft report`"
    check_output(output, suffix=".html", reads=[*paths, answers], is_ours=begins_with(PAGE_START), kind=kind)
    if len({*names}) < len(names):
        raise InputError(f"a file is named twice: {', '.join(names)}. Name each once, as NAME=FILE.")
    tables = align_tables([read_table(path) for path in paths], paths)
    if answers is not None:
        tables = [with_labels(one, name, answers, **options) for one, name in zip(tables, names, strict=True)]
    rows = np.flatnonzero(tables[0].labels != UNKNOWN_LABEL)
    known = [one.take(rows) for one in tables] if len(rows) else []
    page = render(
        "report_classes.html.j2",
        names=names,
        num_rows=len(tables[0]),
        num_classes=len(tables[0].names),
        num_labelled=len(rows),
        metrics=[*NAMES.values()],
        metric_lines=list(_metric_lines(names, known)),
        plots=[plot for name, one in zip(names, tables, strict=True) for plot in _plots(name, one, rows, len(names))],
        confused=[(name, most_confused(one)) for name, one in zip(names, known, strict=False)],
    )
    write_whole(output, PAGE_START + page)
    return f"Wrote {output}: its numbers are of {len(rows):,} rows with a label, of {len(tables[0]):,}."


def _metric_lines(names: Sequence[str], tables: Sequence[ClassProbs]) -> Iterator[list[str]]:
    """As `vqa-sft score` prints them; then how each differs from the first."""
    for name, one in zip(names, tables, strict=False):
        yield [name, f"{len(one):,}", *describe(with_intervals(one), METRICS)]
    for number, one in enumerate(tables[1:], 2):
        yield [f"{number} minus 1", f"{len(one):,}", *describe(differences(tables[0], one), METRICS, sign="+")]


def _plots(name: str, table: ClassProbs, rows: np.ndarray, num_files: int) -> Iterator[tuple[str, Markup]]:
    start = f"{name}: " if num_files > 1 else ""
    confidence = np.exp(table.log_probs[:, 0].astype(np.float64))
    if not len(rows):
        yield f"{start}Confidence: mean {confidence.mean():.3f}", confidences(confidence, None)
        return
    confidence, right = confidence[rows], table.indices[rows, 0] == table.labels[rows]
    wrong = confidence[~right]
    said = f"accuracy {right.mean():.3f}, mean confidence {confidence.mean():.3f}"
    yield f"{start}Reliability: {said}", reliability(confidence, right)
    said = (
        f"{int((wrong > 0.9).sum()):,} of {len(wrong):,} errors are more than 90% sure" if len(wrong) else "no errors"
    )
    yield f"{start}Confidence: {said}", confidences(confidence, right)
