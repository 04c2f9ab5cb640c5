"""Everything that can be said about a data set before a GPU is touched. No torch, unless tokens are counted.

`as_dict` makes the object that `vqa-sft check --json` writes:

    clean                   true when no row has an error
    data                    one object for the training rows, and for the validation and test rows where there are any:
      role, name, notes     "training" | "validation" | "test"; the source; facts about how it was read
      columns               which column was taken for what
      rows, usable_rows
      answers               null without answers, else counts {letter: rows}, expected {letter: rows if no letter were
                            preferred}, largest {letter, share, expected_share}, p_value (null: too few rows), skewed
      choices               {number of choices: rows}
      question_types        {type: rows}
      images_per_row      {number of images: rows}
      images              distinct, near_groups, near_images (how many stand in these groups; null: not looked for),
                            formats {name: images}, and width_px, height_px, megapixels: quantiles {min, p5, p25,
                            median, p75, p95, max} or null
      tokens                null where they were not counted (tokens_note says why), else quantiles, rows, and with a
                            max_length: max_length, cut_rows, cut_share
      problems              [{kind, severity, what, mend, count, rows: [{row, id, label}]}], errors first; `row` counts
                            the rows of the source from 0, `label` is the id with the evidence
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from PIL import Image
from scipy.special import chdtrc

from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.duplicates import near_pairs, row_groups
from vqa_sft.data.examples import Loaded
from vqa_sft.data.images import ImageFacts
from vqa_sft.data.scan import Scan, scan_images
from vqa_sft.letters import LETTERS, identity_order

if TYPE_CHECKING:
    from transformers import ProcessorMixin

TRAINING, VALIDATION, TEST = "training", "validation", "test"
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_SKEWED = 0.01  # below this p-value the answers are called skewed
_FEW = 5  # expected rows below which a chi-square test is not to be trusted
_BATCH = 1_000


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
    mend: str
    rows: list[tuple[int, str, str]]


@dataclass
class Report:
    """What there is to say about one set of rows."""

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

    @property
    def num_rows(self) -> int:
        return len(self.loaded.examples)

    @property
    def num_bad(self) -> int:
        """Rows with an error."""
        return len(self.loaded.problems.bad_rows())


def check(
    data: Sequence[tuple[str, Loaded]],
    *,
    distance: int | None,
    prompts: Prompts,
    processor: "ProcessorMixin | None" = None,
    tokens_note: str = "",
    max_length: int | None = None,
) -> list[Report]:
    """Reports on (role, rows); the training rows come first. Every image is decoded once.

    `distance` is that of near-duplicates. Tokens are counted as `processor` makes them of `prompts`; without one,
    `tokens_note` says why they are not. `max_length` is a length of prompts whose cut is to be counted.

    Raises InputError where the prompts themselves hold a control token of the model.
    """
    if processor is not None:
        from vqa_sft.batch.template import check_texts

        check_texts(processor, data[0][1].examples.select([]), prompts)
    reports = []
    for role, loaded in data:
        scan = scan_images(loaded.examples)
        scan.add_problems(loaded.problems, loaded.examples["id"], loaded.numbers)
        _find_different_answers(loaded, scan)
        if reports:
            _find_in_training(loaded, scan, reports[0].loaded, reports[0].scan, distance)
        if processor is not None:
            _find_control_tokens(loaded, processor)
        tokens = None if processor is None else _tokens_of(loaded, scan, processor, prompts)
        counted = {"tokens": tokens, "tokens_note": tokens_note, "max_length": max_length}
        reports.append(_report(role, loaded, scan, distance, **counted))
    return reports


def _report(role: str, loaded: Loaded, scan: Scan, distance: int | None, **counted: Any) -> Report:
    answers, types = Counter(), Counter()
    for batch in loaded.examples.select_columns(["choices", "answer", "question_type"]).iter(_BATCH):
        types.update(batch["question_type"])
        answers.update(zip(map(len, batch["choices"]), batch["answer"], strict=True))
    choices = Counter()
    for (num_choices, _), count in answers.items():
        choices[num_choices] += count
    known = {key: count for key, count in answers.items() if key[1] is not None and 2 <= key[0] <= len(LETTERS)}
    images = _distinct(scan)
    return Report(
        role,
        loaded,
        scan,
        skew=measure_skew(known) if known else None,
        num_choices=dict(sorted(choices.items())),
        question_types=dict(types.most_common()),
        images_per_row=dict(sorted(Counter(map(len, scan.of_row)).items())),
        images=images,
        near_groups=_near_groups(images, distance),
        problems=list(_list_problems(loaded)),
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


def _near_groups(images: list[ImageFacts], distance: int | None) -> list[int] | None:
    if distance is None:
        return None
    alone = Scan(images, of_row=[(number,) for number in range(len(images))])
    return sorted((count for count in Counter(row_groups(alone, distance)).values() if count > 1), reverse=True)


def _list_problems(loaded: Loaded) -> Iterator[Found]:
    ids = dict(zip(loaded.numbers, loaded.examples["id"], strict=True))
    for key, kind, _ in loaded.problems:
        rows = [(row, ids[row], label) for label, row in loaded.problems.found(key)]
        yield Found(key, kind.severity, kind.what, loaded.problems.remedy(key), rows)


# --- Problems between rows --------------------------------------------------------------------------------------------


def _find_different_answers(loaded: Loaded, scan: Scan) -> None:
    """Rows with the same images, question and context whose choices hold the answer of another, and say otherwise."""
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
            loaded.problems.add("answers_differ", example["id"], loaded.numbers[row], detail)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _find_in_training(loaded: Loaded, scan: Scan, training: Loaded, training_scan: Scan, distance: int | None) -> None:
    nearest: dict[int, tuple[int, int]] = {}  # image -> (distance, image of the training set)
    for image, other, apart in near_pairs(scan, training_scan, distance):
        nearest[image] = min(nearest.get(image, (apart, other)), (apart, other))
    if not nearest:
        return
    row_of = {}  # image of the training set -> its first row
    for row, images in enumerate(training_scan.of_row):
        for image in images:
            row_of.setdefault(image, row)
    training_ids, ids = training.examples["id"], loaded.examples["id"]
    for row, images in enumerate(scan.of_row):
        for apart, other in sorted(nearest[image] for image in images if image in nearest)[:1]:
            kind = "near_training" if apart else "in_training"
            loaded.problems.add(kind, ids[row], loaded.numbers[row], f"{training_ids[row_of[other]]} there")


# --- Tokens -----------------------------------------------------------------------------------------------------------


def _find_control_tokens(loaded: Loaded, processor: "ProcessorMixin") -> None:
    from vqa_sft.batch.template import control_tokens

    control = control_tokens(processor)
    for row, (row_id, question, context, choices) in enumerate(
        _columns(loaded.examples, "id", "question", "context", "choices")
    ):
        found = control.search("\n".join([context, question, *choices]))
        if found:
            loaded.problems.add("control_token", row_id, loaded.numbers[row], found.group())


def _tokens_of(loaded: Loaded, scan: Scan, processor: "ProcessorMixin", prompts: Prompts) -> np.ndarray:
    bad = set(loaded.problems.bad_rows())
    rows = [row for row, number in enumerate(loaded.numbers) if number not in bad]
    sizes = [[(scan.images[p].width, scan.images[p].height) for p in scan.of_row[row]] for row in rows]
    return count_tokens(processor, loaded.examples.select(rows), sizes, prompts)


def count_tokens(
    processor: "ProcessorMixin",
    examples: datasets.Dataset,
    sizes: Sequence[Sequence[tuple[int, int]]],
    prompts: Prompts,
) -> np.ndarray:
    """How many tokens the collator makes of every row; `sizes` holds the (width, height) of its images."""
    from vqa_sft.batch.template import render_prompt

    added = _image_tokens(processor, sorted({size for row_sizes in sizes for size in row_sizes}))
    bos = processor.tokenizer.bos_token
    names = ("question", "choices", "context", "question_type")
    counts = []
    for start in range(0, len(sizes), _BATCH):
        batch = sizes[start : start + _BATCH]
        columns_of = examples.select_columns(list(names))[start : start + _BATCH]
        texts = []
        for values, row_sizes in zip(zip(*(columns_of[name] for name in names), strict=True), batch, strict=True):
            row = dict(zip(names, values, strict=True)) | {"images": row_sizes}
            texts.append(render_prompt(processor, row, identity_order(len(row["choices"])), prompts))
        tokens = processor.tokenizer(
            texts, add_special_tokens=not (bos and texts[0].startswith(bos)), verbose=False
        ).input_ids
        counts += [len(ids) + sum(added[s] for s in row_sizes) for ids, row_sizes in zip(tokens, batch, strict=True)]
    return np.array(counts, dtype=int)


def _image_tokens(processor: "ProcessorMixin", sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """How many tokens an image of each (width, height) adds to its placeholder."""
    if not sizes:
        return {}
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    without = len(processor.tokenizer(prompt).input_ids)

    def added(size: tuple[int, int]) -> int:
        return len(processor(text=[prompt], images=[[Image.new("RGB", size)]])["input_ids"][0]) - without

    # transformers 5.23 has this for vLLM, for most families and without a promise, so it is compared once.
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is not None:
        numbers = count(image_sizes=[(height, width) for width, height in sizes])["num_image_tokens"]
        if numbers[0] - 1 == added(sizes[0]):
            return {size: number - 1 for size, number in zip(sizes, numbers, strict=True)}
    return {size: added(size) for size in sizes}


def _columns(examples: datasets.Dataset, *names: str) -> Iterator[tuple]:
    """The values of every row, a batch in memory at a time."""
    for batch in examples.select_columns(list(names)).iter(_BATCH):
        yield from zip(*(batch[name] for name in names), strict=True)


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_dict(reports: Sequence[Report]) -> dict[str, Any]:
    """The object described at the top."""
    return {"clean": not any(report.num_bad for report in reports), "data": [_as_dict(report) for report in reports]}


def _as_dict(report: Report) -> dict[str, Any]:
    return {
        "role": report.role,
        "name": report.loaded.name,
        "notes": report.loaded.notes,
        "columns": vars(report.loaded.columns),
        "rows": report.num_rows,
        "usable_rows": report.num_rows - report.num_bad,
        "answers": _skew_as_dict(report.skew),
        "choices": {str(number): count for number, count in report.num_choices.items()},
        "question_types": report.question_types,
        "images_per_row": {str(number): count for number, count in report.images_per_row.items()},
        "images": {
            "distinct": len(report.images),
            "near_groups": None if report.near_groups is None else len(report.near_groups),
            "near_images": None if report.near_groups is None else sum(report.near_groups),
            "formats": formats(report.images),
            **{name: quantiles(values) for name, values in sizes(report.images).items()},
        },
        "tokens": _tokens_as_dict(report),
        "tokens_note": report.tokens_note,
        "problems": [
            {
                "kind": found.kind,
                "severity": found.severity,
                "what": found.what,
                "mend": found.mend,
                "count": len(found.rows),
                "rows": [{"row": row, "id": row_id, "label": label} for row, row_id, label in found.rows],
            }
            for found in report.problems
        ],
    }


def _skew_as_dict(skew: Skew | None) -> dict[str, Any] | None:
    if skew is None:
        return None
    return {
        "counts": dict(zip(LETTERS, skew.counts, strict=False)),
        "expected": dict(zip(LETTERS, skew.expected, strict=False)),
        "largest": dict(zip(("letter", "share", "expected_share"), skew.largest, strict=True)),
        "p_value": skew.p_value,
        "skewed": skew.skewed,
    }


def _tokens_as_dict(report: Report) -> dict[str, Any] | None:
    if report.tokens is None:
        return None
    found = {"rows": len(report.tokens), **(quantiles(report.tokens) or {})}
    if report.max_length is not None:
        num_cut = count_cut(report)
        found |= {"max_length": report.max_length, "cut_rows": num_cut}
        found["cut_share"] = num_cut / max(1, len(report.tokens))
    return found


def count_cut(report: Report) -> int:
    """Rows whose prompt has more tokens than `max_length`."""
    return int((report.tokens > report.max_length).sum())


def sizes(images: Sequence[ImageFacts]) -> dict[str, np.ndarray]:
    """Width, height and megapixels of the images that can be decoded."""
    whole = [image for image in images if image.width]
    width = np.array([image.width for image in whole], dtype=int)
    height = np.array([image.height for image in whole], dtype=int)
    return {"width_px": width, "height_px": height, "megapixels": width * height / 1e6}


def formats(images: Sequence[ImageFacts]) -> dict[str, int]:
    """How many of the images have each format, the commonest first."""
    return dict(Counter(image.format for image in images if image.format).most_common())


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    # Of the values themselves, so that an image of that width is there.
    found = np.quantile(values, list(QUANTILES.values()), method="closest_observation")
    return dict(zip(QUANTILES, found.tolist(), strict=True))
