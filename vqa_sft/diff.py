"""What changed between two submissions, or two prediction files. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from vqa_sft.answers import infer_format, read_answer
from vqa_sft.columns import USUAL_NAMES
from vqa_sft.ensemble import align
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.mcq import LETTERS
from vqa_sft.metrics import as_table
from vqa_sft.predictions import Predictions, read_predictions
from vqa_sft.submission import by_letter, read_table

SHOWN = 20  # ids, and lines of the table


@dataclass
class Answers:
    """Answers of one file as it writes them, by id; `predictions` where it is a prediction file."""

    name: str
    by_id: dict[str, str]
    predictions: Predictions | None = None


def read_answers(path: str | Path) -> Answers:
    """Of a prediction file, letters; of a submission, the cells of its answers, or the likeliest of its columns of
    probabilities.

    Raises InputError where the file is neither.
    """
    if Path(path).suffix == ".parquet":
        predictions = read_predictions(path)
        letters = [LETTERS[best] for best in predictions.best]
        return Answers(str(path), dict(zip(predictions.ids, letters, strict=True)), predictions)
    columns, rows = read_table(path)
    unique = [name for name in columns if len({row[name] for row in rows}) == len(rows)]
    is_usual = any(name.casefold() in USUAL_NAMES["id"] for name in unique)
    for name in columns:
        if name.casefold() == "id" and not is_usual:
            twice = [row_id for row_id, count in Counter(row[name] for row in rows).items() if count > 1]
            raise InputError(f"{path}: ids stand in it more than once, of {name_rows(twice, len(rows))}.")
    id_name = next((name for name in unique if name.casefold() in USUAL_NAMES["id"]), unique[0] if unique else None)
    if id_name is None:
        raise InputError(f"no column of {path} has another value in every row, as ids have: {', '.join(columns)}.")
    others = [name for name in columns if name != id_name]
    if not others:
        raise InputError(f"{path} has no answers, only {id_name}.")
    usual = [name for name in others if name.casefold() in USUAL_NAMES["answer"]]
    if len(others) == 1 or len(usual) == 1:
        name = (usual or others)[0]
        return Answers(str(path), {row[id_name]: row[name] for row in rows})
    names = by_letter(others)
    try:
        numbers = np.array([[float(row[name]) for name in names] for row in rows])
    except ValueError as error:
        raise InputError(
            f"{path}: {', '.join(others)} are no probabilities ({error}). One answer column is read."
        ) from error
    bad = [row[id_name] for row, is_finite in zip(rows, np.isfinite(numbers).all(axis=1), strict=True) if not is_finite]
    if bad:
        raise InputError(f"{path}: probabilities are no numbers in {name_rows(bad, len(rows))}.")
    best = [LETTERS[i] for i in numbers.argmax(axis=1)]
    return Answers(str(path), {row[id_name]: letter for row, letter in zip(rows, best, strict=True)})


def describe(one: str | Path, other: str | Path, *, data: str | Path | None = None, show_all: bool = False) -> str:
    """`vqa-sft diff`: how many answers changed, from what to what, and where. Raises InputError for other rows."""
    before, after = read_answers(one), read_answers(other)
    for here, there in ((after, before), (before, after)):
        missing = [row_id for row_id in there.by_id if row_id not in here.by_id]
        if missing:
            raise InputError(f"{here.name} lacks {name_rows(missing, len(there.by_id))} of {there.name}.")
    known = _read_data(data, before) if data else {}
    if known:
        before.by_id, after.by_id = (_as_letters(answers, known) for answers in (before, after))
    else:
        letters = [_read_letters(answers.by_id) for answers in (before, after)]
        if (letters[0] is None) != (letters[1] is None):
            name = before.name if letters[0] is None else after.name
            raise InputError(f"{name} has other answers than letters, which the other file has. Give --data.")
        before.by_id, after.by_id = (
            read or answers.by_id for read, answers in zip(letters, (before, after), strict=True)
        )
    pairs = {row_id: (answer, after.by_id[row_id]) for row_id, answer in before.by_id.items()}
    changed = {row_id: pair for row_id, pair in pairs.items() if pair[0].casefold() != pair[1].casefold()}
    share = len(changed) / len(pairs)
    parts = [f"{before.name} -> {after.name}: {len(changed):,} of {len(pairs):,} answers changed ({share:.1%})."]
    if before.predictions and after.predictions:
        parts.append(_compare(before.predictions, after.predictions, (before.name, after.name)))
    if changed:
        parts += [_transitions(changed.values()), _name_changed(changed, known, show_all)]
    return "\n\n".join(parts)


def _read_data(data: str | Path, answers: Answers) -> dict[str, tuple[str, list[str]]]:
    """Question and choices of every row that has an answer."""
    from vqa_sft.data import read_examples

    examples = read_examples(str(data), split="test", answers="optional").examples
    known = dict(zip(examples["id"], zip(examples["question"], examples["choices"], strict=True), strict=True))
    missing = [row_id for row_id in answers.by_id if row_id not in known]
    if missing:
        raise InputError(f"{data} lacks {name_rows(missing, len(answers.by_id))}. Give the data of these answers.")
    return known


def _read_letters(cells: dict[str, str]) -> dict[str, str] | None:
    """Upper-case letters, however they are written; None where some answer is none."""
    found = {row_id: read_answer(cell, LETTERS, "letter") for row_id, cell in cells.items()}
    return None if None in found.values() else {row_id: LETTERS[choice] for row_id, choice in found.items()}


def _as_letters(answers: Answers, known: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """Answers in any format as letters of the data's choices."""
    cells = [(cell, known[row_id][1]) for row_id, cell in answers.by_id.items()]
    how = "letter" if answers.predictions else infer_format(cells)
    found = {row_id: read_answer(cell, known[row_id][1], how) for row_id, cell in answers.by_id.items()}
    bad = [row_id for row_id, choice in found.items() if choice is None]
    if bad:
        raise InputError(f"{answers.name}: the answer is none of the choices ({how}) in {name_rows(bad, len(found))}.")
    return {row_id: LETTERS[choice] for row_id, choice in found.items() if choice is not None}


def _transitions(pairs: Sequence[tuple[str, str]]) -> str:
    counts = Counter(pairs).most_common()
    lines = [[printable(one, 40), printable(other, 40), f"{count:,}"] for (one, other), count in counts[:SHOWN]]
    more = f"\n... and {len(counts) - SHOWN:,} other changes" if len(counts) > SHOWN else ""
    return as_table([["from", "to", "rows"], *lines]) + more


def _name_changed(changed: dict[str, tuple[str, str]], known: dict, show_all: bool) -> str:
    ids = [*changed][: None if show_all else SHOWN]
    more = f"... and {len(changed) - len(ids):,} more: --all" if len(ids) < len(changed) else ""
    if not known:
        return "Changed: " + ", ".join(map(printable, ids)) + f" {more}".rstrip()
    lines = []
    for row_id in ids:
        question, choices = known[row_id]
        one, other = (f"{letter}. {printable(choices[LETTERS.index(letter)])}" for letter in changed[row_id])
        lines.append(f"{printable(row_id)}  {printable(question)}\n    {one} -> {other}")
    return "\n".join([*lines, *[more] * bool(more)])


def _compare(before: Predictions, after: Predictions, names: Sequence[str]) -> str:
    """The largest change of a probability; where answers are known, whether the changes are for the better."""
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
    lost = sum(a and not b for a, b in zip(was, now, strict=True))
    won = sum(b and not a for a, b in zip(was, now, strict=True))
    # Under no difference each of the rows that only one has right is as likely to be the one's as the other's.
    p_value = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return (
        f"{said}\nOf {len(rows):,} rows with an answer: {lost:,} right -> wrong, {won:,} wrong -> right (McNemar's "
        f"exact test: p = {p_value:.3g})."
    )
