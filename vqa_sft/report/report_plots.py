"""The plots of `vqa-sft report`: calibration, confidence, training curves. No plot holds texts of users. No torch."""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from vqa_sft.errors import InputError
from vqa_sft.report.check_plots import BAR, GRID, MARK, draw
from vqa_sft.report.report_groups import share_of
from vqa_sft.report.report_inputs import Inputs, runs_in
from vqa_sft.runs.folder import LOG

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_BINS = 15  # those of the ECE
SIZE = (2.3, 3.5)  # height and width: four stand side by side, and their texts stay readable
CURVES = (("loss", "eval_loss"), ("accuracy", "eval_accuracy"))  # in training, in validation


def make_plots(inputs: Inputs) -> Iterator[tuple[str, Markup]]:
    """(caption, SVG) of each input: calibration and confidence; then the training curves of the runs among them."""
    rows, answers = inputs.answered, inputs.answers
    for one in inputs.inputs:
        start = f"{one.name}: " if len(inputs.inputs) > 1 else ""
        if len(rows):
            confidence, right = one.confidence[rows], one.best[rows] == answers[rows]
            said = f"accuracy {right.mean():.3f}, mean confidence {confidence.mean():.3f}"
            yield f"{start}Reliability: {said}", reliability(confidence, right)
            wrong = confidence[~right]
            sure = f"{int((wrong > 0.9).sum()):,} of {len(wrong):,} errors are more than 90% sure"
            sure = sure if len(wrong) else "no errors"
            yield f"{start}Confidence: {sure}", confidences(confidence, right)
        else:
            yield f"{start}Confidence: mean {one.confidence.mean():.3f}", confidences(one.confidence, None)
    for one in inputs.inputs:
        if one.folder is not None:
            yield from _curves(f"{one.name}: " if len(inputs.inputs) > 1 else "Training: ", one.folder)


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """The bin (N,) of each confidence; bins are (low, high], as in `metrics.ece_of`."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)


def reliability(confidence: np.ndarray, right: np.ndarray) -> Markup:
    """Accuracy by confidence, with the 95% interval of each bin that has rows."""
    bins = bins_of(confidence)
    known = [number for number in range(NUM_BINS) if (bins == number).any()]
    means = [confidence[bins == number].mean() for number in known]
    shares = [share_of(int(right[bins == number].sum()), int((bins == number).sum())) for number in known]
    heights = np.array([share.accuracy for share in shares])
    below = heights - [share.low for share in shares]
    above = [share.high for share in shares] - heights

    def paint(axes: "Axes") -> None:
        axes.bar((np.array(known) + 0.5) / NUM_BINS, heights, 0.9 / NUM_BINS, color=BAR)
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.5, linestyle="--")
        axes.errorbar(means, heights, np.maximum([below, above], 0), fmt="o", color=MARK, markersize=4, linewidth=1.2)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")

    return draw(paint, *SIZE)


def confidences(confidence: np.ndarray, right: np.ndarray | None) -> Markup:
    """How many rows have which confidence; of those with answers, the wrong ones too."""
    edges = np.linspace(0, 1, NUM_BINS + 1)

    def count(rows: np.ndarray) -> np.ndarray:
        return np.bincount(bins_of(confidence[rows]), minlength=NUM_BINS)

    def paint(axes: "Axes") -> None:
        axes.stairs(count(np.full(len(confidence), True)), edges, color=BAR, fill=True, label="all rows")
        if right is not None:
            axes.stairs(count(~right), edges, color=MARK, linewidth=1.5, hatch="///", label="wrong")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        axes.set(xlim=(0, 1), xlabel="confidence", ylabel="rows")

    return draw(paint, *SIZE)


def _curves(start: str, folder: Path) -> Iterator[tuple[str, Markup]]:
    """Loss and accuracy by step; of folds, a line for each."""
    logs = [read_log(run / LOG) for run in runs_in(folder) if (run / LOG).is_file()]
    for of_training, of_validation in CURVES:
        lines = [
            (key, [(entry["step"], entry[key]) for entry in log if key in entry])
            for log in logs
            for key in (of_training, of_validation)
        ]
        lines = [(key, points) for key, points in lines if points]
        if not lines:
            continue
        last = [points[-1][1] for key, points in lines if key == of_validation]
        said = f"{of_training} by step" + (f", in validation {np.mean(last):.3f} at the end" if last else "")
        said += f", mean of {len(last)} folds" if len(last) > 1 else ""
        yield start + said, _lines(lines, of_training, of_validation)


def _lines(lines: Sequence[tuple[str, list]], of_training: str, of_validation: str) -> Markup:
    def paint(axes: "Axes") -> None:
        styles = {
            of_training: {"color": BAR, "label": "training", "linewidth": 1.2},
            of_validation: {"color": MARK, "label": "validation", "marker": "o", "markersize": 4},
        }
        for key, points in lines:
            dots = {"marker": "o", "markersize": 3} if len(points) < 20 else {}  # of one step there is no line
            axes.plot(*zip(*points, strict=True), **dots | styles[key])
            styles[key].pop("label", None)  # once for all folds
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="step", ylabel=of_training)

    return draw(paint, *SIZE)


def read_log(path: Path) -> list[dict[str, float]]:
    """What a run logged, a mapping for every step. Raises InputError for a file that is no log."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                {name: float(cell) for name, cell in row.items() if cell and _is_number(cell)}
                for row in csv.DictReader(file, strict=True)
            ]
        if any("step" not in row for row in rows):
            raise ValueError("a line without a step")
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise InputError(f"{path} is damaged ({error}). Remove it to have a page without training curves.") from error
    return rows


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
