"""The classes of a source's rows: which column names them, which list they are of, and the class of each row. No torch.

Where no list is given, the classes are those of the data, sorted by name.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa

from vqa_sft.data.answers import UNKNOWN
from vqa_sft.data.classes import Classes, class_name, find_near_names, read_classes
from vqa_sft.data.find_files import quote
from vqa_sft.data.read_row import RowReader
from vqa_sft.errors import InputError, printable, safe

Labels = Callable[[], Iterator[Sequence[str]]]  # what each column holds in a row, from the start at every call


def check_class_columns(source: str, names: Sequence[str], labels: Labels) -> None:
    """Raises InputError where another column with a usual name puts the rows into other classes than the first."""
    for place, other in enumerate(names[1:], 1):
        pairs = {(row[0], row[place]) for row in labels() if row[0] and row[place]}
        for side in (0, 1):
            if len({pair[side] for pair in pairs}) < len(pairs):
                raise InputError(
                    f"{source}: {names[0]} and {other} may both be the class, and put the rows into other classes. "
                    f"Name one in the recipe: `columns: {{answer: {names[0]}}}`."
                )


def settle_classes(reader: RowReader, labels: pa.ChunkedArray) -> Classes:
    """The list that the options give, else that of the data: names that it declares, or those in `labels`, the cells of
    all rows."""
    given = reader.options.classes
    if isinstance(given, Classes):
        return given
    if given is not None:
        return read_classes(given)
    column = reader.columns.answer or ""
    kind = (reader.source.features or {}).get(column)
    declared = kind.names if isinstance(kind, datasets.ClassLabel) else reader.source.class_names
    # Folders name classes; the cells of a column may also say that nothing is known.
    said = [label for label in labels.unique().to_pylist() if label.casefold() not in UNKNOWN]
    found = {class_name(label) for label in (declared or said)}
    where = f"column {printable(column)}" if reader.source.class_names == () else "its folders"
    return Classes(tuple(sorted(found)), f"{reader.source.name} ({where})")


def read_labels(
    reader: RowReader, classes: Classes, labels: Sequence[str], ids: Sequence[str], numbers: Sequence[int]
) -> list[int | None]:
    """The class of every row; None for one without, which is a problem unless answers are optional."""
    is_optional = reader.options.answers == "optional"
    likely: dict[str, str | None] = {}
    found = []
    for label, row_id, number in zip(labels, ids, numbers, strict=True):
        place = classes.find(label)
        found.append(place)
        if place is not None or (is_optional and reader.is_no_answer(label)):
            continue
        if label.casefold() in UNKNOWN:
            reader.problems.add(row_id, number, "no_answer", repr(label) if label else "")
            if label:
                reader.problems.hints["no_answer"] = "Where such a word is a class, name it in `classes`."
            continue
        if label not in likely:
            likely[label] = classes.likely(label)
        meant = f"; is {likely[label]!r:.60} meant?" if likely[label] else ""
        reader.problems.add(row_id, number, "unknown_class", f"{label!r:.60}{meant}")
    reader.problems.hints["unknown_class"] = safe(f"The list is that of {classes.source}.")
    return found


def count_rows(classes: Classes, found: Sequence[int | None]) -> np.ndarray:
    """Rows of each class."""
    counted = Counter(found)
    return np.array([counted[place] for place in range(len(classes))], dtype=np.int64)


def describe_classes(name: str, classes: Classes, counts: np.ndarray) -> list[str]:
    """Notes on the classes of training rows: how many, which have one row or none, which names are nearly equal."""
    said = [f"{len(classes):,} classes, those of {classes.source}"]
    for number, what in ((0, "without rows"), (1, "with one row")):
        if few := [classes.names[place] for place in np.flatnonzero(counts == number)]:
            said.append(f"classes {what} ({len(few):,}): {quote(few)}")
    for how, names in find_near_names(classes.names):
        said.append(f"classes whose names differ in {how} only: {quote(names)}")
    return [safe(f"{name}: {note}") for note in said]
