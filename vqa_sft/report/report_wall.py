"""Which rows are shown: lists of rows worth a look, the best first, and how many of each fit. No torch."""

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from vqa_sft.predictions.compare import say_changes
from vqa_sft.predictions.label_errors import suspect
from vqa_sft.report.report_inputs import Inputs


@dataclass(frozen=True)
class Ranked:
    """A list of rows; `note` says what else is known of them."""

    key: str  # in the address of the page
    title: str
    rows: list[int]
    note: str = ""


def rank_rows(inputs: Inputs) -> list[Ranked]:
    """The lists that have rows. Errors and certainty are those of the first input."""
    first, answers = inputs.inputs[0], inputs.answers
    wrong = np.flatnonzero((answers >= 0) & (first.best != answers))
    lists = [
        Ranked("errors", "Most confident errors", _by(-first.confidence[wrong], wrong)),
        Ranked("uncertain", "Least certain", _by(first.uncertainty.margin, np.arange(len(answers)))),
        Ranked("disagree", *_disagreeing(inputs)),
    ]
    lists += [_changed(inputs, place) for place in range(1, len(inputs.inputs))]
    found = suspect(first.predictions)
    likely = [row for row in found.ranked if found.is_likely[row]]
    lists.append(Ranked("labels", "Likely label errors", likely, "If the model was not trained on these rows."))
    leaked = sorted(inputs.in_training, key=inputs.in_training.get)
    lists.append(Ranked("training", "Image in training too", leaked, "The same ones first, then the nearly same."))
    return [ranked for ranked in lists if ranked.rows]


def _by(values: np.ndarray, rows: np.ndarray) -> list[int]:
    """The rows by their values, the lowest first; ties in the order of the data."""
    return rows[np.argsort(values, kind="stable")].tolist()


def _disagreeing(inputs: Inputs) -> tuple[str, list[int]]:
    """Rows whose permutations choose differently in some input, or, of three inputs and more, whose inputs do: of two
    that is a list of its own."""
    shares = [one.agreement for one in inputs.inputs]
    if len(shares) > 2:
        best = np.array([one.best for one in inputs.inputs])  # (M, N)
        shares.append(np.array([np.bincount(column).max() for column in best.T]) / len(best))
    lowest = np.min(shares, axis=0)
    rows = np.flatnonzero(lowest < 1 - 1e-6)
    title = "Inputs or permutations disagree" if len(inputs.inputs) > 2 else "Permutations disagree"
    if "ensemble" in inputs.inputs[0].predictions.metadata:
        title = title.replace("ermutations", "ermutations or runs")
    return title, _by(lowest[rows], rows)


def _changed(inputs: Inputs, place: int) -> Ranked:
    """From the first input to the one in this place: right -> wrong first, then wrong -> right, then the others; each
    by the largest change of a probability."""
    before, after = inputs.inputs[0], inputs.inputs[place]
    answers = inputs.answers
    changed = np.flatnonzero(before.best != after.best)
    sizes = np.array([np.abs(after.probs[row] - before.probs[row]).max() for row in changed])
    kinds = np.where(before.best == answers, 0, np.where(after.best == answers, 1, 2))[changed]
    rows = changed[np.lexsort((-sizes, kinds))].tolist() if len(changed) else []
    known = inputs.answered
    note = say_changes(before.best[known] == answers[known], after.best[known] == answers[known]) if len(known) else ""
    return Ranked(f"changed{place + 1}", f"Changed from 1 to {place + 1}", rows, note)


def choose(lists: Sequence[Ranked], limit: int) -> dict[int, None]:
    """At most `limit` different rows, from every list in turn, so that each has its first ones."""
    chosen: dict[int, None] = {}
    for row in itertools.chain.from_iterable(itertools.zip_longest(*(ranked.rows for ranked in lists))):
        if len(chosen) == limit:
            break
        if row is not None:
            chosen[row] = None
    return chosen


def whole_starts(lists: Sequence[Ranked], chosen: Container[int]) -> dict[str, list[int]]:
    """Of each list the rows before the first that was not chosen: what is shown of it has no holes."""
    return {ranked.key: list(itertools.takewhile(chosen.__contains__, ranked.rows)) for ranked in lists}
