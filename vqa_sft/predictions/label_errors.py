"""`vqa-sft label-errors`: rows whose given answer is improbable to a model that was not trained on them. No torch.

Rows are ranked by the probability of the given answer (self-confidence). As in confident learning (Northcutt, Jiang and
Chuang 2021, arXiv 1911.00068, section 3), a row is a likely error where its best choice is another one and reaches the
threshold: the mean self-confidence. There it is one for each class; choices of different questions are no classes, so
here it is one for all rows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqa_sft.console import table
from vqa_sft.data.class_probs import NONE_OF_THESE
from vqa_sft.errors import InputError, printable
from vqa_sft.predictions.calibration import default_file
from vqa_sft.predictions.check_file import CLASSES
from vqa_sft.predictions.file import Predictions, read_predictions
from vqa_sft.predictions.submission import check_table, write_table
from vqa_sft.questions.letters import LETTERS

HEADER = ("id", "answer", "probability", "best", "best_probability", "is_likely")
SHOWN = 10


@dataclass
class Suspicion:
    """Of N rows: the probability of the given answer, nan where none is given; the best choice and its probability;
    whether the answer is a likely error. `ranked` are the rows with an answer, the most suspicious first."""

    probability: np.ndarray
    best: np.ndarray
    best_probability: np.ndarray
    is_likely: np.ndarray
    ranked: list[int]


def suspect(predictions: Predictions) -> Suspicion:
    probs = predictions.probs
    pairs = zip(probs, predictions.answers, strict=True)
    given = np.array([np.nan if answer is None else row[answer] for row, answer in pairs])
    best = np.array([row.argmax() for row in probs])
    best_probability = np.array([row.max() for row in probs])
    answered = np.flatnonzero(~np.isnan(given))
    threshold = given[answered].mean() if len(answered) else np.inf
    is_likely = (best_probability >= threshold) & (given < best_probability)  # never where no answer is given
    ranked = answered[np.argsort(given[answered], kind="stable")].tolist()
    return Suspicion(given, best, best_probability, is_likely, ranked)


def write_label_errors(item: str | Path, output: str | Path | None = None, *, overwrite: bool = False) -> str:
    """The most suspicious rows of a prediction file, or of the rows that a run did not train on; all rows with an
    answer go to `output`. Raises InputError before anything is written."""
    file = default_file(Path(item), "Name a prediction file.") if Path(item).is_dir() else Path(item)
    if output is not None:
        check_table(output, HEADER, [file], overwrite)
    predictions = read_predictions(file)
    found = suspect(predictions)
    if not found.ranked:
        raise InputError(f"{file} holds no answers, so none can be wrong. Give rows with answers.")
    rows = [_cells(predictions, found, row) for row in found.ranked]
    num_likely = int(found.is_likely.sum())
    parts = [
        f"{num_likely:,} of {len(rows):,} answers are likely errors ({num_likely / len(rows):.1%}), if the model was "
        "not trained on these rows and is mostly right.",
        table([HEADER, *([printable(cell) for cell in row] for row in rows[:SHOWN])]),
    ]
    if output is not None:
        write_table(output, HEADER, rows)
        parts.append(f"Wrote {len(rows):,} rows to {output}, the most suspicious first.")
    return "\n\n".join(parts)


def _cells(predictions: Predictions, found: Suspicion, row: int) -> list[str]:
    given, best = f"{found.probability[row]:.4f}", f"{found.best_probability[row]:.4f}"
    answer, likely = (_name(predictions, row, choice) for choice in (predictions.answers[row] or 0, found.best[row]))
    return [predictions.ids[row], answer, given, likely, best, "yes" if found.is_likely[row] else "no"]


def _name(predictions: Predictions, row: int, choice: int) -> str:
    """The letter of a choice, or the class of a candidate."""
    if not predictions.candidates:
        return LETTERS[choice]
    place = predictions.candidates[row][choice]
    return "none of these" if place == NONE_OF_THESE else predictions.metadata[CLASSES][place]
