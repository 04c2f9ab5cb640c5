"""Does the model look? Prediction files of the same rows with their images, and blank, swapped or blurred. No torch.

`vqa-sft blind` scores them and writes what `compare` finds to blind.json:

    {"looks": true, "says": "The model looks ...", "run": "runs/demo", "views": "orders identity", "rows": 130,
     "rows_without_image": {"rows": 0}, "unanswered": 0, "data": "validation",
     "images": {"original": {"rows": 130, "accuracy": 1.0, "accuracy_95": [1.0, 1.0], "nll": ..., "nll_95": ...,
                             "confidence": ...},
                "blank": {..., "fall": 0.76, "fall_95": [0.68, 0.83]}, ...},
     "baselines": {"always B": 0.28, ...}}

Of a classification the choices of a row are its candidates, the classifier's best one first, and "always the first
candidate" takes the place of a letter.
`fall` is that of the accuracy, on the rows whose images were changed; its interval is of the same rows' differences.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vqa_sft.batch.control import BLANK, BLURRED, ORIGINAL, SWAPPED
from vqa_sft.console import table
from vqa_sft.errors import InputError
from vqa_sft.predictions.calibration import views_key
from vqa_sft.predictions.ensemble import align
from vqa_sft.predictions.file import Predictions
from vqa_sft.predictions.metrics import with_intervals
from vqa_sft.questions.letters import LETTERS

BLIND = "blind.json"  # in the run folder
FIRST = "always the first candidate"
NAMES = {ORIGINAL: "images as they are", BLANK: "blank", SWAPPED: "swapped", BLURRED: "blurred"}
WITHOUT = {BLANK: "without it", SWAPPED: "with that of another row", BLURRED: "with it blurred"}


def compare(files: Mapping[str, Predictions], baselines: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What blind.json holds, of files by control.KINDS, ORIGINAL among them. `baselines`, by name, are choices by row
    id. Raises InputError where no row has an answer and an image."""
    by_kind = dict(zip(files, align([*files.values()], [*files]), strict=True))
    original = by_kind.pop(ORIGINAL)
    answered = np.array([answer is not None for answer in original.answers])
    has_image = np.any([file.changed for file in by_kind.values()], axis=0)
    rows = np.flatnonzero(answered & has_image)
    if not len(rows):
        raise InputError("no row has both an answer and an image that another can stand for: there is nothing to see.")
    images = {ORIGINAL: _metrics(original, rows)}
    for kind, file in by_kind.items():
        own = np.flatnonzero(answered & np.array(file.changed))
        if len(own):
            was, now = (_are_right(of, own) for of in (original, file))
            images[kind] = _metrics(file, own) | {"fall": float(was.mean() - now.mean()), "fall_95": paired(was, now)}
    answers = [original.answers[row] for row in rows]
    (most, count), *_ = Counter(answers).most_common(1)
    found = {f"always {LETTERS[most]}": count / len(rows)}
    if original.candidates:  # most letters stand for no more than a rank of the classifier
        found = {FIRST: answers.count(0) / len(rows)}
    for name, choice_of in baselines.items():
        known = [choice_of.get(original.ids[row]) == original.answers[row] for row in rows]
        found[name] = float(np.mean(known))
    bare = np.flatnonzero(answered & ~has_image)
    beside = {"rows": len(bare)} | ({"accuracy": float(_are_right(original, bare).mean())} if len(bare) else {})
    looks, says = _judge(images)
    made = {"run": original.maker, "views": views_key(original.metadata)}
    about = {"looks": looks, "says": says} | made | {"rows": len(rows), "rows_without_image": beside}
    return about | {"unanswered": int((~answered).sum()), "images": images, "baselines": found}


def _are_right(file: Predictions, rows: Sequence[int]) -> np.ndarray:
    best = file.best
    return np.array([best[row] == file.answers[row] for row in rows])


def _metrics(file: Predictions, rows: Sequence[int]) -> dict[str, Any]:
    probs, answers = file.probs, [file.answers[row] for row in rows]
    probs = [probs[row] for row in rows]
    values = with_intervals(probs, answers)
    kept = {name: values[name] for name in ("accuracy", "accuracy_95", "nll", "nll_95")}
    return {"rows": len(rows)} | kept | {"confidence": float(np.mean([max(row) for row in probs]))}


def paired(was: np.ndarray, now: np.ndarray, num_resamples: int = 10_000, seed: int = 0) -> list[float]:
    """The middle 95% of the fall in accuracy over resampled rows (percentile bootstrap), each row with both of its
    answers. Rows count as independent."""
    lost, won = float(np.mean(was & ~now)), float(np.mean(now & ~was))
    # A resample is known by how many rows of each kind it holds.
    drawn = np.random.default_rng(seed).multinomial(len(was), [lost, won, max(0, 1 - lost - won)], num_resamples)
    return np.percentile((drawn[:, 0] - drawn[:, 1]) / len(was), [2.5, 97.5]).tolist()


def _judge(images: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str]:
    """Whether the model looks, and a sentence about it: where accuracy falls both without the image and with
    another. What is left of a blurred one may be enough, so that it counts only where it is alone."""
    counted = [kind for kind in (BLANK, SWAPPED) if kind in images] or [BLURRED]
    before = f"{images[ORIGINAL]['accuracy']:.3f}"
    after = " and ".join(f"{images[kind]['accuracy']:.3f} {WITHOUT[kind]}" for kind in counted)
    flat = [kind for kind in counted if images[kind]["fall_95"][0] <= 0]
    if not flat:
        return True, f"The model looks at the image: accuracy falls from {before} to {after}."
    low, high = images[flat[0]]["fall_95"]
    return False, (
        f"Beware: the image hardly matters: accuracy is {before} with it, {after}; the fall "
        f"{WITHOUT[flat[0]]} is between {low:.3f} and {high:.3f} (95%)."
    )


def describe(found: Mapping[str, Any]) -> str:
    """The table and the sentence."""
    lines = [["", "rows", "accuracy", "NLL", "confidence", "fall in accuracy"]]
    for kind, values in found["images"].items():
        fall = _with_interval(values, "fall", 3) if "fall" in values else ""
        cells = [_with_interval(values, "accuracy", 3), _with_interval(values, "nll", 3), f"{values['confidence']:.3f}"]
        lines.append([NAMES[kind], f"{values['rows']:,}", *cells, fall])
    lines += [[name, f"{found['rows']:,}", f"{value:.3f}", "", "", ""] for name, value in found["baselines"].items()]
    parts = [table(lines)]
    if beside := found["rows_without_image"]["rows"]:
        of = found["rows_without_image"]["accuracy"]
        parts.append(f"{beside:,} rows without an image are not in the table (accuracy {of:.3f}).")
    if found["unanswered"]:
        without = "whose class is unknown or no candidate" if FIRST in found["baselines"] else "without an answer"
        parts.append(f"{found['unanswered']:,} rows {without} are left out.")
    return "\n".join([*parts, found["says"]])


def _with_interval(values: Mapping[str, Any], name: str, digits: int) -> str:
    low, high = values[f"{name}_95"]
    return f"{values[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
