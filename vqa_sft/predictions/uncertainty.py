"""`vqa-sft uncertainty`: margin, entropy, conformal sets that hold the answer with a stated probability. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqa_sft.console import table
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.predictions.calibration import VALIDATION, read_calibration, views_key
from vqa_sft.predictions.check_file import CALIBRATION
from vqa_sft.predictions.file import Predictions, may_be_of_one_run, read_predictions, shared_rows
from vqa_sft.predictions.submission import check_table, write_table
from vqa_sft.questions.letters import LETTERS

HEADER = ("id", "best", "probability", "margin", "entropy", "agreement", "set")
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
SHOWN = 10


@dataclass
class Uncertainty:
    """Of N rows: the best choice, its probability, its margin over the second one, the entropy in nats, the share of
    views that agree (None: unknown), and, with a coverage, the choices of the conformal set."""

    ids: list[str]
    best: list[int]
    probability: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    agreement: list[float | None]
    sets: list[list[int]] | None = None


def measure_uncertainty(predictions: Predictions) -> Uncertainty:
    probs = predictions.probs
    weights = (predictions.metadata.get(CALIBRATION) or {}).get("scale_weights") or {}
    # Agreement counts scales equally: with other weights it is not about this best choice.
    counts_equally = max(weights.values(), default=0) - min(weights.values(), default=0) < 1e-9
    agreement = predictions.agreement if counts_equally else []
    top_two = [np.sort(row)[::-1][:2] for row in probs]
    return Uncertainty(
        predictions.ids,
        predictions.best,
        np.array([row[0] for row in top_two]),
        np.array([row[0] - (row[1] if len(row) > 1 else 0) for row in top_two]),
        np.array([-sum(p * math.log(p) for p in row if p > 0) for row in probs]),
        agreement or [None] * len(probs),
    )


def conformal_threshold(held_out: Predictions, coverage: float) -> float:
    """The ceil((n + 1) coverage)-th smallest of the n held-out scores 1 - p(answer); infinite where there are too few
    rows for so high a coverage (Vovk et al. 2005; LAC: Sadinle, Lei and Wasserman 2019, arXiv 1609.00451)."""
    scores = sorted(1 - row[answer] for row, answer in zip(held_out.probs, held_out.answers, strict=True))
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)  # as a float, 0.9 is a little more than nine tenths
    return float(scores[rank - 1]) if rank <= len(scores) else math.inf


def conformal_sets(predictions: Predictions, threshold: float) -> list[list[int]]:
    """The choices with 1 - p at most the threshold. Over rows like the held-out ones they hold the answer with the
    coverage asked for: on average, not for each kind of row. A set that would be empty holds the best choice, which can
    only raise the coverage."""
    return [conformal_set(row, threshold) for row in predictions.probs]


def conformal_set(probs: np.ndarray, threshold: float) -> list[int]:
    """That of one row's probabilities (C,)."""
    return [i for i, p in enumerate(probs) if 1 - p <= threshold] or [int(np.argmax(probs))]


@dataclass(frozen=True)
class Threshold:
    """`conformal_threshold` of a run's validation rows, for questions that are asked one by one."""

    coverage: float
    value: float
    num_rows: int


def threshold_of_run(folder: str | Path, coverage: float) -> Threshold | None:
    """That of a run's own validation rows, as they were scored in training; None where it has none."""
    file = Path(folder) / VALIDATION
    if not file.is_file():
        return None
    held_out = read_predictions(file)
    found = read_calibration(folder, held_out.metadata)
    held_out.metadata[CALIBRATION] = found.as_dict if found else None
    return Threshold(coverage, conformal_threshold(held_out, coverage), len(held_out.ids))


def risk_at(is_wrong: np.ndarray, certainty: np.ndarray) -> np.ndarray:
    """Error rate (N,) of the 1, 2, ..., N most certain rows; ties in their order."""
    order = np.argsort(-certainty, kind="stable")
    return np.cumsum(is_wrong[order]) / np.arange(1, len(order) + 1)


def risk_coverage_table(predictions: Predictions, uncertainty: Uncertainty) -> str:
    """Error rates of the most certain rows, by margin and by entropy, and the area under each curve (its mean)."""
    is_wrong = np.array([best != answer for best, answer in zip(uncertainty.best, predictions.answers, strict=True)])
    curves = [risk_at(is_wrong, uncertainty.margin), risk_at(is_wrong, -uncertainty.entropy)]
    lines = [["coverage", "rows", "error by margin", "error by entropy"]]
    for coverage in COVERAGES:
        num_rows = max(1, math.ceil(coverage * len(is_wrong) - 1e-9))
        lines.append([f"{coverage:.0%}", f"{num_rows:,}", *(f"{curve[num_rows - 1]:.4f}" for curve in curves)])
    return table([*lines, ["area", "", *(f"{curve.mean():.4f}" for curve in curves)]])


def describe(
    file: str | Path,
    *,
    coverage: float | None = None,
    calibrate_on: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> str:
    """The least certain rows; where answers are known, error rates by coverage; with a `coverage`, conformal sets. All
    rows go to `output`. Raises InputError before anything is written."""
    if (coverage is None) != (calibrate_on is None):
        raise InputError("--coverage and --calibrate-on belong together: the sets are learned on held-out rows.")
    if coverage is not None and not 0 < coverage < 1:
        raise InputError(f"--coverage must be between 0 and 1; got {coverage}.")
    if output is not None:
        check_table(output, HEADER, [file, calibrate_on], overwrite)
    predictions = read_predictions(file)
    uncertainty = measure_uncertainty(predictions)
    parts = [_least_certain(uncertainty)]
    if not predictions.unanswered:
        parts.append(risk_coverage_table(predictions, uncertainty))
    if coverage is not None and calibrate_on is not None:
        held_out = _read_held_out(calibrate_on, file, predictions)
        parts += _note_differences(calibrate_on, file, held_out, predictions)
        threshold = conformal_threshold(held_out, coverage)
        uncertainty.sets = conformal_sets(predictions, threshold)
        parts.append(_describe_sets(uncertainty, predictions, coverage, threshold, len(held_out.ids)))
    if output is not None:
        rows = [_cells(uncertainty, i) for i in range(len(uncertainty.ids))]
        write_table(output, HEADER, rows)
        parts.append(f"Wrote {len(rows):,} rows to {output}.")
    return "\n\n".join(parts)


def _read_held_out(path: str | Path, file: str | Path, predictions: Predictions) -> Predictions:
    """The rows that the sets are learned on, with the calibration of the rows that the sets are for."""
    held_out = read_predictions(path)
    if unknown := held_out.unanswered:
        raise InputError(f"{path} has no answer in {name_rows(unknown, len(held_out.ids))}. Give rows with answers.")
    if shared := shared_rows(held_out.ids, {*predictions.ids}, held_out.digest_of, predictions.digest_of):
        raise InputError(
            f"{path} and {file} share {name_rows(shared, len(held_out.ids))}. Sets hold for rows that they were not "
            "learned on. Give others: validation or out-of-fold rows."
        )
    ours, theirs = (_how(one) for one in (predictions, held_out))
    if ours != theirs:
        raise InputError(
            f"{path} was scored with {theirs}, {file} with {ours}: their probabilities cannot be compared. Score the "
            "held-out rows as these; for an ensemble of folds, where some fold has seen every row, take one fold's "
            "file and out_of_fold.parquet."
        )
    return held_out.calibrated_as(predictions)


def _how(predictions: Predictions) -> str:
    found = predictions.metadata.get("ensemble")
    if found is None:
        return views_key(predictions.metadata) + predictions.shown
    average = found.get("average") if isinstance(found, dict) else None
    return f"an ensemble ({average}){predictions.shown}"


def _note_differences(path: str | Path, file: str | Path, held_out: Predictions, predictions: Predictions) -> list[str]:
    """Why the coverage may be another than asked for: the files may be of different runs. No error, for a run may have
    been renamed or merged since."""
    ours, theirs = (_makers(one) for one in (predictions, held_out))
    if len(ours) != len(theirs) or not all(map(may_be_of_one_run, ours, theirs)):
        return [
            f"Beware: {path} was scored by {_named(theirs)}, {file} by {_named(ours)}. If these are different runs, "
            "the sets hold the answer more or less often than stated here."
        ]
    if [_role(one) for one in ours] != [_role(one) for one in theirs]:
        return [
            "Beware: the files of the two ensembles have other weights, views or temperatures, and the sets may hold "
            "the answer more or less often than stated here. Held-out rows that predict.py scores as --data have the "
            "same."
        ]
    return []


def _makers(predictions: Predictions) -> list[Predictions]:
    """The files of an ensemble in the order of their runs, only with their metadata; else the file itself."""
    found = predictions.metadata.get("ensemble")
    if found is None:
        return [predictions]
    files = found.get("files") if isinstance(found, dict) else None
    files = [one for one in files or [] if isinstance(one, dict) and isinstance(one.get("run"), str | None)]
    return [Predictions([], [], [], one) for one in sorted(files, key=lambda one: one.get("run") or "")]


def _role(predictions: Predictions) -> list:
    """Of a file of an ensemble, what the probabilities of the ensemble depend on: weight, views, calibration."""
    metadata = predictions.metadata
    if (weight := metadata.get("weight")) is None:  # no file of an ensemble
        return []
    views = [metadata.get("orders") or "identity", metadata.get("scales") or [1.0], metadata.get("average") or "mean"]
    return [round(weight, 6) if isinstance(weight, float) else weight, views, metadata.get(CALIBRATION)]


def _named(makers: Sequence[Predictions]) -> str:
    return ", ".join(one.maker for one in makers) or "an unknown run"


def _least_certain(uncertainty: Uncertainty) -> str:
    rows = np.argsort(uncertainty.margin, kind="stable")[:SHOWN]
    lines = [["least margin", "best", "probability", "margin", "entropy"]]
    lines += [[printable(row[0]), *row[1:5]] for row in (_cells(uncertainty, i) for i in rows)]
    return table(lines)


def _describe_sets(
    uncertainty: Uncertainty, predictions: Predictions, coverage: float, threshold: float, num_held_out: int
) -> str:
    sets = uncertainty.sets or []
    sizes = np.array([len(found) for found in sets])
    least = f"choices with a probability of at least {1 - threshold:.4f}" if math.isfinite(threshold) else "all choices"
    said = (
        f"Sets for a coverage of {coverage:.0%}, from {num_held_out:,} held-out rows: {least}; {sizes.mean():.2f} "
        f"of a row on average,\none alone in {np.mean(sizes == 1):.1%} of the rows."
    )
    held = [answer in found for answer, found in zip(predictions.answers, sets, strict=True) if answer is not None]
    if not held:
        return said
    share = float(np.mean(held))
    error = math.sqrt(share * (1 - share) / len(held))
    return f"{said} They hold the answer in {share:.2%} of {len(held):,} rows (standard error {error:.2%})."


def _cells(uncertainty: Uncertainty, i: int) -> list[str]:
    numbers = [f"{values[i]:.6f}" for values in (uncertainty.probability, uncertainty.margin, uncertainty.entropy)]
    agreement = uncertainty.agreement[i]
    letters = "".join(LETTERS[choice] for choice in uncertainty.sets[i]) if uncertainty.sets else ""
    shown = "" if agreement is None else f"{agreement:.4f}"
    return [uncertainty.ids[i], LETTERS[uncertainty.best[i]], *numbers, shown, letters]
