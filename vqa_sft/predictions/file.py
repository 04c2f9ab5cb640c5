"""The prediction file. No torch.

A prediction file is Parquet, in the row order of the data:

    id             of the row
    choice_logits  log-probabilities of the row's own choices, averaged over views; dataset order, ragged, no -inf.
                   As scored: no temperature and no bias is in them
    answer         null where unknown
    blanked        answered without an image that could not be used
    agreement      share of the row's views whose best choice is the averaged best one (of an ensemble: the share of the
                   weights); null where unknown, and files without the column are read too. Scales count equally in it
    digest         of the row's question, choices and images (`digests_of`), whatever its id: rows of two files are the
                   same where id and digest agree; null where unknown, and files without the column are read too
    scale_logits   only where images were scored at several scales by one run: of each scale, in the order of `scales`
                   in the metadata, its own log-probabilities. `choice_logits` weight the scales equally
    changed        only where images were blank, swapped or blurred (batch/control.py): whether those of this row were;
                   it may have none
    candidates     only of a classification: the class of each choice, as an index of `classes` in the metadata;
                   class_probs.NONE_OF_THESE for that choice. `answer` is the place of the label among them
    label          only of a classification: the class of the row; null where unknown

Its metadata say what made it; of a classification "classes" are the names of all classes, "candidates" says what those
of the rows were made by, and "candidates_file" where they were. "images", which of these it was. "answers" says how the
data of the run write their answers (`answers_as`), for the submission. "calibration" holds the run's temperature for
these views, and perhaps a bias and weights of the scales: `Predictions.probs` applies them.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqa_sft.batch.control import ORIGINAL
from vqa_sft.data.class_probs import is_class_probs
from vqa_sft.data.columns import Columns
from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import whole
from vqa_sft.predictions.check_file import (
    CALIBRATION,
    CANDIDATES_FILE,
    CLASSES,
    IMAGES,
    check_content,
    scale_names,
)
from vqa_sft.predictions.metrics import softmax
from vqa_sft.predictions.pooling import experts_of_scales, log_rows, pool

if TYPE_CHECKING:  # it loads datasets
    from vqa_sft.data.examples import Loaded

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("choice_logits", pa.list_(pa.float32())),
        ("answer", pa.int64()),
        ("blanked", pa.bool_()),
        ("agreement", pa.float32()),
        ("digest", pa.string()),
    ]
)
LATER = ("agreement", "digest")  # columns that files of earlier versions lack
SCALE_LOGITS = pa.field("scale_logits", pa.list_(pa.list_(pa.float32())))
CHANGED = pa.field("changed", pa.bool_())
CANDIDATES, LABEL = pa.field("candidates", pa.list_(pa.int32())), pa.field("label", pa.int32())
METADATA_KEY = b"vqa_sft"


@dataclass
class Predictions:
    """N rows in data order; `choice_logits[i]` has as many numbers as row i has choices."""

    ids: list[str]
    choice_logits: list[list[float]]
    answers: list[int | None]
    metadata: dict = field(default_factory=dict)
    blanked: list[bool] = field(default_factory=list)  # empty: none
    agreement: list[float | None] = field(default_factory=list)  # empty: unknown
    scale_logits: list[list[list[float]]] = field(default_factory=list)  # of S scales; empty: one scale, or unknown
    digests: list[str | None] = field(default_factory=list)  # empty: unknown
    changed: list[bool] = field(default_factory=list)  # empty: no row was shown other images
    candidates: list[list[int]] = field(default_factory=list)  # empty: no classification
    labels: list[int | None] = field(default_factory=list)  # empty: no classification

    @property
    def images(self) -> str:
        """How images were shown, one of control.KINDS."""
        return self.metadata.get(IMAGES) or ORIGINAL

    @property
    def shown(self) -> str:
        """The same where it must be said: "", ", images blank"."""
        return "" if self.images == ORIGINAL else f", images {self.images}"

    @property
    def digest_of(self) -> dict[str, str]:
        """Id -> digest of the rows whose digest is known."""
        pairs = zip(self.ids, self.digests, strict=bool(self.digests))
        return {row_id: digest for row_id, digest in pairs if digest is not None}

    @property
    def maker(self) -> str:
        """The run or the base model that scored the rows, for messages."""
        return str(self.metadata.get("run") or self.metadata.get("base_model") or "an unknown run")

    @property
    def unanswered(self) -> list[str]:
        """Ids of the rows whose answer is unknown."""
        return [row_id for row_id, answer in zip(self.ids, self.answers, strict=True) if answer is None]

    @property
    def probs(self) -> list[np.ndarray]:
        """Probabilities of each row's choices: softmax(choice_logits / temperature + bias) where the metadata hold a
        calibration, with the scales at its weights if it has some; else softmax(choice_logits)."""
        calibration = self.metadata.get(CALIBRATION) or {}
        logits, weights = self.choice_logits, calibration.get("scale_weights")
        if weights:
            logits = self.weigh_scales([weights[name] for name in scale_names(self.metadata["scales"])])
        return softmax(logits, calibration.get("temperature", 1.0), calibration.get("bias"))

    def weigh_scales(self, weights: Sequence[float]) -> list[list[float]]:
        """What `choice_logits` are with these weights (S,) of the scales; they sum to 1."""
        probs = pool(experts_of_scales(self.scale_logits), weights, self.metadata.get("average") or "mean")
        return log_rows(probs, [len(row[0]) for row in self.scale_logits])

    @property
    def best(self) -> list[int]:
        """The most probable choice of each row; ties go to the first."""
        return [int(np.argmax(row)) for row in self.probs]

    def calibrated_as(self, other: "Predictions") -> "Predictions":
        """The same rows with the calibration of `other`, or with none: weights and conformal sets must be learned on
        held-out rows with the calibration of the rows that they are for."""
        rest = {key: value for key, value in self.metadata.items() if key != CALIBRATION}
        own = other.metadata.get(CALIBRATION)
        weights = (own or {}).get("scale_weights")
        if weights and (not self.scale_logits or weights.keys() != scale_names(self.metadata["scales"]).keys()):
            raise InputError(
                f"the rows that these held-out ones stand for were scored at the scales {', '.join(weights)}, with a "
                "weight each; the held-out file does not have the logits of each. Score them in the same way."
            )
        return replace(self, metadata=rest | ({CALIBRATION: own} if own else {}))


def others_of(ids: Iterable[str], ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The ids under which two files hold different rows, as far as both know their digests."""
    return [i for i in ids if i in ours and i in theirs and ours[i] != theirs[i]]


def shared_rows(
    ids: Sequence[str], others: Collection[str], ours: Mapping[str, str], theirs: Mapping[str, str]
) -> list[str]:
    """Those of the ids that are among the `others` and name the same row there, as far as both know its digest."""
    differ = set(others_of(ids, ours, theirs))
    return [i for i in ids if i in others and i not in differ]


def check_same_rows(
    ids: Sequence[str], ours: Mapping[str, str], theirs: Mapping[str, str], names: Sequence[str | Path]
) -> None:
    """Raises InputError where two files with these names hold different rows under the same ids."""
    differ = others_of(ids, ours, theirs)
    if differ:
        raise InputError(
            f"{names[0]} and {names[1]} have the same ids and other questions, choices or images in "
            f"{name_rows(differ, len(ids))}. Ids that are numbers of rows do not tell one data set from another: give "
            "files of the same rows."
        )


def answers_as(columns: Columns) -> dict[str, Any]:
    """The value of "answers" in the metadata: how the data with these columns name and write their answers. The format
    is None where no row tells it."""
    return {
        "id": columns.id or "id",
        "column": columns.answer or "answer",
        "format": columns.answer_format,
        "is_upper": columns.answers_are_upper,
        "question": columns.question,
        "choices": columns.choices,
        "fixed_question": columns.fixed_question,
        "fixed_choices": columns.fixed_choices,
    }


def classes_as(loaded: "Loaded") -> dict[str, Any]:
    """What the metadata say of a classification: all classes, the file of its candidates and what that was made by."""
    if loaded.classes is None:
        return {}
    of_file = {"candidates": loaded.candidates, CANDIDATES_FILE: loaded.candidates_file}
    return {CLASSES: [*loaded.classes.names]} | of_file


def may_be_of_one_run(one: Predictions, other: Predictions) -> bool:
    """False where the metadata differ in prompts, base model or run. A fold and the folder of all folds are one run; a
    folder that was moved is known by its name."""
    ours, theirs = one.metadata, other.metadata
    if None not in (digests := [ours.get("prompts_digest"), theirs.get("prompts_digest")]) and digests[0] != digests[1]:
        return False
    if not ("run" in ours and "run" in theirs):
        return True
    if ours["run"] is None or theirs["run"] is None:  # a base model as it is, or nothing is known
        bases = [PurePath(str(known["base_model"])).name for known in (ours, theirs) if known.get("base_model")]
        return len(bases) < 2 or ours["run"] == theirs["run"] and bases[0] == bases[1]
    (name, fold), (other_name, other_fold) = (_name_and_fold(PurePath(known["run"])) for known in (ours, theirs))
    return name == other_name and (fold == other_fold or None in (fold, other_fold))


def _name_and_fold(run: PurePath) -> tuple[str, str | None]:
    return (run.parent.name, run.name) if is_fold(run.name) else (run.name, None)


def is_fold(name: str) -> bool:
    """Whether a run folder of this name may be one of the folds that `fold: all` makes."""
    return name.startswith("fold") and name[4:].isdecimal()


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write `predictions` whole or not at all."""
    num_rows = len(predictions.ids)
    blanked = predictions.blanked or [False] * num_rows
    agreement = predictions.agreement or [None] * num_rows
    digests = predictions.digests or [None] * num_rows
    columns = [predictions.ids, predictions.choice_logits, predictions.answers, blanked, agreement, digests]
    table = pa.Table.from_arrays([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)
    if predictions.scale_logits:
        table = table.append_column(SCALE_LOGITS, pa.array(predictions.scale_logits, SCALE_LOGITS.type))
    if predictions.changed:
        table = table.append_column(CHANGED, pa.array(predictions.changed, CHANGED.type))
    if predictions.candidates:
        table = table.append_column(CANDIDATES, pa.array(predictions.candidates, CANDIDATES.type))
        table = table.append_column(LABEL, pa.array(predictions.labels or [None] * num_rows, LABEL.type))
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(predictions.metadata, ensure_ascii=False)})
    with whole(path) as unfinished:
        pq.write_table(table, unfinished)


def read_predictions(path: str | Path) -> Predictions:
    """Raises InputError when there is no such file, it is not a prediction file, or it is damaged."""
    if not Path(path).is_file():
        raise InputError(f"no such prediction file: {path}.")
    try:
        table = pq.read_table(path)
        for name in LATER:
            if name not in table.schema.names:
                table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
        columns = [table.select(SCHEMA.names).cast(SCHEMA)[name].to_pylist() for name in SCHEMA.names]
        has_scales = SCALE_LOGITS.name in table.schema.names
        scale_logits = table[SCALE_LOGITS.name].cast(SCALE_LOGITS.type).to_pylist() if has_scales else []
        changed = table[CHANGED.name].cast(CHANGED.type).to_pylist() if CHANGED.name in table.schema.names else []
        candidates, labels = (
            table[own.name].cast(own.type).to_pylist() if own.name in table.schema.names else []
            for own in (CANDIDATES, LABEL)
        )
        metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    # OSError: pages that are damaged; RecursionError: lists in lists without an end
    except (pa.ArrowException, KeyError, ValueError, OSError, RecursionError) as error:
        if is_class_probs(path):
            raise InputError(
                f"{path} holds class probabilities. Give predictions of candidates, as recipes/predict.py writes them "
                "with --candidates."
            ) from error
        beside = Path(path).with_suffix(".parquet")
        hint = f" That of a submission is beside it: {beside}." if beside != Path(path) and beside.is_file() else ""
        raise InputError(f"{path} is not a prediction file of vqa-sft ({type(error).__name__}).{hint}") from error
    ids, choice_logits, answers, blanked, *later = columns
    agreement, digests = ([] if all(value is None for value in column) else column for column in later)
    rest = (metadata, blanked, agreement, scale_logits, digests, changed, candidates, labels)
    predictions = Predictions(ids, choice_logits, answers, *rest)
    check_content(path, predictions)
    return predictions


def with_answers(predictions: Predictions, answers: dict[str, int]) -> Predictions:
    """`predictions` with the answers of a file, matched by id. Raises InputError for ids without one."""
    if missing := [row_id for row_id in predictions.ids if row_id not in answers]:
        raise InputError(f"no answer for {name_rows(missing, len(predictions.ids))}.")
    pairs = zip(predictions.ids, predictions.choice_logits, strict=True)
    if beyond := [row_id for row_id, logits in pairs if answers[row_id] >= len(logits)]:
        raise InputError(f"the answer is none of the row's choices in {name_rows(beyond, len(predictions.ids))}.")
    return replace(predictions, answers=[answers[row_id] for row_id in predictions.ids])


def take(file: Predictions, rows: Sequence[int]) -> Predictions:
    """Some of the rows, in this order."""
    names = ("ids", "choice_logits", "answers", "blanked", "agreement", "scale_logits", "digests", "changed")
    names += ("candidates", "labels")
    taken: dict[str, Any] = {name: [column[i] for i in rows] for name in names if (column := getattr(file, name))}
    return replace(file, **taken)
