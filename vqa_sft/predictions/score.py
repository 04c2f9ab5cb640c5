"""`vqa-sft score`: a table of metrics of prediction files. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqa_sft.console import table
from vqa_sft.errors import InputError
from vqa_sft.predictions.check_file import CALIBRATION
from vqa_sft.predictions.class_tables import not_of_all_classes
from vqa_sft.predictions.file import Predictions, read_predictions, with_answers
from vqa_sft.predictions.matched import read_answers
from vqa_sft.predictions.metrics import describe, softmax, with_intervals

METRICS = ("accuracy", "nll", "brier", "ece", "ece_equal_mass")


def split_name(item: str) -> tuple[str, str]:
    """The name and the path of PATH or NAME=PATH; without a name, the path is the name."""
    name, _, path = ("", "", item) if Path(item).exists() or "=" not in item else item.partition("=")
    return name or path, path


def read_named(item: str) -> tuple[str, Predictions]:
    """The name and the predictions of FILE.parquet or NAME=FILE.parquet."""
    name, path = split_name(item)
    return name, read_predictions(path)


def score_table(files: Sequence[str], answers_file: str | None = None, data: str | None = None, **options: Any) -> str:
    """A table of rows, accuracy, NLL in nats, Brier score and both ECE, with 95% intervals: a line for each prediction
    file, or two, without and with its calibration. `options` say how the answers are read."""
    lines = []
    for item in files:
        name, predictions = read_named(item)
        if answers_file is not None:
            if predictions.candidates:
                raise not_of_all_classes(name, "score --answers")
            predictions = with_answers(predictions, read_answers(answers_file, predictions, name, data, **options))
        if None in predictions.answers and predictions.candidates:
            raise InputError(
                f"{name} holds rows whose label is unknown, or none of their candidates. vqa-sft fuse makes "
                "probabilities of all classes, which can be scored."
            )
        if None in predictions.answers:
            raise InputError(f"{name} holds rows without an answer. Give --answers FILE.csv.")
        lines += score_lines(name + predictions.shown, predictions)
    return table([["", "rows", *METRICS], *lines])


def score_lines(name: str, predictions: Predictions) -> list[list[str]]:
    """The line of a prediction file whose answers are all known, or both lines of a calibrated one."""
    calibration = predictions.metadata.get(CALIBRATION) or {}
    changes = calibration.get("temperature", 1) != 1 or calibration.get("bias") or calibration.get("scale_weights")
    kinds = [("", softmax(predictions.choice_logits))]
    if changes:
        parts = [f", temperature {calibration['temperature']:.2f}"]
        parts += ["bias"] if calibration.get("bias") else []
        parts += ["weights of scales"] if calibration.get("scale_weights") else []
        kinds = [(", as scored", kinds[0][1]), (", ".join(parts), predictions.probs)]
    lines = []
    for kind, probs in kinds:
        values = with_intervals(probs, predictions.answers)
        lines.append([name + kind, f"{len(predictions.ids):,}", *describe(values, METRICS)])
    return lines
