"""Tables of class probabilities side by side: the same rows, and the same classes by name. No torch.

A table is a `ClassProbs`: the full probabilities of a classification, as `vqa-sft fuse` writes them, or a classifier's.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqa_sft.data.answers import UNKNOWN
from vqa_sft.data.cells import text_of
from vqa_sft.data.class_probs import METADATA_KEY, UNKNOWN_LABEL, ClassProbs, is_class_probs, read_class_probs
from vqa_sft.data.classes import NAME_COLUMNS, Classes, class_name
from vqa_sft.data.columns import USUAL_NAMES, find_usual
from vqa_sft.data.find_files import quote
from vqa_sft.data.image_folder import find_image_folder, open_image_folder
from vqa_sft.data.sources import open_source
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.predictions.file import CANDIDATES, check_same_rows

MADE_BY = "made_by"  # in the metadata, the command that wrote the file


def are_class_tables(paths: Sequence[str | Path], command: str = "") -> bool:
    """Whether the files are tables of class probabilities.

    Raises InputError where some are and others are not; and, where a `command` is named, for predictions of candidates,
    which are no answers yet.
    """
    are_tables = [is_class_probs(path) for path in paths]
    if any(are_tables) and not all(are_tables):
        shown = [[str(path) for path, it_is in zip(paths, are_tables, strict=True) if it_is == kind] for kind in (1, 0)]
        raise InputError(
            f"{', '.join(shown[0])}: probabilities of classes; {', '.join(shown[1])}: something else. They cannot be "
            "compared: give files of one kind. vqa-sft fuse makes the former of predictions of candidates."
        )
    if command and (among := [path for path in paths if _has_candidates(path)]):
        raise not_of_all_classes(among[0], command)
    return all(are_tables) and bool(are_tables)


def not_of_all_classes(name: str | Path, command: str) -> InputError:
    """What to say where a command gets predictions of candidates."""
    return InputError(
        f"{name} holds probabilities of a few candidates, not of all classes, and {command} takes the latter. vqa-sft "
        "fuse makes them, with the classifier that chose the candidates."
    )


def is_made_by(command: str) -> Callable[[Path], bool]:
    """For `check_output`: whether a file holds class probabilities that this command wrote."""

    def is_ours(path: Path) -> bool:
        if not is_class_probs(path):
            return False
        return json.loads(pq.read_schema(path).metadata[METADATA_KEY]).get(MADE_BY) == command

    return is_ours


def _has_candidates(path: str | Path) -> bool:
    try:
        return CANDIDATES.name in pq.read_schema(path).names
    except (pa.ArrowException, OSError, ValueError):
        return False


def match_classes(theirs: Sequence[str], ours: Sequence[str], names: Sequence[str | Path]) -> np.ndarray:
    """The place among our classes (C,) of each of theirs, by name. `names` are those of the two files, theirs first.

    Raises InputError where one list has classes that the other lacks.
    """
    place_of = {class_name(name): place for place, name in enumerate(ours)}
    found = [class_name(name) for name in theirs]
    lacking = [name for name in place_of if name not in {*found}]
    foreign = [name for name in found if name not in place_of]
    if lacking or foreign or len(found) != len(place_of):
        said = [f"{names[0]} lacks {quote(lacking)}"] if lacking else []
        said += [f"{names[1]} lacks {quote(foreign)}"] if foreign else []
        raise InputError(
            f"{names[0]} has {len(found):,} classes, {names[1]} has {len(ours):,}, and they are not the same: "
            f"{'; '.join(said) or 'a name is there twice'}. Give files of one list of classes."
        )
    return np.array([place_of[name] for name in found], dtype=np.int32)


def with_classes(table: ClassProbs, classes: Sequence[str], names: Sequence[str | Path]) -> ClassProbs:
    """The same table with the classes in this order."""
    return table.in_classes(classes, match_classes(table.names, classes, names))


def digest_of(table: ClassProbs) -> dict[str, str]:
    """Id -> digest of the rows whose digest is known."""
    pairs = zip(table.ids, table.digests, strict=bool(table.digests))
    return {row_id: digest for row_id, digest in pairs if digest is not None}


def rows_of(
    table: ClassProbs, ids: Sequence[str], digests: Mapping[str, str], names: Sequence[str | Path]
) -> np.ndarray:
    """The row (N,) of each id in a table, which may have more rows. `names` are those of the table and of the file with
    the ids and digests. Raises InputError where rows are missing or others."""
    row_of = {row_id: row for row, row_id in enumerate(table.ids)}
    if missing := [row_id for row_id in ids if row_id not in row_of]:
        raise InputError(
            f"{names[0]} lacks {name_rows(missing, len(ids))} of {names[1]}. Give probabilities of the same rows."
        )
    check_same_rows(ids, digests, digest_of(table), [names[1], names[0]])
    return np.array([row_of[row_id] for row_id in ids], dtype=np.int64)


def merge_labels(labels: np.ndarray, others: np.ndarray, ids: Sequence[str], names: Sequence[str | Path]) -> np.ndarray:
    """Labels (N,) known to either of two files. Raises InputError where they differ."""
    are_both = (labels != UNKNOWN_LABEL) & (others != UNKNOWN_LABEL)
    if differ := [ids[row] for row in np.flatnonzero(are_both & (labels != others))]:
        raise InputError(f"{names[0]} and {names[1]} have other labels in {name_rows(differ, len(ids))}.")
    return np.where(labels == UNKNOWN_LABEL, others, labels).astype(np.int32)


def read_table(path: str | Path) -> ClassProbs:
    """`read_class_probs` of a file whose numbers count: NaN is refused."""
    table = read_class_probs(path)
    if bad := [table.ids[row] for row in np.flatnonzero(~np.isfinite(table.log_probs).all(axis=1))]:
        raise InputError(f"{path}: log-probabilities are not finite in {name_rows(bad, len(table))}. Make it again.")
    if not len(table):
        raise InputError(f"{path} has no rows.")
    return table


def align_tables(tables: Sequence[ClassProbs], names: Sequence[str | Path]) -> list[ClassProbs]:
    """The same rows and classes in the order of the first table. Raises InputError where the tables are of others, or
    have other labels; each gets the labels that any of them knows."""
    first, aligned = tables[0], []
    for table, name in zip(tables, names, strict=True):
        table = with_classes(table, first.names, [name, names[0]])
        if foreign := [*{*table.ids} - {*first.ids}]:
            raise InputError(f"{name} also has {name_rows(foreign, len(table))}, and {names[0]} has not.")
        aligned.append(table.take(rows_of(table, first.ids, digest_of(first), [name, names[0]])))
    labels = aligned[0].labels
    for table, name in zip(aligned[1:], names[1:], strict=True):
        labels = merge_labels(labels, table.labels, first.ids, [names[0], name])
    return [replace(table, labels=labels) for table in aligned]


def join_tables(tables: Sequence[ClassProbs]) -> ClassProbs:
    """The rows of tables with the same classes, and as many of them one by one, one after the other."""
    arrays = ("indices", "log_probs", "tail", "labels")
    joined: dict[str, Any] = {name: np.concatenate([getattr(table, name) for table in tables]) for name in arrays}
    joined["digests"] = [digest for table in tables for digest in table.digests]
    return replace(tables[0], ids=[row_id for table in tables for row_id in table.ids], **joined)


def read_aligned(paths: Sequence[str | Path]) -> list[ClassProbs]:
    """`align_tables` of files."""
    return align_tables([read_table(path) for path in paths], paths)


def labelled(table: ClassProbs, name: str | Path) -> ClassProbs:
    """The rows whose label is known. Raises InputError where there are none."""
    rows = np.flatnonzero(table.labels != UNKNOWN_LABEL)
    if not len(rows):
        raise InputError(f"{name} holds no labels. Give --answers FILE with ids and class names.")
    return table if len(rows) == len(table) else table.take(rows)


def with_labels(table: ClassProbs, name: str | Path, path: str | Path, **options: Any) -> ClassProbs:
    """The table with the labels of a file of ids and class names, or of an image folder. `options` name its `columns`,
    and how it is read. Raises InputError for rows without a label, and labels that are no class."""
    folder = find_image_folder(str(path))
    how = {key: options[key] for key in ("encoding", "config", "split") if options.get(key) is not None}
    opened = open_image_folder(folder) if folder else open_source(str(path), **{"split": "test"} | how)
    given = options.get("columns") or {}
    usual = {"id": USUAL_NAMES["id"], "answer": (*USUAL_NAMES["answer"], *NAME_COLUMNS)}
    id_name, label_name = (given.get(key) or find_usual(opened.columns, usual[key]) for key in ("id", "answer"))
    if id_name not in opened.columns or label_name not in opened.columns:
        raise InputError(
            f"{path} must have the columns id and label; found: {printable(', '.join(opened.columns), 400)}. Name "
            "them: --columns '{id: ..., answer: ...}'."
        )
    rows = [(text_of(row[id_name]), text_of(row[label_name])) for _, row in opened.rows()]
    cells, known = dict(rows), {*table.ids}
    if twice := [
        row_id for row_id, count in Counter(row_id for row_id, _ in rows).items() if count > 1 and row_id in known
    ]:
        raise InputError(f"{path} has ids more than once: {name_rows(twice, len(rows))}.")
    if missing := [row_id for row_id in table.ids if cells.get(row_id, "").casefold() in UNKNOWN]:
        raise InputError(f"{path} has no label for {name_rows(missing, len(table))} of {name}.")
    classes = Classes(table.names, str(name))
    labels = [classes.find(cells[row_id]) for row_id in table.ids]
    if bad := [row_id for row_id, label in zip(table.ids, labels, strict=True) if label is None]:
        raise InputError(
            f"{path}: the label is no class of {name} in {name_rows(bad, len(table))}, such as "
            f"{printable(repr(cells[bad[0]]), 60)}."
        )
    return replace(table, labels=np.array(labels, dtype=np.int32))
