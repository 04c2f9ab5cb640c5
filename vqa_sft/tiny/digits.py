"""Writes scikit-learn's 1,797 handwritten digits as the files of a picture-question contest.

    data/digits/images/0001.png ...   96 x 96 px, dark ink on white paper
    data/digits/train.csv             id, path, question, a, b, c, d, answer      1,300 rows
    data/digits/test.csv              the same without the answer                    497 rows
    data/digits/test_answers.csv      id, answer

The split is stratified by digit and fixed.
"""

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUESTION = "What digit is written here?"
LETTERS = "abcd"  # as contests write them, in lower case
NUM_TRAIN, NUM_TEST = 1300, 497
PICTURE_PX = 96


def write_digits(output: Path, seed: int = 0) -> None:
    """Write pictures and CSV files under `output`; the same seed writes the same bytes."""
    digits, train, test = split_digits(seed)
    (output / "images").mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(digits.images):
        to_picture(pixels).save(output / _picture_path(index))
    write_csv(output / "train.csv", make_rows("train", train, digits.target, seed))
    write_test(output, make_rows("test", test, digits.target, seed))


def split_digits(seed: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """scikit-learn's digits, and the indices of those for training and for test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    sizes = {"train_size": NUM_TRAIN, "test_size": NUM_TEST}
    indices = np.arange(len(digits.target))
    return digits, *train_test_split(indices, **sizes, stratify=digits.target, random_state=seed)


def make_rows(split: str, indices: np.ndarray, targets: np.ndarray, seed: int) -> list[dict]:
    """One row per digit: three random wrong digits, and every letter right equally often."""
    rng = random.Random(f"{seed}/{split}")
    answers = [i % len(LETTERS) for i in range(len(indices))]
    rng.shuffle(answers)
    rows = []
    for number, (index, answer) in enumerate(zip(indices, answers, strict=True), start=1):
        digit = int(targets[index])
        choices = rng.sample([other for other in range(10) if other != digit], len(LETTERS) - 1)
        choices.insert(answer, digit)
        row = {"id": f"{split}_{number:04d}", "path": _picture_path(int(index)), "question": QUESTION}
        rows.append(row | dict(zip(LETTERS, choices, strict=True)) | {"answer": LETTERS[answer]})
    return rows


def to_picture(pixels: np.ndarray) -> Image.Image:
    """8 x 8 values of 0 (paper) to 16 (ink), scaled up smoothly."""
    small = Image.fromarray((255 - pixels * 255 / 16).astype(np.uint8))
    return small.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)


def write_test(output: Path, rows: list[dict]) -> None:
    """test.csv without the answers, which are in test_answers.csv."""
    write_csv(output / "test_answers.csv", [{"id": row["id"], "answer": row["answer"]} for row in rows])
    write_csv(output / "test.csv", [{key: row[key] for key in row if key != "answer"} for row in rows])


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _picture_path(index: int) -> str:
    return f"images/{index:04d}.png"
