"""Fitting a temperature, a bias of the letters and weights of image scales. No torch.

probabilities = softmax(choice logits / temperature + bias): temperature scaling (Guo et al. 2017, arXiv 1706.04599,
section 4.2), and with a bias its vector scaling with one temperature for all. A temperature alone changes no answer; it
is above 1 where a model is overconfident.

Image scales are weighted: equally or with learned weights, where that lowers the NLL of rows that it was not learned
on, else by the scale nearest to that of training alone. A model reads other sizes than it was trained on worse, and how
much worse nobody knows beforehand.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from vqa_sft.predictions.check_file import scale_names
from vqa_sft.predictions.file import Predictions
from vqa_sft.predictions.metrics import losses_of, softmax
from vqa_sft.predictions.pooling import experts_of_scales, learn_weights, log_rows, own_choices, pool

LOWEST, HIGHEST = 0.05, 20.0  # temperature
NUM_FOLDS = 5
MIN_ROWS = 20
MIN_WRONG = 10  # rows whose most probable choice is wrong, for a temperature below 1

Logits = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Calibration:
    """`bias` has one number for each choice position (letter), in units of logits at temperature 1; None: no bias.
    `scale_weights` has one for each of several scales ("0.9": 0.25), and they sum to 1; None: they count equally."""

    temperature: float = 1.0
    bias: list[float] | None = None
    scale_weights: dict[str, float] | None = None

    def probs(self, choice_logits: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """Of logits whose scales are weighted already."""
        return softmax(choice_logits, self.temperature, self.bias)

    @property
    def as_dict(self) -> dict[str, Any]:
        """The value of "calibration" in the metadata of a prediction file."""
        return asdict(self)


Fitter = Callable[[Logits, Sequence[int]], Calibration]


def fit(
    choice_logits: Logits, answers: Sequence[int], *, may_have_bias: bool, by_fold: Sequence[Logits] | None = None
) -> Calibration:
    """The most probable temperature, between 0.05 and 20, with a prior of log temperature ~ N(0, 1).

    That is the minimum of the summed NLL + (log temperature)^2 / 2. Without the prior a hundred rows that are all right
    give temperature 0; with it they give a little less than 1, and a thousand informative rows outweigh it.

    It must lower the NLL in a 5-fold cross-validation by more than one standard error of the rows' differences; else
    the temperature is 1. One below 1 needs at least MIN_WRONG wrong rows as well: rows that are all right always give
    one, with little variance, and the few errors among other rows cost more than it gains.

    With `may_have_bias` also a bias, with a prior of N(0, 1) for each number, if it lowers the NLL in the same way by
    more than two standard errors and at least MIN_WRONG rows are wrong.

    Where `choice_logits` were learned on these rows too, `by_fold` holds the logits learned without each fold.
    """
    if len(answers) < MIN_ROWS:
        return Calibration()
    known = choice_logits, answers
    losses = losses_of(cross_fit(*known, None, by_fold), answers)
    found, tempered = fit_temperature(*known), losses_of(cross_fit(*known, fit_temperature, by_fold), answers)
    num_wrong = sum(int(np.argmax(row)) != answer for row, answer in zip(choice_logits, answers, strict=True))
    if is_lower(tempered, losses, 1) and (found.temperature > 1 or num_wrong >= MIN_WRONG):
        losses = tempered
    else:
        found = Calibration()
    if not may_have_bias or num_wrong < MIN_WRONG:
        return found
    if not is_lower(losses_of(cross_fit(*known, fit_bias, by_fold), answers), losses, 2):
        return found
    return fit_bias(*known)


def cross_fit(
    choice_logits: Logits,
    answers: Sequence[int],
    fitter: Fitter | None,
    by_fold: Sequence[Logits] | None = None,
) -> list[np.ndarray]:
    """Probabilities of every row by what `fitter` (None: no calibration) makes of the other four folds of five."""
    probs: list[np.ndarray] = [np.empty(0)] * len(answers)
    fold_of = deal_rows(len(answers))
    for fold in range(NUM_FOLDS):
        rows, others = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        logits = choice_logits if by_fold is None else by_fold[fold]
        found = Calibration()
        if fitter:
            found = fitter([logits[i] for i in others], [answers[i] for i in others])
        for i, row in zip(rows, found.probs([logits[i] for i in rows]), strict=True):
            probs[i] = row
    return probs


def fitter_of(found: Calibration) -> Fitter | None:
    """The function that fits such a calibration, for `cross_fit`."""
    if found.bias:
        return fit_bias
    return fit_temperature if found.temperature != 1 else None


def deal_rows(num_rows: int, seed: int = 0) -> np.ndarray:
    """A random fold (N,) for each row; the same at every call."""
    return np.random.default_rng(seed).permutation(num_rows) % NUM_FOLDS


def is_lower(losses: np.ndarray, others: np.ndarray, num_errors: float) -> bool:
    """Whether the mean of the rows' `losses` lies below that of `others` by more than so many standard errors of the
    mean difference."""
    gains = others - losses
    return bool(gains.mean() > max(num_errors * gains.std(ddof=1) / np.sqrt(len(gains)), 1e-12))


def _pad(logits: Logits) -> np.ndarray:
    """(N, C) with -inf where a row has fewer choices; the largest of each row is 0."""
    lengths = [len(row) for row in logits]
    is_own = own_choices(lengths)
    padded = np.full(is_own.shape, -np.inf)
    padded[is_own] = np.concatenate([np.asarray(row, dtype=np.float64) for row in logits])
    return padded - padded.max(axis=1, keepdims=True)


def _nll_of_rows(padded: np.ndarray, answers: Sequence[int]) -> np.ndarray:
    """(N,) in nats, of logits whose largest is near 0."""
    return np.log(np.exp(padded).sum(axis=1)) - padded[np.arange(len(padded)), np.asarray(answers)]


def fit_temperature(choice_logits: Logits, answers: Sequence[int]) -> Calibration:
    """That of `fit`, whether cross-validation confirms it or not."""
    padded = _pad(choice_logits)

    def loss(log_temperature: float) -> float:
        return _nll_of_rows(padded * np.exp(-log_temperature), answers).sum() + log_temperature**2 / 2

    # The sum of two terms with one minimum each may have two minima: a grid finds the lower one.
    grid = np.linspace(np.log(LOWEST), np.log(HIGHEST), 31)
    best = int(np.argmin([loss(point) for point in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    return Calibration(float(np.exp(found)))


def fit_bias(choice_logits: Logits, answers: Sequence[int]) -> Calibration:
    """Temperature and bias together; in 1 / temperature and the bias the NLL is convex."""
    padded, rows = _pad(choice_logits), np.arange(len(answers))
    is_own = np.isfinite(padded)
    known = np.where(is_own, padded, 0.0)

    def loss(found: np.ndarray) -> tuple[float, np.ndarray]:
        log_temperature, bias = found[0], found[1:]
        tempered = known * np.exp(-log_temperature)
        logits = np.where(is_own, tempered + bias, -np.inf)
        logits -= logits.max(axis=1, keepdims=True)
        probs = np.exp(logits)
        probs /= probs.sum(axis=1, keepdims=True)
        slope = probs.copy()  # (N, C)
        slope[rows, answers] -= 1
        value = _nll_of_rows(logits, answers).sum() + (found**2).sum() / 2
        return value, np.array([-(slope * tempered).sum(), *slope.sum(axis=0)]) + found

    start = np.array([np.log(fit_temperature(choice_logits, answers).temperature), *[0.0] * padded.shape[1]])
    bounds = [(np.log(LOWEST), np.log(HIGHEST)), *[(None, None)] * padded.shape[1]]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return Calibration(float(np.exp(found[0])), found[1:].tolist())


def calibrated_nll(logits: Logits, answers: Sequence[int]) -> float:
    """The lowest NLL, in nats, that a temperature of at least 1, fitted on the same rows, gives: the loss that
    calibration cannot remove. Lower temperatures do not count: a few rows that are all right would give 0. Rows may
    differ in length."""
    padded = _pad(logits)

    def nll(log_temperature: float) -> float:
        return float(_nll_of_rows(padded * np.exp(-log_temperature), answers).mean())

    # Convex in 1 / temperature, so there is one minimum in its logarithm too.
    return min(float(minimize_scalar(nll, bounds=(0.0, np.log(HIGHEST)), method="bounded").fun), nll(0.0))


@dataclass(frozen=True)
class Weighing:
    """Ways to weight scales: their weights from all rows, and their NLL in nats, cross-fitted. Of the one that was
    `chosen` the choice logits: by the weights from all rows, and `by_fold` as `fit` takes them."""

    weights: dict[str, dict[str, float]]
    nll: dict[str, float]
    chosen: str
    choice_logits: Logits
    by_fold: list[Logits]


def weigh_scales(predictions: Predictions, answers: Sequence[int]) -> Weighing:
    """The scale nearest to that of training alone, unless equal or learned weights lower the NLL of rows that they were
    not learned on, each way at its own temperature, by more than one standard error of the rows' differences."""
    scales, average = scale_names(predictions.metadata["scales"]), predictions.metadata.get("average") or "mean"
    experts, lengths = experts_of_scales(predictions.scale_logits), [len(row) for row in predictions.choice_logits]
    nearest = min(scales, key=lambda name: (round(abs(np.log(scales[name])), 6), scales[name]))
    fold_of, known = deal_rows(len(answers)), np.asarray(answers)

    def learn(rows: np.ndarray) -> np.ndarray:
        return learn_weights(experts[:, rows], known[rows], average)

    def pooled(weights: np.ndarray) -> Logits:
        return log_rows(pool(experts, weights, average), lengths)

    first = f"{nearest} alone"
    equal, alone = np.full(len(scales), 1 / len(scales)), np.array([float(name == nearest) for name in scales])
    found = {first: alone, "equal weights": equal, "learned weights": learn(fold_of >= 0)}
    logits = {way: pooled(weights) for way, weights in found.items()}
    by_fold = {way: [logits[way]] * NUM_FOLDS for way in found}
    by_fold["learned weights"] = [pooled(learn(fold_of != fold)) for fold in range(NUM_FOLDS)]
    losses = {way: losses_of(cross_fit(logits[way], answers, fit_temperature, by_fold[way]), answers) for way in found}
    nll = {way: float(of_rows.mean()) for way, of_rows in losses.items()}
    proven = [way for way in found if way == first or is_lower(losses[way], losses[first], 1)]
    chosen = min(proven, key=nll.__getitem__)
    weights = {way: dict(zip(scales, of_way.tolist(), strict=True)) for way, of_way in found.items()}
    return Weighing(weights, nll, chosen, logits[chosen], by_fold[chosen])
