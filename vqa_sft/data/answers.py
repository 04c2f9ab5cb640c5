"""How a source writes its answers: as a letter, as an index, or as the choice's text. Standard library only."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from vqa_sft.data.cells import read_answer
from vqa_sft.errors import InputError

FORMATS = ("letter", "index_from_0", "index_from_1", "text")
# What test sets write where the answer is not given.
UNKNOWN = ("", "?", "-", "-1", "nan", "none", "null")
# What they write beside these where rows need no answers, unless it is a choice.
PLACEHOLDERS = ("hidden", "unknown", "n/a", "na", "tbd", "todo", "x", "_", "--", "...", "<hidden>", "[hidden]")
# A format is ruled out by so many rows, and this share of them, that it cannot read and another can.
FEWEST, SHARE = 3, 0.01


def is_plain(cell: str, choices: Sequence[str], answer_format: str) -> bool:
    """Whether an answer is a letter, a number or the text of a choice as it stands, and nothing is guessed."""
    if answer_format == "letter":
        return re.fullmatch(r"\(?[A-Za-z][).:]?", cell) is not None
    if answer_format == "text":
        return cell.casefold() in [choice.casefold() for choice in choices]
    return re.fullmatch(r"[0-9]+(\.0)?", cell) is not None


def infer_format(rows: Iterable[tuple[str, Sequence[str]]], may_be_odd: bool = True) -> str:
    """The likeliest of `infer_formats`."""
    return infer_formats(rows, may_be_odd)[0]


def infer_formats(rows: Iterable[tuple[str, Sequence[str]]], may_be_odd: bool = True) -> list[str]:
    """The format in which the (answer, choices) are answers, and others that read all of them as well and mean the same
    choices: 1, 2, 3 of the choices 1, 2, 3 are indices and texts. Cells that are an answer in no format do not count.

    A format is ruled out by three rows and 1% of all that it cannot read and a better one can. Raises InputError, with
    the evidence, while two formats are left that mean other choices: 1, 2, 1 of four may count from 0 or from 1. Where
    no row `may_be_odd`, as in what a program wrote, one row rules a format out.
    """
    fits: Counter[str] = Counter()
    reads_alone: Counter[tuple[str, str]] = Counter()  # (one, other): rows that the first reads and the second does not
    differ: dict[tuple[str, str], tuple[str, Sequence[str], dict[str, int]]] = {}
    num_rows = 0
    for cell, choices in rows:
        readings = {name: index for name in FORMATS if (index := read_answer(cell, choices, name)) is not None}
        num_rows += bool(readings)
        fits.update(readings.keys())
        reads_alone.update((one, other) for one in readings for other in FORMATS if other not in readings)
        for one, other in itertools.combinations(readings, 2):
            if readings[one] != readings[other]:
                differ.setdefault((one, other), (cell, choices, readings))
    enough = _enough(num_rows) if may_be_odd else 1
    left = [
        name
        for name in sorted(FORMATS, key=lambda name: -fits[name])
        if not any(reads_alone[other, name] >= enough and fits[other] > fits[name] for other in FORMATS)
    ]
    evidence = [found for pair, found in differ.items() if {*pair} <= {*left}]
    if not evidence:
        return [left[0], *(name for name in left[1:] if fits[name] == num_rows)]
    left = [name for name in left if fits[name]]
    counts = [f"{name} ({fits[name]:,} of {num_rows:,} rows)" for name in left]
    shown = dict.fromkeys(_show(cell, choices, readings, left) for cell, choices, readings in evidence)
    raise InputError(
        f"the answers can be read as {', '.join(counts[:-1])} and {counts[-1]}: {'; '.join(shown)}. "
        f"Set answer_format to one of {', '.join(left)}."
    )


def _show(cell: str, choices: Sequence[str], readings: dict[str, int], left: Sequence[str]) -> str:
    """One row as the formats that are left read it."""
    means: dict[int, list[str]] = {}
    for name in left:
        if name in readings:
            means.setdefault(readings[name], []).append(name)
    said = " or ".join(f"{index + 1} ({', '.join(names)})" for index, names in means.items())
    return f"answer {cell!r} of {list(choices)!r:.200} is choice {said}"


def find_answer_column(
    names: Sequence[str], rows: Iterable[tuple[Sequence[str], Sequence[str]]], formats: Sequence[str] = FORMATS
) -> str:
    """Which of some columns is the answer; `rows` gives their cells and the choices.

    Columns whose filled cells are answers in one format, but for so few as rule no format out, may be it. The first of
    them is, where all mean the same choices. Raises InputError where two mean others.
    """
    known: Counter[str] = Counter()
    fits: Counter[tuple[str, str]] = Counter()
    agree: Counter[tuple] = Counter()
    differ: dict[tuple, str] = {}
    for cells, choices in rows:
        filled = {name: cell for name, cell in zip(names, cells, strict=True) if cell.casefold() not in UNKNOWN}
        known.update(filled.keys())
        readings = {
            (name, how): index
            for name, cell in filled.items()
            for how in formats
            if (index := read_answer(cell, choices, how)) is not None
        }
        fits.update(readings.keys())
        for pair in itertools.combinations(readings, 2):
            agree[pair] += readings[pair[0]] == readings[pair[1]]
            if readings[pair[0]] != readings[pair[1]]:
                said = " and ".join(f"{name} {filled[name]!r:.60}" for name, _ in pair)
                differ.setdefault(pair, f"{said} of {list(choices)!r:.200}")
    may_be = {
        name: [how for how in formats if fits[name, how] and known[name] - fits[name, how] < _enough(known[name])]
        for name in names
    }
    usable = [name for name in names if may_be[name]]
    for other in usable[1:]:
        pairs = [((usable[0], one), (other, two)) for one in may_be[usable[0]] for two in may_be[other]]
        if not any(agree[pair] and pair not in differ for pair in pairs):
            example = next((f": {differ[pair]}" for pair in pairs if pair in differ), "")
            raise InputError(
                f"{usable[0]} and {other} may both be the answer and mean other choices{example}. Name one in the "
                f"recipe: `columns: {{answer: {usable[0]}}}`."
            )
    return usable[0] if usable else names[0]


def _enough(num_rows: int) -> float:
    """Rows that a format cannot read, to rule it out."""
    return max(FEWEST, SHARE * num_rows)
