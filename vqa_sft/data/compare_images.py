"""Whether two images are the same, or one a part of the other: one miniature is laid over the other. No torch.

They are near only if they agree at every cell, but for a change of light.
"""

from collections.abc import Sequence

import numpy as np

from vqa_sft.data.hash_images import PARTS, aspects_of, unpack
from vqa_sft.images import COLOUR_PX, MINIATURE_PX, ImageFacts

# Values of grey are 0 to 255, cells are those of a miniature.
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


def are_same(images: Sequence[ImageFacts], others: Sequence[ImageFacts], windows: np.ndarray) -> np.ndarray:
    """Which others (N,) are the image as a whole."""
    (grey, colour), (other_grey, other_colour) = unpack(images), unpack(others)
    return _agree(grey, colour, other_grey, other_colour, np.tile(WHOLE, (len(images), 1)))


def are_crops(images: Sequence[ImageFacts], others: Sequence[ImageFacts], windows: np.ndarray) -> np.ndarray:
    """Which others (N,) are a part of the image, near the window."""
    (grey, colour), (other_grey, other_colour) = unpack(images), unpack(others)
    aspects = np.exp(aspects_of(others) - aspects_of(images)).astype(np.float32)
    parts = fit_parts(grey, other_grey, place_windows(windows, aspects), aspects)
    return _agree(grey, colour, other_grey, other_colour, parts)


def place_windows(windows: np.ndarray, aspects: np.ndarray) -> np.ndarray:
    """Parts (N, 4: left, width, top, height) in the middle of the windows, as large, with the others' aspects."""
    (top, height), (left, width) = PARTS[windows // len(PARTS)].T, PARTS[windows % len(PARTS)].T
    middle_x, middle_y = left + width / 2, top + height / 2
    height = np.minimum(np.sqrt(width * height / aspects), np.minimum(1, 1 / aspects))
    width = height * aspects
    return _keep_inside(np.stack([middle_x - width / 2, width, middle_y - height / 2, height], axis=1))


def fit_parts(grey: np.ndarray, other: np.ndarray, parts: np.ndarray, aspects: np.ndarray) -> np.ndarray:
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


def have_detail(grey: np.ndarray) -> np.ndarray:
    """Which images have contrast in enough places to distinguish their parts from those of others."""
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
