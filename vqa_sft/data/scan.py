"""Every distinct image of a dataset examined once, on all cores; the facts are cached on disk. No torch.

The cache is one SQLite file for all datasets: a second start, a resumed run, or training after `vqa-sft check` decodes
nothing again. A file counts as the same while its path, size and time of change do. Deleting the cache is always safe.
"""

import hashlib
import os
import sqlite3
import sys
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import datasets
import PIL
from huggingface_hub import constants

from vqa_sft.console import progress
from vqa_sft.data.missing_images import describe_missing
from vqa_sft.data.problems import Problems
from vqa_sft.images import ImageFacts, examine

# Count up when the columns, or what `examine` and `make_miniature` find, change; another Pillow may read other files.
TABLE = "images_3"
VERSION = f"{TABLE} {PIL.__version__}"
BLOCK_ROWS = 32
BLOCKS_IN_FLIGHT = 3
BATCH = 512  # images written to the cache at a time


@dataclass
class Scan:
    """The distinct images of a dataset, numbered in the order of rows, and the numbers of each row's images."""

    images: list[ImageFacts] = field(default_factory=list)
    of_row: list[tuple[int, ...]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the images, short, as shown to people
    missing: list[str] = field(default_factory=list)  # paths where there is no file

    def bad(self, row: int) -> tuple[int, ...]:
        """Positions of the row's images that cannot be used."""
        return tuple(i for i, number in enumerate(self.of_row[row]) if self.images[number].problem)

    def take(self, rows: Sequence[int]) -> "Scan":
        """Of these rows, and the images that they have."""
        used = sorted({number for row in rows for number in self.of_row[row]})
        place = {number: i for i, number in enumerate(used)}
        of_row = [tuple(place[number] for number in self.of_row[row]) for row in rows]
        return Scan([self.images[number] for number in used], of_row, [self.names[number] for number in used])

    def add_problems(self, problems: Problems, ids: Sequence[str], rows: Sequence[int] | None = None) -> None:
        """Add what is wrong with every row's images; `rows` are the numbers of the rows in the source."""
        for row, numbers in enumerate(self.of_row):
            names: dict[str, list[str]] = {}
            for number in numbers:
                image = self.images[number]
                for kind in filter(None, (image.problem, *image.findings)):
                    names.setdefault(kind, []).append(self.names[number])
            for kind, found in names.items():
                problems.add(ids[row], row if rows is None else rows[row], kind, ", ".join(filter(None, found)))
        problems.hints["missing_image"] = describe_missing(self.missing)


def scan_images(
    examples: datasets.Dataset, *, hashes: bool = True, cache: bool = True, desc: str = "Reading images"
) -> Scan:
    """Examine every distinct image (same path, or same bytes) of canonical examples once.

    `hashes` asks for what finds near-duplicates (`Image.miniature`), `cache` to use and fill the file on disk.
    """
    scan = Scan()
    stored = Cache(cache_path() if cache else None)
    blocks: deque[list[tuple[bytes | None, ImageFacts | Future]]] = deque()
    # Pillow and hashlib release the GIL, so threads are enough; few blocks in flight keep memory flat.
    with ThreadPoolExecutor(count_cores()) as pool, progress(total=len(examples), desc=desc) as bar:
        for new, num_rows in _read_blocks(examples, scan):
            found = stored.find([key for _, key in new], hashes)
            blocks.append(
                [(key, found.get(key) or pool.submit(examine, image, miniature=hashes)) for image, key in new]
            )
            if len(blocks) > BLOCKS_IN_FLIGHT:
                _collect(blocks.popleft(), scan, stored)
            bar.update(num_rows)
        while blocks:
            _collect(blocks.popleft(), scan, stored)
    stored.close()
    return scan


def cache_path() -> Path:
    return Path(constants.HF_HOME) / "vqa_sft" / "images.sqlite"


def count_cores() -> int:
    """Cores that this process may use; a container or a scheduler may allow it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_blocks(
    examples: datasets.Dataset, scan: Scan
) -> Iterator[tuple[list[tuple[dict[str, object], bytes | None]], int]]:
    """Of every block of rows, the images that no earlier row had, with their keys; fills `of_row` and `names`."""
    numbers: dict[Hashable, int] = {}
    columns = examples.with_format(None).select_columns(["images"])
    for start in range(0, len(columns), BLOCK_ROWS):
        rows = columns[start : start + BLOCK_ROWS]["images"]
        new = []
        for images in rows:
            of_row = []
            for image in images:
                identity = _identify(image)
                if identity not in numbers:
                    numbers[identity] = len(numbers)
                    scan.names.append("/".join(PurePath(image["path"] or "").parts[-2:]))
                    new.append((image, _make_key(image, identity)))
                    if image["bytes"] is None and image["path"] and new[-1][1] is None:
                        scan.missing.append(image["path"])
                of_row.append(numbers[identity])
            scan.of_row.append(tuple(of_row))
        yield new, len(rows)


def _identify(image: dict) -> Hashable:
    if image["bytes"] is None:
        return image["path"]
    # The ending belongs to it: whether the name fits the format is a finding.
    return hashlib.sha256(image["bytes"]).digest(), PurePath(image["path"] or "").suffix.lower()


def _make_key(image: dict, identity: Any) -> bytes | None:
    """The key in the cache, or None for a file that is not there."""
    if image["bytes"] is None:
        try:
            found = os.stat(identity or "")
            identity = (os.path.realpath(identity), found.st_size, found.st_mtime_ns)
        except (OSError, ValueError):
            return None
    return hashlib.sha256(repr((VERSION, identity)).encode(errors="surrogatepass")).digest()


def _collect(block: list[tuple[bytes | None, ImageFacts | Future]], scan: Scan, stored: "Cache") -> None:
    for key, found in block:
        if isinstance(found, Future):
            found = found.result()
            stored.add(key, found)
        scan.images.append(found)


class Cache:
    """Images by key in an SQLite file. Whatever goes wrong with the file, from then on there is no cache."""

    COLUMNS = [column.name for column in fields(ImageFacts)]

    def __init__(self, path: Path | None) -> None:
        self._connection: sqlite3.Connection | None = None
        self._new: list[tuple] = []
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=10)
        except (OSError, sqlite3.Error):
            return
        self._run(f"CREATE TABLE IF NOT EXISTS {TABLE} (key BLOB PRIMARY KEY, {', '.join(self.COLUMNS)})")

    def find(self, keys: Sequence[bytes | None], hashes: bool) -> dict[bytes | None, ImageFacts]:
        """What is known of these keys; with `hashes`, only good images that have a miniature."""
        keys = [key for key in keys if key is not None]
        marks = ", ".join("?" * len(keys))
        found = {}
        for key, *values in self._run(
            f"SELECT key, {', '.join(self.COLUMNS)} FROM {TABLE} WHERE key IN ({marks})", keys
        ):
            facts = dict(zip(self.COLUMNS, values, strict=True))
            facts["findings"] = tuple(map(sys.intern, facts["findings"].split()))
            for name in ("problem", "format"):  # a few words, a hundred thousand times
                facts[name] = facts[name] and sys.intern(facts[name])
            if not hashes:
                facts["miniature"] = None
            if facts["problem"] or facts["miniature"] or not hashes:
                found[key] = ImageFacts(**facts)
        return found

    def add(self, key: bytes | None, image: ImageFacts) -> None:
        # A file that could not be opened may be there the next time.
        if key is not None and image.digest is not None:
            values = [getattr(image, name) for name in self.COLUMNS]
            values[self.COLUMNS.index("findings")] = " ".join(image.findings)
            self._new.append((key, *values))
        if len(self._new) >= BATCH:
            self._write()

    def close(self) -> None:
        self._write()
        if self._connection is not None:
            self._connection.close()

    def _write(self) -> None:
        marks = ", ".join("?" * (1 + len(self.COLUMNS)))
        self._run(f"INSERT OR REPLACE INTO {TABLE} VALUES ({marks})", self._new, many=True)
        self._new = []

    def _run(self, statement: str, values: Sequence = (), many: bool = False) -> list[tuple]:
        if self._connection is None:
            return []
        try:
            with self._connection:  # one transaction
                execute = self._connection.executemany if many else self._connection.execute
                return execute(statement, values).fetchall()
        except sqlite3.Error:
            self._connection = None
            return []
