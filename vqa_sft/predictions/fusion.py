"""One full table of class probabilities from a prior and a model that chose among candidates. No torch.

The prior q has all C classes; the model m has the K candidates S of a row.

    p(c | S)    proportional to m(c)^model q(c)^prior                                   for c in S
    p(S)        sigmoid(mass * logit q(S) + sure * logit max m(c) + shift - none * logit m("none of these"))
    p(c)        p(S) p(c | S) in S,  (1 - p(S)) q(c) / q(not S) outside                 q is tempered: q^exponent
    table       (1 - smoothing) p + smoothing / C

With model 0, prior 1, mass 1, sure 0 and shift 0 that is the prior alone; with exponent 0, an even q, the model alone:
outside S all classes are alike. A model that is sure of a candidate also says that the label is among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from vqa_sft.data.class_probs import ClassProbs
from vqa_sft.predictions.votes import NO_CLASS, Votes

PRIOR, MODEL, FUSED = "prior alone", "model alone", "fused"
_LEAST = np.log(1e-12)  # of a probability of the prior or the model: a class that one rules out may be right
TERMS = ("model", "prior", "mass", "sure", "shift", "none")
_SUREST = np.log(1e6)  # odds, of the best candidate


@dataclass(frozen=True)
class Fusion:
    """The parameters of the formula above; `none` counts only where that is a choice."""

    way: str
    exponent: float
    model: float
    prior: float
    mass: float
    sure: float
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

    @cached_property
    def sureness(self) -> np.ndarray:
        """Log-odds (N,) of the model's best candidate."""
        best = self.model.max(axis=1)
        return np.clip(best - np.log(np.maximum(-np.expm1(best), 1e-9)), -_SUREST, _SUREST)

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
class Tempered:
    """The tempered prior of rows: log-probabilities (N, M) of the classes, of each other one (N,), of the candidates
    (N, K), of all of them (N,), and of all classes that are none (N,), -inf where there are none."""

    classes: np.ndarray
    rest: np.ndarray
    inside: np.ndarray
    log_inside: np.ndarray
    log_outside: np.ndarray


def temper(rows: Rows, exponent: float) -> Tempered:
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
    return Tempered(classes, rest, inside, log_inside, np.where(is_all, -np.inf, log_outside))


def _log_sum(logs: np.ndarray) -> np.ndarray:
    top = logs.max(axis=1, keepdims=True)
    return np.log(np.exp(logs - top).sum(axis=1)) + top[:, 0]


def split(rows: Rows, prior: Tempered, terms: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(c | S) (N, K), log p(S) and log p(not S) (N,), for values of TERMS."""
    model, of_prior, mass, sure, shift, none = terms
    own = np.isfinite(rows.model)
    inside = np.where(own, model * np.where(own, rows.model, 0) + of_prior * prior.inside, -np.inf)
    inside = inside - _log_sum(inside)[:, None]
    has_outside = np.isfinite(prior.log_outside)
    odds = mass * (prior.log_inside - np.where(has_outside, prior.log_outside, 0)) + sure * rows.sureness + shift
    if rows.none is not None:
        odds = odds - none * rows.none
    log_mass = np.where(has_outside, -np.logaddexp(0, -odds), 0)
    return inside, log_mass, np.where(has_outside, -np.logaddexp(0, odds), -np.inf)


def fuse(rows: Rows, fusion: Fusion) -> ClassProbs:
    """The table of these rows, with M classes one by one."""
    prior = temper(rows, fusion.exponent)
    inside, log_mass, log_other = split(rows, prior, [getattr(fusion, name) for name in TERMS])
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
