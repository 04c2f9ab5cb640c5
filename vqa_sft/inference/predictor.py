"""`vqa_sft.Predictor`: calibrated probabilities from Python, without files.

predict = vqa_sft.Predictor("runs/mine")
predict("cat.jpg", "What is it?", ["a cat", "a dog"])                      ->  array([0.97, 0.03])
predict([one, other], ["What?", "Which?"], [["a", "b"], ["x", "y", "z"]])  ->  a list of two arrays
"""

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from PIL import Image

from vqa_sft.batch.collator import AnswerCollator
from vqa_sft.data.images import source_of
from vqa_sft.data.question_types import find_type
from vqa_sft.errors import InputError, explains, printable
from vqa_sft.inference import scorer
from vqa_sft.letters import LETTERS, MOST_ORDERS, view_orders
from vqa_sft.models import scoring
from vqa_sft.predictions.calibration import Calibration, read_calibration
from vqa_sft.predictions.ensemble import AVERAGES, combine
from vqa_sft.predictions.file import Predictions
from vqa_sft.runs import folder as run_folder

ImageInput = str | Path | bytes | Image.Image


class Predictor:
    """Probabilities of choices by one or several runs together; each run's own temperature for these views is applied
    where one is known (calibration.json).

    `orders`, `scales`, `average` and `average_runs` are those of recipes/predict.py, `batch_size` counts views.
    `model` says where the runs' base is now, if not where it was in training. Raises InputError for folders that hold
    no run, and for runs that one model cannot score (other bases, prompts, image sizes, ranks).

    Any number of threads may call it: while one scores, another prepares, and the others wait.
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
        _check_views(orders, scales, average, batch_size)
        if average_runs not in AVERAGES:
            raise InputError(f"average_runs must be one of {', '.join(AVERAGES)}; got {_shown(average_runs)}.")
        folders = run_folder.runs_in([str(run) for run in runs])
        described = run_folder.read_runs(folders, model and str(model))
        if len(scorer.groups_of(described)) != 1:
            raise InputError(f"one model cannot score {', '.join(folders) or 'no run'}. Give runs of one kind.")
        PartialState(cpu=use_cpu)
        self.num_choices = described[0].num_letters
        self.has_context = described[0].columns.context is not None
        if orders == "all" and math.factorial(self.num_choices) > MOST_ORDERS:
            raise InputError(f"{self.num_choices} choices have too many orders for all. Give rotations, or a number.")
        self.scorer = scorer.load(
            described,
            precision=scorer.precision_of(described[0], use_cpu),
            most_choices=self.num_choices,
            compile_layers=compile_layers,
        )
        self.collators = self.scorer.collators(orders, scales)
        self.orders, self.average, self.average_runs = orders, average, average_runs
        self.batch_size = batch_size
        metadata = {"orders": orders, "scales": [*scales], "average": average}
        self.folders = folders
        # The tokenizer holds the padding of the call at hand, and the model the adapter of the run at hand.
        self._preparing, self._scoring = threading.Lock(), threading.Lock()
        self.metadata = [
            metadata | {"calibration": (read_calibration(folder, metadata) or Calibration()).as_dict}
            for folder in folders
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
        a PIL image. Empty choices at the end are none, as in a table, and get 0."""
        if isinstance(question, str):
            return self._of_rows([self._row(0, images, question, choices, context)])[0]
        if context is None and hasattr(question, "__len__"):
            context = [None] * len(question)
        for what, value in (("questions", question), ("images", images), ("choices", choices), ("contexts", context)):
            if isinstance(value, ImageInput) or not hasattr(value, "__len__"):
                raise InputError(
                    f"{what} of several questions are a list; got {_shown(value)}. One question is a str, beside one "
                    "image and one list of choices."
                )
        if not len(images) == len(question) == len(choices) == len(context):
            raise InputError(
                f"there must be as many questions as images and choices; got {len(question)} questions, "
                f"{len(images)} images, {len(choices)} lists of choices and {len(context)} contexts."
            )
        together = enumerate(zip(images, question, choices, context, strict=True))
        rows = [self._row(number, *of_row) for number, of_row in together]
        size = max(1, self.batch_size // len(view_orders(self.num_choices, self.orders)))
        return [probs for start in range(0, len(rows), size) for probs in self._of_rows(rows[start : start + size])]

    def _row(self, number: int, images: Any, question: str, choices: Sequence[str], context: str | None) -> dict:
        """An example as data.py would read it."""
        row = f"question {number + 1}"
        if isinstance(choices, str | bytes | Mapping | Set) or not hasattr(choices, "__iter__"):
            raise InputError(f"the choices of {row} must be a list of texts; got {_shown(choices)}.")
        choices = list(choices)
        _check_text(question, row, str)
        for choice in choices:
            _check_text(choice, f"a choice of {row}", str | int | float | np.number)
        num_given, choices = len(choices), [str(choice).strip() for choice in choices]
        while choices and not choices[-1]:  # empty cells of a table, as in data.py
            choices.pop()
        question = question.strip()
        if not question:
            raise InputError(f"{row} is empty. Write it.")
        if len(choices) > 1 and len({*choices}) == 1:
            raise InputError(f"the choices of {row} are all the same: {_shown(choices[0])}. Give different ones.")
        if not 2 <= len(choices) <= self.num_choices:
            raise InputError(
                f"a question needs 2 to {self.num_choices} choices, {LETTERS[0]} to {LETTERS[self.num_choices - 1]} as "
                f"in training; got {len(choices)}."
            )
        if images is None:
            images = []
        elif isinstance(images, ImageInput):
            images = [images]
        if not isinstance(images, list | tuple) or not all(isinstance(image, ImageInput) for image in images):
            raise InputError(
                f"an image of {row} is a path, the bytes of a file or a PIL image (of an array: Image.fromarray), and "
                f"several are a list; got {_shown(images)}."
            )
        with explains((ValueError, OSError), f"an image of {row} cannot be read"):
            sources = [source_of(image) for image in images]
        if context is None and self.has_context:
            raise InputError(f"the run was trained with contexts, and {row} has none. Give context, '' for no text.")
        if context and not self.has_context:
            raise InputError(f"the run was trained without contexts, and {row} has one. Leave context out.")
        _check_text(context or "", f"the context of {row}", str)
        texts = {"question": question, "choices": choices, "context": (context or "").strip()}
        kind = find_type(texts["question"], choices)
        # By which orders are drawn where only some are taken: that of the texts, wherever they stand in a list.
        row_id = hashlib.sha256("\n".join([question, *choices]).encode()).hexdigest()[:16]
        texts |= {"name": row, "num_given": num_given}  # for us alone
        return texts | {"id": row_id, "images": sources, "answer": None, "question_type": kind}

    @torch.no_grad()
    def _of_rows(self, rows: list[dict]) -> list[np.ndarray]:
        device, scales = PartialState().device, []
        letter_ids = self.scorer.letter_ids.to(device)
        for collator in self.collators:
            with self._preparing:
                try:
                    batch = collator(rows)
                except InputError:
                    _name_bad_image(collator, rows)
                    raise
            groups = batch.get("groups", torch.arange(len(rows))).tolist()
            with self._scoring:
                batch = send_to_device(batch, device)
                logits = scoring.letter_logits_of_runs(
                    self.scorer.model,
                    batch,
                    letter_ids,
                    self.scorer.precision,
                    self.scorer.adapters,
                    range(len(self.folders)),
                )
            scales.append((groups, logits, batch["orders"], batch["num_choices"]))
        scored = scoring.undo_orders(range(len(rows)), scales, self.average)
        ids, answers = [row["id"] for row in rows], [None] * len(rows)
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


def _name_bad_image(collator: AnswerCollator, rows: list[dict]) -> None:
    """Raises InputError for the first image that cannot be read, by the number of its question."""
    for row in rows:
        for position in range(len(row["images"])):
            try:
                collator.image(row, position)
            except InputError as error:
                raise InputError(f"an image of {row['name']} cannot be read: {error.__cause__}.") from error


def _shown(value: Any) -> str:
    return f"{printable(repr(value), 60)} ({type(value).__name__})"


def _check_text(text: Any, what: str, kinds: Any) -> None:
    if not isinstance(text, kinds) or text != text:  # NaN, which pandas has where a text is missing
        raise InputError(f"{what} is no text: {_shown(text)}.")
    with explains(UnicodeEncodeError, f"{what} holds half a character"):
        str(text).encode()
    if "\0" in str(text):
        raise InputError(f"{what} holds a null byte: {_shown(text)}.")


def _check_views(orders: Any, scales: Any, average: Any, batch_size: Any) -> None:
    """Raises InputError for what recipes/predict.py would not take either."""
    is_number = type(orders) is int and 1 <= orders <= MOST_ORDERS
    if not is_number and orders not in ("identity", "rotations", "all"):
        raise InputError(
            f"orders must be identity, rotations, all or a number from 1 to {MOST_ORDERS}; got {_shown(orders)}."
        )
    are_numbers = isinstance(scales, list | tuple) and all(type(scale) in (int, float) for scale in scales)
    if not are_numbers or not scales or not all(0.25 <= scale <= 4 for scale in scales):
        raise InputError(f"scales must be a list of numbers from 0.25 to 4; got {_shown(scales)}.")
    if len(set(scales)) < len(scales):
        raise InputError(f"scales must be different numbers; got {_shown(scales)}.")
    if average not in ("mean", "log"):
        raise InputError(f"average must be mean or log; got {_shown(average)}.")
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size must be a number of at least 1; got {_shown(batch_size)}.")
