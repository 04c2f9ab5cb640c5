"""Fitting how a prior and a model are fused, and whether they are. No torch.

The parameters of fusion.py are those with the lowest NLL of the labels, with a mild prior (STARTS), on rows that
neither the classifier nor the model was trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from vqa_sft.data.class_probs import ClassProbs
from vqa_sft.predictions.class_metrics import losses_of
from vqa_sft.predictions.class_tables import join_tables
from vqa_sft.predictions.fit_calibration import NUM_FOLDS, deal_rows, is_lower
from vqa_sft.predictions.fusion import FUSED, MODEL, PRIOR, TERMS, Fusion, Rows, Tempered, fuse, split, temper
from vqa_sft.predictions.votes import NO_CLASS

# Parameter -> (start, standard deviation of its prior, least, most); exponent and smoothing as logarithms.
STARTS = {
    "exponent": (0.0, 1.0, np.log(0.05), np.log(20.0)),
    "model": (0.5, 1.0, 0.0, 20.0),
    "prior": (0.5, 1.0, 0.0, 20.0),
    "mass": (1.0, 1.0, 0.0, 20.0),
    "sure": (0.0, 1.0, 0.0, 20.0),
    "shift": (0.0, 3.0, -20.0, 20.0),
    "none": (0.5, 1.0, 0.0, 20.0),
    "smoothing": (np.log(1e-3), 2.0, np.log(1e-7), np.log(0.5)),
}

# Values of the parameters (P,) -> log-probability of each label (N,), and its slope (N, P).
Core = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def fit_ways(rows: Rows) -> dict[str, Fusion]:
    """The parameters of each way, from rows that all have a label."""
    alone = _fit(("exponent",), _core_of_prior(rows), len(rows.names))
    exponent = float(np.exp(alone["exponent"]))
    prior = Fusion(PRIOR, exponent, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, alone["smoothing"])
    found = {PRIOR: prior}
    none = [] if rows.none is None else ["none"]
    for way, of_prior, free in (
        (MODEL, 0.0, ["model", "sure", "shift", *none]),
        (FUSED, _fit_beside(rows, exponent), ["model", "prior", "mass", "sure", "shift", *none]),
    ):
        known = dict.fromkeys(TERMS, 0.0)
        values = _fit(free, _core_of_terms(rows, temper(rows, of_prior), free), len(rows.names))
        found[way] = Fusion(way, of_prior, **known | values)
    return found


def _fit_beside(rows: Rows, exponent: float) -> float:
    """The exponent of the prior among the classes that are no candidates, from the rows whose label is one of them. How
    it tempers the prior of the candidates, the other parameters can undo."""
    padded = np.pad(rows.classes, ((0, 0), (0, 1)), constant_values=NO_CLASS)
    is_inside = (np.take_along_axis(padded, rows.places, 1) == rows.labels[:, None]).any(axis=1)
    if is_inside.all():
        return exponent
    beside = rows.take(np.flatnonzero(~is_inside))
    prior = np.pad(beside.prior, ((0, 0), (0, 1)))
    np.put_along_axis(prior, beside.places, -1e6, 1)  # no class that may be it
    starts = STARTS | {"exponent": (np.log(exponent), 0.5, *STARTS["exponent"][2:])}
    core = _core_of_prior(replace(beside, prior=prior[:, :-1]))
    return float(np.exp(_fit(("exponent",), core, len(rows.names), starts)["exponent"]))


def _fit(free: Sequence[str], core: Core, num_classes: int, starts: Mapping = STARTS) -> dict[str, float]:
    """The most probable values of these parameters, and of the smoothing."""
    start, width, least, most = np.array([starts[name] for name in (*free, "smoothing")]).T

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        log_probs, slope = core(values[:-1])  # (N,), (N, P)
        smoothing, probs = np.exp(values[-1]), np.exp(log_probs)
        own, even = (1 - smoothing) * probs, smoothing / num_classes
        total = own + even
        slopes = [-(own / total) @ slope, -((even - smoothing * probs) / total).sum()]
        away = (values - start) / width
        value = -np.log(total).sum() + (away**2).sum() / 2
        return value / len(total), (np.append(*slopes) + away / width) / len(total)

    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=list(zip(least, most, strict=True))).x
    return dict(zip(free, map(float, found[:-1]), strict=True)) | {"smoothing": float(np.exp(found[-1]))}


def _core_of_prior(rows: Rows) -> Core:
    of_label = _of_label(rows, rows.prior, rows.rest)

    def core(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exponent = np.exp(values[0])
        classes, rest = rows.prior * exponent, rows.rest * exponent
        top = np.maximum(classes.max(axis=1), rest)
        probs, others = np.exp(classes - top[:, None]), rows.num_rest * np.exp(rest - top)
        total = probs.sum(axis=1) + others
        mean = ((probs * rows.prior).sum(axis=1) + others * rows.rest) / total
        return exponent * of_label - np.log(total) - top, (exponent * (of_label - mean))[:, None]

    return core


def _of_label(rows: Rows, of_classes: np.ndarray, of_rest: np.ndarray) -> np.ndarray:
    """Of values (N, M) of the classes and (N,) of each other one, those of the labels."""
    is_it = rows.classes == rows.labels[:, None]
    return np.where(is_it.any(axis=1), of_classes[np.arange(len(rows)), is_it.argmax(axis=1)], of_rest)


def _core_of_terms(rows: Rows, prior: Tempered, free: Sequence[str]) -> Core:
    numbers = np.arange(len(rows))
    own = np.isfinite(rows.model)
    padded = np.pad(rows.classes, ((0, 0), (0, 1)), constant_values=NO_CLASS)
    is_label = np.take_along_axis(padded, rows.places, 1) == rows.labels[:, None]
    is_inside, place = is_label.any(axis=1), is_label.argmax(axis=1)
    has_outside = np.isfinite(prior.log_outside)
    beside = np.where(
        is_inside, 0, _of_label(rows, prior.classes, prior.rest) - np.where(has_outside, prior.log_outside, 0)
    )
    model = np.where(own, rows.model, 0)
    prior_odds = np.where(has_outside, prior.log_inside - np.where(has_outside, prior.log_outside, 0), 0)
    none = np.zeros(len(rows)) if rows.none is None else rows.none

    def core(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        given = dict(zip(free, values, strict=True))
        inside, log_mass, log_other = split(rows, prior, [given.get(name, 0.0) for name in TERMS])
        log_probs = np.where(is_inside, inside[numbers, place] + log_mass, beside + log_other)
        probs = np.exp(inside)
        of_odds = np.where(is_inside, np.exp(log_other), -np.exp(log_mass)) * has_outside
        slope = {
            "shift": of_odds,
            "mass": of_odds * prior_odds,
            "sure": of_odds * rows.sureness,
            "none": -of_odds * none,
        }
        for name, term in (("model", model), ("prior", np.where(own, prior.inside, 0))):
            slope[name] = is_inside * (term[numbers, place] - (probs * term).sum(axis=1))
        return log_probs, np.stack([slope[name] for name in free], axis=1)

    return core


@dataclass
class Selection:
    """`fusion` is of all rows; `tables` are those of each way, each row by what the other four folds of five give."""

    fusion: Fusion
    ways: dict[str, Fusion]
    tables: dict[str, ClassProbs]


def select(rows: Rows) -> Selection:
    """Fused, where that lowers the NLL of rows that it was not fitted on by more than one standard error of the rows'
    differences against both the prior and the model alone; else the better of these."""
    fold_of = deal_rows(int(rows.groups.max()) + 1)[rows.groups]
    parts: dict[str, list[ClassProbs]] = {PRIOR: [], MODEL: [], FUSED: []}
    order = np.argsort(fold_of, kind="stable")
    for fold in range(NUM_FOLDS):
        own = np.flatnonzero(fold_of == fold)
        ways = fit_ways(rows.take(np.flatnonzero(fold_of != fold)))
        for way, fusion in ways.items():
            parts[way].append(fuse(rows.take(own), fusion))
    tables = {way: join_tables(found).take(np.argsort(order)) for way, found in parts.items()}
    losses = {way: losses_of(table) for way, table in tables.items()}
    best = min((PRIOR, MODEL), key=lambda way: losses[way].mean())
    if all(is_lower(losses[FUSED], losses[way], 1) for way in (PRIOR, MODEL)):
        best = FUSED
    ways = fit_ways(rows)
    return Selection(ways[best], ways, tables)
