"""Probabilities of many classes: of every row the most likely ones, and what all the others have together. No torch.

A file of class probabilities is Parquet, in the row order of the data:

    id         of the row
    digest     of its question and images (digests.row_digest), whatever its id; null where unknown
    label      index of its class; null where unknown
    classes    indices of its M most likely classes, the most likely first; M is the same for all rows
    log_probs  their log-probabilities
    tail       log of what the other classes have together, evenly; -inf where there are none

Its metadata hold the names of the classes, which indices stand for, and what made it. Candidates, the full table of a
prediction and a submission with one column a class are all of this kind: 100,000 rows of 1,000 classes need a few
dozen MB.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import whole

NUM_KEPT = 50  # classes of a row that are kept one by one
UNKNOWN_LABEL = -1
NONE_OF_THESE = -1  # in place of a class: the candidate that says that the label is none of the others
SMALLEST = 1e-9  # a class that a classifier gives 0 may be right all the same
METADATA_KEY = b"vqa_sft_classes"
_SUM_TOLERANCE = 1e-2  # sums of rounded probabilities
_BATCH = 10_000  # rows sorted at a time
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("digest", pa.string()),
        ("label", pa.int32()),
        ("classes", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("tail", pa.float32()),
    ]
)


@dataclass
class ClassProbs:
    """N rows in data order, M of C classes one by one."""

    ids: list[str]
    names: tuple[str, ...]  # of the classes, (C,)
    indices: np.ndarray  # (N, M), the most likely first
    log_probs: np.ndarray  # (N, M)
    tail: np.ndarray  # (N,), log
    labels: np.ndarray = field(default_factory=lambda: np.array([], np.int32))  # (N,), UNKNOWN_LABEL for none
    digests: list[str | None] = field(default_factory=list)  # empty: unknown
    metadata: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.labels):
            self.labels = np.full(len(self.ids), UNKNOWN_LABEL, np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_kept(self) -> int:
        return self.indices.shape[1]

    @property
    def tail_each(self) -> np.ndarray:
        """Log-probability of each class that is not kept, (N,)."""
        return self.tail - np.log(max(len(self.names) - self.num_kept, 1))

    def log_prob_of(self, classes: np.ndarray) -> np.ndarray:
        """Log-probability of one class a row, (N,): `classes` (N,)."""
        is_it = self.indices == np.asarray(classes)[:, None]
        return np.where(is_it.any(axis=1), self.log_probs[np.arange(len(self)), is_it.argmax(axis=1)], self.tail_each)

    def dense(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Probabilities of all classes for some rows, (rows, C), which sum to 1."""
        part = slice(start, stop)
        probs = np.repeat(np.exp(self.tail_each[part].astype(np.float64))[:, None], len(self.names), axis=1)
        np.put_along_axis(
            probs, self.indices[part].astype(np.int64), np.exp(self.log_probs[part].astype(np.float64)), 1
        )
        return probs / probs.sum(axis=1, keepdims=True)

    def in_classes(self, names: Sequence[str], places: Sequence[int] | np.ndarray) -> "ClassProbs":
        """The same in another order of the classes: class i is `places[i]` of `names`."""
        new = np.append(places, UNKNOWN_LABEL).astype(np.int32)  # the last, which UNKNOWN_LABEL takes
        return replace(self, names=tuple(names), indices=new[self.indices], labels=new[self.labels])

    def take(self, rows: Sequence[int] | np.ndarray) -> "ClassProbs":
        """Some of the rows."""
        rows = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            indices=self.indices[rows],
            log_probs=self.log_probs[rows],
            tail=self.tail[rows],
            labels=self.labels[rows],
            digests=[self.digests[row] for row in rows] if self.digests else [],
        )


def keep_likely(
    ids: Sequence[str],
    names: Sequence[str],
    probs: np.ndarray,
    *,
    num_kept: int = NUM_KEPT,
    source: str = "the probabilities",
) -> ClassProbs:
    """The most likely classes of a full table (N, C). Ties go to the first class; no class has less than SMALLEST.

    Raises InputError, with `source` for the user, for rows with numbers that are no probabilities or do not sum to 1.
    """
    num_kept = min(num_kept, len(names))
    parts = []
    for start in range(0, len(ids), _BATCH):
        part = np.asarray(probs[start : start + _BATCH], dtype=np.float64)
        check_probs(ids[start : start + _BATCH], part, source)
        part = np.maximum(part, SMALLEST)
        part /= part.sum(axis=1, keepdims=True)
        order = np.argsort(-part, axis=1, kind="stable")
        kept, others = order[:, :num_kept], order[:, num_kept:]
        with np.errstate(divide="ignore"):  # no others
            tail = np.log(np.take_along_axis(part, others, 1).sum(axis=1))
        parts.append((kept, np.log(np.take_along_axis(part, kept, 1)), tail))
    indices, log_probs, tail = (np.concatenate(column) for column in zip(*parts, strict=True))
    kinds = (indices.astype(np.int32), log_probs.astype(np.float32), tail.astype(np.float32))
    return ClassProbs(list(ids), tuple(names), *kinds)


def check_probs(ids: Sequence[str], probs: np.ndarray, source: str) -> None:
    """Raises InputError for rows (N, C) with a number that is no probability, or that do not sum to 1."""
    for what, bad in (
        ("numbers that are no probabilities (NaN or infinite)", ~np.isfinite(probs).all(axis=1)),
        ("numbers below 0", (probs < 0).any(axis=1)),
        ("probabilities that do not sum to 1", np.abs(probs.sum(axis=1) - 1) > _SUM_TOLERANCE),
    ):
        if bad.any():
            first = probs[int(bad.argmax())]
            wrong = first[~(np.isfinite(first) & (first >= 0))]
            got = f"such as {wrong[0]:.4g}" if len(wrong) else f"they sum to {first.sum():.4g}"
            found = [ids[row] for row in np.flatnonzero(bad)]
            raise InputError(f"{source}: {what} in {name_rows(found, len(ids))}: {got}. Give each row's softmax.")


def write_class_probs(path: str | Path, probs: ClassProbs) -> None:
    """Write the file whole or not at all."""
    digests = probs.digests or [None] * len(probs)
    labels = pa.array(probs.labels, pa.int32(), mask=probs.labels == UNKNOWN_LABEL)
    columns = [
        pa.array(probs.ids, pa.string()),
        pa.array(digests, pa.string()),
        labels,
        _lists(probs.indices, pa.int32()),
        _lists(probs.log_probs, pa.float32()),
        pa.array(probs.tail, pa.float32()),
    ]
    metadata = json.dumps({**probs.metadata, "classes": probs.names}, ensure_ascii=False)
    table = pa.Table.from_arrays(columns, schema=SCHEMA).replace_schema_metadata({METADATA_KEY: metadata})
    with whole(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")


def read_class_probs(path: str | Path) -> ClassProbs:
    """Raises InputError where there is no such file, it is none of class probabilities, or it is damaged."""
    if not Path(path).is_file():
        raise InputError(f"no such file of class probabilities: {path}.")
    try:
        table = pq.read_table(path)
        metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
        names = tuple(metadata.pop("classes"))
        table = table.select(SCHEMA.names).cast(SCHEMA)
        columns = [table[name].combine_chunks() for name in SCHEMA.names]
        ids, digests = columns[0].to_pylist(), columns[1].to_pylist()
        labels = columns[2].fill_null(UNKNOWN_LABEL).to_numpy(zero_copy_only=False)
        indices, log_probs = (column.values.to_numpy(False).reshape(len(ids), -1) for column in columns[3:5])
        tail = columns[5].to_numpy(zero_copy_only=False)
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is no file of class probabilities ({type(error).__name__}).") from error
    is_known = any(digest is not None for digest in digests)
    probs = ClassProbs(ids, names, indices, log_probs, tail, labels, digests if is_known else [], metadata)
    _check_content(path, probs)
    return probs


def is_class_probs(path: str | Path) -> bool:
    """Whether a file is one of class probabilities, by its metadata."""
    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError, ValueError):
        return False


def _lists(rows: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1), kind))


def _check_content(path: str | Path, probs: ClassProbs) -> None:
    num_classes = len(probs.names)
    mass = np.exp(probs.log_probs.astype(np.float64)).sum(axis=1) + np.exp(probs.tail.astype(np.float64))
    in_order = np.sort(probs.indices, axis=1)
    for what, is_bad in (
        ("ids that are there twice", len(set(probs.ids)) < len(probs)),
        (
            "class indices beyond its list",
            probs.indices.size and not 0 <= in_order.min() <= in_order.max() < num_classes,
        ),
        ("a class twice in a row", bool((in_order[:, 1:] == in_order[:, :-1]).any())),
        ("labels beyond its list", bool(((probs.labels < UNKNOWN_LABEL) | (probs.labels >= num_classes)).any())),
        ("log-probabilities that are not finite", not np.isfinite(probs.log_probs).all()),
        (
            "rows whose first class is not the most likely one",
            bool((probs.log_probs[:, 1:] > probs.log_probs[:, :-1] + 1e-6).any()),
        ),
        ("rows that do not sum to 1", not np.allclose(mass, 1, atol=_SUM_TOLERANCE)),
    ):
        if is_bad:
            raise InputError(f"{path} is damaged: it has {what}. Make it again.")
