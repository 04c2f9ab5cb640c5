"""Any classifier's probabilities of classes, as `ClassProbs` in the order of a list of classes. No torch.

    probs.parquet   a file of class probabilities (class_probs.py), by its metadata
    probs.parquet   a wide table: a column of ids, and one column a class
    probs.csv, .tsv the same as text
    probs.npz       arrays `ids` (N,), `classes` (C,) and `probs` (N, C)

Classes are matched by name, other names count, and the order of columns does not. Tables and texts are read some
thousand rows at a time: 100,000 rows of 1,000 classes are half a GB in single precision.
"""

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from vqa_sft.data.class_probs import (
    UNKNOWN_LABEL,
    ClassProbs,
    check_probs,
    is_class_probs,
    keep_likely,
    read_class_probs,
)
from vqa_sft.data.classes import Classes, class_name
from vqa_sft.data.columns import USUAL_NAMES, find_usual
from vqa_sft.data.digests import digests_of
from vqa_sft.data.find_encoding import find_encoding
from vqa_sft.data.find_files import quote
from vqa_sft.data.options import CLASS
from vqa_sft.data.read_text import find_separator, read_header
from vqa_sft.errors import InputError, name_rows, printable

Part = tuple[list[str], np.ndarray]  # ids, probabilities (rows, columns of the file)
_ROWS = 4_096  # of a part
_BLOCK_BYTES = 32 * 2**20  # of text; a row of 1,000 classes takes about 10 KB
_ARRAYS = ("ids", "classes", "probs")
_LAYOUT = "Give a table with a column of ids and one column a class, named as the class is."


def read_any_class_probs(path: str | Path, classes: Classes | None) -> ClassProbs:
    """The file's rows in its order, its classes in the order of `classes`; None: the file's own.

    Raises InputError for a file of no such kind, classes that one side lacks, a class or an id that is there twice, and
    numbers that are no probabilities.
    """
    if not Path(path).is_file():
        raise InputError(f"no such file of probabilities: {path}.")
    if is_class_probs(path):
        probs = read_class_probs(path)
        return probs if classes is None else reorder(path, probs, classes)
    readers = {".parquet": _open_parquet, ".csv": _open_text, ".tsv": _open_text, ".npz": _open_arrays}
    suffix = Path(path).suffix.lower()
    if suffix not in readers:
        raise InputError(f"probabilities are read from {', '.join(readers)}; got {path}.")
    names, parts = readers[suffix](Path(path), classes)
    known = classes or Classes(tuple(map(class_name, names)), str(path))
    place_of = _match(path, names, known)  # of each class in the file
    kept = []
    for ids, probs in parts:
        probs = probs[:, place_of]
        _check_scale(path, probs)
        check_probs(ids, probs, str(path))
        kept.append(keep_likely(ids, known.names, probs, source=str(path)))
    if not kept:
        raise InputError(f"{path} has no rows.")
    return _join(path, kept)


def of_rows(path: str | Path, probs: ClassProbs, examples: datasets.Dataset) -> ClassProbs:
    """The probabilities of these rows in their order, matched by id, with their labels and digests.

    Raises InputError where the file lacks rows, or knows a row by another digest or label: it is of other data.
    """
    ids, labels, digests = examples["id"][:], labels_of(examples), digests_of(examples)
    place_of = {row_id: place for place, row_id in enumerate(probs.ids)}
    if missing := [row_id for row_id in ids if row_id not in place_of]:
        raise InputError(
            f"{path} lacks {name_rows(missing, len(ids))}; it has {len(probs):,} rows, such as "
            f"{printable(probs.ids[0])}. Give the probabilities of these rows, with their ids."
        )
    found = probs.take([place_of[row_id] for row_id in ids])
    known = (found.labels != UNKNOWN_LABEL) & (labels != UNKNOWN_LABEL)
    pairs = zip(found.digests or digests, digests, strict=True)
    for what, differ in (
        ("question or images", np.array([theirs not in (None, own) for theirs, own in pairs])),
        ("class", known & (found.labels != labels)),
    ):
        if differ.any():
            rows = [ids[row] for row in np.flatnonzero(differ)]
            raise InputError(f"{path} is of other data: another {what} in {name_rows(rows, len(ids))}. Make it again.")
    return replace(found, labels=np.where(known, found.labels, labels), digests=digests)


def labels_of(examples: datasets.Dataset) -> np.ndarray:
    """The class of each row, UNKNOWN_LABEL for none, (N,)."""
    return np.array([UNKNOWN_LABEL if place is None else place for place in examples[CLASS][:]], np.int32)


def _match(path: str | Path, names: Sequence[str], classes: Classes) -> list[int]:
    """Where in the file each class is."""
    found = [classes.find(name) for name in names]
    unknown = [name for name, place in zip(names, found, strict=True) if place is None]
    if unknown:
        meant = [(name, classes.likely(name)) for name in unknown[:5]]
        hints = "; ".join(f"is {printable(other)!r} meant by {printable(name)!r}?" for name, other in meant if other)
        raise InputError(
            f"{path} has {len(unknown):,} names that are no class of {classes.source}: {quote(unknown)}. "
            f"{hints[:1].upper()}{hints[1:]}{' ' if hints else ''}Rename them, or leave them out."
        )
    twice = [name for name, place in zip(names, found, strict=True) if found.count(place) > 1]
    if twice:
        raise InputError(f"{path} has several columns for one class: {quote(twice)}. Keep one of each.")
    place_of = {place: column for column, place in enumerate(found)}
    missing = [name for place, name in enumerate(classes.names) if place not in place_of]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing):,} of the {len(classes):,} classes of {classes.source}: {quote(missing)}. "
            "Give every class a column; 0 is a probability too."
        )
    return [place_of[place] for place in range(len(classes))]


def reorder(path: str | Path, probs: ClassProbs, classes: Classes) -> ClassProbs:
    """The same with the classes in the order of `classes`. Raises InputError where one side lacks some."""
    return probs.in_classes(classes.names, np.argsort(_match(path, probs.names, classes)))


def _join(path: str | Path, parts: Sequence[ClassProbs]) -> ClassProbs:
    ids = [row_id for part in parts for row_id in part.ids]
    if len({*ids}) < len(ids):
        seen: set[str] = set()
        twice = [row_id for row_id in ids if row_id in seen or seen.add(row_id)]  # type: ignore[func-returns-value]
        raise InputError(f"{path} has ids more than once: {name_rows(twice, len(ids))}. Keep one row of each.")
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "log_probs", "tail")
    }
    return ClassProbs(ids, parts[0].names, **joined, metadata={"source": Path(path).name})


def _check_scale(path: str | Path, probs: np.ndarray) -> None:
    """Raises InputError for rows that are something else than probabilities, as far as one can tell what."""
    if not np.isfinite(probs).all() or not len(probs):
        return
    with np.errstate(over="ignore"):
        is_log = (probs <= 0).all() and np.allclose(np.exp(probs).sum(axis=1), 1, atol=1e-2)
    sums = probs.sum(axis=1)
    if is_log:
        raise InputError(f"{path} holds log-probabilities. Give their exp().")
    if (probs >= 0).all() and np.allclose(sums, 100, atol=1):
        raise InputError(f"{path} holds per cent: rows sum to 100. Divide them by 100.")
    is_other = (np.abs(sums - 1) > 1e-2) & ((probs < 0).any(axis=1) | (probs > 1).any(axis=1))
    if is_other.mean() > 0.5:
        raise InputError(
            f"{path} seems to hold logits: numbers from {probs.min():.4g} to {probs.max():.4g}, whose rows do not sum "
            "to 1. Give each row's softmax."
        )


# --- Tables -----------------------------------------------------------------------------------------------------------


def _find_id(path: Path, columns: Sequence[str], classes: Classes | None) -> int:
    """The column of ids: one with a usual name, else the first, where it names no class."""
    others = [name for name in columns if classes is None or classes.find(name) is None]
    found = find_usual(others, USUAL_NAMES["id"])
    if found is None and others and others[0] == columns[0] and not (classes and classes.likely(columns[0])):
        found = columns[0]
    if found is None:
        raise InputError(f"{path} has no column of ids: {', '.join(USUAL_NAMES['id'][:4])}, ... {_LAYOUT}")
    return list(columns).index(found)


def _open_parquet(path: Path, classes: Classes | None) -> tuple[list[str], Iterator[Part]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        _cannot_read(path, error)
    columns = file.schema_arrow.names
    row_id = _find_id(path, columns, classes)
    kinds = [kind for place, kind in enumerate(file.schema_arrow.types) if place != row_id]
    names = [name for place, name in enumerate(columns) if place != row_id]
    for name, kind in zip(names, kinds, strict=True):
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
            raise InputError(f"{path}: column {printable(name)!r} holds {kind} in place of numbers. {_LAYOUT}")
    return names, _parts(path, file.iter_batches(_ROWS), row_id)


def _open_text(path: Path, classes: Classes | None) -> tuple[list[str], Iterator[Part]]:
    encoding = find_encoding(path)
    separator = find_separator(path, encoding, "," if path.suffix.lower() == ".csv" else "\t")
    columns = read_header(path, encoding, separator)
    row_id = _find_id(path, columns, classes)
    # By place: names may be there twice, which is said later.
    places = [str(place) for place in range(len(columns))]
    kinds = {name: pa.string() if place == row_id else pa.float64() for place, name in enumerate(places)}

    def read() -> Iterator[pa.RecordBatch]:
        yield from pyarrow.csv.open_csv(
            path,
            pyarrow.csv.ReadOptions(
                block_size=_BLOCK_BYTES, column_names=places, skip_rows_after_names=1, encoding=encoding
            ),
            pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(column_types=kinds, strings_can_be_null=False),
        )

    return [name for place, name in enumerate(columns) if place != row_id], _parts(path, read(), row_id, columns)


def _parts(path: Path, batches: Iterator[pa.RecordBatch], row_id: int, columns: Sequence[str] = ()) -> Iterator[Part]:
    try:
        for batch in batches:
            numbers = [column for place, column in enumerate(batch.columns) if place != row_id]
            probs = np.empty((len(batch), len(numbers)))
            for place, column in enumerate(numbers):
                probs[:, place] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)  # NaN where it is empty
            if len(batch):
                yield _texts(path, batch.column(row_id).to_pylist()), probs
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        wrong = re.search(r"column #(\d+): .*invalid value (.*)", str(error))
        if wrong and columns:
            name = printable(columns[int(wrong[1])])
            raise InputError(f"{path}: column {name!r} holds {printable(wrong[2])} in place of a number.") from error
        _cannot_read(path, error)


def _open_arrays(path: Path, classes: Classes | None) -> tuple[list[str], Iterator[Part]]:
    if not zipfile.is_zipfile(path):  # np.load would take it for something else
        _cannot_read(path, zipfile.BadZipFile("it is no .npz archive"))
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in _ARRAYS if name not in file]:
                raise InputError(
                    f"{path} lacks the arrays {', '.join(missing)}; it has {printable(', '.join(file.files))}. "
                    "Save ids (N,), classes (C,) and probs (N, C)."
                )
            ids, names, probs = (file[name] for name in _ARRAYS)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{path} holds Python objects, which are not read. Save texts as such: np.array(names, dtype=str)."
        ) from error
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        _cannot_read(path, error)
    if probs.shape != (ids.size, names.size) or ids.ndim != 1 or names.ndim != 1 or names.dtype.kind != "U":
        raise InputError(
            f"{path}: ids {ids.shape}, classes {names.shape} of {names.dtype} and probs {probs.shape} do not fit. Save "
            "ids (N,), classes (C,) as texts and probs (N, C)."
        )
    if probs.dtype.kind not in "fiu":
        raise InputError(f"{path}: probs are {probs.dtype} in place of numbers.")
    starts = range(0, len(ids), _ROWS)
    cut = ((ids[start : start + _ROWS], probs[start : start + _ROWS]) for start in starts)
    return names.tolist(), ((_texts(path, some.tolist()), np.float64(part)) for some, part in cut)


def _texts(path: Path, ids: Sequence[object]) -> list[str]:
    """Ids as texts; a number with a fraction, or none, is no id."""
    for row_id in ids:
        if not isinstance(row_id, str | int) or isinstance(row_id, bool) or not str(row_id).strip():
            raise InputError(f"{path}: ids are texts or whole numbers; got {printable(repr(row_id))}.")
    return [str(row_id).strip() for row_id in ids]


def _cannot_read(path: Path, error: Exception) -> NoReturn:
    said = printable(" ".join(str(error).split()), 200)
    raise InputError(f"{path} cannot be read ({type(error).__name__}: {said}). {_LAYOUT}") from error
