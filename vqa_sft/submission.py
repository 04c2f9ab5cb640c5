"""The submission file, in the names and the format that are asked for. No torch."""

import csv
from collections.abc import Sequence
from pathlib import Path

from vqa_sft.answers import write_answer
from vqa_sft.columns import Columns
from vqa_sft.predictions import Predictions, whole


def write_submission(
    path: str | Path, predictions: Predictions, columns: Columns, choices: Sequence[Sequence[str]]
) -> None:
    """A CSV of id and answer, in the names and the answer format of the data; `choices` are those of each row."""
    best = zip(predictions.best, choices, strict=True)
    answers = [write_answer(i, texts, columns.answer_format, columns.answers_are_upper) for i, texts in best]
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([columns.id, columns.answer])
        writer.writerows(zip(predictions.ids, answers, strict=True))
