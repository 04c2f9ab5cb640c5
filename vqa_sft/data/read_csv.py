"""Rows of CSV and TSV files, every cell as text: "007" stays "007", and "None" and "NA" stay words. No torch."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

from vqa_sft.data.find_files import FORMATS
from vqa_sft.data.read_lines import Lines
from vqa_sft.errors import InputError, name_rows

MAX_CELL = 16 * 2**20  # characters; an image in base64 fits
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


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
