"""What `vqa-sft report` is given: prediction files or runs, answers, and the data with questions and images. No torch.

All inputs are of the same rows, in the order of the first one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vqa_sft.config.training import RecipeArguments, as_list
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import Loaded, read_examples
from vqa_sft.data.find_files import find_files
from vqa_sft.errors import InputError, name_rows
from vqa_sft.predictions.blind import BLIND
from vqa_sft.predictions.calibration import OUT_OF_FOLD, RUN, VALIDATION, default_file
from vqa_sft.predictions.check_file import ANSWERS
from vqa_sft.predictions.class_tables import not_of_all_classes
from vqa_sft.predictions.ensemble import align
from vqa_sft.predictions.file import Predictions, read_predictions, with_answers
from vqa_sft.predictions.matched import read_answers, read_rows_of, without_columns
from vqa_sft.predictions.score import split_name
from vqa_sft.predictions.uncertainty import Uncertainty, measure_uncertainty
from vqa_sft.runs.folder import read_run


@dataclass
class Input:
    """N rows that one model or ensemble scored; `folder` is its run, where it is known."""

    name: str
    predictions: Predictions
    folder: Path | None = None

    @cached_property
    def probs(self) -> list[np.ndarray]:
        return self.predictions.probs

    @cached_property
    def best(self) -> np.ndarray:
        """The most probable choice (N,) of each row; ties go to the first."""
        return np.array([int(row.argmax()) for row in self.probs])

    @cached_property
    def confidence(self) -> np.ndarray:
        return np.array([row.max() for row in self.probs])

    @cached_property
    def uncertainty(self) -> Uncertainty:
        return measure_uncertainty(self.predictions)

    @cached_property
    def agreement(self) -> np.ndarray:
        """The share (N,) of the views that choose as all together do; 1 where it is unknown."""
        return np.array([1.0 if share is None else share for share in self.uncertainty.agreement])


@dataclass
class Data:
    """Questions, choices and images: row i is the example `places[i]` = (number of the source, position in it). They
    are the own data of the run in the folder `run`, where there is one."""

    sources: list[Loaded]
    places: list[tuple[int, int]]
    run: Path | None = None

    def __getitem__(self, row: int) -> dict[str, Any]:
        source, position = self.places[row]
        return self.sources[source].examples[position]

    def column(self, name: str) -> list:
        columns = [loaded.examples[name][:] for loaded in self.sources]
        return [columns[source][position] for source, position in self.places]

    def number(self, row: int) -> tuple[int, int]:
        """(number of the source, number of the row in it), as `Problems` count."""
        source, position = self.places[row]
        return source, self.sources[source].numbers[position]


@dataclass
class Inputs:
    """Everything a page is made of. `answers` (N,) is -1 where none is known; `notes` are for the reader. `in_training`
    tells of the rows with an image that training rows have too: row -> (bits by which the hashes differ, id there)."""

    inputs: list[Input]
    data: Data | None = None
    notes: list[str] = field(default_factory=list)
    in_training: dict[int, tuple[int, str]] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return self.inputs[0].predictions.ids

    @cached_property
    def answers(self) -> np.ndarray:
        return np.array([-1 if answer is None else answer for answer in self.inputs[0].predictions.answers])

    @cached_property
    def answered(self) -> np.ndarray:
        """Positions of the rows whose answer is known."""
        return np.flatnonzero(self.answers >= 0)

    @property
    def id_column(self) -> str | None:
        """The column that `keep_rows` finds the ids in; None where the data have none and rows are numbered."""
        if self.data is not None:
            return self.data.sources[0].columns.id
        return (self.inputs[0].predictions.metadata.get(ANSWERS) or {}).get("id", "id")


def read_inputs(
    items: Sequence[str],
    answers: str | None = None,
    data: str | None = None,
    own: Sequence[Loaded] | None = None,
    **options: Any,
) -> Inputs:
    """Prediction files and runs, as FILE, RUN or NAME=either. `answers` is a file of ids and answers; `data` are the
    rows that were predicted; `options` say how these are read. `own` are the data of the run, where they were read.

    Raises InputError where something cannot be read, or the files are of different rows.
    """
    found = [_read_input(item) for item in items]
    names = [one.name for one in found]
    files = [one.predictions for one in found]
    for name, file in zip(names, files, strict=True):
        if file.candidates and len(files) > 1:
            raise not_of_all_classes(name, "a report of several files")
    if answers is not None:
        known = read_answers(answers, files[0], names[0], data, **options)
        files = [replace(file, answers=[None] * len(file.ids)) for file in files]
        files[0] = with_answers(files[0], known)  # and `align` gives them to the others
        options = without_columns(options)  # which are those of the answers
    for one, file in zip(found, align(files, names), strict=True):
        one.predictions = file
    inputs = Inputs(found, notes=[note for one in found if (note := _blind_note(one) or _candidates_note(one))])
    _find_data(inputs, data, own, options)
    if inputs.data is not None and answers is None:
        _add_answers(inputs, inputs.data)
    return inputs


def _read_input(item: str) -> Input:
    name, path = split_name(item)
    file = default_file(Path(path), "Name a prediction file.") if Path(path).is_dir() else Path(path)
    predictions = read_predictions(file)
    is_own = file.name in (VALIDATION, OUT_OF_FOLD) and file.parent.is_dir()
    return Input(name, predictions, file.parent if is_own and runs_in(file.parent) else None)


def _candidates_note(one: Input) -> str:
    """What the choices of a classification are."""
    labels, answers = one.predictions.labels, one.predictions.answers
    if not one.predictions.candidates:
        return ""
    absent = sum(label is not None and answer is None for label, answer in zip(labels, answers, strict=True))
    return (
        f"The choices of a row are its candidates. The class of {absent:,} of {len(labels):,} rows is not among them: "
        "they do not count here."
    )


def _blind_note(one: Input) -> str:
    """What `vqa-sft blind` found of the run, if it was asked."""
    file = one.folder / BLIND if one.folder is not None else None
    if file is None or not file.is_file():
        return ""
    try:
        return f"{one.name}: {json.loads(file.read_text(encoding='utf-8'))['says']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{file} cannot be read ({type(error).__name__}). `vqa-sft blind` writes it again."


def runs_in(folder: Path) -> list[Path]:
    """The run in this folder, or the folds in it, in their order."""
    folds = sorted(folder.glob("fold*"), key=lambda path: (len(path.name), path.name))
    return [path for path in [folder, *folds] if (path / RUN).is_file()]


def _find_data(inputs: Inputs, data: str | None, own: Sequence[Loaded] | None, options: dict[str, Any]) -> None:
    """The rows that were predicted: `data`, else what a run was trained on. Where the latter is not there any more, or
    has changed, the page has a note."""
    first = inputs.inputs[0]
    if data is not None:
        loaded = read_rows_of(data, first.predictions, first.name, **options).loaded
        place = {row_id: position for position, row_id in enumerate(loaded.examples["id"][:])}
        inputs.data = Data([loaded], [(0, place[row_id]) for row_id in inputs.ids])
        return
    folder = next((one.folder for one in inputs.inputs if one.folder is not None), None)
    if folder is None:
        inputs.notes.append("A prediction file holds no questions and images: --data names the rows that were scored.")
        return
    try:
        inputs.data = _find_own(folder, own or read_sources(folder), first.predictions)
    except InputError as error:
        inputs.notes.append(f"Questions and images are not shown: {error} Give --data, the rows that were scored.")


def _find_own(folder: Path, sources: Sequence[Loaded], predictions: Predictions) -> Data:
    """The rows of a run's own data. Raises InputError where some are not there as they were."""
    place = find_places(sources)
    keys = list(zip(predictions.ids, predictions.digests or [None] * len(predictions.ids), strict=True))
    if missing := [row_id for row_id, digest in keys if (row_id, digest) not in place]:
        files = ", ".join(loaded.name for loaded in sources)
        raise InputError(f"{files} lacks {name_rows(missing, len(keys))}, or has other rows under these ids.")
    return Data([*sources], [place[key] for key in keys], folder)


def read_sources(folder: Path) -> list[Loaded]:
    """The training data of a run and, where its recipe names some, its validation data; of a stream the latter alone.
    Raises InputError where they are not here."""
    run = read_run(runs_in(folder)[0])
    recipe = RecipeArguments.of_run(run.recipe)
    named = []
    if not recipe.streaming:
        options = recipe.with_candidates(recipe.data_options)
        named.append((recipe.train_data, replace(options, classes=run.classes or options.classes)))
    if recipe.validation_data is not None:
        named.append((recipe.validation_data, recipe.validation_options(run.columns, run.classes)))
    if not named:
        raise InputError(f"{folder} was trained on a stream.")
    for source, _ in named:
        if not find_files(as_list(source)) and not all(Path(name).is_dir() for name in as_list(source)):
            raise InputError(f"{source} is no file here.")  # and nothing is downloaded for a page
    return [read_examples(source, options) for source, options in named]


def find_places(sources: Sequence[Loaded]) -> dict[tuple[str, str | None], tuple[int, int]]:
    """(id, digest) and (id, None) -> number of the source and position in it, of every row."""
    place: dict[tuple[str, str | None], tuple[int, int]] = {}
    for number, loaded in enumerate(sources):
        for position, (row_id, digest) in enumerate(
            zip(loaded.examples["id"][:], digests_of(loaded.examples), strict=True)
        ):
            place.setdefault((row_id, None), (number, position))
            place.setdefault((row_id, digest), (number, position))
    return place


def _add_answers(inputs: Inputs, data: Data) -> None:
    """Answers that the data know and the predictions do not; a note where both know one, and another."""
    known, own = inputs.inputs[0].predictions.answers, data.column("answer")
    triples = zip(inputs.ids, known, own, strict=True)
    if differ := [row_id for row_id, one, other in triples if None not in (one, other) and one != other]:
        inputs.notes.append(
            f"The data have another answer than the predictions in {name_rows(differ, len(known))}: that of the "
            "predictions counts. --answers names a file that counts instead."
        )
    both = [other if one is None else one for one, other in zip(known, own, strict=True)]
    for one in inputs.inputs:
        one.predictions.answers = list(both)
