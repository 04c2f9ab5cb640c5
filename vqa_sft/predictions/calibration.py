"""How sure to be: the temperature of a run's choice logits, a bias of its letters, weights of scales. No torch.

probabilities = softmax(choice logits / temperature + bias): temperature scaling (Guo et al. 2017, arXiv 1706.04599,
section 4.2), and with a bias its vector scaling with one temperature for all. A temperature alone changes no answer; it
is above 1 where a model is too sure of itself. What `vqa-sft calibrate` finds stands in calibration.json of the run
folder, one entry for each way of scoring (orders, scales, average): more views make a model less sure of itself.

Images at several scales are weighed: equally or with learned weights, where that lowers the NLL of rows that it was
not learned on, else by the scale nearest to that of training alone. A model reads other sizes than it was trained on
worse, and how much worse nobody knows beforehand.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.predictions.file import Predictions, check_calibration, others_of, read_predictions, scale_names, whole
from vqa_sft.predictions.metrics import as_table, describe, losses_of, softmax, with_intervals
from vqa_sft.predictions.pooling import experts_of_scales, learn_weights, log_rows, pool

LOWEST, HIGHEST = 0.05, 20.0  # temperature
NUM_FOLDS = 5
MIN_ROWS = 20
MIN_WRONG = 10  # rows whose likeliest choice is wrong, for a temperature below 1
CALIBRATION = "calibration.json"
AT_THE_END = "at_the_end_of_training"  # of an entry that nobody asked for
# Files of a run folder, named in run_folder, out_of_fold and split; the first two import torch.
RUN, VALIDATION, OUT_OF_FOLD, ROWS = "run.json", "validation.parquet", "out_of_fold.parquet", "rows.csv"


@dataclass(frozen=True)
class Calibration:
    """`bias` has one number for each choice position (letter), in units of logits at temperature 1; None: no bias.
    `scale_weights` has one for each of several scales ("0.9": 0.25), 1 together; None: they count equally."""

    temperature: float = 1.0
    bias: list[float] | None = None
    scale_weights: dict[str, float] | None = None

    def probs(self, choice_logits: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """Of logits whose scales are weighed already."""
        return softmax(choice_logits, self.temperature, self.bias)

    @classmethod
    def none(cls, choice_logits: "Logits", answers: Sequence[int]) -> "Calibration":
        """What is found where nothing is to be changed."""
        return cls()

    @property
    def as_dict(self) -> dict[str, Any]:
        """What stands under "calibration" in the metadata of a prediction file."""
        return asdict(self)


Logits = Sequence[Sequence[float]]


def fit(
    choice_logits: Logits, answers: Sequence[int], *, may_have_bias: bool, by_fold: Sequence[Logits] | None = None
) -> Calibration:
    """The likeliest temperature, between 0.05 and 20, where log temperature ~ N(0, 1) beforehand.

    That is the minimum of the summed NLL + (log temperature)^2 / 2. Without the second term a hundred rows that are all
    right ask for temperature 0; with it they ask for a little less than 1, and a thousand rows that say something
    drown it.

    It is used only where it proves itself, else it is 1: it must lower the NLL of rows that it was not fitted on, five
    parts in turn, by more than one standard error of the rows' differences. One below 1 is believed only where at least
    MIN_WRONG rows are answered wrongly: rows that are all right differ little and always ask for it, and the few errors
    that other rows will have cost all that it gains.

    With `may_have_bias` a bias as well, each number ~ N(0, 1) beforehand, if it lowers the NLL in the same way by more
    than two standard errors, where so many rows are answered wrongly.

    Where `choice_logits` were learned on these rows too, `by_fold` holds what they are without each of the five parts.
    """
    if len(answers) < MIN_ROWS:
        return Calibration()
    known = choice_logits, answers
    losses = losses_of(cross_fit(*known, Calibration.none, by_fold), answers)
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
    find: Callable[[Logits, Sequence[int]], Calibration],
    by_fold: Sequence[Logits] | None = None,
) -> list[np.ndarray]:
    """Probabilities of every row by what `find` makes of the other four parts of five: `fit_temperature`, `fit_bias`,
    or `Calibration.none`."""
    probs: list[np.ndarray] = [np.empty(0)] * len(answers)
    fold_of = deal_rows(len(answers))
    for fold in range(NUM_FOLDS):
        rows, others = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        logits = choice_logits if by_fold is None else by_fold[fold]
        part = [logits[i] for i in others], [answers[i] for i in others]
        found = find(*part)
        for i, row in zip(rows, found.probs([logits[i] for i in rows]), strict=True):
            probs[i] = row
    return probs


def deal_rows(num_rows: int, seed: int = 0) -> np.ndarray:
    """A fold (N,) for each row, drawn; the same at every call."""
    return np.random.default_rng(seed).permutation(num_rows) % NUM_FOLDS


def is_lower(losses: np.ndarray, others: np.ndarray, num_errors: float) -> bool:
    """Whether the mean of the rows' `losses` lies below that of `others` by more than so many standard errors of the
    mean difference."""
    gains = others - losses
    return bool(gains.mean() > max(num_errors * gains.std(ddof=1) / np.sqrt(len(gains)), 1e-12))


def _pad(logits: Sequence[Sequence[float]]) -> np.ndarray:
    """(N, C) with -inf where a row has fewer choices; the largest of each row is 0."""
    lengths = np.array([len(row) for row in logits])
    is_own = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(is_own.shape, -np.inf)
    padded[is_own] = np.concatenate([np.asarray(row, dtype=np.float64) for row in logits])
    return padded - padded.max(axis=1, keepdims=True)


def _nll_of_rows(padded: np.ndarray, answers: Sequence[int]) -> np.ndarray:
    """(N,) in nats, of logits whose largest is near 0."""
    return np.log(np.exp(padded).sum(axis=1)) - padded[np.arange(len(padded)), np.asarray(answers)]


def fit_temperature(choice_logits: Logits, answers: Sequence[int]) -> Calibration:
    """That of `fit`, whether it proves itself or not."""
    padded = _pad(choice_logits)

    def loss(log_temperature: float) -> float:
        return _nll_of_rows(padded * np.exp(-log_temperature), answers).sum() + log_temperature**2 / 2

    # The sum of two terms, each with one lowest point, may have two: the best of a grid says which.
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


def calibrated_nll(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """The lowest NLL, in nats, that a temperature of at least 1, fitted on the same rows, gives: what is lost in ways
    that a temperature cannot mend. Lower ones do not count: a few rows that are all right would ask for 0. Rows may
    differ in length."""
    padded = _pad(logits)

    def nll(log_temperature: float) -> float:
        return float(_nll_of_rows(padded * np.exp(-log_temperature), answers).mean())

    # Convex in 1 / temperature, so there is one lowest point in its logarithm too.
    return min(float(minimize_scalar(nll, bounds=(0.0, np.log(HIGHEST)), method="bounded").fun), nll(0.0))


# --- Scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighing:
    """Ways to weigh scales, the one that was `chosen` among them: their weights from all rows, their NLL in nats,
    cross-fitted, and of the chosen one the choice logits: by the weights from all rows, and `by_fold` as `fit` takes
    them."""

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


# --- calibration.json -------------------------------------------------------------------------------------------------


def views_key(metadata: Mapping[str, Any]) -> str:
    """How rows were scored, from the metadata of a prediction file: "orders identity", "orders rotations, scales 0.9
    1.0 1.1, average log". What changes nothing is not said: scale 1 alone, the usual average, that of one view."""
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
    """What `vqa-sft calibrate` found for the run in this folder and rows scored as `metadata` say; None: nothing.

    One of several folds may have it from the folder above: `known_entries`. Raises InputError for a damaged file.
    """
    key = views_key(metadata)
    entry = known_entries(folder).get(key)
    if entry is None:
        return None
    check_calibration(entry, f"{printable(key)!r} for {folder}", metadata.get("scales") or [1.0])
    return Calibration(entry["temperature"], entry.get("bias"), entry.get("scale_weights"))


def worth_of_scales(folders: Sequence[str | Path], metadata: Mapping[str, Any]) -> list[str]:
    """What to say where several scales are asked of the runs in these folders: that nobody knows what each is worth, or
    that `vqa-sft calibrate` has found that only one counts."""
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
    """What calibration.json holds for the run in this folder. One of several folds has what was found for itself, else
    what was found for all of them in the folder above, else what its own training found."""
    folder = Path(folder).resolve()
    own = _read_entries(folder)
    if not _is_fold_of(folder, folder.parent):
        return own
    by_itself = {key: entry for key, entry in own.items() if entry.get(AT_THE_END)}
    return by_itself | _read_entries(folder.parent) | {key: own[key] for key in own.keys() - by_itself.keys()}


def _is_fold_of(folder: Path, above: Path) -> bool:
    is_fold = folder.name.startswith("fold") and folder.name[4:].isdecimal()
    return is_fold and (above / OUT_OF_FOLD).is_file()


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
    to calibration.json, and return a table of what it does. `at_the_end` of a training there is no bias, and what was
    found for all folds goes before.

    Raises InputError where there is nothing to fit on, or the rows are not what they must be.
    """
    folder = Path(folder)
    _check_folder(folder)
    file = _default_file(folder) if file is None else Path(file)
    predictions = read_predictions(file)
    _check_rows(folder, file, predictions)
    entries, key = _read_entries(folder), views_key(predictions.metadata)
    answers = [answer for answer in predictions.answers if answer is not None]
    weighing = weigh_scales(predictions, answers) if predictions.scale_logits else None
    logits, by_fold = (weighing.choice_logits, weighing.by_fold) if weighing else (predictions.choice_logits, None)
    # Under other orders a position is no letter.
    may_have_bias = key.startswith("orders identity") and not at_the_end
    found = fit(logits, answers, may_have_bias=may_have_bias, by_fold=by_fold)
    before = with_intervals(softmax(predictions.choice_logits), answers)
    find = fit_bias if found.bias else fit_temperature if found != Calibration() else Calibration.none
    after = with_intervals(cross_fit(logits, answers, find, by_fold), answers)
    is_inside = file.resolve().is_relative_to(folder.resolve())
    source = str(file.resolve().relative_to(folder.resolve())) if is_inside else file.name
    entry = found.as_dict | {"rows": len(answers), "source": source, "before": before, "after": after}
    entry |= {AT_THE_END: True} if at_the_end else {}
    if weighing:
        weights = weighing.weights[weighing.chosen]
        used = [scale for scale in predictions.metadata["scales"] if weights[str(float(scale))]]
        if len(used) == 1:  # alone it is scored the same
            entries.setdefault(views_key({**predictions.metadata, "scales": used}), entry)
        entry = entry | {"scale_weights": weights}
    entries[key] = entry
    with whole(folder / CALIBRATION) as unfinished:
        unfinished.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    names = ["accuracy", "nll", "brier", "ece", "ece_equal_mass"]
    lines = [["", *names], ["before", *describe(before, names)], ["after", *describe(after, names)]]
    bias = "no bias" if found.bias is None else "bias " + " ".join(f"{number:+.2f}" for number in found.bias)
    bias += " (none proves itself: probabilities stay as they are)" if found == Calibration() else ""
    return (
        f"{as_table(lines)}\n{_compare_weights(weighing)}\n{key}: temperature {found.temperature:.3f}, {bias}, from "
        f"{len(answers):,} rows of "
        f"{file}.\n`after` is cross-fitted: each row by what was found on the other four parts of five, for on the\n"
        f"rows that it was fitted on any temperature looks good.\n{_compare(entries)}Wrote "
        f"{folder / CALIBRATION}"
    )


def calibrate_new(folder: str | Path) -> str:
    """At the end of a training: as `calibrate_run`, from the rows that were scored then; what was found, in a line.

    Without a bias, so that no answer changes that nobody asked to change. An entry that is known already stays, and
    where no temperature can be found there is none.
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
            f"Not calibrated: on the {entry['rows']:,} rows of {folder / entry['source']} no temperature proves itself "
            "(NLL of rows that it was not fitted on); probabilities stay as they are scored."
        )
    return (
        f"Calibrated on the {entry['rows']:,} rows of {folder / entry['source']}: temperature "
        f"{entry['temperature']:.3f}; on rows that it was not fitted on the NLL goes from {entry['before']['nll']:.4f} "
        f"to {entry['after']['nll']:.4f}."
    )


def _compare_weights(weighing: Weighing | None) -> str:
    """What was tried with several scales."""
    if weighing is None:
        return ""
    lines = [["scales", *weighing.weights[weighing.chosen], "NLL"]]
    for way, weights in weighing.weights.items():
        taken = " (taken)" if way == weighing.chosen else ""
        lines.append([way + taken, *(f"{weight:.2f}" for weight in weights.values()), f"{weighing.nll[way]:.4f}"])
    return f"\n{as_table(lines)}\n"


def _compare(entries: Mapping[str, Any]) -> str:
    """Where several ways of scoring are known, their NLL, the lowest first."""
    known = [line for line in (_line_of(*item) for item in entries.items()) if line]
    known.sort(key=lambda line: float(line[2].split()[0]))
    if len(known) < 2:
        return ""
    lines = [["views", "rows", "NLL after"], *known]
    return f"\nKnown of this run, the best first:\n{as_table(lines)}\n"


def _line_of(key: str, entry: Mapping[str, Any]) -> list[str]:
    """Of that table; nothing where the entry does not say what it does, as one written by hand."""
    try:
        return [key, f"{entry['rows']:,}", *describe(entry["after"], ["nll"])]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return []


def _default_file(folder: Path) -> Path:
    found = [folder / name for name in (OUT_OF_FOLD, VALIDATION) if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} holds no {OUT_OF_FOLD} and no {VALIDATION}. Give --predictions FILE.parquet.")
    return found[0]


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"no such run folder: {folder}.")
    if not any((folder / name).is_file() for name in (RUN, OUT_OF_FOLD)):
        raise InputError(f"{folder} holds no finished run (no {RUN}). Give the output_dir of a run that has ended.")


def _check_rows(folder: Path, file: Path, predictions: Predictions) -> None:
    """Raises InputError where a temperature from these rows would say little, or nothing of this run."""
    ids = predictions.ids
    unknown = [row_id for row_id, answer in zip(ids, predictions.answers, strict=True) if answer is None]
    if unknown:
        raise InputError(f"{file} has no answer to learn from in {name_rows(unknown, len(ids))}.")
    if len(ids) < MIN_ROWS:
        raise InputError(f"{file} has {len(ids)} rows; a temperature needs at least {MIN_ROWS}.")
    if file.resolve() in {(folder / name).resolve() for name in (OUT_OF_FOLD, VALIDATION)}:
        return
    if "ensemble" in predictions.metadata:
        raise InputError(
            f"{file} is an ensemble, and a temperature belongs to one run. Give the run's own predictions."
        )
    if "run" in predictions.metadata and not _is_of(folder, predictions.metadata["run"]):
        of = predictions.metadata["run"] or f"the base model {predictions.metadata.get('base_model')} as it is"
        raise InputError(
            f"{file} holds predictions of {of}, not of {folder}. Give that run, or this one's predictions."
        )
    run = folder / Path(predictions.metadata.get("run") or "").name
    trained_on = _trained_on(run if _is_fold_of(run, folder) else folder)
    seen = set(ids) & trained_on.keys()
    seen -= set(others_of(seen, predictions.digest_of, {i: digest for i, digest in trained_on.items() if digest}))
    if seen:
        raise InputError(
            f"{folder} was trained on {name_rows([i for i in ids if i in seen], len(ids))} of {file}: there it is "
            "surer than elsewhere. Give rows that it did not see."
        )
    if len(predictions.metadata.get("scales") or []) > 1 and not predictions.scale_logits:
        raise InputError(
            f"{file} does not say what each of its scales does: an earlier version wrote it. Score it anew."
        )


def _is_of(folder: Path, run: str | None) -> bool:
    """Whether `run`, as a prediction file names it, is the run in this folder or one of its folds; the folder may have
    been moved since, and its own predictions tell its earlier name."""
    names = [str(folder)]
    for name in (OUT_OF_FOLD, VALIDATION):
        if (folder / name).is_file():
            names.append(read_predictions(folder / name).metadata.get("run") or str(folder))
    return run is not None and any(Path(run).resolve().is_relative_to(Path(name).resolve()) for name in names)


def _trained_on(folder: Path) -> dict[str, str]:
    """Ids and digests ("": unknown) of the training rows; without those whose ids other rows have too, for two sets may
    both count from 0."""
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
