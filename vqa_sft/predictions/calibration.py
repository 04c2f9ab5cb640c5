"""`vqa-sft calibrate`, and calibration.json in a run folder: what it holds, and who reads it. No torch.

One entry for each way of scoring (orders, scales, average), for more views make a model less confident:

    {"orders identity": {"temperature": 1.9, "bias": null, "scale_weights": null, "rows": 400, "source":
     "validation.parquet", "before": {"nll": 0.93, "nll_95": [...], ...}, "after": {...}}, ...}
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqa_sft.console import table
from vqa_sft.data.split import ROWS
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.files import write_whole
from vqa_sft.predictions.check_file import check_calibration
from vqa_sft.predictions.file import Predictions, is_fold, read_predictions, shared_rows, take
from vqa_sft.predictions.fit_calibration import (
    MIN_ROWS,
    Calibration,
    Weighing,
    cross_fit,
    fit,
    fitter_of,
    weigh_scales,
)
from vqa_sft.predictions.metrics import describe, softmax, with_intervals

CALIBRATION = "calibration.json"
AT_THE_END = "at_the_end_of_training"  # of an entry that nobody asked for
RUN, VALIDATION, OUT_OF_FOLD = "run.json", "validation.parquet", "out_of_fold.parquet"  # files of a run folder


def views_key(metadata: Mapping[str, Any]) -> str:
    """How rows were scored, from the metadata of a prediction file: "orders identity", "orders rotations, scales 0.9
    1.0 1.1, average log". Defaults are left out: scale 1 alone, average "mean", the average of a single view."""
    orders, scales = metadata.get("orders") or "identity", metadata.get("scales") or [1.0]
    orders = "identity" if str(orders) == "1" else orders
    parts = [f"orders {orders}"]
    if scales != [1.0]:
        parts.append("scales " + " ".join(str(float(scale)) for scale in sorted(scales)))
    average = metadata.get("average") or "mean"
    if average != "mean" and (orders != "identity" or len(scales) > 1):
        parts.append(f"average {average}")
    return ", ".join(parts)


def read_calibration(folder: str | Path, metadata: Mapping[str, Any]) -> Calibration | None:
    """The calibration of the run in this folder for rows scored as `metadata` say; None: there is none.

    A fold may have it from the folder above: `known_entries`. Raises InputError for a damaged file.
    """
    key = views_key(metadata)
    entry = known_entries(folder).get(key)
    if entry is None:
        return None
    check_calibration(entry, f"{printable(key)!r} for {folder}", metadata.get("scales") or [1.0])
    return Calibration(entry["temperature"], entry.get("bias"), entry.get("scale_weights"))


def worth_of_scales(folders: Sequence[str | Path], metadata: Mapping[str, Any]) -> list[str]:
    """Notes where the runs in these folders shall score several scales: that no weights of them are known, or that by
    `vqa-sft calibrate` only one of them counts."""
    if len(metadata.get("scales") or []) < 2:
        return []
    unknown, only = [], {}
    for folder in folders:
        weights = (read_calibration(folder, metadata) or Calibration()).scale_weights
        used = [name for name, weight in (weights or {}).items() if weight]
        if weights is None:
            unknown.append(str(folder))
        elif len(used) == 1:
            only.setdefault(used[0], []).append(str(folder))
    notes = [
        f"Of these scales only {scale} counts for {', '.join(of)}: the others made nothing better on validation rows. "
        f"--scales {scale} alone scores the same in less time."
        for scale, of in only.items()
    ]
    if unknown:
        notes.append(
            f"What each scale is worth is not known of {', '.join(unknown)}: they count equally, and one that a model "
            f"reads badly does harm. Score the validation rows in the same way ({views_key(metadata)}; --part "
            "validation), and vqa-sft calibrate finds weights."
        )
    return notes


def known_entries(folder: str | Path) -> dict[str, Any]:
    """The entries for the run in this folder. For a fold: its own of `vqa-sft calibrate`, else those of all folds in
    the folder above, else its own of the end of its training."""
    folder = Path(folder).resolve()
    own = _read_entries(folder)
    if not _is_fold_of(folder, folder.parent):
        return own
    by_itself = {key: entry for key, entry in own.items() if entry.get(AT_THE_END)}
    return by_itself | _read_entries(folder.parent) | {key: own[key] for key in own.keys() - by_itself.keys()}


def _is_fold_of(folder: Path, above: Path) -> bool:
    return is_fold(folder.name) and (above / OUT_OF_FOLD).is_file()


def _read_entries(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("no mapping")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}). Remove it and run `vqa-sft calibrate` again.") from error
    for key, entry in entries.items():
        check_calibration(entry, f"{printable(key)!r} in {path}")
    return entries


def calibrate_run(folder: str | Path, file: str | Path | None = None, *, at_the_end: bool = False) -> str:
    """Fit a calibration on `file`, by default the out-of-fold or else the validation predictions of the run, write it
    to calibration.json, and return a table of its effect. `at_the_end` of a training there is no bias, and entries of
    all folds take precedence over the new one.

    Raises InputError where there are no rows to fit on, too few, or rows of another run or of training.
    """
    folder = Path(folder)
    _check_folder(folder)
    file = default_file(folder) if file is None else Path(file)
    predictions = read_predictions(file)
    if predictions.candidates:  # where the label is none of them, no choice was right
        answered = [row for row, answer in enumerate(predictions.answers) if answer is not None]
        predictions = take(predictions, answered)
    _check_rows(folder, file, predictions)
    entries, key = _read_entries(folder), views_key(predictions.metadata)
    answers = [answer for answer in predictions.answers if answer is not None]
    weighing = weigh_scales(predictions, answers) if predictions.scale_logits else None
    logits, by_fold = (weighing.choice_logits, weighing.by_fold) if weighing else (predictions.choice_logits, None)
    # Under other permutations a position is no letter.
    may_have_bias = key.startswith("orders identity") and not at_the_end
    found = fit(logits, answers, may_have_bias=may_have_bias, by_fold=by_fold)
    before = with_intervals(softmax(predictions.choice_logits), answers)
    after = with_intervals(cross_fit(logits, answers, fitter_of(found), by_fold), answers)
    is_inside = file.resolve().is_relative_to(folder.resolve())
    source = str(file.resolve().relative_to(folder.resolve())) if is_inside else file.name
    entry = found.as_dict | {"rows": len(answers), "source": source, "before": before, "after": after}
    if at_the_end:
        entry[AT_THE_END] = True
    if weighing:
        weights = weighing.weights[weighing.chosen]
        used = [scale for scale in predictions.metadata["scales"] if weights[str(float(scale))]]
        if len(used) == 1:  # this scale alone gives the same logits
            entries.setdefault(views_key({**predictions.metadata, "scales": used}), entry)
        entry = entry | {"scale_weights": weights}
    entries[key] = entry
    write_whole(folder / CALIBRATION, json.dumps(entries, indent=2) + "\n")
    names = ["accuracy", "nll", "brier", "ece", "ece_equal_mass"]
    lines = [["", *names], ["before", *describe(before, names)], ["after", *describe(after, names)]]
    bias = "no bias" if found.bias is None else "bias " + " ".join(f"{number:+.2f}" for number in found.bias)
    if found == Calibration():
        bias += " (neither lowers the NLL of rows that it was not fitted on: probabilities stay as they are)"
    return (
        f"{table(lines)}\n{_compare_weights(weighing)}\n{key}: temperature {found.temperature:.3f}, {bias}, from "
        f"{len(answers):,} rows of {file}.\n"
        "`after` is cross-fitted: each row by a calibration from the other four folds of five, because on the\n"
        f"rows that it was fitted on any temperature looks good.\n{_compare(entries)}Wrote {folder / CALIBRATION}"
    )


def calibrate_new(folder: str | Path) -> str:
    """`calibrate_run` at the end of a training, on the rows that were scored then; the result in one line.

    There is no bias, so that no answer changes without being asked for. An entry that is there already stays, and too
    few rows leave the run without one.
    """
    folder, key = Path(folder), views_key({})
    try:
        if key in _read_entries(folder):
            return f"{folder / CALIBRATION} stays as it is."
        calibrate_run(folder, at_the_end=True)
    except InputError as error:
        return f"Not calibrated: {error}"
    entry = _read_entries(folder)[key]
    if entry["temperature"] == 1:
        return (
            f"Not calibrated: on the {entry['rows']:,} rows of {folder / entry['source']} no temperature lowers the "
            "NLL of rows that it was not fitted on; probabilities stay as they are scored."
        )
    return (
        f"Calibrated on the {entry['rows']:,} rows of {folder / entry['source']}: temperature "
        f"{entry['temperature']:.3f}; on rows that it was not fitted on the NLL goes from {entry['before']['nll']:.4f} "
        f"to {entry['after']['nll']:.4f}."
    )


def _compare_weights(weighing: Weighing | None) -> str:
    """The ways to weight several scales that were tried."""
    if weighing is None:
        return ""
    lines = [["scales", *weighing.weights[weighing.chosen], "NLL"]]
    for way, weights in weighing.weights.items():
        taken = " (taken)" if way == weighing.chosen else ""
        lines.append([way + taken, *(f"{weight:.2f}" for weight in weights.values()), f"{weighing.nll[way]:.4f}"])
    return f"\n{table(lines)}\n"


def _compare(entries: Mapping[str, Any]) -> str:
    """Where there are entries of several ways of scoring: their NLL, the lowest first."""
    known = [line for line in (_line_of(*item) for item in entries.items()) if line]
    known.sort(key=lambda line: float(line[2].split()[0]))
    if len(known) < 2:
        return ""
    lines = [["views", "rows", "NLL after"], *known]
    return f"\nKnown of this run, the best first:\n{table(lines)}\n"


def _line_of(key: str, entry: Mapping[str, Any]) -> list[str]:
    """Of that table; empty for an entry without metrics, such as one written by hand."""
    try:
        return [key, f"{entry['rows']:,}", *describe(entry["after"], ["nll"])]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return []


def default_file(folder: Path, hint: str = "Give --predictions FILE.parquet.") -> Path:
    """The out-of-fold file of a run folder, else its validation file. Raises InputError, with the hint, where it has
    none."""
    found = [folder / name for name in (OUT_OF_FOLD, VALIDATION) if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} holds no {OUT_OF_FOLD} and no {VALIDATION}. {hint}")
    return found[0]


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"no such run folder: {folder}.")
    if not any((folder / name).is_file() for name in (RUN, OUT_OF_FOLD)):
        raise InputError(f"{folder} holds no finished run (no {RUN}). Give the output_dir of a run that has ended.")


def _check_rows(folder: Path, file: Path, predictions: Predictions) -> None:
    """Raises InputError for rows that tell little about this run's temperature, or nothing."""
    ids = predictions.ids
    if unknown := predictions.unanswered:
        raise InputError(f"{file} has no answer to learn from in {name_rows(unknown, len(ids))}.")
    if len(ids) < MIN_ROWS:
        raise InputError(f"{file} has {len(ids)} rows; a temperature needs at least {MIN_ROWS}.")
    if file.resolve() in {(folder / name).resolve() for name in (OUT_OF_FOLD, VALIDATION)}:
        return
    if predictions.shown:
        raise InputError(f"{file} was scored with images {predictions.images}. Give rows with their own images.")
    if "ensemble" in predictions.metadata:
        raise InputError(f"{file} is an ensemble, and a temperature belongs to one run. Give the run's predictions.")
    if "run" in predictions.metadata and not _is_of(folder, predictions.metadata["run"]):
        of = predictions.metadata["run"] or f"the base model {predictions.metadata.get('base_model')} as it is"
        raise InputError(
            f"{file} holds predictions of {of}, not of {folder}. Give that run, or this one's predictions."
        )
    run = folder / Path(predictions.metadata.get("run") or "").name
    trained_on = _trained_on(run if _is_fold_of(run, folder) else folder)
    digests = {row_id: digest for row_id, digest in trained_on.items() if digest}
    if seen := shared_rows(ids, trained_on.keys(), predictions.digest_of, digests):
        raise InputError(
            f"{folder} was trained on {name_rows(seen, len(ids))} of {file}: there it is "
            "more confident than elsewhere. Give rows that it did not see."
        )
    if len(predictions.metadata.get("scales") or []) > 1 and not predictions.scale_logits:
        raise InputError(
            f"{file} does not say what each of its scales does: an earlier version wrote it. Score it again."
        )


def _is_of(folder: Path, run: str | None) -> bool:
    """Whether `run`, as a prediction file names it, is the run in this folder or one of its folds. The folder may have
    been moved since: its own predictions hold its earlier name."""
    names = [str(folder)]
    for name in (OUT_OF_FOLD, VALIDATION):
        if (folder / name).is_file():
            names.append(read_predictions(folder / name).metadata.get("run") or str(folder))
    return run is not None and any(Path(run).resolve().is_relative_to(Path(name).resolve()) for name in names)


def _trained_on(folder: Path) -> dict[str, str]:
    """Ids and digests ("": unknown) of the training rows, without ids that other rows have too: two data sets may both
    count from 0."""
    parts: dict[str, dict[str, str]] = {}
    if (folder / ROWS).is_file():
        try:
            with (folder / ROWS).open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file, strict=True):
                    if row["id"] is None:
                        raise ValueError("a line is cut off")
                    parts.setdefault(row["part"], {})[row["id"]] = row.get("digest") or ""
        except (ValueError, KeyError, csv.Error) as error:
            raise InputError(
                f"{folder / ROWS}, which says what the run was trained on, is damaged ({error}). Train it again."
            ) from error
    trained_on = parts.pop("train", {})
    others = set().union(*parts.values())
    return {row_id: digest for row_id, digest in trained_on.items() if row_id not in others}
