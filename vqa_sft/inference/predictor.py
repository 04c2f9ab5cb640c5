"""`vqa_sft.Predictor`: calibrated probabilities from Python, without files.

predict = vqa_sft.Predictor("runs/mine")
predict("cat.jpg", "What is it?", ["a cat", "a dog"])                      ->  array([0.97, 0.03])
predict([one, other], ["What?", "Which?"], [["a", "b"], ["x", "y", "z"]])  ->  a list of two arrays
predict.decide({"state": ..., "questions": ..., "assets": ...})            ->  the answers of a decision model

Of a run of a classification the choices are classes of the run, its candidates, in the order in which a classifier
ranks them: training showed the validation rows so.
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.batch.prompts import NONE_OF_THESE as NONE_TEXT
from vqa_sft.data.class_probs import NONE_OF_THESE
from vqa_sft.data.classes import class_name
from vqa_sft.data.options import CANDIDATES
from vqa_sft.errors import InputError, explains, printable
from vqa_sft.images import source_of
from vqa_sft.inference import scorer
from vqa_sft.inference.request import read_request
from vqa_sft.inference.rows import check_classes
from vqa_sft.models import scoring
from vqa_sft.models.fast import speedups
from vqa_sft.models.fast.graphs import MULTIPLE
from vqa_sft.predictions.calibration import Calibration, read_calibration
from vqa_sft.predictions.ensemble import AVERAGES, combine
from vqa_sft.predictions.file import Predictions
from vqa_sft.questions.letters import LETTERS, Views, describe_value, view_orders
from vqa_sft.questions.types import find_type
from vqa_sft.runs.folder import read_runs, runs_in

ImageInput: TypeAlias = str | Path | bytes | Image.Image


class Predictor:
    """Probabilities of choices by one or several runs together; each run's own temperature for these views is applied
    where one is known (calibration.json).

    `orders`, `scales`, `average` and `average_runs` are those of recipes/predict.py, `batch_size` counts views.
    `model` says where the runs' base is now, if not where it was in training. Raises InputError for folders that hold
    no run, and for runs that one model cannot score (other bases, prompts, image sizes, ranks).

    Any number of threads may call it: while one scores, another prepares, and the others wait.

    `warm_up` makes calls with few rows faster, `compile_layers` those with many, and with few after `warm_up`.
    """

    def __init__(
        self,
        *runs: str | Path,
        orders: str | int = "identity",
        scales: Sequence[float] = (1.0,),
        average: str = "mean",
        average_runs: str = "log",
        batch_size: int = 16,
        use_cpu: bool = False,
        compile_layers: bool = False,
        model: str | None = None,
    ) -> None:
        self.views = Views(orders, scales, average)
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size must be a number of at least 1; got {describe_value(batch_size)}.")
        if average_runs not in AVERAGES:
            raise InputError(f"average_runs must be one of {', '.join(AVERAGES)}; got {describe_value(average_runs)}.")
        self.folders = runs_in([str(run) for run in runs])
        described = read_runs(self.folders, model and str(model))
        check_classes(described)
        PartialState(cpu=use_cpu)
        groups = scorer.groups_of(described, use_cpu)
        if len(groups) != 1:
            raise InputError(f"one model cannot score {', '.join(self.folders) or 'no run'}. Give runs of one kind.")
        self.num_choices = described[0].num_letters
        self.has_context, self.has_images = described[0].has_context, described[0].has_images
        self.classes, recipe = described[0].classes, described[0].recipe
        has_none = self.classes is not None and recipe.get("absent") == "none_of_these"
        self.none_of_these = NONE_TEXT[recipe.get("prompt_language") or "en"] if has_none else None
        self.views.check(self.num_choices)
        self.scorer = scorer.load(groups[0], most_choices=self.num_choices, compile_layers=compile_layers)
        self.has_graphs = False
        self.collators = self.scorer.collators(self.views)
        self.average_runs, self.batch_size = average_runs, batch_size
        # The tokenizer holds the padding of one call, and the model the adapter of one run.
        self._preparing, self._scoring = threading.Lock(), threading.Lock()
        self.metadata = [
            self.views.metadata
            | {"calibration": (read_calibration(folder, self.views.metadata) or Calibration()).as_dict}
            for folder in self.folders
        ]

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None,
        question: str | Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        context: str | Sequence[str] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Probabilities (C,) of the choices of one question about `images`: an image, several, or None. Of lists of
        questions, images of each, and choices of each, a list of them. An image is a path, the bytes of a file, or
        a PIL image. Empty choices at the end are none, as in a table, and get 0; of a classification all choices are
        classes, but "none of these", which comes last where the run was trained with it."""
        if isinstance(question, str):
            return self._of_rows([self._row(0, images, question, choices, context)])[0]
        if context is None and hasattr(question, "__len__"):
            context = [None] * len(question)
        every: dict[str, Any] = {"images": images, "questions": question, "choices": choices, "contexts": context}
        for what in ("questions", "images", "choices", "contexts"):
            value = every[what]
            if isinstance(value, ImageInput) or not hasattr(value, "__len__"):
                raise InputError(
                    f"{what} of several questions are a list; got {describe_value(value)}. One question is a str, with "
                    "one image and one list of choices."
                )
        nums = {what: len(value) for what, value in every.items()}
        if len({*nums.values()}) > 1:
            raise InputError(
                f"there must be as many questions as images and choices; got {nums['questions']} questions, "
                f"{nums['images']} images, {nums['choices']} lists of choices and {nums['contexts']} contexts."
            )
        together = enumerate(zip(*every.values(), strict=True))
        rows = [self._row(number, *of_row) for number, of_row in together]
        size = max(1, self.batch_size // len(view_orders(self.num_choices, self.views.orders)))
        return [probs for start in range(0, len(rows), size) for probs in self._of_rows(rows[start : start + size])]

    def warm_up(
        self,
        images: ImageInput | Sequence[ImageInput] | None,
        question: str,
        choices: Sequence[str],
        *,
        longer: int = 256,
    ) -> None:
        """Score a question like those to come until it is as fast as they will be: one with images of their sizes, and
        a short text. From now on calls with few rows go by CUDA graphs where the GPU has compute capability 8.0 or
        newer and rows are packed: one is captured the second time that an image size and a length of text come, and
        here for texts of up to `longer` tokens more. Compiled layers stay so inside a graph."""
        with self._scoring:
            if not self.has_graphs:
                self.has_graphs = speedups.use_graphs(self.scorer.model)
        context = "" if self.has_context else None
        for more in range(0, longer + 1 if self.has_graphs else 1, MULTIPLE):
            for _ in range(3):
                self(images, question + " a" * more, choices, context)

    def decide(self, request: Mapping[str, Any] | str) -> dict[str, dict[str, Any]]:
        """The answers to a request of transformers' pipeline("decision"), in its form:
        `{"state": ..., "questions": ..., "assets": ...}` or its JSON -> name of a question -> {"type", "choice",
        "confidence", "probabilities"}.

        Of the run that `vqa-sft export` wrote the pipeline gives the same numbers, where the Predictor has one run and
        the identity alone. Raises InputError for what it refuses.
        """
        asked = read_request(request, self.num_choices, has_images=self.has_images, has_context=self.has_context)
        parts = zip(*((each.images, each.text, each.choices, each.context) for each in asked), strict=True)
        found = self(*map(list, parts))
        return {each.question.name: each.question.answer(p.tolist()) for each, p in zip(asked, found, strict=True)}

    def _row(self, number: int, images: Any, question: str, choices: Any, context: Any) -> dict:
        """An example as data/ would read it."""
        name = f"question {number + 1}"
        if isinstance(choices, str | bytes | Mapping | Set) or not hasattr(choices, "__iter__"):
            raise InputError(f"the choices of {name} must be a list of texts; got {describe_value(choices)}.")
        given = list(choices)
        texts: dict[str, Any] = {"question": _text(question, name)}
        if not texts["question"]:
            raise InputError(f"{name} is empty. Write it.")
        texts |= {"choices": self._choices(given, name)} if self.classes is None else self._candidates(given, name)
        sources = _sources(images, name)
        if context is None and self.has_context:
            raise InputError(f"the run was trained with contexts, and {name} has none. Give context, '' for no text.")
        if context and not self.has_context:
            raise InputError(f"the run was trained without contexts, and {name} has one. Leave context out.")
        texts["context"] = _text(context or "", f"the context of {name}")
        kind = find_type(texts["question"], texts["choices"] if self.classes is None else [])
        # By which orders are drawn where only some are taken: that of the texts, wherever they are in a list.
        row_id = hashlib.sha256("\n".join([texts["question"], *texts["choices"]]).encode()).hexdigest()[:16]
        own = {"name": name, "num_given": len(given)}  # for us alone
        return texts | own | {"id": row_id, "images": sources, "answer": None, "question_type": kind}

    def _choices(self, given: list[Any], name: str) -> list[str]:
        choices = [_text(choice, f"a choice of {name}", str | int | float | np.number) for choice in given]
        while choices and not choices[-1]:  # empty cells of a table, as in data/
            choices.pop()
        if len(choices) > 1 and len({*choices}) == 1:
            raise InputError(
                f"the choices of {name} are all the same: {describe_value(choices[0])}. Give different ones."
            )
        if not 2 <= len(choices) <= self.num_choices:
            raise InputError(
                f"a question needs 2 to {self.num_choices} choices, {LETTERS[0]} to {LETTERS[self.num_choices - 1]} as "
                f"in training; got {len(choices)}."
            )
        return choices

    def _candidates(self, given: list[Any], name: str) -> dict[str, list]:
        """The names of the classes that were given, and which classes these are, as data/candidates.py has them."""
        assert self.classes is not None
        texts = [_text(choice, f"a choice of {name}", str | int | float | np.number) for choice in given]
        last = [] if self.none_of_these is None else [self.none_of_these]
        named = texts[: len(texts) - len(last)]
        if texts[len(named) :] != last:
            raise InputError(f"the run was trained with {last[0]!r} as the last choice, and {name} has not. Add it.")
        num = min(self.num_choices - len(last), len(self.classes))
        wanted = f"The choices of this run are 2 to {num} of its {len(self.classes):,} classes, the most likely first"
        found = [place for text in named if (place := self.classes.find(text)) is not None]
        if unknown := [text for text in named if self.classes.find(text) is None]:
            likely = self.classes.likely(class_name(unknown[0])) if unknown[0] else None
            meant = f"; is {printable(likely)!r} meant?" if likely else "."
            said = printable(unknown[0], 60)
            raise InputError(f"a choice of {name} is no class of the run: {said!r}{meant} {wanted}.")
        if len({*found}) < len(found):
            twice = next(self.classes.names[place] for place in found if found.count(place) > 1)
            raise InputError(f"{name} has the class {printable(twice)!r} twice. Give it once.")
        if not 2 <= len(found) <= num:
            raise InputError(f"{name} has {len(found)} classes. {wanted}.")
        names = [self.classes.names[place] for place in found]
        return {"choices": names + last, CANDIDATES: found + [NONE_OF_THESE] * len(last)}

    @torch.no_grad()
    def _of_rows(self, rows: list[dict]) -> list[np.ndarray]:
        with self._preparing:
            batches = [self._collate(collator, rows) for collator in self.collators]
        with self._scoring:
            scales = scoring.score_scales(self.scorer, batches, range(len(self.folders)))
        scored = scoring.undo_orders(range(len(rows)), scales, self.views.average)
        ids = [row["id"] for row in rows]
        answers: list[int | None] = [None] * len(rows)
        of_runs = [[*zip(*of_rows, strict=True)] for of_rows in (scored.choice_logits, scored.scale_logits)]
        runs = [
            Predictions(ids, [*logits], answers, metadata, scale_logits=[*filter(None, of_scales)])
            for metadata, logits, of_scales in zip(self.metadata, *of_runs, strict=True)
        ]
        together = runs[0]
        if len(runs) > 1:
            together = combine(runs, self.folders, [1 / len(runs)] * len(runs), self.average_runs)
        # An empty choice at the end has no letter, and no chance.
        return [np.pad(p, (0, row["num_given"] - len(p))) for p, row in zip(together.probs, rows, strict=True)]

    def _collate(self, collator: AnswerCollator, rows: list[dict]) -> dict[str, Any]:
        try:
            return collator(rows)
        except InputError:
            _name_bad_image(collator, rows)
            raise


def _name_bad_image(collator: AnswerCollator, rows: list[dict]) -> None:
    """Raises InputError for the first image that cannot be read, by the number of its question."""
    for row in rows:
        for position in range(len(row["images"])):
            try:
                collator.image(row, position)
            except InputError as error:
                raise InputError(f"an image of {row['name']} cannot be read: {error.__cause__}.") from error


def _sources(images: Any, name: str) -> list[dict]:
    """Images as a dataset holds them."""
    if images is None:
        images = []
    elif isinstance(images, ImageInput):
        images = [images]
    if not isinstance(images, list | tuple) or not all(isinstance(image, ImageInput) for image in images):
        raise InputError(
            f"an image of {name} is a path, the bytes of a file or a PIL image (of an array: Image.fromarray), and "
            f"several are a list; got {describe_value(images)}."
        )
    with explains((ValueError, OSError), f"an image of {name} cannot be read"):
        return [source_of(image) for image in images]


def _text(text: Any, what: str, kinds: Any = str) -> str:
    if not isinstance(text, kinds) or text != text:  # NaN, which pandas has where a text is missing
        raise InputError(f"{what} is no text: {describe_value(text)}.")
    with explains(UnicodeEncodeError, f"{what} holds half a character"):
        str(text).encode()
    if "\0" in str(text):
        raise InputError(f"{what} holds a null byte: {describe_value(text)}.")
    return str(text).strip()
