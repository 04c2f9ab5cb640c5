"""A contest drawn in a moment, as files: squares of four colours, their questions, choices and answers."""

import csv
import random

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black")


def write_contest(folder, num_rows=24, seed=0):
    """Squares of four colours as a contest's files: train.csv, test.csv, images/; returns the folder."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_rows):
        choices = rng.sample(COLOURS, 4)
        answer = rng.randrange(4)
        path = f"images/{i:03d}.png"
        image = Image.new("RGB", (84 + 7 * (i % 3), 84), "white")
        ImageDraw.Draw(image).rectangle([20, 20, 60, 60], fill=choices[answer])
        image.save(folder / path)
        rows.append({"id": f"row_{i:03d}", "path": path, "question": "Which colour has the square?"})
        rows[-1] |= dict(zip("abcd", choices, strict=True)) | {"answer": "abcd"[answer]}
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "test.csv", [{key: row[key] for key in row if key != "answer"} for row in rows])
    write_csv(folder / "test_answers.csv", [{key: row[key] for key in ("id", "answer")} for row in rows])
    return folder


def write_hard_contest(folder):
    """32 rows whose answers the tiny base gets wrong, so that there is something to learn: 24 to train on and 8 in
    validation.csv; test.csv holds all of them."""
    write_contest(folder, num_rows=32)
    rows = [row | {"answer": "bcda"["abcd".index(row["answer"])]} for row in rows_of(folder)]
    write_csv(folder / "train.csv", rows[:24])
    write_csv(folder / "validation.csv", rows[24:])
    return folder


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def rows_of(contest):
    with (contest / "train.csv").open() as file:
        return list(csv.DictReader(file))


def noise(path, seed, size=(120, 90)):
    """An image of its own: coarse noise, so that no two of them are alike."""
    values = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(path)
