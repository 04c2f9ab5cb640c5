"""`vqa-sft check --fix`: a copy of a source without the rows that cannot be used, or that a list of ids leaves out. No
torch.

CSV and TSV become .csv, JSONL and JSON .jsonl, Parquet and what `datasets` holds .parquet. Cells stay as they are, and
so do image paths: in another folder, the copy is read with `image_root`.
"""

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import datasets
import pyarrow.parquet as pq

from vqa_sft.data.examples import Loaded
from vqa_sft.data.find_files import FORMATS, find_files
from vqa_sft.data.problems import Problems
from vqa_sft.data.read_arrow import with_images
from vqa_sft.data.sources import Source
from vqa_sft.errors import InputError, explains, name_rows, printable
from vqa_sft.files import whole

SUFFIXES = {"CSV": ".csv", "TSV": ".csv", "JSONL": ".jsonl", "JSON": ".jsonl", "Parquet": ".parquet"}


def check_copy(path: str, source: str | list[str], image_root: str | None) -> None:
    """Raises InputError when a copy of the source cannot be written to `path`: another suffix, a file in the way."""
    files = find_files([source] if isinstance(source, str) else source)
    suffix = SUFFIXES[FORMATS[files[0].suffix.lower()]] if files else ".parquet"
    if Path(path).suffix.lower() != suffix:
        raise InputError(f"the copy of {source} is written as {suffix}; got --fix {path}.")
    if Path(path).exists():
        raise InputError(f"{path} exists, and nothing is overwritten. Name a new file, or remove it.")
    if not Path(path).parent.is_dir():
        raise InputError(f"there is no folder {Path(path).parent} to write {path} into.")
    if image_root is None and len({file.parent.resolve() for file in files}) > 1:
        raise InputError("the files lie in several folders, and image paths in one copy cannot be relative to all.")


def choose_by_ids(loaded: Loaded, only: str | None, without: str | None) -> set[int]:
    """Numbers of the rows that a copy leaves out: those that the file `only` does not name, or that `without` names, by
    an id a line, as the page of `vqa-sft report` gives them. Raises InputError for ids of other data."""
    file = only or without
    if file is None:
        return set()
    with explains((OSError, ValueError), f"{file} cannot be read as a list of ids"):
        ids = dict.fromkeys(filter(str.strip, Path(file).read_text(encoding="utf-8-sig").split("\n")))
    rows = list(zip(loaded.numbers, loaded.examples["id"], strict=True))
    if missing := [*ids.keys() - {row_id for _, row_id in rows}]:
        raise InputError(
            f"{loaded.name} lacks {name_rows(sorted(missing), len(ids))} of {file}. Name the data of the ids."
        )
    if not ids:
        raise InputError(f"{file} names no row: it holds an id a line. Write some, or leave the option out.")
    return {number for number, row_id in rows if (row_id in ids) == (without is not None)}


def write_copy(path: str, source: Source, left_out: Collection[int]) -> int:
    """Copy the source's rows but for those numbers to a CSV, JSONL or Parquet file, whole or not at all; returns how
    many were copied."""
    left_out = set(left_out)
    write = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[Path(path).suffix.lower()]
    with whole(path) as unfinished:
        num_rows = write(unfinished, source, left_out)
        if not num_rows:
            raise InputError(f"no row of {source.name} can be used, so {path} was not written.")
    return num_rows


def describe_copy(
    path: str,
    num_rows: int,
    source: str | list[str],
    image_root: str | None,
    problems: Problems,
    by_ids: Collection[int] = (),
) -> str:
    """What was copied, what was left out and why, and how the copy finds its images."""
    lines = [f"Wrote {path}: {num_rows:,} rows, {len({*problems.bad_rows(), *by_ids}):,} left out."]
    if by_ids:
        lines.append(f"  by the list of ids ({len(by_ids):,})")
    for _, kind, labels in problems.errors():
        lines.append(f"  {kind.what} ({len(labels):,}): {', '.join(map(printable, labels))}")
    folders = {str(file.parent.resolve()) for file in find_files([source] if isinstance(source, str) else source)}
    if image_root is None and folders and str(Path(path).parent.resolve()) not in folders:
        lines.append(f"Its image paths are as they were: read it with `image_root: {folders.pop()}`.")
    return "\n".join(lines)


def _kept(source: Source, left_out: set[int]) -> Iterator[dict]:
    return (row for number, (_, row) in enumerate(source.rows()) if number not in left_out)


def _write_csv(path: Path, source: Source, left_out: set[int]) -> int:
    num_rows = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        # csv would leave a lone carriage return bare, and read it as the end of the row.
        plain, quoted = (
            csv.writer(file, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        plain.writerow(source.columns)
        for row in _kept(source, left_out):
            cells = [row[name] for name in source.columns]
            (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)
            num_rows += 1
    return num_rows


def _write_jsonl(path: Path, source: Source, left_out: set[int]) -> int:
    num_rows = 0
    # Half a character, which UTF-8 cannot hold, becomes the escape that JSON has for it.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in _kept(source, left_out):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def _write_parquet(path: Path, source: Source, left_out: set[int]) -> int:
    table = source.table.select([row for row in range(len(source.table)) if row not in left_out])
    for name, feature in table.features.items():
        table = table.cast_column(name, with_images(feature, decode=True))
    with pq.ParquetWriter(path, table.features.arrow_schema) as writer:
        for batch in table.with_format("arrow").iter(100):
            # Images of a saved dataset may be files; the copy holds their bytes.
            writer.write_table(datasets.table.embed_table_storage(batch))
    return len(table)
