"""`vqa-sft diff`: the answers that differ between two submissions, or two prediction files. No torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqa_sft.console import table
from vqa_sft.data.cells import read_answer
from vqa_sft.data.columns import USUAL_NAMES
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.predictions.check_file import ANSWERS
from vqa_sft.predictions.ensemble import align
from vqa_sft.predictions.file import Predictions, read_predictions
from vqa_sft.predictions.matched import Rows, as_indices, read_rows
from vqa_sft.predictions.read_submission import describe_columns, order_columns, read_table
from vqa_sft.questions.letters import LETTERS

SHOWN = 20  # ids, and lines of the table


@dataclass
class Answers:
    """Answers of one file as it writes them, by id; `predictions` where it is a prediction file. `answer_format` is
    known where they are taken from probabilities, and `note` says which column is whose."""

    name: str
    by_id: dict[str, str]
    predictions: Predictions | None = None
    answer_format: str | None = None
    note: str | None = None


def read_answers(
    path: str | Path, given: Mapping[str, Any] | None = None, choices: Mapping[str, Sequence[str]] | None = None
) -> Answers:
    """Of a prediction file, letters; of a submission, the cells of its answers, or the most probable choice by columns
    that are named after the choices. `given` names the columns `id` and `answer`.

    Raises InputError where the file is neither.
    """
    if Path(path).suffix == ".parquet":
        predictions = read_predictions(path)
        letters = [LETTERS[best] for best in predictions.best]
        return Answers(str(path), dict(zip(predictions.ids, letters, strict=True)), predictions, "letter")
    columns, rows = read_table(path)
    given = {key: name for key, name in (given or {}).items() if key in ("id", "answer") and name in columns}
    id_name = _find_id_column(path, columns, rows, given.get("id"))
    others = [name for name in columns if name != id_name]
    if not others:
        raise InputError(f"{path} has no answers, only {id_name}.")
    usual = [name for name in others if name.casefold() in USUAL_NAMES["answer"]]
    if "answer" in given:
        usual = [given["answer"]]
    if len(others) == 1 or len(usual) == 1:
        name = (usual or others)[0]
        return Answers(str(path), {row[id_name]: row[name] for row in rows})
    return _most_probable(path, id_name, others, rows, choices or {})


def _find_id_column(path: str | Path, columns: list[str], rows: list[dict[str, str]], given: str | None) -> str:
    """The `given` column if it may hold ids, else one that is named so, else the first with distinct values."""
    unique = [name for name in columns if len({row[name] for row in rows}) == len(rows)]
    if given in unique:
        return given
    usual = [name for name in unique if name.casefold() in USUAL_NAMES["id"]]
    named_id = [name for name in columns if name.casefold() == "id"]
    if named_id and not usual:
        twice = [row_id for row_id, count in Counter(row[named_id[0]] for row in rows).items() if count > 1]
        raise InputError(f"{path}: ids are not unique: {name_rows(twice, len(rows))}.")
    if not unique:
        raise InputError(f"no column of {path} has another value in every row, as ids have: {', '.join(columns)}.")
    return (usual or unique)[0]


def _most_probable(
    path: str | Path,
    id_name: str,
    columns: list[str],
    rows: list[dict[str, str]],
    choices: Mapping[str, Sequence[str]],
) -> Answers:
    """The answers by columns of probabilities."""
    of_rows = [choices[row[id_name]] for row in rows if row[id_name] in choices]
    ordered = order_columns(path, columns, of_rows, max(map(len, of_rows), default=len(columns)))
    if ordered is None:
        raise InputError(
            f"{path}: which of the columns {printable(', '.join(columns))} is the answer? Name it: --columns "
            "'{answer: ...}'. Columns of probabilities are named after the choices (--data tells their texts), their "
            "letters or numbers."
        )
    names, texts = ordered
    try:
        numbers = np.array([[float(row[name]) for name in names] for row in rows])
    except ValueError as error:
        raise InputError(
            f"{path}: {', '.join(columns)} are no probabilities ({error}). One answer column is read."
        ) from error
    bad = [row[id_name] for row, is_finite in zip(rows, np.isfinite(numbers).all(axis=1), strict=True) if not is_finite]
    if bad:
        raise InputError(f"{path}: probabilities are not finite in {name_rows(bad, len(rows))}.")
    best = [(texts or LETTERS)[i] for i in numbers.argmax(axis=1)]
    by_id = {row[id_name]: answer for row, answer in zip(rows, best, strict=True)}
    note = f"{path}: {describe_columns(names, texts)}."
    return Answers(str(path), by_id, None, "text" if texts else "letter", note)


def describe(
    one: str | Path, other: str | Path, *, data: str | Path | None = None, show_all: bool = False, **options: Any
) -> str:
    """`vqa-sft diff`: how many answers changed, from what to what, and in which rows. `options` say how the files
    are read. Raises InputError for files of different rows."""
    given, paths = options.get("columns"), (one, other)
    own = _own_of(paths)
    rows = read_rows(data, own, **options) if data else None
    choices = rows.choices if rows else None
    before, after = (read_answers(path, given, choices) for path in paths)
    for here, there in ((after, before), (before, after)):
        if missing := [row_id for row_id in there.by_id if row_id not in here.by_id]:
            raise InputError(f"{here.name} lacks {name_rows(missing, len(there.by_id))} of {there.name}.")
    if data and rows:
        for file in (before, after):
            digests = file.predictions.digest_of if file.predictions else {}
            rows.check(data, [*file.by_id], digests, file.name)
    _use_one_format(before, after, rows, options.get("answer_format") or (own or {}).get("format"))
    pairs = {row_id: (answer, after.by_id[row_id]) for row_id, answer in before.by_id.items()}
    changed = {row_id: pair for row_id, pair in pairs.items() if pair[0].casefold() != pair[1].casefold()}
    share = len(changed) / len(pairs)
    parts = [file.note for file in (before, after) if file.note]
    parts += [f"{before.name} -> {after.name}: {len(changed):,} of {len(pairs):,} answers changed ({share:.1%})."]
    parts += [
        f"{file.name} was scored with images {file.predictions.images}."
        for file in (before, after)
        if file.predictions and file.predictions.shown
    ]
    if before.predictions and after.predictions:
        parts.append(_compare(before.predictions, after.predictions, (before.name, after.name)))
    if changed:
        parts += [_transitions(list(changed.values())), name_changed(changed, rows, show_all)]
    return "\n\n".join(parts)


def _own_of(paths: Sequence[str | Path]) -> dict[str, Any] | None:
    """How answers are written in the data of the first prediction file among the two."""
    files = [read_predictions(path) for path in paths if Path(path).suffix == ".parquet"]
    return next((file.metadata[ANSWERS] for file in files if file.metadata.get(ANSWERS)), None)


def _use_one_format(before: Answers, after: Answers, rows: Rows | None, answer_format: str | None) -> None:
    """Answers of both files as letters, where the data, the format or their cells allow that; else as they are."""
    if rows or answer_format:
        before.by_id, after.by_id = (_as_letters(file, rows, answer_format) for file in (before, after))
        return
    of_before, of_after = _read_letters(before.by_id), _read_letters(after.by_id)
    if (of_before is None) != (of_after is None):
        name = before.name if of_before is None else after.name
        raise InputError(f"{name} has other answers than letters, which the other file has. Give --data.")
    if of_before and of_after:
        before.by_id, after.by_id = of_before, of_after


def _read_letters(cells: dict[str, str]) -> dict[str, str] | None:
    """Upper-case letters, however they are written; None where some cell is no letter."""
    found = {row_id: read_answer(cell, LETTERS, "letter") for row_id, cell in cells.items()}
    return None if None in found.values() else {row_id: LETTERS[choice] for row_id, choice in found.items()}


def _as_letters(answers: Answers, rows: Rows | None, answer_format: str | None) -> dict[str, str]:
    """Answers in any format as letters of the data's choices."""
    how = answers.answer_format or answer_format
    choices = {row_id: rows.choices[row_id] for row_id in answers.by_id} if rows else None
    if choices is None and how == "letter":  # whose number of choices is unknown
        choices = dict.fromkeys(answers.by_id, LETTERS)
    found = as_indices(answers.by_id, answers.name, "answer", how, choices)
    return {row_id: LETTERS[choice] for row_id, choice in found.items()}


def _transitions(pairs: Sequence[tuple[str, str]]) -> str:
    counts = Counter(pairs).most_common()
    lines = [[printable(one, 40), printable(other, 40), f"{count:,}"] for (one, other), count in counts[:SHOWN]]
    more = f"\n... and {len(counts) - SHOWN:,} other changes" if len(counts) > SHOWN else ""
    return table([["from", "to", "rows"], *lines]) + more


def name_changed(changed: dict[str, tuple[str, str]], rows: Rows | None, show_all: bool) -> str:
    ids = [*changed][: None if show_all else SHOWN]
    more = f"... and {len(changed) - len(ids):,} more: --all" if len(ids) < len(changed) else ""
    if rows is None:
        return "Changed: " + ", ".join(map(printable, ids)) + f" {more}".rstrip()
    lines = []
    for row_id in ids:
        choices = rows.choices[row_id]
        one, other = (f"{letter}. {printable(choices[LETTERS.index(letter)])}" for letter in changed[row_id])
        lines.append(f"{printable(row_id)}  {printable(rows.questions[row_id])}\n    {one} -> {other}")
    if more:
        lines.append(more)
    return "\n".join(lines)


def _compare(before: Predictions, after: Predictions, names: Sequence[str]) -> str:
    """The largest change of a probability; where answers are known, whether there are more right ones."""
    before, after = align([before, after], names)
    changes = [np.abs(q - p) for p, q in zip(before.probs, after.probs, strict=True)]
    row = int(np.argmax([change.max() for change in changes]))
    choice = int(changes[row].argmax())
    p, q = before.probs[row][choice], after.probs[row][choice]
    where = f"choice {LETTERS[choice]} of row {printable(before.ids[row])}"
    said = f"Largest change of a probability: {p:.3f} -> {q:.3f}, {where}." if p != q else "No probability changed."
    rows = [i for i, answer in enumerate(before.answers) if answer is not None]
    if not rows:
        return said
    was, now = ([best[i] == before.answers[i] for i in rows] for best in (before.best, after.best))
    return f"{said}\n{say_changes(was, now)}"


def say_changes(was: Sequence[bool], now: Sequence[bool]) -> str:
    """How many rows with an answer became wrong and right, and McNemar's exact test."""
    lost = sum(a and not b for a, b in zip(was, now, strict=True))
    won = sum(b and not a for a, b in zip(was, now, strict=True))
    # Under no difference each of the rows that only one has right is as likely to be the one's as the other's.
    from scipy.stats import binomtest  # slow to import, and a training imports this file before its first step

    p_value = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return (
        f"Of {len(was):,} rows with an answer: {lost:,} right -> wrong, {won:,} wrong -> right (McNemar's exact test: "
        f"p = {p_value:.3g})."
    )
