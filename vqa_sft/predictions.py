"""The prediction file and the submission file. No torch.

A prediction file is Parquet: `id`, `choice_logits` (log-probabilities of the row's own choices, dataset order, ragged,
no -inf) and `answer` (null where unknown), in the row order of the data. Its metadata say what made it.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqa_sft.data import Columns, read_csv
from vqa_sft.errors import InputError, name_rows
from vqa_sft.mcq import LETTERS

SCHEMA = pa.schema([("id", pa.string()), ("choice_logits", pa.list_(pa.float32())), ("answer", pa.int64())])
METADATA_KEY = b"vqa_sft"


@dataclass
class Predictions:
    """N rows in data order; `choice_logits[i]` has as many numbers as row i has choices."""

    ids: list[str]
    choice_logits: list[list[float]]
    answers: list[int | None]
    metadata: dict = field(default_factory=dict)

    @property
    def best(self) -> list[int]:
        """The likeliest choice of each row; ties go to the first."""
        return [int(np.argmax(row)) for row in self.choice_logits]


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write `predictions` whole or not at all."""
    columns = [predictions.ids, predictions.choice_logits, predictions.answers]
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
    predictions = Predictions(*columns, metadata=metadata)
    bad = [
        row_id
        for row_id, logits, answer in zip(*columns, strict=True)
        if not logits or not np.isfinite(logits).all() or not (answer is None or 0 <= answer < len(logits))
    ]
    if bad or not predictions.ids:
        raise InputError(f"{path} is damaged: " + (name_rows(bad, len(predictions.ids)) if bad else "no rows") + ".")
    return predictions


def write_submission(path: str | Path, predictions: Predictions, columns: Columns) -> None:
    """A CSV of id and answer letter, in the names and the letter case of the data itself."""
    letters = LETTERS if columns.answers_are_upper else LETTERS.lower()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([columns.id, columns.answer])
        writer.writerows(zip(predictions.ids, (letters[choice] for choice in predictions.best), strict=True))
    unfinished.replace(path)


def read_answers(path: str | Path) -> dict[str, int]:
    """Ids and answer indices of a CSV with columns `id` and `answer` (letters)."""
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}.")
    table = read_csv(Path(path))
    if not {"id", "answer"} <= set(table.columns):
        raise InputError(f"{path} must have the columns id and answer; found: {', '.join(table.columns)}.")
    answers = dict(zip(table["id"].str.strip(), table["answer"].str.strip().str.upper(), strict=True))
    if len(answers) < len(table):
        raise InputError(f"{path} has ids more than once: {len(table)} rows, {len(answers)} ids.")
    bad = [row_id for row_id, answer in answers.items() if len(answer) != 1 or answer not in LETTERS]
    if bad:
        raise InputError(f"{path}: `answer` is no letter in {name_rows(bad, len(answers))}.")
    return {row_id: LETTERS.index(answer) for row_id, answer in answers.items()}


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
    return Predictions(predictions.ids, predictions.choice_logits, list(matched), predictions.metadata)
