"""Which rows a run trains on, validates on and leaves out; written to its folder, so that a resumed run keeps them.

No torch. One part a row, in the order of the data, and digests of what the row held:

    part,id,texts,label,images,pool,digest
    train,t_1,6f1c...,9a04...,77e2...,,3b5d...
    left_out,t_2,...      it could not be used, and the recipe said `on_bad_row: skip`
    validation,t_3,...

`label` is of answer and targets, `images` of their content, wherever the files lie; empty with `check_images: false`.
`pool` is of the classes that a training row of a classification draws its candidates from. `digest` tells the row from
others with its id, as in a prediction file.
Of a stream, whose rows nobody counts, one line tells its first rows: `stream,first 100 rows,...`.
"""

import csv
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from vqa_sft.data.digests import digest, digests_of
from vqa_sft.data.duplicates import row_groups
from vqa_sft.data.examples import CLASS, Loaded
from vqa_sft.data.folds import hold_out_rows, read_folds
from vqa_sft.data.options import POOL
from vqa_sft.data.scan import Scan, scan_images
from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import whole
from vqa_sft.images import ImageFacts, digest_of

TRAIN, VALIDATION, LEFT_OUT = "train", "validation", "left_out"
STREAM = "stream"
ROWS = "rows.csv"
DIGESTS = {"texts": "texts", "label": "labels", "images": "images", "pool": "candidates"}  # column -> in words
STREAM_ROWS = 100


def choose_parts(
    loaded: Sequence[Loaded], *, check_images: bool = True, on_bad_row: str = "error", **how: Any
) -> list[list[str] | None]:
    """The part of every row of the training data and, as a second list, of the validation data if there are any.

    Every image is decoded once. Rows that cannot be used raise InputError, all at once, or are left out with
    `on_bad_row` "skip". `how` goes to `held_out`. A stream has no parts.
    """
    parts: list[list[str] | None] = []
    for data in loaded:
        if isinstance(data.examples, datasets.IterableDataset):
            parts.append(None)
            continue
        scan = scan_images(data.examples) if check_images else None
        data.image_digests = _image_digests(scan) if scan is not None else None
        bad = _bad_rows(data, scan, on_bad_row) if scan is not None else set()
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


def _image_digests(scan: Scan) -> list[str]:
    """Of every row's images; those of files that cannot be read count by what is wrong with them."""
    known = [image.digest.hex() if image.digest else image.problem for image in scan.images]
    return [digest([known[number] for number in of_row]) for of_row in scan.of_row]


def _bad_rows(data: Loaded, scan: Scan, on_bad_row: str) -> set[int]:
    scan.add_problems(data.problems, data.examples["id"], data.numbers)
    data.problems.raise_if_any(data.name, on_bad_row)
    numbers = {*data.problems.bad_rows()}
    bad = {row for row, number in enumerate(data.numbers) if number in numbers}
    if bad:
        print(f"{data.name}: left out because they cannot be used:")
        for _, kind, labels in data.problems.errors():
            print(f"  {kind.what}: {name_rows(labels, data.problems.total)}")
    if len(bad) == len(data.examples):
        raise InputError(f"no row of {data.name} can be used.")
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
    """Which rows are validated on. Without a scan, only equal files or bytes count as one image."""
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
    """A scan that opens no image: equal paths or equal bytes are one image."""
    keys: dict[bytes, int] = {}
    of_row = []
    for images in examples["images"]:
        named = (image["path"].encode() if image["bytes"] is None else image["bytes"] for image in images)
        parts = [hashlib.sha256(name).digest() for name in named]
        of_row.append(tuple(keys.setdefault(part, len(keys)) for part in parts))
    return Scan([ImageFacts(None, digest=key) for key in keys], of_row)


def strata_of(examples: datasets.Dataset) -> list[tuple]:
    """What folds are balanced by: the answer or class, the question type and the number of choices of every row."""
    answers = examples[CLASS if CLASS in examples.column_names else "answer"]
    columns = (answers, examples["question_type"], map(len, examples["choices"]))
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


def most_choices(loaded: Sequence[Loaded], parts: Sequence[list[str] | None]) -> int:
    """Of a row that is trained or validated on; of a stream as far as it is known."""
    counts = []
    for data, data_parts in zip(loaded, parts, strict=True):
        if data_parts is None:
            counts.append(data.num_choices)
        else:
            used = zip(data.examples["choices"], data_parts, strict=True)
            counts += [len(choices) for choices, part in used if part != LEFT_OUT]
    return max(counts)


def write_parts(folder: str | Path, loaded: Sequence[Loaded], parts: Sequence[list[str] | None]) -> None:
    """Write rows.csv into a run's folder, whole or not at all."""
    with (
        whole(Path(folder) / ROWS) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("part", "id", *DIGESTS, "digest"))
        for data, data_parts in zip(loaded, parts, strict=True):
            if data_parts is None:
                writer.writerow((STREAM, *_first_rows(data).values(), ""))
                continue
            for part, row, digest in zip(data_parts, _describe_rows(data), digests_of(data.examples), strict=True):
                row["pool"] = row["pool"] if part == TRAIN else ""  # others draw nothing
                writer.writerow((part, *row.values(), digest))


def _describe_rows(data: Loaded) -> Iterator[dict[str, str]]:
    """`id` and `DIGESTS` of every row."""
    columns = [name for name in data.examples.column_names if name != "images"]
    images = data.image_digests or itertools.repeat("")
    names = data.classes.names if data.classes else ()
    for row, of_images in zip(data.examples.select_columns(columns), images, strict=False):
        described = {"id": row["id"], "texts": _texts(row), "label": _label(row), "images": of_images}
        yield described | {"pool": digest([names[place] for place in row[POOL]]) if POOL in row else ""}


def _texts(row: Mapping[str, Any]) -> str:
    return digest([row["question"], row["context"], row["choices"]])


def _label(row: Mapping[str, Any]) -> str:
    # Of a classification the class: it may not be among the candidates, and the answer tells nothing then.
    return digest([row[CLASS]] if CLASS in row else [row["answer"], row.get("targets")])


def _first_rows(data: Loaded) -> dict[str, str]:
    rows = list(itertools.islice(data.examples, STREAM_ROWS))
    texts, labels = ([read(row) for row in rows] for read in (_texts, _label))
    ids = [row["id"] for row in rows]
    said = f"first {len(rows)} rows"
    return {"id": said, "texts": digest([ids, texts]), "label": digest(labels), "images": "", "pool": ""}


def read_parts(
    folder: str | Path,
    loaded: Sequence[Loaded],
    hint: str = "Choose another output_dir, or give --overwrite to start over.",
    part: str | None = None,
) -> list[list[str] | None]:
    """The parts that a run in this folder began with.

    Raises InputError, with the hint, when the data have other rows by now, or rows with other texts, labels or images;
    with `part`, only its rows are compared, and their image files are read. What an earlier version did not write down
    is not compared.
    """
    lines = _read_lines(Path(folder) / ROWS)
    streamed = [line for line in lines if line["part"] == STREAM]
    lines = [line for line in lines if line["part"] != STREAM]
    is_stream = isinstance(loaded[0].examples, datasets.IterableDataset)
    if streamed and is_stream:
        first = _first_rows(loaded[0])
        if any(streamed[0].get(name, "") != first[name] for name in ("id", *DIGESTS)):
            raise InputError(
                f"the {first['id']} of {loaded[0].name} have changed since the run in {folder} began. {hint}"
            )
    tables = [data for data in loaded if not isinstance(data.examples, datasets.IterableDataset)]
    ids = [row_id for data in tables for row_id in data.examples["id"]]
    if [line["id"] for line in lines] != ids:
        raise InputError(
            f"the run in {folder} began with {len(lines):,} rows, and the data have {len(ids):,} or other ids by now. "
            + hint
        )
    rest = iter(lines)
    lines_of = [list(itertools.islice(rest, len(data.examples))) for data in tables]
    pairs = [pair for data, own in zip(tables, lines_of, strict=True) for pair in _pair_rows(data, own, part)]
    _check_same(folder, pairs, hint)
    parts = [[line["part"] for line in own] for own in lines_of]
    return [None, *parts] if is_stream else parts


def _read_lines(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
        if any(line["part"] is None or line["id"] is None or None in line for line in lines):
            raise ValueError("lines of other lengths")
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(
            f"{path}, which says what the run was trained on, cannot be read ({error}). Train it again."
        ) from error
    return lines


def _pair_rows(data: Loaded, lines: list[dict[str, str]], part: str | None) -> Iterator[tuple[dict, dict]]:
    """(line, row as it is now) of every row, or of those of one part."""
    if part is not None:
        compared = [number for number, line in enumerate(lines) if line["part"] == part]
        own = data.examples.select(compared)
        data = replace(data, examples=own, image_digests=[*map(_read_images, own["images"])])
        lines = [lines[number] for number in compared]
    return zip(lines, _describe_rows(data), strict=True)


def _read_images(images: Sequence[dict]) -> str:
    digests = [digest_of(image) for image in images]
    return "" if None in digests else digest(digests)  # who opens it names a file that cannot be read


def _check_same(folder: str | Path, pairs: Sequence[tuple[Mapping[str, str], Mapping[str, str]]], hint: str) -> None:
    """Raises InputError where a row is not as the run's line says."""
    differ = []
    for name, what in DIGESTS.items():
        known = [(line[name], row[name], row["id"]) for line, row in pairs if line.get(name) and row[name]]
        changed = [row_id for before, now, row_id in known if before != now]
        if changed:
            differ.append(f"{what} of {name_rows(changed, len(pairs))}")
    if differ:
        raise InputError(f"the data have changed since the run in {folder} began: {'; '.join(differ)}. {hint}")
