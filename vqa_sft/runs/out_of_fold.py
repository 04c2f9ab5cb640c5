"""The out-of-fold prediction file and its metrics: every row scored by the run that did not train on it."""

import csv
from collections.abc import Sequence
from pathlib import Path

from vqa_sft.console import table
from vqa_sft.data.split import ROWS
from vqa_sft.errors import InputError, name_rows
from vqa_sft.predictions.calibration import CALIBRATION, OUT_OF_FOLD
from vqa_sft.predictions.file import Predictions, read_predictions, write_predictions
from vqa_sft.predictions.metrics import all_metrics, softmax, with_intervals
from vqa_sft.runs import folder as run_folder

METRICS = "out_of_fold.json"


def _ids_of(run: str | Path) -> list[str]:
    """All rows of a run's data, in their order."""
    with (Path(run) / ROWS).open(newline="", encoding="utf-8") as file:
        return [row["id"] for row in csv.DictReader(file)]


def write_out_of_fold(folder: str | Path, runs: Sequence[str | Path]) -> str:
    """Write both files into `folder`, rows in the order of the data; a table of metrics, by fold and of all rows."""
    parts = {Path(run).name: read_predictions(Path(run) / run_folder.VALIDATION) for run in runs}
    row_of: dict[str, tuple[list[float], int | None]] = {}
    digest_of: dict[str, str] = {}
    for part in parts.values():
        if twice := [row_id for row_id in part.ids if row_id in row_of]:
            raise InputError(f"two folds validate on {name_rows(twice, len(part.ids))}. Train the folds again.")
        digest_of |= part.digest_of
        row_of |= zip(part.ids, zip(part.choice_logits, part.answers, strict=True), strict=True)
    data = {str(run): _ids_of(run) for run in runs}
    for run, found in data.items():
        if found != data[str(runs[0])]:
            raise InputError(f"{run} and {runs[0]} were trained on other rows. Train all folds again: --overwrite.")
    ids = [row_id for row_id in data[str(runs[0])] if row_id in row_of]
    logits, answers = zip(*(row_of[row_id] for row_id in ids), strict=True)
    metadata = next(iter(parts.values())).metadata | {"run": str(folder), "split": "out-of-fold", "folds": [*parts]}
    file = Path(folder) / OUT_OF_FOLD
    before = file.read_bytes() if file.is_file() else None
    digests = [digest_of.get(row_id) for row_id in ids]
    write_predictions(file, Predictions(ids, [*logits], [*answers], metadata, digests=digests))
    if file.read_bytes() != before:  # its temperatures are of other weights
        (Path(folder) / CALIBRATION).unlink(missing_ok=True)

    probs = softmax(logits)
    values, with_95 = all_metrics(probs, answers), with_intervals(probs, answers)
    folds = {name: all_metrics(softmax(part.choice_logits), part.answers) for name, part in parts.items()}
    run_folder.write_json(Path(folder) / METRICS, {"rows": len(ids)} | with_95 | {"folds": folds})
    lines = [["", "rows", *values]]
    for name, of_fold in folds.items():
        lines.append([name, f"{len(parts[name].ids):,}", *(f"{value:.4f}" for value in of_fold.values())])
    lines.append(["out of fold", f"{len(ids):,}", *(f"{value:.4f}" for value in values.values())])
    intervals = [with_95[f"{name}_95"] for name in values]
    lines.append(["95% of resamples", "", *(f"{low:.4f}-{high:.4f}" for low, high in intervals)])
    return table(lines)
