"""One full table of class probabilities from a prior and a model that chose among candidates. No torch.

The prior q has all C classes; the model m has the K candidates S of a row.

    p(c | S)    proportional to m(c)^model q(c)^prior                                   for c in S
    p(S)        sigmoid(mass * logit q(S) + shift - none * logit m("none of these"))
    p(c)        p(S) p(c | S) in S,  (1 - p(S)) q(c) / q(not S) outside                 q is tempered: q^exponent
    table       (1 - smoothing) p + smoothing / C

With model 0, prior 1, mass 1 and shift 0 that is the prior alone; with exponent 0, an even q, the model alone: outside
S all classes are alike, and S has one mass in all rows. The parameters are those with the lowest NLL of the labels,
with a mild prior (STARTS), on rows that neither of the two was trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.optimize import minimize

from vqa_sft.data.class_probs import ClassProbs
from vqa_sft.predictions.class_metrics import losses_of
from vqa_sft.predictions.class_tables import join_tables
from vqa_sft.predictions.fit_calibration import NUM_FOLDS, deal_rows, is_lower
from vqa_sft.predictions.votes import NO_CLASS, Votes

PRIOR, MODEL, FUSED = "prior alone", "model alone", "fused"
_LEAST = np.log(1e-12)  # of a probability of the prior or the model: a class that one rules out may be right
# Parameter -> (start, standard deviation of its prior, least, most); exponent and smoothing as logarithms.
STARTS = {
    "exponent": (0.0, 1.0, np.log(0.05), np.log(20.0)),
    "model": (0.5, 1.0, 0.0, 20.0),
    "prior": (0.5, 1.0, 0.0, 20.0),
    "mass": (1.0, 1.0, 0.0, 20.0),
    "shift": (0.0, 3.0, -20.0, 20.0),
    "none": (0.5, 1.0, 0.0, 20.0),
    "smoothing": (np.log(1e-3), 2.0, np.log(1e-7), np.log(0.5)),
}
_TERMS = ("model", "prior", "mass", "shift", "none")


@dataclass(frozen=True)
class Fusion:
    """The parameters of the formula above; `none` counts only where that is a choice."""

    way: str
    exponent: float
    model: float
    prior: float
    mass: float
    shift: float
    none: float
    smoothing: float

    @property
    def parameters(self) -> dict[str, float]:
        return {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "way"}


@dataclass
class Rows:
    """N rows of prior and model. The M `classes` of a row are those that the prior keeps, and candidates beyond them;
    of the `num_rest` others each has `rest` in the prior."""

    ids: list[str]
    classes: np.ndarray  # (N, M)
    prior: np.ndarray  # (N, M), log
    rest: np.ndarray  # (N,), log
    places: np.ndarray  # (N, K), of the candidates among the classes; M where a row has fewer
    model: np.ndarray  # (N, K), log; of "none of these" nothing is in it
    none: np.ndarray | None  # (N,), log-odds
    labels: np.ndarray  # (N,)
    groups: np.ndarray  # (N,), rows of one group are in one fold
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_rest(self) -> int:
        return len(self.names) - self.classes.shape[1]

    def take(self, rows: np.ndarray) -> "Rows":
        arrays = ("classes", "prior", "rest", "places", "model", "labels", "groups")
        taken = {name: getattr(self, name)[rows] for name in arrays}
        none = None if self.none is None else self.none[rows]
        return replace(self, ids=[self.ids[row] for row in rows], none=none, **taken)


def make_rows(prior: ClassProbs, votes: Votes) -> Rows:
    """Prior and votes, which are of the same rows in one order."""
    candidates, kept = votes.candidates, prior.indices
    is_own = candidates != NO_CLASS
    places = np.full(candidates.shape, -1)
    for column in range(candidates.shape[1]):
        is_it = kept == candidates[:, column, None]
        places[:, column] = np.where(is_it.any(axis=1), is_it.argmax(axis=1), -1)
    beyond = is_own & (places < 0)
    num_more = int(beyond.sum(axis=1).max())
    more = _classes_beyond(kept, np.where(beyond, candidates, NO_CLASS), num_more, len(prior.names))
    places = np.where(beyond, kept.shape[1] + beyond.cumsum(axis=1) - 1, places)
    each = np.maximum(prior.tail_each.astype(np.float64), _LEAST)
    log_prior = np.maximum(prior.log_probs.astype(np.float64), _LEAST)
    chosen = votes.probs.sum(axis=1)
    with np.errstate(divide="ignore"):
        model = np.log(votes.probs / chosen[:, None])
    none = None if votes.none is None else np.log(votes.none) - np.log(np.maximum(chosen, 1e-12))
    keys = [votes.digest_of.get(row_id, row_id) for row_id in votes.ids]
    return Rows(
        votes.ids,
        np.concatenate([kept, more], axis=1),
        np.concatenate([log_prior, np.repeat(each[:, None], num_more, axis=1)], axis=1),
        each,
        np.where(is_own, places, kept.shape[1] + num_more),
        np.where(is_own, np.maximum(model, _LEAST), -np.inf),
        none,
        votes.labels,
        np.unique(keys, return_inverse=True)[1],
        prior.names,
    )


def _classes_beyond(kept: np.ndarray, beyond: np.ndarray, num_more: int, num_classes: int) -> np.ndarray:
    """So many classes a row (N, num_more) beside the kept ones: the candidates `beyond` these, then any others."""
    if not num_more:
        return np.empty((len(kept), 0), kept.dtype)
    found = []
    for start in range(0, len(kept), 10_000):
        rank = np.ones((len(kept[start : start + 10_000]), num_classes + 1), np.uint8)  # the last: of no class
        np.put_along_axis(rank, np.where(beyond < 0, num_classes, beyond)[start : start + 10_000], 0, 1)
        np.put_along_axis(rank, kept[start : start + 10_000].astype(np.int64), 2, 1)
        found.append(np.argsort(rank[:, :num_classes], axis=1, kind="stable")[:, :num_more])
    return np.concatenate(found).astype(kept.dtype)


@dataclass
class _Prior:
    """The tempered prior of rows: log-probabilities (N, M) of the classes, of each other one (N,), of the candidates
    (N, K), of all of them (N,), and of all classes that are none (N,), -inf where there are none."""

    classes: np.ndarray
    rest: np.ndarray
    inside: np.ndarray
    log_inside: np.ndarray
    log_outside: np.ndarray


def _temper(rows: Rows, exponent: float) -> _Prior:
    classes, rest = rows.prior * exponent, rows.rest * exponent
    top = np.maximum(classes.max(axis=1), rest)
    probs, each = np.exp(classes - top[:, None]), np.exp(rest - top)
    total = np.log(probs.sum(axis=1) + rows.num_rest * each) + top
    padded = np.pad(probs, ((0, 0), (0, 1)))
    np.put_along_axis(padded, rows.places, 0.0, 1)
    is_all = (rows.places < classes.shape[1]).sum(axis=1) == len(rows.names)  # every class is a candidate
    with np.errstate(divide="ignore"):
        log_outside = np.log(padded.sum(axis=1) + rows.num_rest * each) + top - total
    classes, rest = classes - total[:, None], rest - total
    inside = np.take_along_axis(np.pad(classes, ((0, 0), (0, 1))), rows.places, 1)  # 0 at the end; the model is -inf
    log_inside = _log_sum(np.where(np.isfinite(rows.model), inside, -np.inf))
    return _Prior(classes, rest, inside, log_inside, np.where(is_all, -np.inf, log_outside))


def _log_sum(logs: np.ndarray) -> np.ndarray:
    top = logs.max(axis=1, keepdims=True)
    return np.log(np.exp(logs - top).sum(axis=1)) + top[:, 0]


def _split(rows: Rows, prior: _Prior, terms: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(c | S) (N, K), log p(S) and log p(not S) (N,), for values of _TERMS."""
    model, of_prior, mass, shift, none = terms
    own = np.isfinite(rows.model)
    inside = np.where(own, model * np.where(own, rows.model, 0) + of_prior * prior.inside, -np.inf)
    inside = inside - _log_sum(inside)[:, None]
    has_outside = np.isfinite(prior.log_outside)
    odds = mass * (prior.log_inside - np.where(has_outside, prior.log_outside, 0)) + shift
    if rows.none is not None:
        odds = odds - none * rows.none
    log_mass = np.where(has_outside, -np.logaddexp(0, -odds), 0)
    return inside, log_mass, np.where(has_outside, -np.logaddexp(0, odds), -np.inf)


def fuse(rows: Rows, fusion: Fusion) -> ClassProbs:
    """The table of these rows, with M classes one by one."""
    prior = _temper(rows, fusion.exponent)
    inside, log_mass, log_other = _split(rows, prior, [getattr(fusion, name) for name in _TERMS])
    has_outside = np.isfinite(prior.log_outside)
    scale = np.where(has_outside, log_other - np.where(has_outside, prior.log_outside, 0), -np.inf)
    found = np.pad(prior.classes + scale[:, None], ((0, 0), (0, 1)))
    np.put_along_axis(found, rows.places, inside + log_mass[:, None], 1)
    keep, even = np.log1p(-fusion.smoothing), np.log(fusion.smoothing / len(rows.names))
    log_probs = np.logaddexp(found[:, :-1] + keep, even)
    with np.errstate(divide="ignore"):
        tail = np.logaddexp(prior.rest + scale + keep, even) + np.log(rows.num_rest)
    order = np.argsort(-log_probs, axis=1, kind="stable")
    indices = np.take_along_axis(rows.classes, order, 1).astype(np.int32)
    log_probs = np.take_along_axis(log_probs, order, 1).astype(np.float32)
    return ClassProbs(rows.ids, rows.names, indices, log_probs, tail.astype(np.float32), rows.labels.astype(np.int32))


# --- fitting ----------------------------------------------------------------------------------------------------------

# Values of the parameters (P,) -> log-probability of each label (N,), and its slope (N, P).
Core = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def fit_ways(rows: Rows) -> dict[str, Fusion]:
    """The parameters of each way, from rows that all have a label."""
    alone = _fit(("exponent",), _core_of_prior(rows), len(rows.names))
    exponent = float(np.exp(alone["exponent"]))
    prior = Fusion(PRIOR, exponent, 0.0, 1.0, 1.0, 0.0, 0.0, alone["smoothing"])
    found = {PRIOR: prior}
    none = [] if rows.none is None else ["none"]
    for way, of_prior, free in (
        (MODEL, 0.0, ["model", "shift", *none]),
        (FUSED, _fit_beside(rows, exponent), ["model", "prior", "mass", "shift", *none]),
    ):
        known = {"model": 0.0, "prior": 0.0, "mass": 0.0, "shift": 0.0, "none": 0.0}
        values = _fit(free, _core_of_terms(rows, _temper(rows, of_prior), free), len(rows.names))
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


def _core_of_terms(rows: Rows, prior: _Prior, free: Sequence[str]) -> Core:
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
        inside, log_mass, log_other = _split(rows, prior, [given.get(name, 0.0) for name in _TERMS])
        log_probs = np.where(is_inside, inside[numbers, place] + log_mass, beside + log_other)
        probs = np.exp(inside)
        of_odds = np.where(is_inside, np.exp(log_other), -np.exp(log_mass)) * has_outside
        slope = {"shift": of_odds, "mass": of_odds * prior_odds, "none": -of_odds * none}
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
