"""Several prediction files -> one: a weighted mean of calibrated probabilities. No torch.

    files of one set of rows -> aligned by id -> experts (M files, N rows, C choices) -> pooled -> prediction file

`mean` and `log` are those of pooling.py, `vote` pools each file's best choice (a linear pool of votes).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import begins_with, check_output, write_whole
from vqa_sft.predictions.calibration import views_key
from vqa_sft.predictions.check_file import ANSWERS, CALIBRATION, CANDIDATES_FILE, CLASSES, IMAGES
from vqa_sft.predictions.file import (
    Predictions,
    check_same_rows,
    may_be_of_one_run,
    read_predictions,
    shared_rows,
    take,
    write_predictions,
)
from vqa_sft.predictions.fit_calibration import MIN_ROWS, NUM_FOLDS, deal_rows, is_lower
from vqa_sft.predictions.pooling import TINY, learn_weights, log_rows, own_choices, pool

AVERAGES = ("mean", "log", "vote")
VOTE = 0.99  # of a vote goes to the choice, the rest is spread over all: no log 0 in a file
WEIGHTS_START = b'{\n  "average"'  # how a file of --save-weights begins


@dataclass(frozen=True)
class Learned:
    """`weights` is None where the plain mean is as good; NLL in nats, cross-fitted."""

    weights: list[float] | None
    nll: float
    nll_of_mean: float
    num_rows: int


def align(files: Sequence[Predictions], names: Sequence[str]) -> list[Predictions]:
    """The same rows in the order of the first file.

    Raises InputError where ids, digests, numbers of choices or known answers differ.
    """
    first, aligned = files[0], []
    for file, name in zip(files, names, strict=True):
        row_of = {row_id: i for i, row_id in enumerate(file.ids)}
        missing = [row_id for row_id in first.ids if row_id not in row_of]
        known = set(first.ids)
        foreign = [row_id for row_id in file.ids if row_id not in known]
        if missing:
            raise InputError(
                f"{name} lacks {name_rows(missing, len(first.ids))}, and {names[0]} has them. Give predictions for the "
                "same rows."
            )
        if foreign:
            raise InputError(
                f"{name} also has {name_rows(foreign, len(file.ids))}, and {names[0]} has not. Give predictions for "
                "the same rows."
            )
        check_same_rows(first.ids, first.digest_of, file.digest_of, [names[0], name])
        rows = [row_of[row_id] for row_id in first.ids]
        aligned.append(take(file, rows))
        pairs = list(zip(first.ids, first.choice_logits, aligned[-1].choice_logits, strict=True))
        if other_length := [row_id for row_id, one, other in pairs if len(one) != len(other)]:
            raise InputError(
                f"{name} and {names[0]} have other numbers of choices in {name_rows(other_length, len(rows))}. Give "
                "predictions for the same data."
            )
        if aligned[-1].candidates != first.candidates or file.metadata.get(CLASSES) != first.metadata.get(CLASSES):
            raise InputError(
                f"{name} and {names[0]} chose among other candidates, so a place is not the same class in both. Give "
                "predictions with the same candidates; `vqa-sft fuse` makes a table of all classes of each."
            )
    known_answers: list[int | None] = [None] * len(first.ids)
    for file, name in zip(aligned, names, strict=True):
        both = zip(file.ids, known_answers, file.answers, strict=True)
        if differ := [row_id for row_id, one, other in both if None not in (one, other) and one != other]:
            raise InputError(
                f"{name} has other answers than the files before it in {name_rows(differ, len(rows))}. Give "
                "predictions for the same data."
            )
        known_answers = [other if one is None else one for one, other in zip(known_answers, file.answers, strict=True)]
    for file in aligned:
        file.answers = list(known_answers)
    return aligned


def experts_of(files: Sequence[Predictions], average: str) -> np.ndarray:
    """The experts (M, N, C) to pool, 0 where a row has fewer choices: calibrated probabilities, or smoothed votes."""
    lengths = np.array([len(row) for row in files[0].choice_logits])
    is_own = own_choices(lengths)  # (N, C)
    experts = np.zeros((len(files), *is_own.shape))
    for expert, file in zip(experts, files, strict=True):
        expert[is_own] = np.maximum(np.concatenate(file.probs), TINY)
        if average == "vote":
            best = expert.argmax(axis=1)
            expert[is_own] = ((1 - VOTE) / np.repeat(lengths, lengths)).ravel()
            expert[np.arange(len(best)), best] += VOTE
    return experts


def learn(files: Sequence[Predictions], average: str) -> Learned:
    """Weights from rows with answers, if in a 5-fold cross-validation they lower the NLL of equal weights by more than
    one standard error of the rows' differences."""
    experts, answers = experts_of(files, average), np.array(files[0].answers)
    rows = np.arange(len(answers))
    equal = np.full(len(files), 1 / len(files))
    losses_of_mean = -np.log(pool(experts, equal, average)[rows, answers])
    losses, fold_of = np.empty(len(answers)), deal_rows(len(answers))
    for fold in range(NUM_FOLDS):
        others, own = fold_of != fold, np.flatnonzero(fold_of == fold)
        weights = learn_weights(experts[:, others], answers[others], average)
        losses[own] = -np.log(pool(experts[:, own], weights, average)[np.arange(len(own)), answers[own]])
    is_better = is_lower(losses, losses_of_mean, 1)
    weights = learn_weights(experts, answers, average).tolist() if is_better else None
    return Learned(weights, float(losses.mean()), float(losses_of_mean.mean()), len(answers))


def combine(files: Sequence[Predictions], names: Sequence[str], weights: Sequence[float], average: str) -> Predictions:
    """One set of predictions from aligned files. Its `choice_logits` are logarithms of the pooled probabilities, which
    are calibrated already; its `agreement` is the share of the weights that choose as all together do."""
    first, experts = files[0], experts_of(files, average)
    probs = pool(experts, weights, average)
    logits = log_rows(probs, [len(row) for row in first.choice_logits])
    agree = (experts.argmax(axis=2) == probs.argmax(axis=1)).T @ np.asarray(weights)  # (N,)
    made_of = [
        {"file": str(name), "weight": float(weight)} | {key: file.metadata.get(key) for key in _MADE_BY}
        for name, weight, file in zip(names, weights, files, strict=True)
    ]
    metadata: dict[str, Any] = {"ensemble": {"average": average, "files": made_of}}
    written_as = next((file.metadata[ANSWERS] for file in files if file.metadata.get(ANSWERS)), None)
    metadata |= {ANSWERS: written_as} if written_as else {}
    metadata |= {IMAGES: first.images} if first.shown else {}
    shared = (CLASSES, "candidates", CANDIDATES_FILE)
    metadata |= {name: first.metadata[name] for name in shared if name in first.metadata}
    digests = next((file.digests for file in files if file.digests), [])
    blanked = [any(row) for row in zip(*(file.blanked or [False] * len(first.ids) for file in files), strict=True)]
    agreement = np.minimum(agree, 1).tolist()
    return Predictions(
        first.ids,
        logits,
        first.answers,
        metadata,
        blanked,
        agreement,
        digests=digests,
        changed=first.changed,
        candidates=first.candidates,
        labels=first.labels,
    )


_MADE_BY = ("base_model", "run", "orders", "scales", "average", CALIBRATION)


# --- the command ------------------------------------------------------------------------------------------------------


def write_ensemble(
    names: Sequence[str],
    output: str | Path,
    *,
    average: str = "mean",
    weights: str = "mean",
    learn_on: Sequence[str] = (),
    save_weights: str | Path | None = None,
) -> str:
    """`vqa-sft ensemble`: write the files' ensemble to `output`; the weight of each file, as text.

    `weights` is "mean", "learned" (on the files `learn_on`), numbers ("0.6,0.4"), or a file of `save_weights`.
    Raises InputError before anything is written.
    """
    if len(names) < 2:
        raise InputError(f"an ensemble is of two prediction files at least; got {len(names)}.")
    paths = [Path(name).resolve() for name in names]
    if twice := [name for number, name in enumerate(names) if paths[number] in paths[:number]]:
        raise InputError(f"{twice[0]} is given twice. Give it once, and with --weights more of it.")
    if (weights == "learned") != bool(learn_on):
        raise InputError("--weights learned and --learn-on FILES belong together; one is missing.")
    check_output(output, suffix=".parquet", reads=[*names, *learn_on], is_ours=_is_ensemble, kind="ensemble")
    if save_weights is not None:
        option, is_ours = "--save-weights", begins_with(WEIGHTS_START)
        check_output(save_weights, suffix=".json", option=option, is_ours=is_ours, kind=f"file of {option}")
    files = align([read_predictions(name) for name in names], names)
    if len({file.images for file in files}) > 1:
        shown = ", ".join(f"{name} ({file.images})" for name, file in zip(names, files, strict=True))
        raise InputError(f"the files were scored with images shown in different ways: {shown}. Give those of one.")
    if weights == "learned":
        found, notes = _learned_weights(files, learn_on, average, names)
    else:
        found, notes = given_weights(weights, names, average), []
    ensemble = combine(files, names, found, average)
    ways = [file.metadata[ANSWERS] for file in files if file.metadata.get(ANSWERS)]
    if any(way != ways[0] for way in ways):
        notes.append(
            "The runs' data write their answers in different ways; a submission is written as those of the first file "
            f"that has one: {ways[0]['column']} ({ways[0]['format']})."
        )
    ensemble.metadata["ensemble"] |= {"weights_from": weights, "learn_on": [str(name) for name in learn_on]}
    if save_weights is not None:
        shares = [{"file": str(name), "weight": weight} for name, weight in zip(names, found, strict=True)]
        write_whole(save_weights, json.dumps({"average": average, "files": shares}, indent=2) + "\n")
    write_predictions(output, ensemble)
    lines = [f"{weight:7.4f}  {name}" for weight, name in zip(found, names, strict=True)]
    return "\n".join([*notes, *lines, f"Wrote {len(ensemble.ids):,} rows to {output} ({average})."])


def _learned_weights(
    files: Sequence[Predictions], learn_on: Sequence[str], average: str, names: Sequence[str]
) -> tuple[list[float], list[str]]:
    """The weights, and notes on how good they are and whether the held-out files are the right ones."""
    if len(learn_on) != len(files):
        raise InputError(
            f"--learn-on needs one file for each of the {len(files)}, in their order; got {len(learn_on)}."
        )
    held_out = [read_predictions(name) for name in learn_on]
    learned = _learn_on(held_out, files, learn_on, average, names)
    compared = f"NLL {learned.nll:.4f}, cross-fitted; of equal weights {learned.nll_of_mean:.4f}"
    notes = [f"Weights learned on {learned.num_rows:,} rows ({compared})."]
    if learned.weights is None:
        notes = [
            f"Learned weights are no better than equal ones on {learned.num_rows:,} rows ({compared}): equal weights "
            "are used."
        ]
    for name, stands_for, one, other in zip(learn_on, names, held_out, files, strict=True):
        if not may_be_of_one_run(one, other) or _views(one) != _views(other):
            ours, theirs = (f"{file.maker}, {_views(file)}" for file in (other, one))
            notes.append(f"Beware: {name} ({theirs}) may not stand for {stands_for} ({ours}).")
    first = held_out[0]
    if learned.weights and shared_rows(files[0].ids, {*first.ids}, files[0].digest_of, first.digest_of):
        notes.append("They were learned on rows of this ensemble, so its own metrics look a little too good.")
    return learned.weights or [1 / len(files)] * len(files), notes


def _learn_on(
    held_out: Sequence[Predictions],
    files: Sequence[Predictions],
    learn_on: Sequence[str],
    average: str,
    names: Sequence[str],
) -> Learned:
    held_out = align(held_out, learn_on)
    if unknown := held_out[0].unanswered:
        raise InputError(f"--learn-on: there is no answer in {name_rows(unknown, len(held_out[0].ids))}.")
    if len(held_out[0].ids) < MIN_ROWS:
        raise InputError(f"--learn-on: weights need at least {MIN_ROWS} rows; got {len(held_out[0].ids)}.")
    for i, (one, other) in enumerate(zip(held_out, files, strict=True)):
        if not may_be_of_one_run(one, other) and any(may_be_of_one_run(one, file) for file in files):
            raise InputError(
                f"--learn-on: {learn_on[i]} is of {one.maker}, {names[i]} of {other.maker}. Give the files of "
                "--learn-on in the order of those that they stand for."
            )
    # With the calibrations of the files that the weights are for.
    return learn([one.calibrated_as(other) for one, other in zip(held_out, files, strict=True)], average)


def _views(predictions: Predictions) -> str:
    views = "an ensemble" if "ensemble" in predictions.metadata else views_key(predictions.metadata)
    return views + predictions.shown


def given_weights(text: str, names: Sequence[str], average: str) -> list[float]:
    if text == "mean":
        return [1 / len(names)] * len(names)
    of = average
    try:
        if Path(text).suffix == ".json":
            saved = json.loads(Path(text).read_text(encoding="utf-8"))
            numbers, of = [float(one["weight"]) for one in saved["files"]], saved["average"]
            by_name = dict(zip([one["file"] for one in saved["files"]], numbers, strict=True))
            if set(by_name) == set(map(str, names)):  # the same files, perhaps in another order
                numbers = [by_name[str(name)] for name in names]
        else:
            numbers = [float(part) for part in text.split(",")]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(
            f"--weights must be mean, learned, numbers such as 0.6,0.4 or a file of --save-weights; got {text}."
        ) from error
    if of != average:
        raise InputError(f"the weights in {text} are for --average {of}; got {average}.")
    if len(numbers) != len(names):
        raise InputError(f"--weights {text}: {len(numbers)} weights for {len(names)} files. Give one for each.")
    if not math.isfinite(sum(numbers)) or min(numbers) < 0 or sum(numbers) <= 0:
        raise InputError(f"--weights {text}: no weight may be below 0, and one must be above it.")
    return [number / sum(numbers) for number in numbers]


def _is_ensemble(path: Path) -> bool:
    try:
        return "ensemble" in read_predictions(path).metadata
    except InputError:
        return False
