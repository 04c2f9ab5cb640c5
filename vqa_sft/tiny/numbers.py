"""The demo's data, two-digit numbers with similar choices, and the sets on which training recipes are compared.

    data/numbers/images/train_0000.png ...   96 x 96 px, dark ink on white paper
    data/numbers/train.csv                   id, path, question, a, b, c, d, answer      1,200 rows
    data/numbers/validation.csv              the same                                      300 rows
    data/numbers/test.csv                    the same without the answer                   500 rows
    data/numbers/test_answers.csv            id, answer

A number is two of scikit-learn's handwritten digits side by side, which the tiny base has never seen. No digit stands
in pictures of two of these files. Wrong choices are the digits swapped, and numbers with one other digit.
A set for comparisons has in test.csv the answers too, and every row four times, its answer once under each letter.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqa_sft.tiny.digits import (
    LETTERS,
    NUM_TEST,
    NUM_TRAIN,
    PICTURE_PX,
    make_rows,
    split_digits,
    to_picture,
    write_csv,
    write_test,
)

QUESTION = "Which number is written here?"
NUM_TRAIN_ROWS, NUM_VALIDATION_ROWS, NUM_TEST_ROWS = 1200, 300, 500  # of the demo
NUM_VALIDATION_DIGITS = 300  # of those for training


@dataclass(frozen=True)
class TaskSet:
    """What a set holds; `noise` and `skew` are of the training rows alone."""

    about: str
    num_train: int
    num_epochs: int  # of a training on it
    num_digits: int = 2
    noise: float = 0.0  # share of rows whose answer is a wrong one
    skew: float = 0.0  # share of rows whose answer is moved to the first letter
    num_test: int = 1000


SETS = {
    "digits": TaskSet("one digit, wrong choices at random", NUM_TRAIN, 4, 1, num_test=NUM_TEST),
    "similar": TaskSet("numbers, similar choices", 800, 12),
    "few": TaskSet("numbers, similar choices, 160 rows", 160, 24),
    "noisy": TaskSet("numbers, similar choices, a fifth of the answers wrong", 800, 12, noise=0.2),
    "skewed": TaskSet("numbers, similar choices, the answer under A in 7 of 10 rows more", 800, 12, skew=0.7),
}


def write_numbers(output: Path, seed: int = 0) -> None:
    """Write pictures and CSV files of the demo under `output`; the same seed writes the same bytes."""
    digits, train, test = split_digits(seed)
    (output / "images").mkdir(parents=True, exist_ok=True)
    train, validation = train[:-NUM_VALIDATION_DIGITS], train[-NUM_VALIDATION_DIGITS:]
    for split, indices, num_rows in (
        ("train", train, NUM_TRAIN_ROWS),
        ("validation", validation, NUM_VALIDATION_ROWS),
    ):
        write_csv(output / f"{split}.csv", _number_rows(split, indices, num_rows, digits, output, seed))
    write_test(output, _number_rows("test", test, NUM_TEST_ROWS, digits, output, seed))


def write_set(output: Path, task: TaskSet, seed: int = 0, *, choice_seed: int | None = None) -> None:
    """Write the pictures and the two files of a set; the same arguments write the same bytes. `choice_seed` draws the
    wrong choices of single test digits again."""
    digits, *parts = split_digits(seed)
    (output / "images").mkdir(parents=True, exist_ok=True)
    for split, indices, num_rows in zip(("train", "test"), parts, (task.num_train, task.num_test), strict=True):
        if task.num_digits == 1:
            is_anew = split == "test" and choice_seed is not None
            rows = make_rows(split, indices[:num_rows], digits.target, choice_seed if is_anew else seed)
            for row, index in zip(rows, indices, strict=False):
                to_picture(digits.images[index]).save(output / row["path"])
        else:
            rows = _number_rows(split, indices, num_rows, digits, output, seed)
        if split == "train":
            rng = random.Random(f"{seed}/{task.noise}/{task.skew}")
            write_csv(output / "train.csv", [_disturbed(row, task, rng) for row in rows])
        else:
            write_csv(output / "test.csv", [turned for row in rows for turned in _rotations(row)])


def _number_rows(split: str, indices: np.ndarray, num_rows: int, digits: Any, output: Path, seed: int) -> list[dict]:
    rng = random.Random(f"{seed}/{split}/2")
    return [_number_row(f"{split}_{number:04d}", indices, digits, rng, output) for number in range(num_rows)]


def _number_row(row_id: str, indices: np.ndarray, digits: Any, rng: random.Random, output: Path) -> dict:
    pair = [int(rng.choice(indices)) for _ in range(2)]
    first, second = (int(digits.target[index]) for index in pair)
    path = f"images/{row_id}.png"
    number_picture([digits.images[index] for index in pair]).save(output / path)
    right, swapped = f"{first}{second}", f"{second}{first}"
    near = [f"{first}{(second + step) % 10}" for step in range(1, 10)]
    near += [f"{(first + step) % 10}{second}" for step in range(1, 10)]
    num_wrong = len(LETTERS) - 1
    wrong = rng.sample([number for number in near if number != swapped], num_wrong)
    if swapped != right:
        wrong[rng.randrange(num_wrong)] = swapped
    answer = rng.randrange(len(LETTERS))
    wrong.insert(answer, right)
    row = {"id": row_id, "path": path, "question": QUESTION}
    return row | dict(zip(LETTERS, wrong, strict=True)) | {"answer": LETTERS[answer]}


def number_picture(pair: Sequence[np.ndarray]) -> Image.Image:
    """Both digits, (8, 8) each, side by side in the middle of a square page."""
    side_px = PICTURE_PX // 2
    page = Image.new("L", (PICTURE_PX, PICTURE_PX), 255)
    for place, pixels in enumerate(pair):
        small = to_picture(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC)
        page.paste(small, (place * side_px, side_px // 2))
    return page


def _disturbed(row: dict, task: TaskSet, rng: random.Random) -> dict:
    answer = row["answer"]
    if rng.random() < task.skew:
        row = row | {LETTERS[0]: row[answer], answer: row[LETTERS[0]]}
        answer = LETTERS[0]
    if rng.random() < task.noise:
        answer = rng.choice([letter for letter in LETTERS if letter != answer])
    return row | {"answer": answer}


def _rotations(row: dict) -> list[dict]:
    """The row with its choices under every letter in turn."""
    choices, answer = [row[letter] for letter in LETTERS], LETTERS.index(row["answer"])
    rows = []
    for shift in range(len(LETTERS)):
        turned = choices[-shift:] + choices[:-shift] if shift else choices
        letters = dict(zip(LETTERS, turned, strict=True)) | {"answer": LETTERS[(answer + shift) % len(LETTERS)]}
        rows.append(row | letters | {"id": f"{row['id']}/{shift}"})
    return rows
