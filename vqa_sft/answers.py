"""How a source writes its answers: as a letter, as an index, or as the choice's text. Standard library only."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from vqa_sft.errors import InputError
from vqa_sft.mcq import LETTERS

FORMATS = ("letter", "index_from_0", "index_from_1", "text")
# What test sets write where the answer is not given.
UNKNOWN = ("", "?", "-", "-1", "nan", "none", "null")
_LETTER = re.compile(r"\(?([a-z])[).:]?", re.IGNORECASE)
_INDEX = re.compile(r"[0-9]{1,3}(\.0)?")


def read_answer(cell: str, choices: Sequence[str], answer_format: str) -> int | None:
    """The index of the right choice, or None when the cell is no answer in this format.

    Letters count in either case, also as "(b)" or "b."; an index may be written 2.0, as spreadsheets do. A text is
    compared as it is, then without case; of two equal choices it means the first.
    """
    if answer_format == "letter":
        match = _LETTER.fullmatch(cell)
        index = LETTERS.index(match[1].upper()) if match else -1
    elif answer_format == "text":
        folded = [choice.casefold() for choice in choices]
        if cell in choices:
            index = list(choices).index(cell)
        else:
            index = folded.index(cell.casefold()) if cell and cell.casefold() in folded else -1
    else:
        index = int(float(cell)) - (answer_format == "index_from_1") if _INDEX.fullmatch(cell) else -1
    return index if 0 <= index < len(choices) else None


def write_answer(choice: int, choices: Sequence[str], answer_format: str | None, is_upper: bool) -> str:
    """The inverse of `read_answer`, as the source writes its answers."""
    if answer_format == "text":
        return choices[choice]
    if answer_format in ("index_from_0", "index_from_1"):
        return str(choice + (answer_format == "index_from_1"))
    return LETTERS[choice] if is_upper else LETTERS[choice].lower()


def is_upper_case(cells: Iterable[str]) -> bool:
    """Whether most of the letters among the cells are upper case."""
    letters = [match[1] for cell in cells if (match := _LETTER.fullmatch(cell))]
    return sum(letter.isupper() for letter in letters) * 2 > len(letters)


def infer_format(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """The format in which the (answer, choices) are answers; cells that are one in no format do not count.

    Raises InputError, with the evidence, when a second format misses at most twice as many rows as the best and means
    other choices: 1, 2, 1 of four choices may count from 0 or from 1.
    """
    fits: Counter[str] = Counter()
    differ: dict[tuple[str, str], list[str]] = {}
    num_rows = 0
    for cell, choices in rows:
        readings = [(name, read_answer(cell, choices, name)) for name in FORMATS]
        readings = [(name, index) for name, index in readings if index is not None]
        num_rows += bool(readings)
        fits.update(name for name, _ in readings)
        for (one, i), (other, j) in itertools.combinations(readings, 2):
            evidence = differ.setdefault((one, other), [])
            if i != j and len(evidence) < 3:
                evidence.append(f"answer {cell!r} of {list(choices)!r:.200} is choice {i + 1} or {j + 1}")
    misses = {name: num_rows - fits[name] for name in FORMATS}
    best = min(FORMATS, key=misses.__getitem__)
    for pair, evidence in differ.items():
        if evidence and best in pair and max(misses[name] for name in pair) <= 2 * misses[best]:
            counts = " and ".join(f"{name} ({fits[name]:,} of {num_rows:,} rows)" for name in pair)
            raise InputError(
                f"the answers can be read as {counts}: {'; '.join(dict.fromkeys(evidence))}. Set answer_format to one "
                f"of {', '.join(FORMATS)}."
            )
    return best
