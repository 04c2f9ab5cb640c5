"""A report on a data set, before a GPU is needed. No torch.

Problems between rows are found here: equal questions with other answers, images of the training set in a test set.
What is wrong with one row is found where it is read (read_row.py), with an image where it is scanned (scan.py).
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from scipy.special import chdtrc

from vqa_sft.data.check_classes import find_class_problems
from vqa_sft.data.duplicates import row_groups, rows_in_training
from vqa_sft.data.examples import CLASS, Loaded
from vqa_sft.data.scan import Scan, scan_images
from vqa_sft.data.settle_classes import count_rows
from vqa_sft.images import ImageFacts
from vqa_sft.questions.letters import LETTERS

TRAINING, VALIDATION, TEST = "training", "validation", "test"
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_SKEWED = 0.01  # below this p-value the answers are called skewed
_FEW = 5  # expected rows below which a chi-square test is not to be trusted
_BATCH = 1_000
# (rows, width and height of the images of each) -> how many tokens each row's prompt has
CountTokens = Callable[[datasets.Dataset, Sequence[Sequence[tuple[int, int]]]], np.ndarray]


@dataclass(frozen=True)
class Skew:
    """How often each letter is the answer, and whether a difference of that size may be chance."""

    counts: list[int]
    expected: list[float]
    p_value: float | None  # None: too few rows to tell

    @property
    def skewed(self) -> bool:
        return self.p_value is not None and self.p_value < _SKEWED

    @property
    def largest(self) -> tuple[str, float, float]:
        """The commonest letter, its share of the rows, and its share if no letter were preferred."""
        i, total = int(np.argmax(self.counts)), sum(self.counts)
        return LETTERS[i], self.counts[i] / total, self.expected[i] / total


@dataclass(frozen=True)
class Found:
    """One kind of problem and the rows that have it: (number in the source, id, label)."""

    kind: str
    severity: str
    what: str
    fix: str
    rows: list[tuple[int, str, str]]


@dataclass
class Report:
    """Facts and problems of one set of rows."""

    role: str
    loaded: Loaded
    scan: Scan
    skew: Skew | None
    num_choices: dict[int, int]
    question_types: dict[str, int]
    images_per_row: dict[int, int]
    images: list[ImageFacts]  # those with different contents
    near_groups: list[int] | None  # how many images each group of near-duplicates has; None: not looked for
    problems: list[Found]
    tokens: np.ndarray | None  # of every row that can be used
    tokens_note: str
    max_length: int | None
    class_rows: np.ndarray | None = None  # of a classification: how many rows each of `loaded.classes` has

    @property
    def num_rows(self) -> int:
        return len(self.loaded.examples)

    @property
    def num_bad(self) -> int:
        """Rows with an error."""
        return len(self.loaded.problems.bad_rows())

    @property
    def num_cut(self) -> int:
        """Rows whose prompt has more tokens than `max_length`."""
        return int((self.tokens > self.max_length).sum())

    @property
    def formats(self) -> dict[str, int]:
        """How many of the images have each format, the commonest first."""
        return dict(Counter(image.format for image in self.images if image.format).most_common())

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        """Width, height and megapixels of the images that can be decoded."""
        whole = [image for image in self.images if image.width]
        width, height = (np.array([getattr(image, side) for image in whole], dtype=int) for side in ("width", "height"))
        return {"width_px": width, "height_px": height, "megapixels": width * height / 1e6}


def check(
    data: Sequence[tuple[str, Loaded]],
    *,
    distance: int | None,
    count_tokens: CountTokens | None = None,
    control_tokens: re.Pattern | None = None,
    tokens_note: str = "",
    max_length: int | None = None,
) -> list[Report]:
    """Reports on (role, rows); the training rows come first. Every image is decoded once.

    `distance` is that of near-duplicates. Without `count_tokens`, `tokens_note` says why tokens are not counted.
    `control_tokens` matches those of the model. `max_length` is a length of prompts whose cut is to be counted.
    """
    reports = []
    for role, loaded in data:
        scan = scan_images(loaded.examples)
        scan.add_problems(loaded.problems, loaded.examples["id"], loaded.numbers)
        images = _distinct(scan)
        groups = None if distance is None else _group(images, distance)
        if loaded.classes is None:
            _find_different_answers(loaded, scan)
        else:
            find_class_problems(loaded, scan, images, groups, reports[0].loaded if reports else None)
        if reports:
            _find_in_training(loaded, scan, reports[0].loaded, reports[0].scan, distance)
        if control_tokens is not None:
            _find_control_tokens(loaded, control_tokens)
        tokens = None if count_tokens is None else _tokens_of(loaded, scan, count_tokens)
        counted = {"tokens": tokens, "tokens_note": tokens_note, "max_length": max_length}
        reports.append(_report(role, loaded, scan, images, groups, **counted))
    return reports


def _report(
    role: str, loaded: Loaded, scan: Scan, images: list[ImageFacts], groups: list[int] | None, **counted: Any
) -> Report:
    answers, types = Counter(), Counter()
    for batch in loaded.examples.select_columns(["choices", "answer", "question_type"]).iter(_BATCH):
        types.update(batch["question_type"])
        answers.update(zip(map(len, batch["choices"]), batch["answer"], strict=True))
    choices = Counter()
    for (num_choices, _), count in answers.items():
        choices[num_choices] += count
    known = {key: count for key, count in answers.items() if key[1] is not None and 2 <= key[0] <= len(LETTERS)}
    near = None if groups is None else sorted((n for n in Counter(groups).values() if n > 1), reverse=True)
    classes = loaded.classes
    return Report(
        role,
        loaded,
        scan,
        skew=measure_skew(known) if known else None,
        num_choices=dict(sorted(choices.items())),
        question_types=dict(types.most_common()),
        images_per_row=dict(sorted(Counter(map(len, scan.of_row)).items())),
        images=images,
        near_groups=near,
        problems=list(_list_problems(loaded)),
        class_rows=None if classes is None else count_rows(classes, loaded.examples[CLASS]),
        **counted,
    )


def measure_skew(answers: dict[tuple[int, int], int]) -> Skew:
    """A chi-square test of whether the answers prefer a letter; `answers` counts (number of choices, answer).

    Rows with different numbers of choices are one multinomial draw each, so the squares are weighed with the inverse of
    their summed covariance; where all rows have as many choices, that is Pearson's test.
    """
    num_letters = max(num_choices for num_choices, _ in answers)
    counts, expected = np.zeros(num_letters, dtype=int), np.zeros(num_letters)
    covariance = np.zeros((num_letters, num_letters))
    for (num_choices, answer), rows in answers.items():
        counts[answer] += rows
        even = (np.arange(num_letters) < num_choices) / num_choices
        expected += rows * even
        covariance += rows * (np.diag(even) - np.outer(even, even))
    # Letters that are rarely to be expected are counted together.
    starts = [i for i in range(num_letters) if expected[i:].sum() >= _FEW and (i == 0 or expected[i - 1] >= _FEW)]
    if len(starts) < 2:
        return Skew(counts.tolist(), expected.tolist(), None)
    merge = np.array([[i == max(s for s in starts if s <= j) for j in range(num_letters)] for i in starts], dtype=float)
    difference = merge @ (counts - expected)
    statistic = difference @ np.linalg.pinv(merge @ covariance @ merge.T) @ difference
    return Skew(counts.tolist(), expected.tolist(), float(chdtrc(len(starts) - 1, statistic)))


def _distinct(scan: Scan) -> list[ImageFacts]:
    """One image of equal files; those that could not be read count as different."""
    first: dict[Hashable, ImageFacts] = {}
    for number, image in enumerate(scan.images):
        first.setdefault(image.digest or number, image)
    return list(first.values())


def _group(images: list[ImageFacts], distance: int) -> list[int]:
    """One number an image: those that are nearly the same have the same."""
    return row_groups(Scan(images, of_row=[(number,) for number in range(len(images))]), distance)


def _list_problems(loaded: Loaded) -> Iterator[Found]:
    ids = dict(zip(loaded.numbers, loaded.examples["id"], strict=True))
    for key, kind, _ in loaded.problems:
        rows = [(row, ids[row], label) for label, row in loaded.problems.found(key)]
        yield Found(key, kind.severity, kind.what, loaded.problems.fix(key), rows)


def _find_different_answers(loaded: Loaded, scan: Scan) -> None:
    """Rows with equal images, question and context, one of whose choices is the answer of another, and not its own."""
    rows_of = defaultdict(list)
    for row, (question, context) in enumerate(_columns(loaded.examples, "question", "context")):
        images = [scan.images[number].digest or number for number in scan.of_row[row]]
        texts = repr((images, _plain(question), _plain(context)))
        rows_of[hashlib.blake2b(texts.encode(), digest_size=16).digest()].append(row)
    for rows in rows_of.values():
        if len(rows) > 1:
            _compare_answers(loaded, rows)


def _compare_answers(loaded: Loaded, rows: list[int]) -> None:
    table = loaded.examples.select_columns(["id", "choices", "answer"])
    examples = [table[row] for row in rows]
    answered: dict[str, str] = {}  # answer -> the first row that gives it
    for example in examples:
        if example["answer"] is not None:
            answered.setdefault(_plain(example["choices"][example["answer"]]), example["id"])
    for row, example in zip(rows, examples, strict=True):
        if example["answer"] is None or len(answered) < 2:
            continue
        choices = list(map(_plain, example["choices"]))
        other = next((c for c in choices if c in answered and c != choices[example["answer"]]), None)
        if other is not None:
            detail = f"{choices[example['answer']][:40]!r}, and {other[:40]!r} in {answered[other]}"
            loaded.problems.add(example["id"], loaded.numbers[row], "answers_differ", detail)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _find_in_training(loaded: Loaded, scan: Scan, training: Loaded, training_scan: Scan, distance: int | None) -> None:
    found = rows_in_training(scan, training_scan, distance)
    if not found:
        return
    training_ids, ids = training.examples["id"][:], loaded.examples["id"][:]
    for row, (apart, other) in found.items():
        kind = "near_training" if apart else "in_training"
        loaded.problems.add(ids[row], loaded.numbers[row], kind, f"{training_ids[other]} there")


def _find_control_tokens(loaded: Loaded, control_tokens: re.Pattern) -> None:
    names = ("id", "question", "context", "choices")
    for row, (row_id, question, context, choices) in enumerate(_columns(loaded.examples, *names)):
        found = control_tokens.search("\n".join([context, question, *choices]))
        if found:
            loaded.problems.add(row_id, loaded.numbers[row], "control_token", found.group())


def _tokens_of(loaded: Loaded, scan: Scan, count_tokens: CountTokens) -> np.ndarray:
    """Of every row that can be used."""
    bad = set(loaded.problems.bad_rows())
    rows = [row for row, number in enumerate(loaded.numbers) if number not in bad]
    images = [[scan.images[number] for number in scan.of_row[row]] for row in rows]
    sizes = [[(image.width, image.height) for image in of_row] for of_row in images]
    return count_tokens(loaded.examples.select(rows), sizes)


def _columns(examples: datasets.Dataset, *names: str) -> Iterator[tuple]:
    """The values of every row, a batch in memory at a time."""
    for batch in examples.select_columns(list(names)).iter(_BATCH):
        yield from zip(*(batch[name] for name in names), strict=True)


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Those of QUANTILES, by name; None for no values."""
    if not len(values):
        return None
    # Of the values themselves, so that an image of that width is there.
    found = np.quantile(values, list(QUANTILES.values()), method="closest_observation")
    return dict(zip(QUANTILES, found.tolist(), strict=True))
