"""`vqa-sft fuse`: the full class probabilities of test rows, from a classifier and a model's choices. No torch.

test.parquet (candidates)  + prior       ->  fused.parquet     by parameters
oof.parquet  (candidates)  + fit_prior   ->  the parameters    of rows that neither of the two was trained on
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vqa_sft.console import table
from vqa_sft.data.class_probs import UNKNOWN_LABEL, ClassProbs, write_class_probs
from vqa_sft.data.read_class_probs_table import read_any_class_probs
from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import check_output
from vqa_sft.predictions.calibration import default_file, views_key
from vqa_sft.predictions.check_file import CALIBRATION, CANDIDATES_FILE
from vqa_sft.predictions.class_metrics import with_intervals
from vqa_sft.predictions.class_tables import (
    MADE_BY,
    digest_of,
    is_made_by,
    merge_labels,
    rows_of,
    with_classes,
)
from vqa_sft.predictions.file import Predictions, may_be_of_one_run, read_predictions, shared_rows
from vqa_sft.predictions.fit_calibration import MIN_ROWS
from vqa_sft.predictions.fit_fusion import Selection, select
from vqa_sft.predictions.fusion import FUSED, MODEL, PRIOR, Rows, fuse, make_rows
from vqa_sft.predictions.metrics import describe
from vqa_sft.predictions.votes import NO_CLASS, Votes, average_votes, join_votes, votes_of

METRICS = ("nll", "accuracy", "top_5")


def fuse_files(
    files: Sequence[str],
    *,
    prior: str | None = None,
    fit: Sequence[str] = (),
    fit_prior: str | None = None,
    output: str | Path,
) -> str:
    """Write the fused table of `files`; the cross-fitted metrics of each way and the parameters, as text. Several files
    are averaged. `fit` are files or run folders, by default those of the runs; the priors are by default the candidates
    that the rows were predicted with. Raises InputError before anything is written."""
    test = _as_scored(files)
    fit = [_held_out_of(name) if Path(name).is_dir() else name for name in fit]
    fit = fit or [_held_out_of(run) for run in _runs_of(test, files)]
    held_out = _as_scored(fit)
    prior = prior or _candidates_of(test[0], files[0], "--prior")
    fit_prior = fit_prior or _candidates_of(held_out[0], fit[0], "--fit-prior")
    reads = [*files, prior, *fit, fit_prior]
    check_output(output, suffix=".parquet", reads=reads, is_ours=is_made_by("fuse"), kind="table of vqa-sft fuse")
    own = read_any_class_probs(prior, None)
    of_fit = with_classes(read_any_class_probs(fit_prior, None), own.names, [fit_prior, prior])
    notes = _notes(test, held_out, [*files, *fit]) + _note_prior(of_fit, fit_prior)
    votes = average_votes(
        [votes_of(one, own.names, [name, prior]) for one, name in zip(test, files, strict=True)], files
    )
    fit_votes = [votes_of(one, own.names, [name, prior]) for one, name in zip(held_out, fit, strict=True)]
    fit_votes = join_votes(fit_votes, fit)
    if shared := shared_rows(fit_votes.ids, {*votes.ids}, fit_votes.digest_of, votes.digest_of):
        raise InputError(
            f"{', '.join(fit)} and {', '.join(files)} share {name_rows(shared, len(fit_votes.ids))}. Parameters are "
            "fitted on rows that are not predicted with them: give out-of-fold or validation rows."
        )
    if (votes.none is None) != (fit_votes.none is None):
        alone = files[0] if fit_votes.none is None else fit[0]
        raise InputError(f"'none of these' is a choice in {alone} alone. Predict both in one way.")
    rows = _join(own, votes, [prior, *files])
    joined = _join(of_fit, fit_votes, [fit_prior, *fit])
    fit_rows, num_unknown = _labelled(joined, fit)
    notes += [f"{num_unknown:,} rows of {', '.join(fit)} have no label and do not count."] if num_unknown else []
    notes += _check_candidates(of_fit, replace(fit_votes, labels=joined.labels), fit)
    notes += _check_candidates(own, replace(votes, labels=np.full(len(votes.ids), UNKNOWN_LABEL)), files)
    found = select(fit_rows)
    fused = replace(fuse(rows, found.fusion), digests=[votes.digest_of.get(row_id) for row_id in votes.ids])
    made_of = f"{', '.join(files)} and {prior}, by {', '.join(fit)} and {fit_prior}"
    fused.metadata = {
        "source": f"vqa-sft fuse: {made_of}",
        MADE_BY: "fuse",
        "fusion": {"way": found.fusion.way} | found.fusion.parameters,
    }
    write_class_probs(output, fused)
    wrote = f"Wrote {len(fused):,} rows to {output}, from {made_of}."
    to_submit = f"  vqa-sft submit {output} --template sample_submission.csv --output submission.csv"
    return "\n".join([*notes, describe_selection(found), wrote, "To submit them:", to_submit])


def _as_scored(names: Sequence[str]) -> list[Predictions]:
    """Without the run's calibration, which was fitted on the rows that parameters are fitted on here. Raises InputError
    for a file that is there twice."""
    if len({Path(name).resolve() for name in names}) < len(names):
        raise InputError(f"a file is given twice: {', '.join(names)}. Give each once.")
    found = [read_predictions(name) for name in names]
    return [replace(one, metadata={k: v for k, v in one.metadata.items() if k != CALIBRATION}) for one in found]


def _runs_of(test: Sequence[Predictions], files: Sequence[str]) -> list[str]:
    """The folders of the runs that scored the test rows."""
    runs = dict.fromkeys(one.metadata.get("run") for one in test)
    if None in runs:
        raise InputError(
            f"--fit is missing, and no run made {', '.join(files)} whose held-out rows could be taken. Give "
            "predictions of rows with labels."
        )
    return [str(run) for run in runs]


def _held_out_of(run: str) -> str:
    """The file of a run folder's held-out rows."""
    return str(default_file(Path(run), "Give --fit FILE, predictions of rows that it was not trained on."))


def _candidates_of(predictions: Predictions, name: str, option: str) -> str:
    """The file of the candidates that rows were predicted with, where it is still there."""
    path = predictions.metadata.get(CANDIDATES_FILE)
    if path is None or not Path(path).is_file():
        what = "does not say with which candidates it was predicted" if path is None else f"names {path}, which is gone"
        raise InputError(f"{option} is missing, and {name} {what}. Give their class probabilities.")
    return path


def _notes(test: Sequence[Predictions], held_out: Sequence[Predictions], names: Sequence[str]) -> list[str]:
    """Where the rows to fit on may not stand for the test rows."""
    notes = []
    if any(not any(may_be_of_one_run(one, other) for other in held_out) for one in test):
        makers = [", ".join(dict.fromkeys(one.maker for one in files)) for files in (held_out, test)]
        notes.append(f"Beware: the rows to fit on were scored by {makers[0]}, the test rows by {makers[1]}.")
    ways = [{views_key(one.metadata) + one.shown for one in files} for files in (held_out, test)]
    if ways[0] != ways[1]:
        said = [" and ".join(sorted(way)) for way in ways]
        notes.append(
            f"Beware: the rows to fit on were scored with {said[0]}, the test rows with {said[1]}. predict.py --part "
            "validation scores the former as the latter; give its file to --fit."
        )
    sizes = [{max(map(len, one.candidates)) for one in files if one.candidates} for files in (held_out, test)]
    if sizes[0] != sizes[1]:
        said = [", ".join(map(str, sorted(size))) for size in sizes]
        notes.append(f"Beware: the rows to fit on have up to {said[0]} choices, the test rows {said[1]}.")
    if shown := [f"{name} ({one.images})" for name, one in zip(names, [*test, *held_out], strict=True) if one.shown]:
        notes.append(f"Beware: not scored with the rows' own images: {', '.join(shown)}.")
    return notes


def _note_prior(prior: ClassProbs, name: str) -> list[str]:
    if "out_of_fold" in prior.metadata:  # False: of rows beside those that `candidates` trained on
        return []
    return [
        f"Beware: {name} does not say that its probabilities are out of fold. Those of rows that the classifier was "
        "trained on are too good, and the table would trust it too much."
    ]


def _join(prior: ClassProbs, votes: Votes, names: Sequence[str]) -> Rows:
    """Prior and votes of the rows of the votes; `names` are those of the prior and of the files."""
    prior = prior.take(rows_of(prior, votes.ids, votes.digest_of, names[:2]))
    labels = merge_labels(votes.labels, prior.labels, votes.ids, [names[1], names[0]])
    digests = digest_of(prior) | votes.digest_of
    return make_rows(prior, replace(votes, labels=labels, digest_of=digests))


def _labelled(rows: Rows, names: Sequence[str]) -> tuple[Rows, int]:
    """The rows with a label, and how many have none."""
    known = np.flatnonzero(rows.labels != UNKNOWN_LABEL)
    if len(known) < MIN_ROWS:
        raise InputError(
            f"parameters need at least {MIN_ROWS} rows with a label; got {len(known)} of {len(rows):,} in "
            f"{', '.join(names)}."
        )
    return rows.take(known), len(rows) - len(known)


def _check_candidates(prior: ClassProbs, votes: Votes, names: Sequence[str]) -> list[str]:
    """Raises InputError where the label was put among the candidates; a note where these are not the prior's own."""
    prior = prior.take(rows_of(prior, votes.ids, votes.digest_of, [names[0], names[0]]))
    own = votes.candidates != NO_CLASS
    num_own = own.sum(axis=1)
    if num_own.max() > prior.num_kept:  # which are the likeliest is not known
        return []
    padded = np.where(np.arange(prior.num_kept) < num_own[:, None], prior.indices, NO_CLASS)  # its likeliest ones
    is_likely = np.stack([(padded == column[:, None]).any(axis=1) for column in votes.candidates.T], axis=1) & own
    is_label = own & (votes.candidates == votes.labels[:, None])
    unlikely = own & ~is_likely
    differ, put_in = unlikely.any(axis=1), (unlikely.sum(axis=1) == 1) & (unlikely & is_label).any(axis=1)
    if put_in.any() and (put_in == differ).all():
        found = [votes.ids[row] for row in np.flatnonzero(put_in)]
        raise InputError(
            f"{', '.join(names)}: the label was put among the candidates in {name_rows(found, len(own))}, where the "
            "classifier does not have it. Test rows have no such help: predict these rows with the candidates as they "
            "are."
        )
    share = float(differ.mean())
    if not share:
        return []
    return [f"In {share:.1%} of the rows of {', '.join(names)} the candidates are not their prior's likeliest classes."]


def describe_selection(found: Selection) -> str:
    """A table of the ways, cross-fitted; which is used, and its parameters."""
    names = {"nll": "log loss", "accuracy": "accuracy", "top_5": "top-5"}
    lines = [["", "rows", *(names[name] for name in METRICS)]]
    values = {way: with_intervals(one) for way, one in found.tables.items()}
    for way, one in found.tables.items():
        lines.append([way, f"{len(one):,}", *describe(values[way], METRICS)])
    used = found.fusion
    counts = {PRIOR: ("exponent", "smoothing"), MODEL: ("model", "sure", "shift", "none", "smoothing")}
    shown = counts.get(used.way, tuple(used.parameters))
    said = ", ".join(
        f"{name} {value:.3g}" for name, value in used.parameters.items() if name in shown and (value or name != "none")
    )
    parts = [
        table(lines),
        "Cross-fitted: each row by parameters from the other four folds of five.",
        f"{used.way}: {said}.",
    ]
    if used.way != FUSED:
        other = MODEL if used.way == PRIOR else PRIOR
        parts.append(
            f"Fusing is not better by more than a standard error than {PRIOR} and {MODEL}: the table is that of the "
            f"{used.way} (log loss {values[used.way]['nll']:.4f}; {other} {values[other]['nll']:.4f})."
        )
    return "\n".join(parts)
