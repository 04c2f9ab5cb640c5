"""The candidates of a classification's rows: the classes that a row's choices name. No torch.

A file of class probabilities says which classes are likely. The K most likely ones are the choices of a row, and so
many more may be drawn in training (batch/draw_candidates.py):

    class_index    classes of the file      candidates    choices             answer    pool
    9              7 2 9 4 5 ...            7 2 9         Kia, Opel, BMW      2         7 2 9 4 5 1
    3              5 7 2 1 4 ...            5 7 2         Fiat, Kia, Opel     None      5 7 2 1 4 9

With NONE_OF_THESE a further choice comes last, and is the answer of the second row. A label is never shown where it is
not among them, but in training, by `settle_absent`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from vqa_sft.data.class_probs import NONE_OF_THESE, UNKNOWN_LABEL, ClassProbs
from vqa_sft.data.classes import Classes
from vqa_sft.data.digests import digests_of
from vqa_sft.data.options import CANDIDATES, CLASS, POOL, ReadOptions
from vqa_sft.data.problems import Problems
from vqa_sft.data.read_class_probs_table import reorder
from vqa_sft.errors import InputError, name_rows, printable, safe
from vqa_sft.questions.letters import LETTERS

NUM_CANDIDATES = 10  # where neither the recipe nor the file says
ABSENT = ("insert", "drop", "none_of_these")
_CHOICES = datasets.List(datasets.Value("string"))
_CLASSES = datasets.List(datasets.Value("int32"))


@dataclass(frozen=True)
class Candidates:
    """A file of candidates in the classes of the rows. `pool` (N, P) are class indices, the most likely first."""

    path: str
    ids: dict[str, int]  # row id -> its place
    digests: list[str | None]  # empty: unknown
    labels: np.ndarray  # (N,), UNKNOWN_LABEL for none
    pool: np.ndarray
    num: int  # K of them are shown
    source: str  # for the user
    is_out_of_fold: bool


def classes_in(probs: ClassProbs, path: str) -> Classes:
    """The classes of a file of candidates, for rows that name no list of their own."""
    return Classes(probs.names, f"{path} (its classes)")


def settle_candidates(probs: ClassProbs, classes: Classes, options: ReadOptions) -> Candidates:
    """The file that `options` name, in the classes of the rows. Raises InputError where it has other classes, or fewer
    for each row than are wanted."""
    path, metadata = str(options.candidates), probs.metadata
    probs = reorder(path, probs, classes)
    wanted = options.num_candidates or metadata.get("num_candidates") or NUM_CANDIDATES
    if type(wanted) is not int or wanted < 2:
        raise InputError(f"{path} is damaged: num_candidates in its metadata is {printable(repr(wanted))}.")
    num = min(wanted, len(classes))
    if num + (options.none_of_these is not None) > len(LETTERS):
        raise InputError(f"num_candidates: {num} classes and {options.none_of_these!r} are more than 26 choices.")
    if options.none_of_these is not None and classes.find(options.none_of_these) is not None:
        raise InputError(f"absent: none_of_these adds {options.none_of_these!r}, which is a class. Choose another.")
    kept = probs.num_kept
    if kept < num:
        raise InputError(f"{path} has {kept} classes of each row, fewer than num_candidates {num}. Set it to {kept}.")
    pool = min(options.candidate_pool or min(2 * num, kept), len(classes))
    if not num <= pool <= kept:
        raise InputError(
            f"candidate_pool {pool}: a row shows {num} of them, and {path} has {kept} classes of each. Set it to a "
            f"number from {num} to {kept}."
        )
    said = str(metadata.get("source") or Path(path).name)
    of = {row_id: place for place, row_id in enumerate(probs.ids)}
    shown = probs.indices[:, :pool]
    return Candidates(path, of, probs.digests, probs.labels, shown, num, said, metadata.get("out_of_fold") is True)


def join_candidates(
    examples: datasets.Dataset,
    numbers: Sequence[int],
    problems: Problems,
    classes: Classes,
    options: ReadOptions,
    probs: ClassProbs,
) -> tuple[datasets.Dataset, str, list[str]]:
    """The examples with `candidates`, `pool`, `choices` and `answer`; where the candidates are from, and notes.

    A row without candidates is a problem. Raises InputError where the file is of other classes or of other rows.
    """
    found = settle_candidates(probs, classes, options)
    ids, labels = examples["id"][:], examples[CLASS][:]
    rows = [found.ids.get(row_id) for row_id in ids]
    for row_id, number, row in zip(ids, numbers, rows, strict=True):
        if row is None:
            problems.add(row_id, number, "no_candidates")
    problems.hints["no_candidates"] = safe(f"They are from {found.path}.")
    _check_digests(examples, ids, rows, found)
    pools = [[] if row is None else found.pool[row].tolist() for row in rows]
    shown = [pool[: found.num] for pool in pools]
    names = [[classes.names[place] for place in of_row] for of_row in shown]
    if options.none_of_these is not None:
        shown = [[*of_row, NONE_OF_THESE] if of_row else [] for of_row in shown]
        names = [[*of_row, options.none_of_these] if of_row else [] for of_row in names]
    answers = [_answer(label, of_row) for label, of_row in zip(labels, shown, strict=True)]
    columns: list[tuple[str, Sequence, Any]] = [
        ("choices", names, _CHOICES),
        ("answer", answers, datasets.Value("int64")),
    ]
    joined = _with_columns(examples, [*columns, (CANDIDATES, shown, _CLASSES), (POOL, pools, _CLASSES)])
    notes = _describe(found, ids, labels, rows, options)
    return joined, found.source, notes


def _answer(label: int | None, candidates: Sequence[int]) -> int | None:
    """The place of the label among the candidates; where it is not, that of NONE_OF_THESE, or None."""
    place = label if label in candidates else NONE_OF_THESE
    return candidates.index(place) if label is not None and place in candidates else None


def _check_digests(
    examples: datasets.Dataset, ids: Sequence[str], rows: Sequence[int | None], found: Candidates
) -> None:
    """Raises InputError where the file has other rows under the ids, as far as it knows which they are."""
    if not found.digests:
        return
    pairs = zip(ids, rows, digests_of(examples), strict=True)
    differ = [row_id for row_id, row, own in pairs if row is not None and found.digests[row] not in (None, own)]
    if differ:
        raise InputError(
            f"{found.path} has candidates of other rows under these ids: {name_rows(differ, len(ids))} have another "
            "question or image there. Make them again from these rows: `vqa-sft candidates`."
        )


def _describe(
    found: Candidates,
    ids: Sequence[str],
    labels: Sequence[int | None],
    rows: Sequence[int | None],
    options: ReadOptions,
) -> list[str]:
    """How often the label is among the candidates, and what looks like a mistake."""
    of = "candidate" if found.num == 1 else "candidates"
    said = f"{found.path}: {found.num} {of} a row, by {found.source}"
    known = [(label, row) for label, row in zip(labels, rows, strict=True) if label is not None and row is not None]
    notes = []
    if known:
        share = np.mean([label in found.pool[row, : found.num] for label, row in known])
        said += f"; the class of {share:.2%} of {len(known):,} rows is among them"
        if differ := sum(found.labels[row] not in (UNKNOWN_LABEL, label) for label, row in known):
            notes.append(f"{found.path}: {differ:,} of {len(known):,} rows had another class when it was made")
    if options.answers == "required" and options.trained is None and not found.is_out_of_fold:
        notes.append(
            f"Beware: {found.path} does not say that it is out of fold. Candidates of training rows must come from a "
            "classifier that has not seen them, as those of `vqa-sft candidates` do: else it looks better than it is."
        )
    return [safe(note) for note in (said, *notes)]


def settle_absent(
    examples: datasets.Dataset, rows: Sequence[int], absent: str, classes: Classes
) -> tuple[datasets.Dataset, list[int], list[str]]:
    """The examples of which the `rows` are trained on, those of the rows that are, and a note, for rows whose class is
    not among their candidates.

    "insert": it takes the place of the last candidate. "drop": the rows are left out. With "none_of_these" they have an
    answer already. Raises InputError where no row is left.
    """
    answers, ids = examples["answer"][:], examples["id"]
    without = [row for row in rows if answers[row] is None]
    if not without or absent == "none_of_these":
        return examples, [*rows], []
    if absent == "drop":
        left = sorted({*rows} - {*without})
        if not left:
            raise InputError("absent: drop leaves no training row: no class is among its candidates.")
        said = name_rows([ids[row] for row in without], len(rows))
        return examples, left, [f"absent: drop: not trained on, for their class is no candidate: {said}"]
    labels = examples[CLASS][:]
    columns = {name: examples[name][:] for name in ("choices", CANDIDATES, POOL)}
    for row in without:
        columns["choices"][row][-1], columns[CANDIDATES][row][-1] = classes.names[labels[row]], labels[row]
        if labels[row] not in columns[POOL][row]:
            columns[POOL][row][-1] = labels[row]
        answers[row] = len(columns[CANDIDATES][row]) - 1
    kinds = examples.features
    changed = _with_columns(examples, [(name, of, kinds[name]) for name, of in (columns | {"answer": answers}).items()])
    said = f"absent: insert: the class takes the last candidate's place in {len(without):,} of {len(rows):,} rows"
    return changed, [*rows], [said]


def _with_columns(examples: datasets.Dataset, columns: Sequence[tuple[str, Sequence, Any]]) -> datasets.Dataset:
    """The examples with columns that are new or take the place of others: (name, values, feature)."""
    order = dict.fromkeys([*examples.column_names, *(name for name, _, _ in columns)])
    examples = examples.remove_columns([name for name, _, _ in columns if name in examples.column_names])
    for name, values, feature in columns:
        examples = examples.add_column(name, values, feature=feature)
    return examples.select_columns([*order])
