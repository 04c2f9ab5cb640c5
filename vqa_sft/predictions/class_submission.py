"""`vqa-sft submit` of class probabilities: one column a class, matched by name, or the most likely class. No torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vqa_sft.data.answers import UNKNOWN
from vqa_sft.data.class_probs import ClassProbs
from vqa_sft.data.classes import Classes, read_classes
from vqa_sft.data.find_files import quote
from vqa_sft.errors import InputError, printable
from vqa_sft.predictions.class_tables import match_classes, read_table
from vqa_sft.predictions.read_submission import read_table as read_template
from vqa_sft.predictions.style import PROBABILITIES, check_numbers, find_id_column
from vqa_sft.predictions.submission import check_table, quoted, write_lines, write_table

DIGITS = 10  # of a probability: a class with 0 would make the log loss endless
INDICES = {"index_from_0": 0, "index_from_1": 1}
_BATCH = 1000


def submit_classes(
    file: str | Path,
    output: str | Path,
    *,
    template: str | None = None,
    answer_format: str | None = None,
    classes: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write the submission of class probabilities; how it was written, as text. Raises InputError before it writes.

    Without a template: id and the most likely class, or with `answer_format` "probabilities" one column a class.
    `classes` names a list with other names of the classes.
    """
    if answer_format == "letter":
        raise InputError(f"{file} holds classes, which have no letters. Give another --answer-format.")
    table = read_table(file)
    known = _list_classes(table, file, classes)
    if template is None:
        answers = [*table.names] if answer_format == PROBABILITIES else ["label"]
        header, ids, id_name = ["id", *answers], table.ids, "id"
    else:
        header, rows = read_template(template)
        id_name = find_id_column(template, header, rows, table.ids)
        ids, answers = [row[id_name] for row in rows], [name for name in header if name != id_name]
        if not answers:
            raise InputError(f"{template} has no column beside {id_name}: neither a label nor one column a class.")
        if len(answers) == 1 and answer_format is None:
            _check_labels(template, answers[0], [row[answers[0]] for row in rows], known)
        elif len(answers) > 1:
            _match_columns(template, answers, known)
            check_numbers(template, answers, rows)
    check_table(output, header, [file, template, classes], overwrite)
    row_of = {row_id: row for row, row_id in enumerate(table.ids)}
    table = table.take([row_of[row_id] for row_id in ids])
    if len(answers) > 1:
        if answer_format not in (None, PROBABILITIES):
            raise InputError(f"{template} has one column a class; --answer-format {answer_format} has one for all.")
        places = _match_columns(template or file, answers, known)
        write_lines(output, _lines_of_probs(table, header, id_name, places))
        how = f"{id_name} and the probabilities of {len(answers):,} classes, each in the column of its name"
    else:
        if answer_format == PROBABILITIES:
            raise InputError(f"{template} has one column beside {id_name}; probabilities need one a class.")
        cells, how = _cells(table, answer_format)
        rows_of = (
            (row_id, cell) if header[0] == id_name else (cell, row_id) for row_id, cell in zip(ids, cells, strict=True)
        )
        write_table(output, header, rows_of)
    return f"Wrote {len(table):,} rows to {output}: {how}."


def _list_classes(table: ClassProbs, file: str | Path, path: str | None) -> Classes:
    """The classes of the table, in its order, with the other names of the list in `path`."""
    if path is None:
        return Classes(table.names, str(file))
    given = read_classes(path)
    places = match_classes(table.names, given.names, [file, path])  # of the table's classes in the list
    others = tuple(given.other_names[place] for place in places) if given.other_names else ()
    return Classes(table.names, path, other_names=others)


def _match_columns(path: str | Path, columns: Sequence[str], classes: Classes) -> np.ndarray:
    """The class (C,) of each column. Raises InputError unless each class has one."""
    found = [classes.find(name) for name in columns]
    unknown = [name for name, place in zip(columns, found, strict=True) if place is None]
    missing = [name for place, name in enumerate(classes.names) if place not in {*found}]
    twice = [
        f"{name} ({classes.names[place]})" if name != classes.names[place] else name
        for name, place in zip(columns, found, strict=True)
        if place is not None and found.count(place) > 1
    ]
    if unknown or missing or twice:
        near = [(name, classes.likely(name)) for name in unknown[:5]]
        meant = [f"{printable(name, 60)!r} may be {likely!r}" for name, likely in near if likely]
        faults = [f"columns that are no class: {quote(unknown)}"] if unknown else []
        faults += [f"classes without a column: {quote(missing)}"] if missing else []
        faults += [f"columns of one class: {quote(twice)}"] if twice else []
        faults += ["; ".join(meant)] if meant else []
        raise InputError(
            f"{path} has {len(columns):,} columns beside the ids, and {classes.source} has {len(classes):,} classes: "
            f"{'; '.join(faults)}. Columns are matched by name; --classes names a list with other names."
        )
    return np.array(found, dtype=np.int64)


def _check_labels(path: str, column: str, cells: Sequence[str], classes: Classes) -> None:
    """Raises InputError where the cells of a template are no names of classes: it may want something else."""
    wrong = [cell for cell in cells if cell.casefold() not in UNKNOWN and classes.find(cell) is None]
    if wrong:
        raise InputError(
            f"{path}: `{column}` holds {printable(repr(wrong[0]), 60)}, which is no class of {classes.source}. If "
            "names of classes are wanted there, give --answer-format text; if numbers in the order of its list, "
            "index_from_0 or index_from_1."
        )


def _cells(table: ClassProbs, answer_format: str | None) -> tuple[list[str], str]:
    best = table.indices[:, 0]
    if answer_format in INDICES:
        first = INDICES[answer_format]
        return [str(place + first) for place in best], f"numbers from {first}, in the order of the file's own classes"
    return [table.names[place] for place in best], "the name of the most likely class"


def _lines_of_probs(table: ClassProbs, header: Sequence[str], id_name: str, places: np.ndarray) -> Iterator[str]:
    """Lines of a CSV, whose numbers sum to 1 as they are written. No class gets 0."""
    before = [*header].index(id_name)
    yield ",".join(map(quoted, header))
    cells = ",".join([f"%.{DIGITS}f"] * len(places))
    for start in range(0, len(table), _BATCH):
        for row_id, units in zip(table.ids[start : start + _BATCH], _units(table, start)[:, places], strict=True):
            numbers = cells % tuple((units / 10**DIGITS).tolist())
            if before == 0:
                yield f"{quoted(row_id)},{numbers}"
            else:
                parts = numbers.split(",")
                yield ",".join([*parts[:before], quoted(row_id), *parts[before:]])


def _units(table: ClassProbs, start: int) -> np.ndarray:
    """Probabilities of some rows (R, C) in units of the last digit: whole, none 0, in each row 10^DIGITS together."""
    probs = table.dense(start, min(start + _BATCH, len(table)))
    units = np.maximum(np.round(probs * 10**DIGITS), 1).astype(np.int64)
    best = units.argmax(axis=1)
    units[np.arange(len(units)), best] += 10**DIGITS - units.sum(axis=1)
    return units
