"""Reads a submission's CSV: its rows, and which column holds which choice's probability. No torch."""

import re
from collections.abc import Sequence
from pathlib import Path

from vqa_sft.data.sources import open_source
from vqa_sft.errors import InputError, printable
from vqa_sft.questions.letters import LETTERS


def read_table(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Names and rows of a CSV as a submission is one: separated by commas, every cell text."""
    if Path(path).suffix.lower() != ".csv":
        raise InputError(f"a submission is a .csv file; got {path}.")
    opened = open_source(str(path))
    if any("separated by" in note for note in opened.notes):
        raise InputError(f"{opened.notes[0]}, and submissions are written with commas. Convert it.")
    rows = [{name: str(row[name] or "").strip() for name in opened.columns} for _, row in opened.rows()]
    if not rows:
        raise InputError(f"{path} has no rows.")
    return opened.columns, rows


def order_columns(
    path: str | Path, names: Sequence[str], choices: Sequence[Sequence[str]] | None, most: int
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Columns of probabilities in the order of the choices, by their names; None where these name no choices.

    Names are the letters, or count from 0 or 1: then they are places in a row, of which there are at most `most`. Or
    they are the texts of all choices (red, green and blue, in any order in any row), which are returned too. All names
    may have the same prefix and suffix ("option_a", "p1", "prob_red"). Raises InputError where they can be read as
    both.
    """
    counted = [[*LETTERS[:most]], *([str(first + i) for i in range(most)] for first in (0, 1))]
    by_place = next((found for words in counted if (found := _named_after(names, words))), None)
    texts = tuple(dict.fromkeys(text for row in choices or () for text in row))
    by_text = _named_after(names, texts)
    if by_place and by_text:
        text_of = dict(zip(by_text, texts, strict=True))
        if any(list(row) != [text_of[name] for name in by_place[: len(row)]] for row in choices):
            raise InputError(
                f"{path}: the columns {printable(', '.join(names))} may be places or the texts of choices, which stand "
                "in another order in some rows. Rename them, such as option_a, option_b for places."
            )
    if by_place:
        return by_place, ()
    return (by_text, texts) if by_text else None


def _named_after(names: Sequence[str], words: Sequence[str]) -> tuple[str, ...] | None:
    """The names in the order of the words, each a word with the same prefix and suffix; None where they are not. Case
    does not count, nor, if need be, spaces, "_" and "-"."""
    if len(names) != len(words) or not all(words):
        return None
    for plain in (str.casefold, lambda text: re.sub(r"[\s_-]", "", text).casefold()):
        own, wanted = [plain(name.strip()) for name in names], [plain(word.strip()) for word in words]
        if len({*own}) < len(own) or len({*wanted}) < len(wanted):
            continue
        for word in wanted:
            for place in range(len(own[0]) - len(word) + 1):
                if own[0].startswith(word, place):
                    framed = [own[0][:place] + other + own[0][place + len(word) :] for other in wanted]
                    if {*framed} == {*own}:
                        return tuple(names[own.index(name)] for name in framed)
    return None


def describe_columns(names: Sequence[str], texts: Sequence[str]) -> str:
    """Which column is the probability of which choice, for the user."""
    of = [repr(text) for text in texts] or [f"choice {letter}" for letter in LETTERS]
    said = [f"{printable(name, 40)} is that of {printable(text, 40)}" for name, text in zip(names, of, strict=False)]
    return "probabilities by column: " + ", ".join(said)
