"""Rows and images that are nearly the same: re-encoded, resized, a little brighter or cropped. No torch.

    Image.miniature -> hashes of the whole and 195 windows -> pairs within `distance` -> laid over one another -> near

The hash is imagehash's `phash`: 64 bits, the signs of the lowest frequencies. Crops meet because the hash of an image
is compared with those of the windows of others. Hashes alone would join pages, charts and drawings of one style by the
thousand (docs/measured.md); so every pair that they find is checked: one miniature is laid over the other where the
two agree best, and they are near only if they agree everywhere. Flipped and turned images are different images.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
from tqdm import tqdm

from vqa_sft.data.images import COLOUR_PX, MINIATURE_PX, ImageFacts
from vqa_sft.data.scan import Scan, count_cores

DISTANCE = 16  # of 64 bits; a crop that lies between two windows differs in up to so many
MAX_DISTANCE = 20

FREQUENCIES = 8  # a side; 64 bits
# A window takes one of these parts (start, length) of either side, the whole first: crops keep at least 70% of it.
NUM_STARTS = {1.0: 1, 0.9: 3, 0.8: 5, 0.7: 5}  # by length
PARTS = np.array([(at, length) for length, num in NUM_STARTS.items() for at in np.linspace(0, 1 - length, num)]).round(
    6
)
ASPECT_TOLERANCE = 0.08  # natural logarithm; a crop has the aspect of its window
MIN_COSINE = 0.7  # between the frequencies behind the hashes; cheaper than the check, and throws out most

# The check. Values of grey are 0 to 255, cells are those of a miniature.
MARGIN = 2  # cells at the border are not compared: there the blur would need what was cropped
BLUR, COLOUR_BLUR = 1.0, 0.7  # cells; takes away what differs by the sampling alone
STEPS, MAX_MOVE = 3, 0.08  # of a side
MIN_PART = 0.6  # of a side
BEYOND = 1 / MINIATURE_PX  # of a side; a part may reach over the border, for frames of a film and pages scanned twice
MAX_ERROR = 0.8  # at every cell, of ERROR_FLOOR + ERROR_SHARE * the contrast around it
ERROR_FLOOR, ERROR_SHARE = 4.0, 0.25
MAX_LOSS = 12.0  # at a cell that more light or contrast has cut off
MAX_UNEXPLAINED = 0.05  # of the variance
GAINS = (0.72, 1.4)  # contrast, and brightness as a factor
MAX_SHIFT, MAX_PLAIN_SHIFT = 40.0, 8.0  # of the mean; the latter for images of one colour
MAX_COLOUR_ERROR = 16.0  # of Cb and Cr together
# A crop must have contrast in this share of its cells: with one shape on a plain ground it may be of many images.
MIN_CONTRAST, MIN_DETAIL = 1.0, 0.6

BLOCK = 128  # images whose windows are hashed at a time
COLUMNS = 8192  # hashes compared at a time; they stay in the cache of a core
HITS = 50_000  # near hashes looked at together
BATCH = 256  # pairs checked together


def row_groups(scan: Scan, distance: int | None) -> list[int]:
    """One number a row, counted as they come: rows that share an image, exactly or nearly, have the same number.

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


def near_pairs(test: Scan, train: Scan, distance: int | None) -> list[tuple[int, int, int]]:
    """(image of `test`, image of `train`, bits by which their hashes differ, at least 1; 0 for equal files)."""
    ours = [number for number, image in enumerate(test.images) if image.problem is None]
    theirs = [number for number, image in enumerate(train.images) if image.problem is None]
    equal = defaultdict(list)
    for number in theirs:
        equal[train.images[number].digest].append(number)
    near = {(number, other): 0 for number in ours for other in equal.get(test.images[number].digest, ())}
    if distance is not None:
        sides = [test.images[number] for number in ours], [train.images[number] for number in theirs]

        def add(a: int, b: int, bits: int) -> None:
            pair = (ours[a], theirs[b])
            near[pair] = min(near.get(pair, MAX_DISTANCE), max(1, bits))

        # Either may be a crop of the other.
        _find_near(*sides, distance, found=add)
        _find_near(*reversed(sides), distance, found=lambda b, a, bits: add(a, b, bits))
    return sorted((*pair, bits) for pair, bits in near.items())


# --- Pairs whose hashes are near --------------------------------------------------------------------------------------


@dataclass
class _Wholes:
    """What is known of whole images (P,), sorted by aspect."""

    positions: np.ndarray  # in the list of images
    aspects: np.ndarray  # natural logarithm of width / height
    hashes: np.ndarray  # uint64
    frequencies: np.ndarray  # (P, 63) unit vectors
    colours: np.ndarray  # (P, 2) mean Cb and Cr
    have_detail: np.ndarray  # bool


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
        hashes, frequencies, colours = _hash(block, len(PARTS))

        def is_wanted(row: np.ndarray, place: np.ndarray) -> np.ndarray:
            return wanted(start + row, wholes.positions[place])

        for row, place, window, bits in _near_hashes(hashes, _aspects(block), wholes, distance, is_wanted):
            ours, theirs = colours[row, window], wholes.colours[place]
            keep = (np.abs(ours - theirs) <= MAX_COLOUR_ERROR + (GAINS[1] - 1) * np.abs(ours)).all(axis=1)
            keep &= is_wanted(row, place)
            row, place, window, bits = (values[keep] for values in (row, place, window, bits))
            cosine = np.einsum("nf,nf->n", frequencies[row, window], wholes.frequencies[place])
            may_be_crop = wholes.have_detail[place] & (cosine >= MIN_COSINE)
            same = np.flatnonzero(window == 0)
            crops = _choose_best(row, place, np.where(may_be_crop, cosine, 0))
            for check, pairs in ((_are_same, same), (_are_crops, crops)):
                for begin in range(0, len(pairs), BATCH):
                    batch = pairs[begin : begin + BATCH]
                    batch = batch[is_wanted(row[batch], place[batch])]
                    ours, theirs = [block[i] for i in row[batch]], [others[i] for i in wholes.positions[place[batch]]]
                    for i in batch[check(ours, theirs, window[batch])] if len(batch) else ():
                        found(start + int(row[i]), int(wholes.positions[place[i]]), int(bits[i]))

    blocks = range(0, len(images), BLOCK)
    with ThreadPoolExecutor(count_cores()) as pool:
        for _ in tqdm(pool.map(search, blocks), total=len(blocks), desc="Comparing images", delay=1, disable=None):
            pass


def _choose_best(a: np.ndarray, b: np.ndarray, score: np.ndarray) -> np.ndarray:
    """For every pair of `a` and `b` the place of its best score, if it is above 0."""
    order = np.lexsort((-score, b, a))
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (np.diff(a[order]) != 0) | (np.diff(b[order]) != 0)
    best = order[is_first]
    return best[score[best] > 0]


def _near_hashes(
    hashes: np.ndarray,
    aspects: np.ndarray,
    wholes: _Wholes,
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


def _hash_wholes(images: Sequence[ImageFacts]) -> _Wholes:
    aspects = _aspects(images)
    order = np.argsort(aspects, kind="stable")
    parts = []
    for start in range(0, len(order), 1024):
        block = [images[i] for i in order[start : start + 1024]]
        parts.append((*(values[:, 0] for values in _hash(block, 1)), _have_detail(_unpack(block)[0])))
    return _Wholes(order, aspects[order], *map(np.concatenate, zip(*parts, strict=True)))


def _hash(images: Sequence[ImageFacts], num_parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the windows (P, W) made of the first `num_parts` parts of either side: hashes, unit vectors (P, W, 63) of the
    frequencies, and mean colours (P, W, 2)."""
    grey, colour = _unpack(images)
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


def _aspects(images: Sequence[ImageFacts]) -> np.ndarray:
    return np.log([image.width / image.height for image in images])


def _unpack(images: Sequence[ImageFacts]) -> tuple[np.ndarray, np.ndarray]:
    """Grey (P, 32, 32) and colour (P, 2, 8, 8)."""
    values = np.frombuffer(b"".join(image.miniature for image in images), dtype=np.uint8)
    values = values.reshape(len(images), -1).astype(np.float32)
    grey, colour = values[:, : MINIATURE_PX**2], values[:, MINIATURE_PX**2 :]
    return grey.reshape(-1, MINIATURE_PX, MINIATURE_PX), colour.reshape(-1, 2, COLOUR_PX, COLOUR_PX)


# --- The check --------------------------------------------------------------------------------------------------------


def _are_same(images: Sequence[ImageFacts], others: Sequence[ImageFacts], windows: np.ndarray) -> np.ndarray:
    """Which others (N,) are the image as a whole."""
    (grey, colour), (other_grey, other_colour) = _unpack(images), _unpack(others)
    return _agree(grey, colour, other_grey, other_colour, np.tile(WHOLE, (len(images), 1)))


def _are_crops(images: Sequence[ImageFacts], others: Sequence[ImageFacts], windows: np.ndarray) -> np.ndarray:
    """Which others (N,) are a part of the image, near the window."""
    (grey, colour), (other_grey, other_colour) = _unpack(images), _unpack(others)
    aspects = np.exp(_aspects(others) - _aspects(images)).astype(np.float32)
    parts = _fit(grey, other_grey, _place(windows, aspects), aspects)
    return _agree(grey, colour, other_grey, other_colour, parts)


def _place(windows: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """Parts (N, 4: left, width, top, height) in the middle of the windows, as large, with the others' aspects."""
    (top, height), (left, width) = PARTS[windows // len(PARTS)].T, PARTS[windows % len(PARTS)].T
    middle_x, middle_y = left + width / 2, top + height / 2
    height = np.minimum(np.sqrt(width * height / aspects), np.minimum(1, 1 / aspects))
    width = height * aspects
    return _keep_inside(np.stack([middle_x - width / 2, width, middle_y - height / 2, height], axis=1))


def _fit(grey: np.ndarray, other: np.ndarray, parts: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """The parts (N, 4) of the images that look most like the others.

    Takes Gauss-Newton steps (as Lucas and Kanade align images). A part keeps its aspect, which leaves three unknowns.
    """
    blurred = _blur(other)
    slope_x, slope_y = BLUR_ROWS @ other @ SLOPE_ROWS.T, SLOPE_ROWS @ other @ BLUR_ROWS.T
    directions = np.stack([slope_x, slope_y, slope_x * AT + slope_y * AT[:, None], blurred], axis=1)
    directions = _centred(directions.reshape(len(parts), 4, len(AT) ** 2))  # (N, 4, cells): shifts, size, contrast
    normal = directions @ directions.transpose(0, 2, 1)
    damping = 1e-3 * np.trace(normal[:, :3, :3], axis1=1, axis2=2) / 3 + 1e-2
    inverse = np.linalg.inv(normal + damping[:, None, None] * np.eye(4, dtype=np.float32))
    target = directions[:, 3]

    best, best_error = parts, np.full(len(parts), np.inf)
    for step in range(STEPS + 1):
        seen = _centred(_sample(grey, parts, AT, BLUR).reshape(len(parts), len(AT) ** 2))
        gain = _dot(seen, target) / np.maximum(_dot(seen, seen), 1e-3)
        rest = target - gain[:, None] * seen
        error = _dot(rest, rest)
        is_better = error < best_error
        best, best_error = np.where(is_better[:, None], parts, best), np.where(is_better, error, best_error)
        if step < STEPS:
            moves = (inverse @ (directions @ rest[:, :, None]))[:, :3, 0]
            move_x, move_y, grow = np.clip(moves, -MAX_MOVE, MAX_MOVE).T
            left, width, top, height = parts.T
            new_height = np.clip(height * (1 + grow), MIN_PART, np.minimum(1, 1 / aspects))
            parts = np.stack([left + move_x * width, new_height * aspects, top + move_y * height, new_height], axis=1)
            parts = _keep_inside(parts)
    return best


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nc,nc->n", a, b)


def _keep_inside(parts: np.ndarray) -> np.ndarray:
    for start, length in ((0, 1), (2, 3)):
        parts[:, start] = parts[:, start].clip(-BEYOND, 1 + BEYOND - parts[:, length])
    return parts.astype(np.float32)


def _agree(
    grey: np.ndarray, colour: np.ndarray, other_grey: np.ndarray, other_colour: np.ndarray, parts: np.ndarray
) -> np.ndarray:
    """Whether the parts of the images agree with the others at every cell, but for a change of light."""
    seen, other = _sample(grey, parts, AT, BLUR), _blur(other_grey)
    gain, seen_mean, other_mean = _fit_light(seen, other)
    shown = gain * (seen - seen_mean) + other_mean
    error = other - np.clip(shown, 0, 255)
    limit = MAX_ERROR * (ERROR_FLOOR + ERROR_SHARE * _contrast(other))
    # More light or contrast cuts off what becomes whiter than white: a cell near it loses more than its mean shows.
    lost_white, lost_black = (
        np.where(gain > 1.02, (MAX_LOSS - 0.4 * np.abs(shown - end)).clip(0), 0) for end in (255, 0)
    )
    agrees = ((error <= limit + lost_black) & (error >= -limit - lost_white)).all(axis=CELLS)
    variance = other.var(axis=CELLS)
    agrees &= (error**2).mean(axis=CELLS) <= MAX_UNEXPLAINED * variance + 0.25
    agrees &= ((gain >= GAINS[0]) & (gain <= GAINS[1])).all(axis=CELLS)
    shift = np.abs(other.mean(axis=CELLS) - seen.mean(axis=CELLS))
    agrees &= shift <= np.where(variance < 1, MAX_PLAIN_SHIFT, MAX_SHIFT)
    return agrees & (_differ_in_colour(colour, other_colour, parts).max(axis=CELLS) <= MAX_COLOUR_ERROR)


def _differ_in_colour(colour: np.ndarray, other: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """How far Cb and Cr are apart at every cell but those at the border, but for a change of light."""
    whole = np.tile(WHOLE, (len(parts), 1))
    ours, theirs = (
        np.stack([_sample(values[:, band], where, AT_COLOUR, COLOUR_BLUR) - 128 for band in (0, 1)], axis=1)
        for values, where in ((colour, parts), (other, whole))
    )
    gain = (ours * theirs).sum(axis=(1, 2, 3)) / np.maximum((ours * ours).sum(axis=(1, 2, 3)), 1e-3)
    return np.sqrt(((theirs - np.clip(gain, *GAINS)[:, None, None, None] * ours) ** 2).sum(axis=1))


def _fit_light(seen: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gain and both means (N, 1, 1), by cells that are neither black nor white: a change of light cuts those off."""
    inside = (seen > 5) & (seen < 250) & (other > 5) & (other < 250)
    few = inside.mean(axis=CELLS, keepdims=True) < 0.1
    weight = (inside | few).astype(np.float32)
    weight /= weight.sum(axis=CELLS, keepdims=True)
    seen_mean, other_mean = ((values * weight).sum(axis=CELLS, keepdims=True) for values in (seen, other))
    variance = (weight * (seen - seen_mean) ** 2).sum(axis=CELLS, keepdims=True)
    covariance = (weight * (seen - seen_mean) * (other - other_mean)).sum(axis=CELLS, keepdims=True)
    return np.where(variance < 0.25, 1, covariance / np.maximum(variance, 1e-3)), seen_mean, other_mean


def _have_detail(grey: np.ndarray) -> np.ndarray:
    """Which images have contrast in enough places to be told from others by their parts."""
    return (_contrast(_blur(grey)) >= MIN_CONTRAST).mean(axis=CELLS) >= MIN_DETAIL


def _contrast(values: np.ndarray) -> np.ndarray:
    """Standard deviation around every cell."""
    mean = AROUND @ values @ AROUND.T
    return np.sqrt(np.maximum(AROUND @ (values * values) @ AROUND.T - mean * mean, 0))


def _blur(grey: np.ndarray) -> np.ndarray:
    return BLUR_ROWS @ grey @ BLUR_ROWS.T


def _sample(values: np.ndarray, parts: np.ndarray, at: np.ndarray, blur: float) -> np.ndarray:
    """Parts of `values` (N, cells, cells), blurred, at the points `at` x `at`, fractions of the part's sides."""
    cells = values.shape[1]
    columns, rows = (
        _weigh_cells(
            (parts[:, start, None] + parts[:, start + 1, None] * at) * cells - 0.5, cells, blur * parts[:, start + 1]
        )
        for start in (0, 2)
    )
    return rows @ values @ columns.transpose(0, 2, 1)


def _weigh_cells(at: np.ndarray, cells: int, blur: np.ndarray) -> np.ndarray:
    """(N, points, cells): how much every cell counts at the points `at` (N, points), under a Gaussian."""
    apart = at[:, :, None] - np.arange(cells, dtype=np.float32)
    weights = np.exp(-(apart**2) / (2 * np.maximum(blur, 0.45)[:, None, None] ** 2))
    return weights / weights.sum(axis=2, keepdims=True)


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(axis=-1, keepdims=True)


CELLS = (1, 2)  # axes
WHOLE = np.float32([0, 1, 0, 1])  # left, width, top, height
AT = ((np.arange(MARGIN, MINIATURE_PX - MARGIN) + 0.5) / MINIATURE_PX).astype(np.float32)
AT_COLOUR = ((np.arange(1, COLOUR_PX - 1) + 0.5) / COLOUR_PX).astype(np.float32)
BLUR_ROWS = _weigh_cells(AT[None] * MINIATURE_PX - 0.5, MINIATURE_PX, np.float32([BLUR]))[0]
# The slope of the blurred image, per side; by the difference of two blurs, half a cell to either side.
SLOPE_ROWS = MINIATURE_PX * (
    _weigh_cells(AT[None] * MINIATURE_PX, MINIATURE_PX, np.float32([BLUR]))[0]
    - _weigh_cells(AT[None] * MINIATURE_PX - 1, MINIATURE_PX, np.float32([BLUR]))[0]
)
AROUND = _weigh_cells(np.arange(len(AT), dtype=np.float32)[None], len(AT), np.float32([2.5]))[0]
