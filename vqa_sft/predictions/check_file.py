"""What may not be wrong in a prediction file: values that would fail later, or silently give wrong results."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vqa_sft.batch.control import KINDS
from vqa_sft.data.answers import FORMATS
from vqa_sft.data.class_probs import NONE_OF_THESE
from vqa_sft.errors import InputError, name_rows
from vqa_sft.questions.letters import LETTERS

if TYPE_CHECKING:
    from vqa_sft.predictions.file import Predictions

CALIBRATION, ANSWERS, IMAGES = "calibration", "answers", "images"  # in the metadata
CLASSES = "classes"  # there too, of a classification
CANDIDATES_FILE = "candidates_file"  # there too: where the candidates were


def check_content(path: str | Path, predictions: "Predictions") -> None:
    """Raises InputError for a file of such values."""
    if (
        fault := _fault_of_rows(predictions)
        or _fault_of_metadata(predictions.metadata)
        or _fault_of_scales(predictions)
        or _fault_of_candidates(predictions)
    ):
        raise InputError(f"{path} is damaged: {fault}.")
    scales, calibration = predictions.metadata.get("scales") or [], predictions.metadata.get(CALIBRATION)
    if calibration is not None:
        check_calibration(calibration, f"the calibration in {path}", scales)
        if calibration.get("scale_weights") and not predictions.scale_logits:
            raise InputError(f"{path} is damaged: it has weights of its scales, and no scale_logits.")


def _fault_of_rows(predictions: "Predictions") -> str:
    ids = predictions.ids
    if not ids:
        return "no rows"
    if None in ids:
        return f"{ids.count(None):,} of {len(ids):,} rows have no id"
    bad = [
        row_id
        for row_id, logits, answer in zip(ids, predictions.choice_logits, predictions.answers, strict=True)
        if not _are_finite(logits) or not 1 <= len(logits) <= len(LETTERS)
        or not (answer is None or 0 <= answer < len(logits))
    ]  # fmt: skip
    twice = [row_id for row_id, count in Counter(ids).items() if count > 1]
    if bad:
        return name_rows(bad, len(ids))
    return f"ids are not unique: {name_rows(twice, len(ids))}" if twice else ""


def _fault_of_metadata(metadata: object) -> str:
    if not isinstance(metadata, dict):
        return "its metadata are no mapping"
    scales, run = metadata.get("scales") or [], metadata.get("run")
    are_scales = isinstance(scales, list) and all(_is_number(scale) and scale > 0 for scale in scales)
    if not are_scales or len(scale_names(scales)) < len(scales):
        return "`scales` in its metadata are not distinct numbers above 0"
    if not (run is None or isinstance(run, str)):
        return "`run` in its metadata is no folder"
    if metadata.get(IMAGES) not in (None, *KINDS):
        return "`images` in its metadata do not say how images were shown"
    if not _says_how_to_write(metadata.get(ANSWERS)):
        return "`answers` in its metadata do not say how answers are written"
    return ""


def _fault_of_scales(predictions: "Predictions") -> str:
    if not predictions.scale_logits:
        return ""
    num_scales = len(predictions.metadata.get("scales") or [])
    pairs = zip(predictions.choice_logits, predictions.scale_logits, strict=True)
    are_like = all(_are_like(of_scales, num_scales, len(logits)) for logits, of_scales in pairs)
    return "" if are_like and num_scales > 1 else f"scale_logits are not those of {num_scales} scales"


def _fault_of_candidates(predictions: "Predictions") -> str:
    if not (rows := predictions.candidates):
        return ""
    names = predictions.metadata.get("classes")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "`classes` in its metadata are no names, which candidates stand for"
    labels = predictions.labels or [None] * len(rows)
    known = zip(predictions.ids, rows, predictions.choice_logits, labels, predictions.answers, strict=True)
    bad = [
        row_id
        for row_id, row, logits, label, answer in known
        if row is None or None in row or len({*row}) < len(row) or len(row) != len(logits)
        or not all(NONE_OF_THESE <= place < len(names) for place in row)
        or not (label is None or 0 <= label < len(names))
        or not (None in (answer, label) or row[answer] in (label, NONE_OF_THESE))
    ]  # fmt: skip
    return f"candidates or labels of {name_rows(bad, len(rows))} are none of its classes" if bad else ""


def _says_how_to_write(known: Any) -> bool:
    """Whether it is a value of `answers_as`, or None."""
    if not isinstance(known, dict):
        return known is None
    are_names = isinstance(known.get("id"), str) and isinstance(known.get("column"), str)
    return are_names and known.get("format") in (None, *FORMATS) and isinstance(known.get("is_upper"), bool)


def _are_like(of_scales: list | None, num_scales: int, num_choices: int) -> bool:
    """Whether they are `num_scales` lists of so many finite numbers."""
    rows = of_scales or []
    return len(rows) == num_scales and all(_are_finite(row) and len(row) == num_choices for row in rows)


def _are_finite(numbers: list[float | None] | None) -> bool:
    return numbers is not None and None not in numbers and bool(np.isfinite(numbers).all())


def check_calibration(values: object, what: str, scales: Sequence[float] | None = None) -> None:
    """Raises InputError where `values` are no {"temperature": 0.001 to 1000, "bias": null or numbers, "scale_weights":
    null or numbers from 0, together 1}; the latter one for each of the `scales`, where these are known."""
    known = values if isinstance(values, dict) else {}
    bias, weights = known.get("bias"), known.get("scale_weights")
    numbers = [known.get("temperature"), *(bias if isinstance(bias, list) else [])]
    numbers += weights.values() if isinstance(weights, dict) else []
    are_numbers = all(map(_is_number, numbers))
    if not are_numbers or not 1e-3 <= numbers[0] <= 1e3 or not (bias is None or isinstance(bias, list)):
        raise InputError(
            f"{what} is damaged: a temperature from 0.001 to 1000 and a bias of numbers or null are expected."
        )
    if weights is not None and not (
        isinstance(weights, dict)
        and min(weights.values(), default=-1) >= 0
        and abs(sum(weights.values()) - 1) < 1e-6
        and len(weights) > 1
        and (scales is None or weights.keys() == scale_names(scales).keys())
    ):
        raise InputError(
            f"{what} is damaged: in scale_weights a weight of each scale is expected, of two at least, none below 0, 1 "
            "together."
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # false of NaN too


def scale_names(scales: Sequence[float]) -> dict[str, float]:
    """The names that scales have in `scale_weights`, in the order of the scales."""
    return {str(float(scale)): float(scale) for scale in scales}
