"""Rows and images that are nearly the same: re-encoded, resized, a little brighter or cropped. No torch.

    Image.miniature -> hashes of the whole and 195 windows -> pairs within `distance` -> laid over one another -> near

Hashes (hash_images.py) alone would join pages, charts and drawings of one style by the thousand
(docs/measurements/recipes.md); so every pair that they find is checked (compare_images.py): one miniature is laid over
the other where the two agree best, and they are near only if they agree everywhere. Flipped and turned images are
different images.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

from vqa_sft.console import progress
from vqa_sft.data.compare_images import GAINS, MAX_COLOUR_ERROR, are_crops, are_same, have_detail
from vqa_sft.data.hash_images import PARTS, Wholes, aspects_of, find_near_hashes, hash_windows, unpack
from vqa_sft.data.scan import Scan, count_cores
from vqa_sft.images import ImageFacts

DISTANCE = 16  # of 64 bits; a crop that lies between two windows differs in up to so many
MAX_DISTANCE = 20
MIN_COSINE = 0.7  # between the frequencies behind the hashes; cheaper than the check, and throws out most
BLOCK = 128  # images whose windows are hashed at a time
BATCH = 256  # pairs checked together


def row_groups(scan: Scan, distance: int | None) -> list[int]:
    """One number a row, in the order of rows: rows that share an image, exactly or nearly, have the same number.

    Rows linked by way of others are one group as well. With `distance` None only equal files count. Images that
    cannot be used link nothing.
    """
    labels = np.arange(len(scan.images))  # equal for images of one group
    lock = Lock()

    def join(a: int, b: int) -> None:
        with lock:
            low, high = sorted((labels[a], labels[b]))
            if low != high:
                labels[labels == high] = low

    first: dict[bytes, int] = {}  # of equal files
    for number, image in enumerate(scan.images):
        if image.problem is None:
            join(first.setdefault(image.digest, number), number)
    of_row = [[number for number in numbers if scan.images[number].problem is None] for numbers in scan.of_row]
    for numbers in of_row:
        for number in numbers[1:]:
            join(numbers[0], number)
    if distance is not None:
        distinct = np.array(list(first.values()), dtype=np.int64)
        images = [scan.images[number] for number in distinct]
        # Pairs that are joined already need no look: of a thousand nearly equal images few pairs are checked.
        _find_near(
            images,
            images,
            distance,
            wanted=lambda a, b: labels[distinct[a]] != labels[distinct[b]],
            found=lambda a, b, bits: join(distinct[a], distinct[b]),
        )
    counted: dict[object, int] = {}
    return [
        counted.setdefault(int(labels[numbers[0]]) if numbers else ("row", row), len(counted))
        for row, numbers in enumerate(of_row)
    ]


def rows_in_training(scan: Scan, training: Scan, distance: int | None) -> dict[int, tuple[int, int]]:
    """Row -> (bits, row of training), of the rows that have an image of the training rows, or nearly one: the nearest,
    its first row, and by how many bits their hashes differ, 0 for equal files."""
    nearest: dict[int, tuple[int, int]] = {}  # image -> (bits, image of the training set)
    for image, other, apart in near_pairs(scan, training, distance):
        nearest[image] = min(nearest.get(image, (apart, other)), (apart, other))
    row_of: dict[int, int] = {}  # image of the training set -> its first row
    for row, images in enumerate(training.of_row if nearest else ()):
        for image in images:
            row_of.setdefault(image, row)
    found = {}
    for row, images in enumerate(scan.of_row):
        for apart, other in sorted(nearest[image] for image in images if image in nearest)[:1]:
            found[row] = apart, row_of[other]
    return found


def near_pairs(test: Scan, train: Scan, distance: int | None) -> list[tuple[int, int, int]]:
    """(image of `test`, image of `train`, bits by which their hashes differ, at least 1; 0 for equal files)."""
    ours = [number for number, image in enumerate(test.images) if image.problem is None]
    theirs = [number for number, image in enumerate(train.images) if image.problem is None]
    equal = defaultdict(list)
    for number in theirs:
        equal[train.images[number].digest].append(number)
    near = {(number, other): 0 for number in ours for other in equal.get(test.images[number].digest, ())}
    if distance is not None:
        images, others = [test.images[number] for number in ours], [train.images[number] for number in theirs]

        def add(a: int, b: int, bits: int) -> None:
            pair = (ours[a], theirs[b])
            near[pair] = min(near.get(pair, MAX_DISTANCE), max(1, bits))

        # Either may be a crop of the other.
        _find_near(images, others, distance, found=add)
        _find_near(others, images, distance, found=lambda b, a, bits: add(a, b, bits))
    return sorted((*pair, bits) for pair, bits in near.items())


def _find_near(
    images: Sequence[ImageFacts],
    others: Sequence[ImageFacts],
    distance: int,
    *,
    found: Callable[[int, int, int], None],
    wanted: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda a, b: np.ones(len(b), dtype=bool),
) -> None:
    """Call `found` (position of an image, of an other, bits) for the others that are nearly an image or a crop of it.

    Only pairs that are `wanted` are looked at. Both functions are called from several threads.
    """
    if not images or not others:
        return
    wholes = _hash_wholes(others)

    def search(start: int) -> None:
        block = images[start : start + BLOCK]
        hashes, frequencies, colours = hash_windows(block, len(PARTS))

        def is_wanted(row: np.ndarray, place: np.ndarray) -> np.ndarray:
            return wanted(start + row, wholes.positions[place])

        for row, place, window, bits in find_near_hashes(hashes, aspects_of(block), wholes, distance, is_wanted):
            ours, theirs = colours[row, window], wholes.colours[place]
            keep = (np.abs(ours - theirs) <= MAX_COLOUR_ERROR + (GAINS[1] - 1) * np.abs(ours)).all(axis=1)
            keep &= is_wanted(row, place)
            row, place, window, bits = (values[keep] for values in (row, place, window, bits))
            cosine = np.einsum("nf,nf->n", frequencies[row, window], wholes.frequencies[place])
            may_be_crop = wholes.have_detail[place] & (cosine >= MIN_COSINE)
            same = np.flatnonzero(window == 0)
            crops = _choose_best(row, place, np.where(may_be_crop, cosine, 0))
            for check, pairs in ((are_same, same), (are_crops, crops)):
                for begin in range(0, len(pairs), BATCH):
                    batch = pairs[begin : begin + BATCH]
                    batch = batch[is_wanted(row[batch], place[batch])]
                    ours, theirs = [block[i] for i in row[batch]], [others[i] for i in wholes.positions[place[batch]]]
                    for i in batch[check(ours, theirs, window[batch])] if len(batch) else ():
                        found(start + int(row[i]), int(wholes.positions[place[i]]), int(bits[i]))

    blocks = range(0, len(images), BLOCK)
    with ThreadPoolExecutor(count_cores()) as pool:
        for _ in progress(pool.map(search, blocks), total=len(blocks), desc="Comparing images", delay_s=1):
            pass


def _choose_best(a: np.ndarray, b: np.ndarray, score: np.ndarray) -> np.ndarray:
    """For every pair of `a` and `b` the place of its best score, if it is above 0."""
    order = np.lexsort((-score, b, a))
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (np.diff(a[order]) != 0) | (np.diff(b[order]) != 0)
    best = order[is_first]
    return best[score[best] > 0]


def _hash_wholes(images: Sequence[ImageFacts]) -> Wholes:
    aspects = aspects_of(images)
    order = np.argsort(aspects, kind="stable")
    parts = []
    for start in range(0, len(order), 1024):
        block = [images[i] for i in order[start : start + 1024]]
        parts.append((*(values[:, 0] for values in hash_windows(block, 1)), have_detail(unpack(block)[0])))
    return Wholes(order, aspects[order], *map(np.concatenate, zip(*parts, strict=True)))
