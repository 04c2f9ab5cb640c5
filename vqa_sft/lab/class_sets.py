"""Two classifications with known answers: two-digit numbers (100 classes) and drawn shapes (400 classes).

    data/numbers100/train/47/00012.png ...   an image folder, 96 x 96 px
    data/numbers100/train.csv                id (47/00012.png), path, label               3,000 rows
    data/numbers100/folds.csv                id, fold
    data/numbers100/test/TEST_00000.png ...
    data/numbers100/test.csv                 ID, img_path                                 3,000 rows
    data/numbers100/test_labels.csv          ID, label: not for the model to see
    data/numbers100/classes.csv              name
    data/numbers100/sample_submission.csv    ID and one column a class

A number is two of scikit-learn's 1,797 handwritten digits side by side, as in the demo. No digit is in images of both
parts, or in images of two folds: a classifier that is fitted without a fold has seen none of its digits.

A drawn class is a large shape and two to five small ones: "star and three moons". Colours, places, sizes and angles say
nothing. Every class has as many images as every other, give or take one, and the same seed writes the same bytes.
"""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vqa_sft.data.folds import read_folds, write_folds
from vqa_sft.tiny.draw import PICTURE_PX, Scene, Sketch, add_noise
from vqa_sft.tiny.numbers import QUESTION, number_picture
from vqa_sft.tiny.words import COLOURS, NUMBER_WORDS, SHAPES

NUM_FOLDS = 5
NUM_TEST_DIGITS = 597  # of the 1,797
COUNTS = (2, 3, 4, 5)  # of the small shapes
NUM_TRAIN, NUM_TEST = {"numbers": 3000, "drawn": 3200}, 3000
QUESTIONS = {"numbers": QUESTION, "drawn": "What is drawn here?"}
Draw = Callable[[np.random.Generator, int, int], Image.Image]  # class, fold -> image


@dataclass(frozen=True)
class ClassRow:
    """One image; the `fold` of a test row is -1."""

    row_id: str
    path: Path
    label: int
    fold: int


def write_numbers(folder: Path, seed: int = 0, num_train: int = NUM_TRAIN["numbers"], num_test: int = NUM_TEST) -> None:
    """Write the set of two-digit numbers: 00 to 99."""
    train, test = _split_digits(seed)

    def draw(rng: np.random.Generator, label: int, fold: int) -> Image.Image:
        by_digit = test if fold < 0 else train[fold]
        return number_picture([rng.choice(by_digit[digit]) for digit in divmod(label, 10)])

    _write_set(folder, [f"{number:02d}" for number in range(100)], draw, seed, num_train, num_test)


def write_drawn(folder: Path, seed: int = 0, num_train: int = NUM_TRAIN["drawn"], num_test: int = NUM_TEST) -> None:
    """Write the set of drawn classes: 10 large shapes, 10 small ones, 2 to 5 of these."""
    kinds = [(large, small, count) for large in SHAPES for small in SHAPES for count in COUNTS]
    names = [f"{large} and {NUMBER_WORDS['en'][count]} {SHAPES[small][0]}" for large, small, count in kinds]
    _write_set(folder, names, lambda rng, label, _: _draw_shapes(rng, *kinds[label]), seed, num_train, num_test)


WRITERS = {"numbers": write_numbers, "drawn": write_drawn}


def read_rows(folder: Path) -> tuple[list[str], list[ClassRow], list[ClassRow]]:
    """Names of the classes, training rows, and test rows with their labels."""
    names = [row["name"] for row in _read_csv(folder / "classes.csv")]
    place = {name: number for number, name in enumerate(names)}
    rows = _read_csv(folder / "train.csv")
    folds = read_folds(folder / "folds.csv", [row["id"] for row in rows])
    train = [
        ClassRow(row["id"], folder / row["path"], place[row["label"]], fold)
        for row, fold in zip(rows, folds, strict=True)
    ]
    labels = {row["ID"]: place[row["label"]] for row in _read_csv(folder / "test_labels.csv")}
    test = [
        ClassRow(row["ID"], folder / row["img_path"], labels[row["ID"]], -1) for row in _read_csv(folder / "test.csv")
    ]
    return names, train, test


# --- Files ------------------------------------------------------------------------------------------------------------


def _write_set(folder: Path, names: Sequence[str], draw: Draw, seed: int, num_train: int, num_test: int) -> None:
    train, folds, test = [], [], []
    seen = Counter[int]()
    for number, label in enumerate(_draw_labels(seed, "train", len(names), num_train)):
        rng = np.random.default_rng([seed, 0, number])
        row_id = f"{names[label]}/{number:05d}.png"
        folds.append((label + seen[label]) % NUM_FOLDS)  # as many rows of a class in every fold, give or take one
        seen[label] += 1
        _save(draw(rng, label, folds[-1]), folder / "train" / row_id)
        train.append({"id": row_id, "path": f"train/{row_id}", "label": names[label]})
    for number, label in enumerate(_draw_labels(seed, "test", len(names), num_test)):
        row_id = f"TEST_{number:05d}"
        path = f"test/{row_id}.png"
        _save(draw(np.random.default_rng([seed, 1, number]), label, -1), folder / path)
        test.append({"ID": row_id, "img_path": path, "label": names[label]})
    _write_csv(folder / "train.csv", train)
    write_folds(folder / "folds.csv", [row["id"] for row in train], folds)
    _write_csv(folder / "test.csv", [{key: row[key] for key in ("ID", "img_path")} for row in test])
    _write_csv(folder / "test_labels.csv", [{key: row[key] for key in ("ID", "label")} for row in test])
    _write_csv(folder / "classes.csv", [{"name": name} for name in names])
    even = dict.fromkeys(names, f"{1 / len(names):.6f}")
    _write_csv(folder / "sample_submission.csv", [{"ID": row["ID"], **even} for row in test])


def _draw_labels(seed: int, part: str, num_classes: int, num_rows: int) -> list[int]:
    """Every class equally often, give or take one, in random order."""
    rng = np.random.default_rng([seed, 2, part == "test"])
    rounds = [rng.permutation(num_classes) for _ in range(-(-num_rows // num_classes))]
    return [int(label) for label in rng.permutation(np.concatenate(rounds)[:num_rows])]


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# --- Images -----------------------------------------------------------------------------------------------------------


def _split_digits(seed: int) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """Handwritten digits: train[fold][digit] and test[digit] are (images, 8, 8)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, test = train_test_split(indices, test_size=NUM_TEST_DIGITS, stratify=digits.target, random_state=seed)
    of_digit = [train[digits.target[train] == digit] for digit in range(10)]
    folds = [[digits.images[found[fold::NUM_FOLDS]] for found in of_digit] for fold in range(NUM_FOLDS)]
    return folds, [digits.images[test[digits.target[test] == digit]] for digit in range(10)]


def _draw_shapes(rng: np.random.Generator, large: str, small: str, count: int) -> Image.Image:
    """A large shape and `count` small ones of another colour, which do not touch."""
    sketch = Sketch(rng, "")
    colours = sketch.pick(list(COLOURS), 2)
    scene = Scene(sketch, avoid=tuple(colours))
    radius = rng.uniform(14, 19)
    size = rng.uniform(5.0, 7.0)
    places = _place(rng, [radius, *[size] * count])
    for shape, colour, own, (x, y) in zip(
        [large, *[small] * count], [colours[0], *[colours[1]] * count], [radius, *[size] * count], places, strict=True
    ):
        scene.put(shape, colour, x, y, own * rng.uniform(0.92, 1.08))
    return add_noise(rng, np.asarray(scene.finish(), dtype=np.float32) + rng.normal(0, rng.uniform(0, 12), 3))


def _place(rng: np.random.Generator, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Middles of circles that do not touch, in pixels."""
    places: list[tuple[float, float]] = []
    tries = 0
    while len(places) < len(radii):
        radius = radii[len(places)]
        x, y = (float(value) for value in rng.uniform(radius + 2, PICTURE_PX - radius - 2, 2))
        others = zip(places, radii, strict=False)
        if all(np.hypot(x - left, y - top) > radius + other + 2 for (left, top), other in others):
            places.append((x, y))
        tries += 1
        if tries % 200 == 0:  # no room is left: start again
            places = []
    return places
