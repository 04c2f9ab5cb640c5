"""The prediction file and the submission file. No torch.

A prediction file is Parquet: `id`, `choice_logits` (log-probabilities of the row's own choices, dataset order, ragged,
no -inf), `answer` (null where unknown) and `blanked` (answered without a picture that could not be used), in the row
order of the data. Its metadata say what made it.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqa_sft.answers import write_answer
from vqa_sft.columns import Columns
from vqa_sft.errors import InputError, name_rows
from vqa_sft.mcq import LETTERS
from vqa_sft.sources import open_source

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("choice_logits", pa.list_(pa.float32())),
        ("answer", pa.int64()),
        ("blanked", pa.bool_()),
    ]
)
METADATA_KEY = b"vqa_sft"


@dataclass
class Predictions:
    """N rows in data order; `choice_logits[i]` has as many numbers as row i has choices."""

    ids: list[str]
    choice_logits: list[list[float]]
    answers: list[int | None]
    metadata: dict = field(default_factory=dict)
    blanked: list[bool] = field(default_factory=list)  # empty: none

    @property
    def best(self) -> list[int]:
        """The likeliest choice of each row; ties go to the first."""
        return [int(np.argmax(row)) for row in self.choice_logits]


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write `predictions` whole or not at all."""
    blanked = predictions.blanked or [False] * len(predictions.ids)
    columns = [predictions.ids, predictions.choice_logits, predictions.answers, blanked]
    table = pa.Table.from_arrays([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(predictions.metadata, ensure_ascii=False)})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    pq.write_table(table, unfinished)
    unfinished.replace(path)


def read_predictions(path: str | Path) -> Predictions:
    """Raises InputError when there is no such file or it is not a prediction file."""
    if not Path(path).is_file():
        raise InputError(f"no such prediction file: {path}.")
    try:
        table = pq.read_table(path)
        columns = [table.select(SCHEMA.names).cast(SCHEMA)[name].to_pylist() for name in SCHEMA.names]
        metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a prediction file of vqa-sft ({type(error).__name__}).") from error
    ids, choice_logits, answers, blanked = columns
    predictions = Predictions(ids, choice_logits, answers, metadata, blanked)
    bad = [
        row_id
        for row_id, logits, answer in zip(ids, choice_logits, answers, strict=True)
        if not logits or not np.isfinite(logits).all() or not (answer is None or 0 <= answer < len(logits))
    ]
    if bad or not predictions.ids:
        raise InputError(f"{path} is damaged: " + (name_rows(bad, len(predictions.ids)) if bad else "no rows") + ".")
    return predictions


def write_submission(
    path: str | Path, predictions: Predictions, columns: Columns, choices: Sequence[Sequence[str]]
) -> None:
    """A CSV of id and answer, in the names and the answer format of the data; `choices` are those of each row."""
    best = zip(predictions.best, choices, strict=True)
    answers = [write_answer(i, texts, columns.answer_format, columns.answers_are_upper) for i, texts in best]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([columns.id, columns.answer])
        writer.writerows(zip(predictions.ids, answers, strict=True))
    unfinished.replace(path)


def read_answers(path: str | Path) -> dict[str, int]:
    """Ids and answer indices of a CSV with columns `id` and `answer` (letters)."""
    opened = open_source(str(path))
    if not {"id", "answer"} <= set(opened.columns):
        raise InputError(f"{path} must have the columns id and answer; found: {', '.join(opened.columns)}.")
    rows = [(str(row["id"]).strip(), str(row["answer"]).strip().upper()) for _, row in opened.rows()]
    answers = dict(rows)
    if len(answers) < len(rows):
        raise InputError(f"{path} has ids more than once: {len(rows)} rows, {len(answers)} ids.")
    bad = [row_id for row_id, answer in rows if len(answer) != 1 or answer not in LETTERS]
    if bad:
        raise InputError(f"{path}: `answer` is no letter in {name_rows(bad, len(rows))}.")
    return {row_id: LETTERS.index(answer) for row_id, answer in rows}


def with_answers(predictions: Predictions, answers: dict[str, int]) -> Predictions:
    """`predictions` with the answers of a file, matched by id. Raises InputError for ids without one."""
    missing = [row_id for row_id in predictions.ids if row_id not in answers]
    if missing:
        raise InputError(f"no answer for {name_rows(missing, len(predictions.ids))}.")
    matched: Sequence[int] = [answers[row_id] for row_id in predictions.ids]
    beyond = [
        row_id
        for row_id, answer, row in zip(predictions.ids, matched, predictions.choice_logits, strict=True)
        if answer >= len(row)
    ]
    if beyond:
        raise InputError(f"the answer is none of the row's choices in {name_rows(beyond, len(predictions.ids))}.")
    return replace(predictions, answers=list(matched))
