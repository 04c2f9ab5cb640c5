"""What a model says of the candidates of each row, from one or several prediction files. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vqa_sft.data.class_probs import NONE_OF_THESE, UNKNOWN_LABEL
from vqa_sft.errors import InputError, name_rows
from vqa_sft.predictions.class_tables import match_classes, merge_labels
from vqa_sft.predictions.file import Predictions, check_same_rows
from vqa_sft.predictions.pooling import TINY, own_choices

NO_CLASS = -2  # beyond the candidates of a row that has fewer than others


@dataclass
class Votes:
    """N rows; of each its candidates in the order of the classes, and the probability of each.

    Where "none of these" is a choice, it has the rest of the probability, `none`.
    """

    ids: list[str]
    digest_of: dict[str, str]
    candidates: np.ndarray  # (N, K) classes, NO_CLASS at the end of rows that have fewer
    probs: np.ndarray  # (N, K), 0 there
    none: np.ndarray | None  # (N,); None: no such choice
    labels: np.ndarray  # (N,), UNKNOWN_LABEL for none

    def take(self, rows: np.ndarray) -> "Votes":
        none = None if self.none is None else self.none[rows]
        ids = [self.ids[row] for row in rows]
        return Votes(ids, self.digest_of, self.candidates[rows], self.probs[rows], none, self.labels[rows])


def votes_of(predictions: Predictions, classes: Sequence[str], names: Sequence[str]) -> Votes:
    """Those of one prediction file. `names` are those of this file and of the one with the `classes`.

    Raises InputError where it holds no candidates, or those of other classes.
    """
    if not predictions.candidates:
        raise InputError(
            f"{names[0]} holds no candidates: it is no prediction of a classification. Give what recipes/predict.py "
            "writes with --candidates."
        )
    places = match_classes(predictions.metadata["classes"], classes, names)
    is_own = own_choices([len(row) for row in predictions.candidates])  # (N, K)
    candidates, probs = np.full(is_own.shape, NO_CLASS), np.zeros(is_own.shape)
    listed = np.concatenate([np.asarray(row) for row in predictions.candidates])
    candidates[is_own] = np.where(listed == NONE_OF_THESE, NONE_OF_THESE, places[listed])
    probs[is_own] = np.maximum(np.concatenate(predictions.probs), TINY)
    is_none = candidates == NONE_OF_THESE
    have_it, none = is_none.any(axis=1), (probs * is_none).sum(axis=1)
    if have_it.any() and not have_it.all():
        without = [predictions.ids[row] for row in np.flatnonzero(~have_it)]
        raise InputError(
            f"{names[0]}: the choice 'none of these' is missing in {name_rows(without, len(have_it))}, and others have "
            "it. Predict all rows in one way."
        )
    candidates[is_none] = NO_CLASS
    order = np.argsort(np.where(candidates == NO_CLASS, len(classes), candidates), axis=1, kind="stable")
    order = order[:, : order.shape[1] - int(have_it.all())]
    candidates, probs = (np.take_along_axis(part, order, 1) for part in (candidates, probs))
    if empty := [predictions.ids[row] for row in np.flatnonzero((candidates == NO_CLASS).all(axis=1))]:
        raise InputError(f"{names[0]}: there are no candidates in {name_rows(empty, len(have_it))}.")
    known = predictions.labels or [None] * len(predictions.ids)
    labels = np.array([UNKNOWN_LABEL if label is None else places[label] for label in known])
    return Votes(predictions.ids, predictions.digest_of, candidates, probs, none if have_it.all() else None, labels)


def average_votes(votes: Sequence[Votes], names: Sequence[str]) -> Votes:
    """The mean, by class, of the probabilities that several files give the same candidates of the same rows; in the
    order of the first. Raises InputError where rows, candidates or labels are others."""
    first, aligned = votes[0], [votes[0]]
    labels = first.labels
    for one, name in zip(votes[1:], names[1:], strict=True):
        row_of = {row_id: row for row, row_id in enumerate(one.ids)}
        for here, there, known, where in ((name, names[0], row_of, first.ids), (names[0], name, {*first.ids}, one.ids)):
            if missing := [row_id for row_id in where if row_id not in known]:
                raise InputError(
                    f"{here} lacks {name_rows(missing, len(where))} of {there}. Give predictions of the same rows."
                )
        check_same_rows(first.ids, first.digest_of, one.digest_of, [names[0], name])
        one = one.take(np.array([row_of[row_id] for row_id in first.ids]))
        is_alike = one.candidates.shape == first.candidates.shape and (one.none is None) == (first.none is None)
        same = (one.candidates == first.candidates).all(axis=1) if is_alike else np.zeros(len(one.ids), bool)
        if differ := [one.ids[row] for row in np.flatnonzero(~same)]:
            raise InputError(
                f"{names[0]} and {name} have other candidates in {name_rows(differ, len(one.ids))}. Only predictions "
                "of the same candidates can be averaged: predict with the same --candidates and num_candidates."
            )
        labels = merge_labels(labels, one.labels, first.ids, [names[0], name])
        aligned.append(one)
    none = None if first.none is None else np.mean([one.none for one in aligned], axis=0)
    return replace(first, probs=np.mean([one.probs for one in aligned], axis=0), none=none, labels=labels)


def join_votes(votes: Sequence[Votes], names: Sequence[str]) -> Votes:
    """Files of the same rows averaged, and files of other rows, such as folds, put one after the other.

    Raises InputError where two share some rows and not all.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for number, one in enumerate(votes):
        groups.setdefault(frozenset(one.ids), []).append(number)
    joined = [average_votes([votes[i] for i in group], [names[i] for i in group]) for group in groups.values()]
    if len({one.none is None for one in joined}) > 1:
        raise InputError(f"of {', '.join(names)} only some have the choice 'none of these'. Give files of one kind.")
    ids = [row_id for one in joined for row_id in one.ids]
    if len({*ids}) < len(ids):
        raise InputError(
            f"{', '.join(names)} share some of their rows, but not all. Give files of the same rows, or of folds that "
            "share none."
        )
    most = max(one.candidates.shape[1] for one in joined)

    def padded(part: np.ndarray, value: float) -> np.ndarray:
        return np.pad(part, ((0, 0), (0, most - part.shape[1])), constant_values=value)

    return Votes(
        ids,
        {row_id: digest for one in joined for row_id, digest in one.digest_of.items()},
        np.concatenate([padded(one.candidates, NO_CLASS) for one in joined]),
        np.concatenate([padded(one.probs, 0) for one in joined]),
        None if joined[0].none is None else np.concatenate([one.none for one in joined]),
        np.concatenate([one.labels for one in joined]),
    )
