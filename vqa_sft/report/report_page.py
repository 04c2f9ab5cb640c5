"""The page that `vqa-sft report` writes: metrics, plots, accuracy by kind of row, and rows that its script filters.

One file that needs nothing else. No torch.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from vqa_sft.data.examples import Loaded
from vqa_sft.errors import InputError, breakdown, safe
from vqa_sft.files import begins_with, check_output, write_whole
from vqa_sft.predictions.ensemble import take
from vqa_sft.predictions.metrics import describe, differences
from vqa_sft.predictions.score import METRICS, score_lines, split_name
from vqa_sft.report.page import read_markup, render
from vqa_sft.report.report_cards import make_cards
from vqa_sft.report.report_groups import make_groups
from vqa_sft.report.report_inputs import Inputs, read_inputs
from vqa_sft.report.report_leakage import add_leakage
from vqa_sft.report.report_plots import make_plots
from vqa_sft.report.report_wall import choose, rank_rows, whole_starts

PAGE_START = "<!DOCTYPE html>\n<!-- Written by vqa-sft report -->\n"
REPORT = "report.html"  # in a run folder


def write_report(
    items: Sequence[str],
    answers: str | None = None,
    data: str | None = None,
    *,
    output: str | Path = "report.html",
    max_rows: int = 1000,
    **options: Any,
) -> str:
    """`vqa-sft report`. Raises InputError before anything is written."""
    if max_rows < 1:
        raise InputError(f"--rows must be at least 1; got {max_rows}.")
    check_output(
        output,
        suffix=".html",
        reads=[*(split_name(item)[1] for item in items), answers, data],
        is_ours=begins_with(PAGE_START),
        kind="page of `vqa-sft report`",
    )
    inputs = read_inputs(items, answers, data, **options)
    add_leakage(inputs)
    return "\n".join([*map(safe, inputs.notes), write_page(output, inputs, max_rows)])


def report_new(folder: str | Path, loaded: Sequence[Loaded] = ()) -> str:
    """`write_report` at the end of a training, into its folder; of the data as they were `loaded`, or else read again.
    Whatever goes wrong is said in one line: the run is whole without a page."""
    path = Path(folder) / REPORT
    try:
        own = [source for source in loaded if isinstance(source.examples, datasets.Dataset)]  # no stream
        return write_report([str(folder)], output=path, own=own)
    except Exception as error:
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        said = breakdown(error) or f"{what}{' '.join(str(error).split())}"
        return safe(f"No page was written: {said} The run is whole. Later: vqa-sft report {folder} --output {path}")


def write_page(path: str | Path, inputs: Inputs, max_rows: int = 1000) -> str:
    """Write the page whole or not at all; says how many of the rows are on it."""
    lists = rank_rows(inputs)
    cards = make_cards(inputs, list(choose(lists, max_rows)))
    starts = whole_starts(lists, cards)
    rank_of: dict[int, list[str]] = {row: [] for row in cards}
    for key, rows in starts.items():
        for rank, row in enumerate(rows):
            rank_of[row].append(f"{key}:{rank}")
    script = read_markup("report_page.js")
    page = render(
        "report_page.html.j2",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        names=[one.name for one in inputs.inputs],
        num_rows=len(inputs.ids),
        num_answered=len(inputs.answered),
        notes=inputs.notes,
        metrics=METRICS,
        metric_lines=list(_metric_lines(inputs)),
        plots=list(make_plots(inputs)),
        groups=make_groups(inputs),
        lists=[(ranked, len(starts[ranked.key])) for ranked in lists],
        types=sorted({*inputs.data.column("question_type")}) if inputs.data else [],
        cards=[(" ".join(rank_of[row]), row, *card) for row, card in sorted(cards.items())],
        id_column=inputs.id_column,
    )
    write_whole(path, PAGE_START + page)
    return f"Wrote {path}: {len(cards):,} of {len(inputs.ids):,} rows are on the page; its numbers are of all."


def _metric_lines(inputs: Inputs) -> Iterator[list[str]]:
    """As `vqa-sft score` prints them, of the rows with an answer; then how each differs from the first."""
    if not len(inputs.answered):
        return
    files = [take(one.predictions, inputs.answered.tolist()) for one in inputs.inputs]
    for one, file in zip(inputs.inputs, files, strict=True):
        yield from score_lines(one.name, file)
    for number, file in enumerate(files[1:], 2):
        found = differences(files[0].probs, file.probs, file.answers)
        yield [f"{number} minus 1", f"{len(file.ids):,}", *describe(found, METRICS, sign="+")]
