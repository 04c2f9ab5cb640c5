"""Hashes of images and of windows in them, and which are near: what finds the candidates of near-duplicates. No torch.

The hash is imagehash's `phash`: 64 bits, the signs of the lowest frequencies. Crops are found because the hash of an
image is compared with those of the windows of others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vqa_sft.images import COLOUR_PX, MINIATURE_PX, ImageFacts

FREQUENCIES = 8  # a side; 64 bits
# A window takes one of these parts (start, length) of either side, the whole first: crops keep at least 70% of it.
NUM_STARTS = {1.0: 1, 0.9: 3, 0.8: 5, 0.7: 5}  # by length
PARTS = np.array([(at, length) for length, num in NUM_STARTS.items() for at in np.linspace(0, 1 - length, num)]).round(
    6
)
ASPECT_TOLERANCE = 0.08  # natural logarithm; a crop has the aspect of its window
COLUMNS = 8192  # hashes compared at a time; they stay in the cache of a core
HITS = 50_000  # near hashes compared at a time


@dataclass
class Wholes:
    """What is known of whole images (P,), sorted by aspect."""

    positions: np.ndarray  # in the list of images
    aspects: np.ndarray  # natural logarithm of width / height
    hashes: np.ndarray  # uint64
    frequencies: np.ndarray  # (P, 63) unit vectors
    colours: np.ndarray  # (P, 2) mean Cb and Cr
    have_detail: np.ndarray  # bool


def find_near_hashes(
    hashes: np.ndarray,
    aspects: np.ndarray,
    wholes: Wholes,
    distance: int,
    is_wanted: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[tuple[np.ndarray, ...]]:
    """Many (row, place in `wholes`, window, bits) at a time, all whose hashes differ in at most `distance` bits.

    Where they are many, those that are not wanted are left out.
    """
    hits: list[tuple[np.ndarray, ...]] = []
    num_hits = 0
    for row, aspect in enumerate(aspects):
        for ratio, windows in WINDOWS_OF_RATIO:
            low, high = 0, len(wholes.hashes)
            if ratio is not None:
                limits = aspect + np.log(ratio) + np.array([-ASPECT_TOLERANCE, ASPECT_TOLERANCE])
                low, high = np.searchsorted(wholes.aspects, limits)
            for begin in range(low, high, COLUMNS):
                bits = np.bitwise_count(hashes[row, windows, None] ^ wholes.hashes[begin : min(high, begin + COLUMNS)])
                close = bits <= distance
                count = np.count_nonzero(close)
                if count > close.shape[1]:
                    close &= is_wanted(np.int64(row), np.arange(begin, begin + close.shape[1]))
                if count:
                    window, column = np.divmod(np.flatnonzero(close), close.shape[1])
                    hits.append((np.full(len(column), row), begin + column, windows[window], bits[window, column]))
                    num_hits += len(column)
            if num_hits >= HITS:
                yield tuple(map(np.concatenate, zip(*hits, strict=True)))
                hits, num_hits = [], 0
    if hits:
        yield tuple(map(np.concatenate, zip(*hits, strict=True)))


def hash_windows(images: Sequence[ImageFacts], num_parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the windows (P, W) made of the first `num_parts` parts of either side: hashes, unit vectors (P, W, 63) of the
    frequencies, and mean colours (P, W, 2)."""
    grey, colour = unpack(images)
    basis = BASIS[: num_parts * FREQUENCIES]
    values = basis @ grey @ basis.T  # (P, parts x frequencies, parts x frequencies)
    values = values.reshape(len(grey), num_parts, FREQUENCIES, num_parts, FREQUENCIES).swapaxes(2, 3)
    values = values.reshape(len(grey), num_parts**2, FREQUENCIES**2)
    # Rounded, for values that should be equal, as the zeros of a plain image are, differ a little.
    values = values.round(6).astype(np.float32)
    half = FREQUENCIES**2 // 2
    bits = values > np.sort(values, axis=2)[..., half - 1 : half + 1].mean(axis=2, keepdims=True)
    hashes = np.packbits(bits, axis=2).view(np.uint64)[..., 0]
    vectors = values[..., 1:] * WEIGHTS
    vectors /= np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-6)
    means = MEANS[:num_parts]
    return hashes, vectors, (means @ colour @ means.T - 128).reshape(len(grey), 2, -1).transpose(0, 2, 1)


def _overlap(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of every part lies in each of the cells of a side (parts, cells), and where, from 0 to 1, its middle."""
    edges = (np.linspace(0, 1, cells + 1) - PARTS[:, :1]) / PARTS[:, 1:]
    edges = edges.clip(0, 1)
    return np.diff(edges), (edges[:, 1:] + edges[:, :-1]) / 2


def _make_basis() -> np.ndarray:
    """(parts x frequencies, 32): the cosine transform, type 2, of every part of a side."""
    share, middle = _overlap(MINIATURE_PX)
    waves = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * middle[:, None])
    return (share[:, None] * waves).reshape(-1, MINIATURE_PX)


def _group_windows() -> list[tuple[float | None, np.ndarray]]:
    """Windows by width / height. The whole comes first, with None: it is compared with images of any aspect, for many
    sets squeeze their images into squares."""
    lengths = PARTS[:, 1]
    # The number of a window is that of its part of the height x 14 + that of its part of the width.
    ratios = (lengths / lengths[:, None]).ravel().round(6)
    rest = np.arange(1, len(ratios))
    return [(None, np.array([0]))] + [(ratio, rest[ratios[1:] == ratio]) for ratio in sorted(set(ratios[1:]))]


BASIS = _make_basis()
MEANS = _overlap(COLOUR_PX)[0].astype(np.float32)
WINDOWS_OF_RATIO = _group_windows()
# Higher frequencies are weaker in photographs; weighted by frequency all count alike.
WEIGHTS = np.hypot(*np.indices((FREQUENCIES, FREQUENCIES))).ravel()[1:].astype(np.float32)


def aspects_of(images: Sequence[ImageFacts]) -> np.ndarray:
    return np.log([image.width / image.height for image in images])


def unpack(images: Sequence[ImageFacts]) -> tuple[np.ndarray, np.ndarray]:
    """Grey (P, 32, 32) and colour (P, 2, 8, 8)."""
    values = np.frombuffer(b"".join(image.miniature for image in images), dtype=np.uint8)
    values = values.reshape(len(images), -1).astype(np.float32)
    grey, colour = values[:, : MINIATURE_PX**2], values[:, MINIATURE_PX**2 :]
    return grey.reshape(-1, MINIATURE_PX, MINIATURE_PX), colour.reshape(-1, 2, COLOUR_PX, COLOUR_PX)
