"""What a prediction has scored so far, on the disk as it comes: a killed one goes on where it stopped. No torch.

    submission.csv.parts/
      plan.json                what is predicted, and how; of another plan nothing is taken over
      pass0-block0/*.parquet   shards of every process, some seconds each: rows, and what the runs of the pass say
      pass0-block0.parquet     all of a block, in the order of its rows, once it is whole; its shards are gone then
      pass0-block0.rows        of a stream, a digest of the block's rows

A pass is one model over the rows. A block is all of them, or of a stream some ten thousand.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqa_sft.errors import InputError
from vqa_sft.files import whole, write_whole

EVERY_S = 20.0  # between two shards of a process
BLOCK_ROWS = 10_000  # of a stream
BLOCK_COLUMNS = ("id", "answer", "choices", "blanked", "digest")  # of its file, beside what the runs say
PLAN = "plan.json"
OURS = re.compile(r"plan\.json|pass\d+-block\d+|\d+-")  # how the names in the folder begin
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("choice_logits", pa.list_(pa.list_(pa.float32()))),  # of each run
        ("agreement", pa.list_(pa.float32())),
        ("scale_logits", pa.list_(pa.list_(pa.list_(pa.float32())))),
    ]
)


def open_parts(output: Path, plan: dict[str, Any]) -> tuple[Path, bool]:
    """The folder of what is scored for `output`, and whether it holds some of it already. Called by one process.

    What another plan left there, that of another run or of other data, is removed.
    """
    folder = output.with_name(output.name + ".parts")
    text = json.dumps(plan | {"columns of shards": SCHEMA.names}, indent=1, ensure_ascii=False)
    with suppress(OSError, UnicodeDecodeError):
        if (folder / PLAN).read_text(encoding="utf-8") == text:
            return folder, any(folder.glob("*/*.parquet")) or any(folder.glob("*.parquet"))
    if folder.exists() and not (folder.is_dir() and all(OURS.match(path.name) for path in folder.iterdir())):
        raise InputError(f"{folder} is in the way and none of our folders. Move it, or name another --output.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(folder / PLAN, text)
    return folder, False


class Shards:
    """Those of one block, written by this process."""

    def __init__(self, folder: Path, every_s: float | None = None) -> None:
        self.folder, self.every_s = folder, EVERY_S if every_s is None else every_s
        self._waiting: list[tuple] = []
        self._written_s = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        rows: Sequence[int],
        choice_logits: Sequence[Sequence[Sequence[float]]],
        agreement: Sequence[Sequence[float]],
        scale_logits: Sequence[Sequence[Sequence[Sequence[float]]]],
    ) -> None:
        """As in scoring.Scored."""
        self._waiting += zip(rows, choice_logits, agreement, scale_logits, strict=True)
        if time.monotonic() - self._written_s >= self.every_s:
            self.flush()

    def flush(self) -> None:
        """Write what waits, whole or not at all."""
        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            columns = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
            write_table(pa.Table.from_arrays(columns, schema=SCHEMA), self.folder / f"{uuid4().hex}.parquet")
        self._waiting, self._written_s = [], time.monotonic()


def write_table(table: pa.Table, path: Path) -> None:
    with whole(path) as unfinished:
        pq.write_table(table, unfinished)


def read_shards(folder: Path) -> pa.Table:
    """What all processes have written of a block, by row."""
    tables = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            tables.append(pq.read_table(path, schema=SCHEMA))
        except (OSError, pa.ArrowException):  # a machine that lost power; its rows are scored again
            path.unlink()
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    rows = table["row"].to_numpy()
    _, first = np.unique(rows, return_index=True)  # sorted by row
    return table.take(first)


def rows_done(folder: Path) -> set[int]:
    return set(read_shards(folder)["row"].to_pylist())


def finish_block(folder: Path, beside: pa.Table) -> None:
    """One file of all shards of a block and, `beside` them, the columns of its rows in their order. Raises InputError
    where shards are missing, as when processes do not see one disk."""
    table = read_shards(folder)
    if table["row"].to_pylist() != [*range(len(beside))]:
        raise InputError(
            f"{folder} holds {len(table):,} of {len(beside):,} rows: not every process writes where the first one "
            "reads. Give an --output on a disk that all of them see."
        )
    for name in SCHEMA.names[1:]:
        beside = beside.append_column(name, table[name])
    write_table(beside, folder.with_name(folder.name + ".parquet"))
    shutil.rmtree(folder, ignore_errors=True)


def begin_block(folder: Path, rows: str) -> None:
    """Remove what there is of a block of other rows; `rows` tells one from another."""
    known = folder.with_name(folder.name + ".rows")
    if known.is_file() and known.read_text(encoding="utf-8") == rows:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + ".parquet").unlink(missing_ok=True)
    known.write_text(rows, encoding="utf-8")


def is_finished(folder: Path) -> bool:
    """Whether a block stands in one file; a damaged one, of a machine that lost power, is removed and scored again."""
    path = folder.with_name(folder.name + ".parquet")
    try:
        pq.read_table(path)
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException):
        path.unlink()
        return False
    return True


def read_blocks(folder: Path, num_pass: int) -> Iterator[pa.Table]:
    """The whole blocks of a pass, in their order."""
    number = 0
    while (path := folder / f"pass{num_pass}-block{number}.parquet").is_file():
        yield pq.read_table(path)
        number += 1


def join_files(parts: Sequence[Path], output: Path) -> None:
    """One Parquet or text file of several, whole or not at all; they are removed. Texts have one header line each."""
    with whole(output) as unfinished:
        if output.suffix == ".parquet":
            with pq.ParquetWriter(unfinished, pq.read_schema(parts[0])) as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part))
        else:
            with unfinished.open("wb") as file:
                for number, part in enumerate(parts):
                    with part.open("rb") as lines:
                        header = lines.readline()
                        file.write(header if number == 0 else b"")
                        shutil.copyfileobj(lines, file)
    for part in parts:
        part.unlink()
