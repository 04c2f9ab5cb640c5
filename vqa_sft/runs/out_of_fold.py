"""The out-of-fold prediction file and its metrics: every row scored by the run that did not train on it."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vqa_sft.console import table
from vqa_sft.data.folds import read_fold_of
from vqa_sft.data.split import ROWS, TRAIN, VALIDATION
from vqa_sft.errors import InputError, name_rows
from vqa_sft.predictions.calibration import CALIBRATION, OUT_OF_FOLD
from vqa_sft.predictions.file import Predictions, read_predictions, write_predictions
from vqa_sft.predictions.metrics import all_metrics, softmax, with_intervals
from vqa_sft.runs import folder as run_folder
from vqa_sft.runs.checkpoints import last_whole_checkpoint

METRICS = "out_of_fold.json"


def check_folds(folder: str | Path, runs: Sequence[str], folds_file: str | Path, overwrite: bool) -> None:
    """Raises InputError where the folds that `folder` holds do not go together with `runs`, those of the file: one that
    is none of them, or, unless they are trained again, one that validates on other rows than the file has by now."""
    found = [run for run in run_folder.runs_in([str(folder)]) if run != str(folder)]
    found = [run for run in found if run_folder.is_finished(run) or last_whole_checkpoint(run)]
    if others := sorted({Path(run).name for run in found} - {Path(run).name for run in runs}):
        raise InputError(
            f"{folder} holds {', '.join(others)}, which {folds_file} has not, and its predictions would take it too. "
            "Move it away, or choose another output_dir."
        )
    fold_of = read_fold_of(folds_file)
    for run in [] if overwrite else found:
        fold = int(Path(run).name.removeprefix("fold"))
        parts = [(row_id, part) for row_id, part in _parts_of(run) if part in (TRAIN, VALIDATION) and row_id in fold_of]
        if moved := [row_id for row_id, part in parts if (part == VALIDATION) != (fold_of[row_id] == fold)]:
            raise InputError(
                f"{folds_file} has changed since {run} was trained: other folds of {name_rows(moved, len(parts))}. "
                "Bring the earlier file back, or train all folds again with --overwrite."
            )


def _parts_of(run: str | Path) -> list[tuple[str, str]]:
    """Id and part of all rows of a run's data, in their order."""
    with (Path(run) / ROWS).open(newline="", encoding="utf-8") as file:
        return [(row["id"], row["part"]) for row in csv.DictReader(file)]


def _ids_of(run: str | Path) -> list[str]:
    return [row_id for row_id, _ in _parts_of(run)]


def write_out_of_fold(folder: str | Path, runs: Sequence[str | Path]) -> str:
    """Write both files into `folder`, rows in the order of the data; a table of metrics, by fold and of all rows.

    The metrics are of the rows with an answer: the class of others is not among their candidates.
    """
    parts = {Path(run).name: read_predictions(Path(run) / run_folder.VALIDATION) for run in runs}
    together = _put_together(parts, _ids_of_all(runs), Path(folder))
    file = Path(folder) / OUT_OF_FOLD
    before = file.read_bytes() if file.is_file() else None
    write_predictions(file, together)
    if file.read_bytes() != before:  # its temperatures are of other weights
        (Path(folder) / CALIBRATION).unlink(missing_ok=True)
    known = {name: _answered(part) for name, part in (parts | {"out of fold": together}).items()}
    metrics = {name: all_metrics(*of_part) for name, of_part in known.items()}
    with_95, values = with_intervals(*known["out of fold"]), metrics["out of fold"]
    ids, num_rows = together.ids, len(known["out of fold"][1])
    without = {"unanswered": len(ids) - num_rows} if num_rows < len(ids) else {}
    folds = {name: metrics[name] for name in parts}
    run_folder.write_json(Path(folder) / METRICS, {"rows": num_rows} | without | with_95 | {"folds": folds})
    lines = [["", "rows", *values]]
    for name, of_part in metrics.items():
        lines.append([name, f"{len(known[name][1]):,}", *(f"{value:.4f}" for value in of_part.values())])
    intervals = [with_95[f"{name}_95"] for name in values]
    lines.append(["95% of resamples", "", *(f"{low:.4f}-{high:.4f}" for low, high in intervals)])
    said = f"\n{len(ids) - num_rows:,} of {len(ids):,} rows are not in it: their class is no candidate."
    return table(lines) + (said if without else "")


def _ids_of_all(runs: Sequence[str | Path]) -> list[str]:
    """All rows of the runs' data. Raises InputError where one was trained on other rows."""
    first = _ids_of(runs[0])
    for run in runs[1:]:
        if _ids_of(run) != first:
            raise InputError(f"{run} and {runs[0]} were trained on other rows. Train all folds again: --overwrite.")
    return first


def _put_together(parts: dict[str, Predictions], ids: Sequence[str], folder: Path) -> Predictions:
    """The rows that the folds validate on, in the order of `ids`. Raises InputError where two have the same."""
    place_of: dict[str, tuple[Predictions, int]] = {}
    for part in parts.values():
        if twice := [row_id for row_id in part.ids if row_id in place_of]:
            raise InputError(f"two folds validate on {name_rows(twice, len(part.ids))}. Train the folds again.")
        place_of |= {row_id: (part, place) for place, row_id in enumerate(part.ids)}
    kept = [row_id for row_id in ids if row_id in place_of]
    names = ("choice_logits", "answers", "digests", "candidates", "labels")
    columns: dict[str, list] = {
        name: [getattr(part, name)[place] for part, place in map(place_of.__getitem__, kept)]
        for name in names
        if all(getattr(part, name) for part in parts.values())
    }
    metadata = next(iter(parts.values())).metadata | {"run": str(folder), "split": "out-of-fold", "folds": [*parts]}
    return Predictions(kept, metadata=metadata, **columns)


def _answered(predictions: Predictions) -> tuple[list[np.ndarray], list[int]]:
    """Probabilities as scored, and answers, of the rows with an answer."""
    pairs = zip(predictions.choice_logits, predictions.answers, strict=True)
    known = [(logits, answer) for logits, answer in pairs if answer is not None]
    return softmax([logits for logits, _ in known]), [answer for _, answer in known]
