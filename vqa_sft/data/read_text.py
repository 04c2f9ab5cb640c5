"""Text files as streams, whatever their size: the rows of several, the rows of a CSV, and lines. Standard library only.

Every cell of a CSV stays text: "007" stays "007", "None" a word.
"""

import csv
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from vqa_sft.data.find_files import FORMATS
from vqa_sft.errors import InputError, name_rows

MAX_CELL = 16 * 2**20  # characters; an image in base64 fits
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

MAX_ROW = 64 * 2**20  # characters of a row: a quote that never closes ends soon


class Lines:
    """The lines of a text file. `held` counts the characters of the row at hand: its reader sets it back to 0."""

    def __init__(self, path: Path, encoding: str) -> None:
        self.path, self.encoding = path, encoding
        self.held = 0

    def __iter__(self) -> Iterator[str]:
        with open_text(self.path, self.encoding) as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_ROW), ""), 1):
                self.held += len(line)
                if self.held >= MAX_ROW:
                    raise InputError(
                        f"{self.path}: the row that ends on line {number} or later is larger than {MAX_ROW // 2**20} "
                        "MiB. Is it a text file, with line breaks and closed quotes?"
                    )
                yield line


def open_text(path: Path, encoding: str) -> TextIO:
    """The file, without a byte order mark and with its own line ends, as `csv` wants it."""
    file = path.open(encoding=encoding, newline="")
    if file.read(1) != "\ufeff":
        file.seek(0)
    return file


def read_files(
    folders: list[str], readers: list[Callable[[], Iterator[dict]]], columns: list[str]
) -> Iterator[tuple[str, dict]]:
    """Every row with all columns in the order of the first file; a key that a JSON object lacks gives None."""
    empty = dict.fromkeys(columns)
    for folder, read in zip(folders, readers, strict=True):
        for row in read():
            yield folder, empty | row


def find_separator(path: Path, encoding: str, usual: str) -> str:
    """The mark that separates most names of the header; spreadsheets in Europe write semicolons into a .csv."""
    header = next((line for line in Lines(path, encoding) if line.strip()), "")
    return max([usual, *SEPARATORS], key=header.count)  # the first of equals


def read_header(path: Path, encoding: str, separator: str) -> list[str]:
    line, header = next(_read_cells(path, encoding, separator), (0, []))
    if not header:
        raise InputError(f"{path} cannot be read as {FORMATS[path.suffix.lower()]}: it is empty.")
    names = [cell.strip() for cell in header]
    if "" in names:
        raise InputError(
            f"{path}: column {names.index('') + 1} has no name (line {line}). Name it or remove it; pandas writes such "
            "a column for its index unless told index=False."
        )
    return names


def read_csv(path: Path, encoding: str, separator: str) -> Iterator[dict]:
    """Every row. Raises InputError at the first that has not as many cells as the header, with all others."""
    names = read_header(path, encoding, separator)
    bad, sizes, total = [], set(), 0
    for line, cells in itertools.islice(_read_cells(path, encoding, separator), 1, None):
        total += 1
        if len(cells) != len(names):
            bad.append(f"on line {line} ({len(cells)} cells)")
            sizes.add("longer" if len(cells) > len(names) else "shorter")
        elif not bad:
            yield dict(zip(names, cells, strict=True))
    if bad:
        raise InputError(
            f"{path} has rows {' and '.join(sorted(sizes))} than its header ({len(names)} cells): "
            f"{name_rows(bad, total)}. Is a comma or a line break in a text that needs quotes?"
        )


def _read_cells(path: Path, encoding: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of the header and every row; blank lines are none."""
    csv.field_size_limit(MAX_CELL)  # of the whole process
    lines = Lines(path, encoding)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    line = 1
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield line, cells
            line = reader.line_num + 1
            lines.held = 0
    except csv.Error as error:
        raise InputError(
            f"{path} cannot be read as {FORMATS[path.suffix.lower()]}: {error}, in the row that begins on line {line}. "
            "Is a quote never closed, or one inside a text not doubled?"
        ) from error
