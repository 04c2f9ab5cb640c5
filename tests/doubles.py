"""A contest in which 30% of the rows show an image of another row, saved another way; and whether folds hold.

    python tests/doubles.py FOLDER --rows 10000     # writes FOLDER/train.csv, FOLDER/images/ and FOLDER/truth.csv
    vqa-sft folds FOLDER/train.csv --num-folds 5 --output FOLDER/folds.csv
    python tests/doubles.py FOLDER --verify         # reads FOLDER/folds.csv

An image is smooth coloured noise in several scales, as different from another as two photographs are. Shown again it
is one of: the same file, JPEG at quality 30 to 95, WebP, smaller or larger, a little brighter, or cropped to 80 to 95%.
"""

import argparse
import csv
import random
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

WAYS = ("same file", "jpeg", "webp", "resized", "brighter", "cropped")
QUESTIONS = ("What is this?", "What colour is it?", "How many are there?", "Where is it?", "What does the sign say?")


def draw(seed: int) -> Image.Image:
    """An image of its own, 160 to 320 px a side."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(160, 321, 2))
    values = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24):
        # As in photographs, the channels go together: more light and dark than colour.
        coarse = rng.normal(0, 35 / np.sqrt(cells), (cells, cells, 1)) + rng.normal(
            0, 12 / np.sqrt(cells), (cells, cells, 3)
        )
        coarse = coarse.astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            values[..., channel] += np.asarray(layer) * 2
    return Image.fromarray((128 + values).clip(0, 255).astype(np.uint8))


def save_again(image: Image.Image, way: str, path: Path, rng: random.Random) -> Path:
    """Save `image` as `way` says; returns the path with the suffix of its format."""
    options = {"quality": 90}
    if way == "jpeg":
        options = {"quality": rng.randint(30, 95)}
    elif way == "resized":
        factor = rng.uniform(0.5, 2.0)
        image = image.resize([round(side * factor) for side in image.size], Image.Resampling.LANCZOS)
    elif way == "brighter":
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.9, 1.1))
    elif way == "cropped":
        part = rng.uniform(0.8, 0.95)
        width, height = (round(side * part) for side in image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    path = path.with_suffix(".webp" if way == "webp" else ".jpg")
    image.save(path, **options)
    return path


def write_images(folder: Path, original: int, copies: list[tuple[int, str]]) -> dict[int, str]:
    """Row -> path of an original image and of its copies."""
    image = draw(original)
    paths = {original: save_again(image, "jpeg", folder / f"{original:05d}", random.Random(original))}
    for row, way in copies:
        name = folder / f"{row:05d}"
        paths[row] = paths[original] if way == "same file" else save_again(image, way, name, random.Random(row))
    return {row: f"images/{path.name}" for row, path in paths.items()}


def write(folder: Path, num_rows: int, share: float = 0.3, seed: int = 0) -> None:
    rng = random.Random(seed)
    num_originals = round(num_rows * (1 - share))
    copies: dict[int, list[tuple[int, str]]] = defaultdict(list)
    truth = {row: (row, "original") for row in range(num_originals)}
    for row in range(num_originals, num_rows):
        truth[row] = (rng.randrange(num_originals), rng.choice(WAYS))
        copies[truth[row][0]].append((row, truth[row][1]))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(write_images, folder / "images", row, copies[row]) for row in range(num_originals)]
        paths = {row: path for job in jobs for row, path in job.result().items()}
    rows = []
    for row in rng.sample(range(num_rows), num_rows):
        num_choices = rng.choices((2, 3, 4, 5), (3, 4, 90, 3))[0]
        choices = [f"thing {rng.randrange(100)}{letter}" for letter in "abcde"[:num_choices]]
        cells = dict(zip("abcde", choices + [""] * (5 - num_choices), strict=True))
        answer = rng.choice("abcde"[:num_choices])
        question = rng.choices(QUESTIONS, (50, 20, 15, 10, 5))[0]
        rows.append({"id": f"row_{row:05d}", "path": paths[row], "question": question, **cells, "answer": answer})
    for name, lines in (
        ("train.csv", rows),
        ("truth.csv", [{"id": f"row_{row:05d}", "original": of, "way": way} for row, (of, way) in truth.items()]),
    ):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0].keys())
            writer.writeheader()
            writer.writerows(lines)


def read(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verify(folder: Path) -> dict[str, Counter]:
    """Way -> how many of its rows lie in their original's fold, and how many do not."""
    fold_of = {row["id"]: row["fold"] for row in read(folder / "folds.csv")}
    found: dict[str, Counter] = defaultdict(Counter)
    for row in read(folder / "truth.csv"):
        if row["way"] != "original":
            met = fold_of[row["id"]] == fold_of[f"row_{int(row['original']):05d}"]
            found[row["way"]]["same fold" if met else "another fold"] += 1
    return dict(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--verify", action="store_true")
    args = parser.parse_args()
    if args.verify:
        for way, counts in verify(args.folder).items():
            print(f"{way:10s} {dict(counts)}")
    else:
        write(args.folder, args.rows)
