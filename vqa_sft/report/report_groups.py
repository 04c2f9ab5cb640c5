"""Accuracy by kind of row: question type, number of choices, length, language, answer letter, image size. No torch."""

import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vqa_sft.data.class_probs import NONE_OF_THESE
from vqa_sft.images import size_of
from vqa_sft.predictions.blind import paired
from vqa_sft.questions.letters import LETTERS
from vqa_sft.questions.types import TYPES
from vqa_sft.report.report_inputs import Data, Inputs

CHARS, PIXELS = (10, 20, 40, 80, 160, 320), (224, 448, 896, 1792)  # upper ends of groups
NO_IMAGE, NO_SIZE = "no image", "unknown"
IN_TRAINING, NOT_IN_TRAINING = ("the same", "nearly the same"), "not there"
# Scripts by the first word of a letter's name; others are named by that word.
LANGUAGES = {"HANGUL": "Korean", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Chinese characters"}
OTHER = "no letters"


@dataclass(frozen=True)
class Share:
    """Share of right answers, and its 95% interval (Wilson 1927)."""

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """Rows of one kind; a share for each input, and for each but the first how much larger it is than that of the
    first, with the 95% interval of the same rows' differences."""

    label: str
    num_rows: int
    shares: list[Share]
    differences: list[Share]


@dataclass(frozen=True)
class Group:
    title: str
    lines: list[Line]

    @property
    def is_one(self) -> bool:
        """Whether all rows are of one kind, so that there is nothing to compare."""
        return len(self.lines) == 1


def make_groups(inputs: Inputs) -> list[Group]:
    """Of the rows with a known answer; empty where there are none. What needs the data is left out without them."""
    if not len(inputs.answered):
        return []
    rows = inputs.answered
    lengths = [len(probs) for probs in inputs.inputs[0].probs]
    groups: list[tuple[str, Sequence[str], Sequence[str]]] = []
    if inputs.data is not None:
        questions = inputs.data.column("question")
        groups.append(("question type", inputs.data.column("question_type"), TYPES))
        groups.append(("length of the question, characters", *_between([len(text) for text in questions], CHARS)))
        languages = [find_language(text) for text in questions]
        groups.append(("language, by the letters of the question", languages, _by_count(languages, rows)))
        groups.append(("longer side of the image, pixels", *_sizes(inputs.data)))
    if inputs.in_training:
        bits = [inputs.in_training.get(row, (None, ""))[0] for row in range(len(inputs.ids))]
        known = [NOT_IN_TRAINING if apart is None else IN_TRAINING[apart > 0] for apart in bits]
        groups.append(("image in training", known, [*IN_TRAINING, NOT_IN_TRAINING]))
    counts = [str(number) for number in lengths]
    groups.append(("number of choices", counts, sorted({*counts}, key=int)))
    groups.append(_answers(inputs))
    return [_make_group(inputs, title, labels, order) for title, labels, order in groups]


def _answers(inputs: Inputs) -> tuple[str, list[str], Sequence[str]]:
    """By the letter of the answer; of a classification by its rank, for candidates stand the most likely first."""
    candidates = inputs.inputs[0].predictions.candidates
    if not candidates:
        return "letter of the answer", [LETTERS[answer] for answer in inputs.answers], LETTERS
    none, ranks = "none of these", [str(number) for number in range(1, len(LETTERS) + 1)]
    given = zip(inputs.answers, candidates, strict=True)
    labels = [none if of_row[answer] == NONE_OF_THESE else ranks[answer] for answer, of_row in given]
    return "rank of the class among the candidates", labels, [*ranks, none]


def _make_group(inputs: Inputs, title: str, labels: Sequence[str], order: Sequence[str]) -> Group:
    rows_of: dict[str, list[int]] = {}
    for row in inputs.answered:
        rows_of.setdefault(labels[row], []).append(row)
    lines = []
    for label in order:
        if rows := rows_of.get(label):
            right = [one.best[rows] == inputs.answers[rows] for one in inputs.inputs]
            shares = [share_of(int(of_input.sum()), len(rows)) for of_input in right]
            more = [
                Share(float(other.mean() - right[0].mean()), *paired(was=other, now=right[0])) for other in right[1:]
            ]
            lines.append(Line(label, len(rows), shares, more))
    return Group(title, lines)


def share_of(num_right: int, num_rows: int) -> Share:
    from scipy.stats import binomtest  # slow to import, and a training imports this file before its first step

    interval = binomtest(num_right, num_rows).proportion_ci(method="wilson")
    return Share(num_right / num_rows, float(interval.low), float(interval.high))


def _by_count(labels: Sequence[str], rows: np.ndarray) -> list[str]:
    return [label for label, _ in Counter(labels[row] for row in rows).most_common()]


def _between(numbers: Sequence[int | None], ends: Sequence[int]) -> tuple[list[str], list[str]]:
    """A label for every number, and all labels in their order; None is NO_SIZE, 0 is NO_IMAGE."""
    names = [f"{low + 1:,} to {high:,}" for low, high in zip((0, *ends), ends, strict=False)]
    names = [f"up to {ends[0]:,}", *names[1:], f"more than {ends[-1]:,}"]
    labels = [NO_SIZE if n is None else names[int(np.searchsorted(ends, n))] for n in numbers]
    return labels, [*names, NO_SIZE]


def find_language(text: str) -> str:
    """The language or the script of most letters of a text: some languages have a script of their own."""
    counts = Counter(map(_script_of, text))
    del counts[""]
    if counts["Japanese"]:  # whose texts mix kana and Chinese characters
        return "Japanese"
    return counts.most_common(1)[0][0] if any(counts.values()) else OTHER


@functools.lru_cache(maxsize=20_000)
def _script_of(char: str) -> str:
    if not char.isalpha():
        return ""
    word = unicodedata.name(char, "OTHER").split()[0]
    return LANGUAGES.get(word, f"{word.capitalize()} letters")


def _sizes(data: Data) -> tuple[list[str], list[str]]:
    """The largest image of each row, as its header says; nothing is decoded, and few images are held at a time."""
    labels_of: list[list[str]] = []
    order: list[str] = []
    with ThreadPoolExecutor(8) as pool:  # a network disk answers many at once
        for loaded in data.sources:
            labels_of.append([])
            for batch in loaded.examples.select_columns(["images"]).iter(batch_size=256):
                images = batch["images"]
                labels, order = _between(list(pool.map(_longest_side, images)), PIXELS)
                labels_of[-1] += [label if row else NO_IMAGE for label, row in zip(labels, images, strict=True)]
    return [labels_of[source][position] for source, position in data.places], [*order, NO_IMAGE]


def _longest_side(images: list[dict]) -> int | None:
    sides = [_longer_side(image) for image in images]
    return max((side for side in sides if side is not None), default=None)


def _longer_side(image: dict) -> int | None:
    """None where the image cannot be read."""
    if image["bytes"] is None and not os.path.isfile(image["path"]):
        return None
    try:
        return max(size_of(image))
    except Exception:  # whatever Pillow raises of a damaged header; the wall says what is wrong
        return None
