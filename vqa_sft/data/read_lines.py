"""The lines of a text file, one in memory at a time, whatever its size. Standard library only."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from vqa_sft.errors import InputError

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
