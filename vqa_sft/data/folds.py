"""Folds that never split a group, as like the whole as the groups allow; the file that keeps them. No torch.

A group is a number that rows share when they show the same image, or nearly the same. A stratum is what rows are
balanced by: (answer, question type, number of choices). Every fold gets its share of each stratum, of each part of it
alone (every answer, every question type, ...) and of all rows.

The same rows get the same folds on every machine: strata and groups are numbered in the order of rows, the random
numbers are of numpy's frozen generator, and the sums are exact in float64 (whole numbers, halves and 64ths), in
whatever order a machine adds them.
"""

import csv
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse

from vqa_sft.data.sources import Source, open_source
from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import begins_with, check_output, whole

ENCODINGS = ("cp949", "gb18030", "big5", "cp932", "euc_jp", "cp1252", "latin-1")  # in which spreadsheets save
# What the square of a row too many costs: among all rows, in its stratum, in each part of the stratum alone.
# Measured: with less on strata, rare ones are more than a row off; with less on parts, a hold-out rounds too many rare
# strata the same way.
WEIGHTS = (100, 10, 3)
MAX_COMPARED = 20_000  # rows for which scikit-learn's folds are made too; it needs seconds
FOLDS_START = '"id","fold"'  # how a folds file begins
MAX_CANDIDATES = 300  # groups of each of two folds that are tried against each other at a time
MAX_ROUNDS = 200  # a bound; it took 2 to 14


def make_folds(strata: Sequence[tuple], groups: Sequence[int], num_folds: int, seed: int) -> list[int]:
    """The fold of every row. Raises InputError when there are fewer groups than folds."""
    if num_folds < 2:
        raise InputError(f"num_folds must be at least 2; got {num_folds}. For one split, set validation_fraction.")
    if len(set(groups)) < num_folds:
        raise InputError(f"{num_folds} folds need at least {num_folds} different images; got {len(set(groups))}.")
    return _assign(strata, groups, [1 / num_folds] * num_folds, seed)


def hold_out_rows(strata: Sequence[tuple], groups: Sequence[int], fraction: float, seed: int) -> list[bool]:
    """Which rows are held out: about `fraction` of them. Raises InputError when that is none, or all."""
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction must be between 0 and 1; got {fraction}.")
    held_out = [fold == 1 for fold in _assign(strata, groups, [1 - fraction, fraction], seed)]
    if len(set(held_out)) < 2:
        raise InputError(
            f"validation_fraction {fraction} leaves no row for {'training' if any(held_out) else 'validation'}: there "
            f"are {len(set(groups)):,} different images in {len(groups):,} rows. Use a "
            f"{'smaller' if any(held_out) else 'larger'} fraction or a validation_data file."
        )
    return held_out


class Deviation(NamedTuple):
    """The most rows that a fold has too many or too few: of a stratum, of one part of the strata, of all rows."""

    stratum: float
    part: float
    size: float


def max_deviation(strata: Sequence[tuple], folds: Sequence[int], shares: Sequence[float]) -> Deviation:
    """How far `folds` are from holding their `shares` of everything; of `make_folds`, all shares are 1 / num_folds."""
    off = []
    for cells in _cells(strata):
        counts = np.zeros((len(shares), cells.max() + 1))
        np.add.at(counts, (folds, cells), 1)
        off.append(np.abs(counts - np.outer(shares, counts.sum(axis=0))).max())
    return Deviation(stratum=float(off[1]), part=float(max(off[2:])), size=float(off[0]))


def _assign(strata: Sequence[tuple], groups: Sequence[int], shares: Sequence[float], seed: int) -> list[int]:
    """The fold of every row, fold f with shares[f] of the rows: group by group, the largest first, then by exchanges.

    A row counts in several cells: all rows, its stratum, each part of the stratum alone. A group is a vector of
    counts in the C cells, and a fold the sum of its groups.
    """
    rng = np.random.RandomState(seed)
    numbers = _number(groups)
    cells = _cells(strata)
    first = np.cumsum([0, *(column.max() + 1 for column in cells)])
    indices = np.concatenate([column + start for column, start in zip(cells, first[:-1], strict=True)])
    shape = (numbers.max() + 1, first[-1])
    vectors = sparse.csr_matrix((np.ones(len(indices)), (np.tile(numbers, len(cells)), indices)), shape=shape)
    weights = np.repeat([*WEIGHTS[:2], *[WEIGHTS[2]] * (len(cells) - 2)], np.diff(first)).astype(float)  # (C,)
    fold_of = _deal(vectors, shares, rng)
    _exchange(vectors, fold_of, shares, weights, rng)
    return fold_of[numbers].tolist()


def _deal(vectors: sparse.csr_matrix, shares: Sequence[float], rng: np.random.RandomState) -> np.ndarray:
    """The fold of every group: the one that, for its share, has the fewest rows like those of the group."""
    totals = vectors.sum(axis=0).A1
    rarity = (totals[0] // totals + 1) ** 2  # few groups can balance a rare stratum later, so it counts more
    counts = np.zeros((len(shares), len(totals)))
    fold_of = np.empty(vectors.shape[0], dtype=int)
    order = rng.permutation(len(fold_of))
    sizes = vectors[:, 0].toarray()[:, 0]
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        held = slice(vectors.indptr[group], vectors.indptr[group + 1])
        where, vector = vectors.indices[held], vectors.data[held]
        fold_of[group] = ((counts[:, where] + vector / 2) @ (vector * rarity[where]) / shares).argmin()
        counts[fold_of[group], where] += vector
    return fold_of


def _exchange(
    vectors: sparse.csr_matrix,
    fold_of: np.ndarray,
    shares: Sequence[float],
    weights: np.ndarray,
    rng: np.random.RandomState,
) -> None:
    """Give a group of one fold for a group of another, or for none, while that lowers the weighted sum of squares."""
    held = (slice(*ends) for ends in pairwise(vectors.indptr))
    kinds = _number((vectors.indices[of_group].tobytes(), vectors.data[of_group].tobytes()) for of_group in held)
    excess = np.vstack([vectors[fold_of == fold].sum(axis=0).A1 for fold in range(len(shares))])  # (folds, C)
    excess -= np.round(np.outer(shares, excess.sum(axis=0)) * 64) / 64
    none = np.zeros((1, len(weights)))
    for _ in range(MAX_ROUNDS):
        improved = False
        for a, b in combinations(range(len(shares)), 2):
            groups_a, groups_b = (_draw(np.flatnonzero(fold_of == fold), kinds, rng) for fold in (a, b))
            give, take = (np.vstack([vectors[groups].toarray(), none]) for groups in (groups_a, groups_b))
            # Half the change of the sum when a gives x and takes y: |x - y|^2 - (x - y) (excess of a - excess of b).
            weighted, pull = give * weights, (excess[a] - excess[b]) * weights
            change = ((give * weighted).sum(axis=1) - give @ pull)[:, None] - 2 * weighted @ take.T
            change += (take**2 @ weights) + take @ pull
            i, j = np.unravel_index(change.argmin(), change.shape)
            if change[i, j] < 0:
                improved = True
                fold_of[groups_a[i : i + 1]] = b  # an empty slice where it is the last, which stands for none
                fold_of[groups_b[j : j + 1]] = a
                excess[a] += take[j] - give[i]
                excess[b] += give[i] - take[j]
        if not improved:
            return


def _draw(groups: np.ndarray, kinds: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Some of `groups`, drawn again at every call, no two with the same vector."""
    groups = rng.permutation(groups)
    return groups[rng.permutation(np.unique(kinds[groups], return_index=True)[1])[:MAX_CANDIDATES]]


def _cells(strata: Sequence[tuple]) -> list[np.ndarray]:
    """Numbers from 0: the cell of every row among all rows (one cell), the strata, and each part of them alone."""
    return [_number(values) for values in ([0] * len(strata), strata, *zip(*strata, strict=True))]


def _number(values: Iterable[Hashable]) -> np.ndarray:
    """Equal values get the same number, in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def stratified_deviation(strata: Sequence[tuple], groups: Sequence[int], num_folds: int, seed: int) -> Deviation | None:
    """That of scikit-learn's folds of the same rows, for comparison; None where they cannot be made or take long."""
    if len(strata) > MAX_COMPARED:
        return None
    from sklearn.model_selection import StratifiedGroupKFold

    numbers: dict[tuple, int] = {}
    labels = [numbers.setdefault(stratum, len(numbers)) for stratum in strata]
    folds = [0] * len(strata)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings(action="ignore"):  # strata with fewer rows than folds
            for fold, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
                for row in rows:
                    folds[row] = fold
    except ValueError:  # no stratum has as many rows as there are folds
        return None
    return max_deviation(strata, folds, [1 / num_folds] * num_folds)


def check_folds_file(path: str | Path) -> None:
    """Raises InputError where `vqa-sft folds` cannot write this file, or must not."""
    check_output(path, suffix=".csv", is_ours=begins_with(FOLDS_START), kind="file of `vqa-sft folds`")


def write_folds(path: str | Path, ids: Sequence[str], folds: Sequence[int], overwrite: bool = True) -> None:
    """Write a CSV of id and fold, whole or not at all; fold -1: always trained on."""
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        # Ids in quotes: csv would leave a lone carriage return in one bare, and read it as the end of the row.
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(("id", "fold"))
        writer.writerows(zip(ids, folds, strict=True))
        file.flush()
        if Path(path).exists() and not overwrite and Path(path).read_bytes() != unfinished.read_bytes():
            raise InputError(
                f"{path} holds other folds, which runs may rely on. Name another file, or give --overwrite."
            )


def read_folds(path: str | Path, ids: Sequence[str], whole: bool = True) -> list[int]:
    """The folds of `ids`, in their order. Raises InputError when the file is none or does not fit the data.

    `whole` is False where `ids` are only a part of the data, as under a limit: then the file may have others.
    """
    fold_of = read_fold_of(path, ids)
    _check_ids(path, ids, fold_of, whole)
    return [fold_of[row_id] for row_id in ids]


def fold_numbers(path: str | Path) -> list[int]:
    """The folds of a file, fewest first, without that of the rows that are always trained on. Raises InputError."""
    return sorted(set(read_fold_of(path).values()) - {-1})


def _open(path: str | Path, ids: Sequence[str] | None) -> Source:
    """The file, in an encoding in which it has these ids where it is not sure; numbers of folds are the same in all."""
    try:
        return open_source(str(path))
    except InputError:
        for encoding in ENCODINGS if ids is not None else ("latin-1",):
            with suppress(InputError):
                opened = open_source(str(path), encoding=encoding)
                if ids is None or "id" in opened.columns and {*ids} <= {row["id"] for _, row in opened.rows()}:
                    return opened
        raise


def read_fold_of(path: str | Path, ids: Sequence[str] | None = None) -> dict[str, int]:
    """Id -> fold; `ids` tell the encoding where it is not sure. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}. `vqa-sft folds` writes one.")
    opened = _open(path, ids)
    if not {"id", "fold"} <= set(opened.columns):
        raise InputError(f"{path} must have the columns id and fold; found: {', '.join(opened.columns)}.")
    rows = [(str(row["id"]), str(row["fold"]).strip()) for _, row in opened.rows()]
    twice = [row_id for row_id, count in Counter(row_id for row_id, _ in rows).items() if count > 1]
    if twice:
        raise InputError(f"{path} has ids more than once: {name_rows(twice, len(rows))}. Keep one row of each.")
    bad = [f"{row_id} ({fold!r})" for row_id, fold in rows if not re.fullmatch("-1|[0-9]{1,9}", fold)]
    if bad:
        raise InputError(f"{path}: `fold` must be 0, 1, ... or -1; got another in {name_rows(bad, len(rows))}.")
    return {row_id: int(fold) for row_id, fold in rows}


def _check_ids(path: str | Path, ids: Sequence[str], found: dict[str, int], whole: bool) -> None:
    missing = [row_id for row_id in ids if row_id not in found]
    known = set(ids)
    foreign = [row_id for row_id in found if row_id not in known]
    lines = [f"not in the file: {name_rows(missing, len(ids))}."] if missing else []
    lines += [f"only in the file: {name_rows(foreign, len(found))}."] if foreign and (whole or missing) else []
    if not lines:
        return
    if any((row_id.lstrip("0") or "0") in found for row_id in missing):
        lines.append("A spreadsheet seems to have cut the zeros that ids begin with (0001 became 1).")
    lines.append("Write it again from these data with `vqa-sft folds`.")
    raise InputError("\n  ".join([f"{path} has other rows than the data.", *lines]))
