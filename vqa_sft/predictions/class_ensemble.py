"""`vqa-sft ensemble` and `calibrate` of tables of class probabilities. No torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from vqa_sft.console import table
from vqa_sft.data.class_probs import UNKNOWN_LABEL, ClassProbs, keep_likely, write_class_probs
from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import check_output
from vqa_sft.predictions.class_metrics import METRICS, losses_of, with_intervals
from vqa_sft.predictions.class_scores import NAMES
from vqa_sft.predictions.class_tables import (
    MADE_BY,
    digest_of,
    is_made_by,
    join_tables,
    labelled,
    read_aligned,
    read_table,
)
from vqa_sft.predictions.ensemble import given_weights
from vqa_sft.predictions.file import shared_rows
from vqa_sft.predictions.fit_calibration import HIGHEST, LOWEST, MIN_ROWS, NUM_FOLDS, deal_rows, is_lower
from vqa_sft.predictions.metrics import describe
from vqa_sft.predictions.pooling import learn_weights

KIND = "class probabilities that this command wrote"
_BATCH = 10_000


def mean_of(tables: Sequence[ClassProbs], weights: Sequence[float]) -> ClassProbs:
    """The weighted mean of aligned tables; as many classes one by one as the table that has most of them."""
    first, parts = tables[0], []
    num_kept = max(one.num_kept for one in tables)
    for start in range(0, len(first), _BATCH):
        stop = min(start + _BATCH, len(first))
        probs = np.sum([weight * one.dense(start, stop) for one, weight in zip(tables, weights, strict=True)], axis=0)
        parts.append(keep_likely(first.ids[start:stop], first.names, probs, num_kept=num_kept))
    digests = next((one.digests for one in tables if one.digests), [])
    return replace(join_tables(parts), labels=first.labels, digests=digests)


def learn(tables: Sequence[ClassProbs]) -> tuple[np.ndarray | None, float, float]:
    """Weights (M,) of aligned tables with labels, or None where equal ones are as good, by the rule of
    `ensemble.learn`; the NLL of learned weights, cross-fitted, and that of equal ones."""
    of_label = np.exp([-losses_of(one) for one in tables])  # (M, N)
    fold_of = deal_rows(of_label.shape[1])

    def learned(rows: np.ndarray) -> np.ndarray:
        return learn_weights(of_label[:, rows, None], np.zeros(int(rows.sum()), int), "mean")

    equal, losses = -np.log(of_label.mean(axis=0)), np.empty(of_label.shape[1])
    for fold in range(NUM_FOLDS):
        own = fold_of == fold
        losses[own] = -np.log(learned(~own) @ of_label[:, own])
    weights = learned(fold_of >= 0) if is_lower(losses, equal, 1) else None
    return weights, float(losses.mean()), float(equal.mean())


def ensemble_classes(
    names: Sequence[str],
    output: str | Path,
    *,
    average: str = "mean",
    weights: str = "mean",
    learn_on: Sequence[str] = (),
    save_weights: str | None = None,
) -> str:
    """As `ensemble.write_ensemble`, by the names of the classes; the average is a mean."""
    if average != "mean" or save_weights is not None:
        given = f"--average {average}" if average != "mean" else "--save-weights"
        raise InputError(f"{given} is for prediction files. Class probabilities are averaged by --average mean.")
    if len({*names}) < max(2, len(names)):
        raise InputError(f"an ensemble is of two different files at least; got {', '.join(names)}.")
    if (weights == "learned") != bool(learn_on) or len(learn_on) not in (0, len(names)):
        raise InputError("--weights learned and --learn-on with a file for each, in their order, belong together.")
    check_output(output, suffix=".parquet", reads=[*names, *learn_on], is_ours=is_made_by("ensemble"), kind=KIND)
    tables, notes = read_aligned(names), []
    if learn_on:
        held_out = _known(read_aligned(learn_on), learn_on[0])
        _check_apart(held_out[0], tables[0], [learn_on[0], names[0]])
        found, nll, nll_of_equal = learn(held_out)
        said = f"log loss {nll:.4f}, cross-fitted; of equal weights {nll_of_equal:.4f}"
        notes.append(f"Weights learned on {len(held_out[0]):,} rows ({said}).")
        if found is None:
            notes = [f"Learned weights are no better than equal ones ({said}): equal weights are used."]
        shares = np.full(len(tables), 1 / len(tables)).tolist() if found is None else found.tolist()
    else:
        shares = given_weights(weights, names, average)
    made_of = ", ".join(f"{weight:.4f} {name}" for weight, name in zip(shares, names, strict=True))
    ensemble = mean_of(tables, shares)
    ensemble.metadata = {"source": f"vqa-sft ensemble: {made_of}", MADE_BY: "ensemble"}
    write_class_probs(output, ensemble)
    lines = [f"{weight:7.4f}  {name}" for weight, name in zip(shares, names, strict=True)]
    return "\n".join([*notes, *lines, f"Wrote {len(ensemble):,} rows to {output}."])


def _known(tables: Sequence[ClassProbs], name: str) -> list[ClassProbs]:
    """The rows with a label, which must be enough to learn from."""
    rows = np.flatnonzero(tables[0].labels != UNKNOWN_LABEL)
    if len(rows) < MIN_ROWS:
        raise InputError(f"{name}: at least {MIN_ROWS} rows with a label are needed; got {len(rows)}.")
    return [one.take(rows) for one in tables]


def _check_apart(held_out: ClassProbs, tables: ClassProbs, names: Sequence[str]) -> None:
    if shared := shared_rows(held_out.ids, {*tables.ids}, digest_of(held_out), digest_of(tables)):
        raise InputError(
            f"{names[0]} and {names[1]} share {name_rows(shared, len(held_out))}. Nothing is fitted on the rows that "
            "it is for: give out-of-fold or validation rows."
        )


# --- calibration ------------------------------------------------------------------------------------------------------


def tempered(probs: ClassProbs, temperature: float) -> ClassProbs:
    """p^(1 / temperature) over all classes."""
    logs = probs.log_probs.astype(np.float64) / temperature
    num_others = len(probs.names) - probs.num_kept
    with np.errstate(divide="ignore"):
        tail = np.log(num_others) + probs.tail_each.astype(np.float64) / temperature
    total = np.logaddexp(np.logaddexp.reduce(logs, axis=1), tail)
    return replace(probs, log_probs=(logs - total[:, None]).astype(np.float32), tail=(tail - total).astype(np.float32))


def fit_temperature(probs: ClassProbs) -> float:
    """The most probable one, with the prior of `fit_calibration.fit`: log temperature ~ N(0, 1)."""

    def loss(log_temperature: float) -> float:
        return float(losses_of(tempered(probs, float(np.exp(log_temperature)))).sum() + log_temperature**2 / 2)

    bounds = (np.log(LOWEST), np.log(HIGHEST))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x))


def calibrate_classes(file: str, held_out: str | None, output: str | None) -> str:
    """Write `file` at the temperature of the rows of `held_out`, where this lowers the NLL of rows that it was not
    fitted on by more than one standard error; else at 1. Returns metrics before and after, cross-fitted."""
    if held_out is None or output is None:
        raise InputError(
            f"{file} holds class probabilities: give --predictions FILE, those of rows with labels, and --output FILE."
        )
    check_output(output, suffix=".parquet", reads=[file, held_out], is_ours=is_made_by("calibrate"), kind=KIND)
    probs = read_table(file)
    [known] = _known([labelled(read_table(held_out), held_out)], held_out)
    _check_apart(known, probs, [held_out, file])
    fold_of = deal_rows(len(known))
    order = np.argsort(fold_of, kind="stable")
    parts = []
    for fold in range(NUM_FOLDS):
        others, own = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        parts.append(tempered(known.take(own), fit_temperature(known.take(others))))
    after = join_tables(parts).take(np.argsort(order))
    temperature, said = fit_temperature(known), ""
    if not is_lower(losses_of(after), losses_of(known), 1):
        temperature, after = 1.0, known
        said = " (none lowers the log loss of rows that it was not fitted on: probabilities stay as they are)"
    lines = [["", *NAMES.values()]]
    lines += [[name, *describe(with_intervals(one), METRICS)] for name, one in (("before", known), ("after", after))]
    calibrated = tempered(probs, temperature)
    calibrated.metadata = {**probs.metadata, "temperature": temperature, MADE_BY: "calibrate"}
    write_class_probs(output, calibrated)
    return (
        f"{table(lines)}\nTemperature {temperature:.3f}{said}, from {len(known):,} rows of {held_out}; `after` is "
        f"cross-fitted.\nWrote {len(calibrated):,} rows to {output}."
    )
