"""Which rows a run trains on, validates on and leaves out; written to its folder, so that a resumed run keeps them.

No torch. One part a row, in the order of the data:

    part,id,digest
    train,t_1,6f1c...
    left_out,t_2,...      its picture could not be used, and the recipe said `on_bad_image: skip`
    validation,t_3,...

`digest` tells the row from others with its id, as in a prediction file; earlier versions wrote none.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from vqa_sft.data import Loaded
from vqa_sft.duplicates import row_groups
from vqa_sft.errors import InputError, name_rows
from vqa_sft.folds import hold_out_rows, read_folds
from vqa_sft.images import Picture
from vqa_sft.predictions import digests_of
from vqa_sft.scan import Scan, scan_pictures

TRAIN, VALIDATION, LEFT_OUT = "train", "validation", "left_out"
ROWS = "rows.csv"


def choose_parts(
    loaded: Sequence[Loaded], *, check_images: bool = True, on_bad_image: str = "error", **how: Any
) -> list[list[str] | None]:
    """The part of every row of the training data and, as a second list, of the validation data if there are any.

    Every picture is decoded once. Rows whose pictures cannot be used raise InputError, all at once, or are left out
    with `on_bad_image` "skip". `how` goes to `held_out`. A stream has no parts.
    """
    parts: list[list[str] | None] = []
    for data in loaded:
        if isinstance(data.examples, datasets.IterableDataset):
            parts.append(None)
            continue
        scan = scan_pictures(data.examples) if check_images else None
        bad = _bad_rows(data, scan, on_bad_image) if scan is not None else set()
        validates = held_out(data, scan, **how) if data is loaded[0] else [True] * len(data.examples)
        parts.append([VALIDATION if yes else TRAIN for yes in validates])
        parts[-1] = [LEFT_OUT if row in bad else part for row, part in enumerate(parts[-1])]
    if parts[0] is not None and TRAIN not in parts[0]:
        raise InputError(f"no row of {loaded[0].name} is left to train on; all are held out or left out.")
    for data, data_parts in zip(loaded, parts, strict=True):
        validates = data is not loaded[0] or how.get("validation_fraction") or how.get("folds_file")
        if data_parts is not None and validates and VALIDATION not in data_parts:
            raise InputError(f"no row of {data.name} is left to validate on; all are trained on or left out.")
    return parts


def _bad_rows(data: Loaded, scan: Scan, on_bad_image: str) -> set[int]:
    scan.add_problems(data.problems, data.examples["id"], data.numbers)
    if on_bad_image == "error":
        data.problems.raise_if_any(data.name)
    bad = {row for row in range(len(data.examples)) if scan.bad(row)}
    if bad:
        print(f"{data.name}: left out because their pictures cannot be used:")
        for _, kind, labels in data.problems.errors():
            print(f"  {kind.what}: {name_rows(labels, data.problems.total)}")
    if len(bad) == len(data.examples):
        raise InputError(f"no row of {data.name} has a picture that can be used.")
    return bad


def held_out(
    data: Loaded,
    scan: Scan | None,
    *,
    validation_fraction: float = 0.0,
    folds_file: str | None = None,
    fold: int | None = None,
    duplicate_distance: int | None = None,
    seed: int = 42,
    limit: int | None = None,
) -> list[bool]:
    """Which rows are validated on. Without a scan, only equal files or bytes count as one picture."""
    if folds_file is not None:
        folds = read_folds(folds_file, data.examples["id"][:], whole=limit is None)
        if fold not in folds:
            named = ", ".join(str(number) for number in sorted(set(folds)))
            raise InputError(f"no row is in fold {fold} of {folds_file}; it has the folds {named}.")
        return [row_fold == fold for row_fold in folds]
    if not validation_fraction:
        return [False] * len(data.examples)
    if scan is None:
        scan, duplicate_distance = _tell_apart(data.examples), None
    groups = row_groups(scan, duplicate_distance)
    return hold_out_rows(strata_of(data.examples), groups, validation_fraction, seed)


def _tell_apart(examples: datasets.Dataset) -> Scan:
    """A scan that opens no picture: equal paths or equal bytes are one picture."""
    keys: dict[bytes, int] = {}
    of_row = []
    for images in examples["images"]:
        named = (image["path"].encode() if image["bytes"] is None else image["bytes"] for image in images)
        parts = [hashlib.sha256(name).digest() for name in named]
        of_row.append(tuple(keys.setdefault(part, len(keys)) for part in parts))
    return Scan([Picture(None, digest=key) for key in keys], of_row)


def strata_of(examples: datasets.Dataset) -> list[tuple]:
    """What folds are balanced by: the answer, the question type and the number of choices of every row."""
    columns = (examples["answer"], examples["question_type"], map(len, examples["choices"]))
    return list(zip(*columns, strict=True))


def select(loaded: Sequence[Loaded], parts: Sequence[list[str] | None], part: str) -> datasets.Dataset | None:
    """The examples of one part, or None; a stream (whose parts are None) is trained on as a whole."""
    for data, data_parts in zip(loaded, parts, strict=True):
        if data_parts is None and part == TRAIN:
            return data.examples
        rows = [row for row, of_row in enumerate(data_parts or []) if of_row == part]
        if rows:
            return data.examples if len(rows) == len(data_parts) else data.examples.select(rows)
    return None


def write_parts(folder: str | Path, loaded: Sequence[Loaded], parts: Sequence[list[str] | None]) -> None:
    """Write rows.csv into a run's folder, whole or not at all."""
    unfinished = Path(folder) / (ROWS + ".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("part", "id", "digest"))
        for data, data_parts in zip(loaded, parts, strict=True):
            if data_parts is not None:
                writer.writerows(zip(data_parts, data.examples["id"], digests_of(data.examples), strict=True))
    unfinished.replace(Path(folder) / ROWS)


def read_parts(
    folder: str | Path,
    loaded: Sequence[Loaded],
    hint: str = "Choose another output_dir, or give --overwrite to start anew.",
) -> list[list[str] | None]:
    """The parts that a run in this folder began with. Raises InputError, with the hint, when the data have other rows
    by now."""
    is_stream = isinstance(loaded[0].examples, datasets.IterableDataset)
    try:
        with (Path(folder) / ROWS).open(newline="", encoding="utf-8") as file:
            lines = [(part, row_id) for part, row_id, *_ in list(csv.reader(file))[1:]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{Path(folder) / ROWS}, which says what the run was trained on, cannot be read ({error}). Train it again."
        ) from error
    loaded = [data for data in loaded if not isinstance(data.examples, datasets.IterableDataset)]
    ids = [row_id for data in loaded for row_id in data.examples["id"]]
    if [row_id for _, row_id in lines] != ids:
        raise InputError(
            f"the run in {folder} began with {len(lines):,} rows, and the data have {len(ids):,} or other ids by now. "
            + hint
        )
    parts = iter(part for part, _ in lines)
    return [None] * is_stream + [[next(parts) for _ in range(len(data.examples))] for data in loaded]
