"""`vqa-sft submit`: the submission of a prediction file. No torch."""

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqa_sft.data.cells import write_answer
from vqa_sft.data.class_probs import NONE_OF_THESE
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.files import check_output, whole
from vqa_sft.predictions.check_file import ANSWERS
from vqa_sft.predictions.file import Predictions, read_predictions
from vqa_sft.predictions.matched import read_rows_of
from vqa_sft.predictions.style import PROBABILITIES, Style
from vqa_sft.questions.letters import LETTERS

DIGITS = 6  # of a probability


def render(
    predictions: Predictions, style: Style, choices: Sequence[Sequence[str]] | None = None
) -> list[dict[str, str]]:
    """The rows of the submission, each cell as it is written. `choices` are the texts of each row of the predictions.

    Raises InputError where a submission would not hold every row once, with finite probabilities.
    """
    row_of = {row_id: i for i, row_id in enumerate(predictions.ids)}
    ids = style.ids or tuple(predictions.ids)
    if len(row_of) < len(predictions.ids) or sorted(ids) != sorted(predictions.ids):
        raise InputError(f"a submission holds every id once; got {len(ids)} rows for {len(row_of)} ids.")
    all_probs = predictions.probs
    if bad := [i for i, row in zip(predictions.ids, all_probs, strict=True) if not np.isfinite(row).all()]:
        raise InputError(f"the probabilities are not finite in {name_rows(bad, len(ids))}. Score the rows again.")
    if style.answer_format == "text" and choices is None:
        raise InputError(
            "answers are written as texts, and a prediction file holds none. Give --data, the data that were "
            "predicted, or another --answer-format."
        )
    if style.texts and choices is None:
        raise InputError("columns are named after the texts of choices, and a prediction file holds none. Give --data.")
    rows = []
    for row_id in ids:
        row = row_of[row_id]
        probs = all_probs[row]
        if predictions.candidates:  # the name of a class is asked for
            probs = np.where(np.array(predictions.candidates[row]) == NONE_OF_THESE, -1, probs)
        cells = _cells(probs, style, None if choices is None else choices[row])
        rows.append({style.id: row_id} | dict(zip(style.answers, cells, strict=True)))
    return rows


def _cells(probs: np.ndarray, style: Style, choices: Sequence[str] | None) -> list[str]:
    """The cells of `style.answers` in one row."""
    if style.answer_format == PROBABILITIES:
        places: Sequence[int] = range(len(probs))
        if style.texts and choices is not None:
            place_of = {text: place for place, text in enumerate(style.texts)}
            places = [place_of.get(text, 0) for text in choices]  # a row without choices: the first
        return _rounded(probs, places, len(style.answers))
    cell = write_answer(
        int(probs.argmax()), LETTERS if choices is None else choices, style.answer_format, style.is_upper
    )
    return [cell.join(style.around) if style.answer_format == "letter" else cell]


def _rounded(probs: np.ndarray, places: Sequence[int], num_columns: int) -> list[str]:
    """Probabilities, each in the column of its place, that still sum to 1 once they are rounded; columns of choices
    that the row does not have get 0."""
    rounded = np.zeros(num_columns)
    np.add.at(rounded, list(places), np.round(probs, DIGITS))
    rounded[places[int(probs.argmax())]] += 1 - rounded.sum()
    cells = [f"{number:.{DIGITS}f}" for number in rounded]
    assert abs(math.fsum(map(float, cells)) - 1) < 1e-5, cells
    return cells


def write(
    path: str | Path, predictions: Predictions, style: Style, choices: Sequence[Sequence[str]] | None = None
) -> None:
    """Write the submission whole or not at all, over whatever is there: see `check_table`."""
    rows = render(predictions, style, choices)
    write_table(path, style.header, ([row[name] for name in style.header] for row in rows))


def submit(
    file: str | Path,
    output: str | Path,
    *,
    template: str | Path | None = None,
    answer_format: str | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> str:
    """`vqa-sft submit`: write a prediction file's submission; how it was written, as text. `options` say how the data
    are read. Raises InputError before it writes."""
    predictions = read_predictions(file)
    own, choices = predictions.metadata.get(ANSWERS), None
    if data:
        found = read_rows_of(data, predictions, file, **options).choices
        choices = [found[row_id] for row_id in predictions.ids]
    num_choices = [len(row) for row in predictions.choice_logits]
    if template is None:
        style = Style.plain(answer_format, max(num_choices), own)
    else:
        style = Style.from_template(template, predictions.ids, num_choices, answer_format, choices, own)
    check_table(output, style.header, [file, template, data], overwrite)
    write(output, predictions, style, choices)
    like = f", as {template} has them" if template else ""
    said = f"Wrote {len(predictions.ids):,} rows to {output}: {', '.join(style.header)} ({style.answer_format}){like}."
    notes = [f"Beware: {file} was scored with images {predictions.images}."] if predictions.shown else []
    return "\n".join([*style.notes, *notes, said])


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV, whole or not at all, that every reader cuts into these rows: a cell is quoted if it holds anything
    that some reader drops or takes for the end of a line. Python's csv leaves a lone carriage return unquoted, which is
    a new row for pandas."""
    write_lines(path, (",".join(map(quoted, row)) for row in itertools.chain([header], rows)))


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")


def check_table(
    path: str | Path, header: Sequence[str], reads: Sequence[str | Path | None], overwrite: bool = False
) -> None:
    """`files.check_output` for a CSV with this header: without `overwrite`, only one with the same may be replaced."""
    check_output(path, suffix=".csv", reads=reads)
    if overwrite or not Path(path).exists():
        return
    with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
        found = next(csv.reader([file.readline(10_000)]), [])
    if found != list(header):
        raise InputError(
            f"{path} exists and has other columns ({printable(', '.join(found))}) than what would be written "
            f"({printable(', '.join(header), 200)}). Name another --output, or give --overwrite."
        )


def quoted(cell: str) -> str:
    is_plain = len(cell.splitlines()) == 1 and cell == cell.strip() and not set(cell) & set(',"\r\n\0\ufeff')
    return cell if is_plain or cell == "" else '"' + cell.replace('"', '""') + '"'
