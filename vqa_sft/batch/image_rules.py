"""What `min_pixels` and `max_pixels` can become in the image processor of each family.

    any area       Qwen-VL, GLM-4V, Kimi, ...            a number of pixels or of tokens
    some areas     Gemma 4, InternVL, Pixtral, ...       budgets of tokens, tiles, slices, longest edges
    one area       LLaVA-1.5, Gemma 3, PaliGemma, ...    no row here

The area of an image is everything that the vision tower is given of it: its tiles or slices, and its thumbnail. All of
it is read from the image processor, which a run folder holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from vqa_sft.images import MAX_ASPECT

BUDGETS = (70, 140, 280, 560, 1120)  # tokens; Gemma 4's processor takes no others (transformers 5.23)


@dataclass(frozen=True)
class Setting:
    """Attributes of an image processor, and the pixels (width x height) that it then shows."""

    most: int  # of any image
    least: int  # of a small one
    values: dict[str, Any]
    largest: tuple[tuple[int, int], ...]  # (width, height) of images that are shown `most`, or nearly
    label: str  # of the values, in messages


@dataclass(frozen=True)
class Sizes:
    now: Setting
    choices: list[Setting]  # from the smallest `most`


def sizes_of(processor: ProcessorMixin, low: int | None = None, high: int | None = None) -> Sizes | None:
    """How the processor's limits can be set, for images of `low` to `high` pixels; None: not at all."""
    process = processor.image_processor
    rule = _RULES.get(type(process).__name__.removesuffix("Pil").removesuffix("Fast").removesuffix("ImageProcessor"))
    if rule is None:
        has_areas = all(_size(process).get(name) for name in ("shortest_edge", "longest_edge"))
        rule = _areas if hasattr(process, "merge_size") and has_areas else None
    return rule(processor, low, high) if rule else None


def _areas(processor: ProcessorMixin, low: int | None, high: int | None, *, counts_frames: bool = False) -> Sizes:
    """Qwen-VL and those after it keep two areas in `size`; GLM-4V's count an image as a video of two frames."""
    process = processor.image_processor
    frames = process.temporal_patch_size if counts_frames else 1
    token_px = process.patch_size * process.merge_size

    def setting(least: int, most: int) -> Setting:
        values = {"size": {"shortest_edge": least * frames, "longest_edge": most * frames}}
        return Setting(most, least, values, _fill(most, token_px), f"{token_px} px a token")

    now = setting(_size(process)["shortest_edge"] // frames, _size(process)["longest_edge"] // frames)
    most = max(now.most, low or 0) if high is None else max(high, token_px**2)
    return Sizes(now, [setting(_lower(now.least, most) if low is None else low, most)])


def _tokens(processor: ProcessorMixin, low: int | None, high: int | None, *, has_least: bool = False) -> Sizes:
    """GLM 5 and Muse keep numbers of tokens."""
    process = processor.image_processor
    token_px = process.patch_size * process.merge_size

    def setting(num_least: int, num: int) -> Setting:
        values = {"max_image_tokens": num} | ({"min_image_tokens": num_least} if has_least else {})
        pixels = num * token_px**2
        return Setting(pixels, num_least * token_px**2, values, _fill(pixels, token_px), f"{token_px} px a token")

    now = setting(process.min_image_tokens if has_least else 1, process.max_image_tokens)
    num_least = now.least // token_px**2
    if has_least and low is not None:
        num_least = math.ceil(low / token_px**2)
    num = max(process.max_image_tokens, num_least) if high is None else max(1, high // token_px**2)
    return Sizes(now, [setting(_lower(num_least, num) if low is None else num_least, num)])


def _padded(processor: ProcessorMixin, low: int | None, high: int | None) -> Sizes:
    """Kimi keeps a number of patches before an image is padded to whole tokens, which adds up to one to each side."""
    process = processor.image_processor
    patch_px, token_px = process.patch_size, process.patch_size * process.merge_size
    # Sides are s x sqrt(3) and s / sqrt(3) of an image three times as long as high; patches are counted rounded down.
    padding = token_px + patch_px // 2
    added = (math.sqrt(3) + 1 / math.sqrt(3)) * padding

    def setting(side: float) -> Setting:
        pixels = math.floor(side**2 + added * side + padding**2)
        values = {"max_patches": math.floor((side / patch_px) ** 2)}
        # Which shapes need most padding cannot be seen; their tokens are counted without a pixel.
        shown = tuple(size for scale in (1.1, 1.3, 2, 4) for size in _shapes((scale * side) ** 2))
        return Setting(pixels, token_px**2, values, shown, f"{token_px} px a token")

    now = setting(math.sqrt(process.max_patches) * patch_px)
    most = now.most if high is None else max(high, (3 * token_px) ** 2)
    side = (math.sqrt(added**2 - 4 * (padding**2 - most)) - added) / 2
    return Sizes(now, [now if high is None else setting(side)])


def _budgets(processor: ProcessorMixin, low: int | None, high: int | None) -> Sizes:
    """Gemma 4 fills one of five budgets of tokens, with small images too."""
    process = processor.image_processor
    token_px = process.patch_size * process.pooling_kernel_size

    def setting(num: int) -> Setting:
        pixels = num * token_px**2
        return Setting(pixels, pixels, {"max_soft_tokens": num}, _fill(pixels, token_px), f"max_soft_tokens {num}")

    return Sizes(setting(process.max_soft_tokens), [setting(num) for num in BUDGETS])


def _tiles(
    processor: ProcessorMixin, low: int | None, high: int | None, *, most: str, least: str = "", overview: bool = False
) -> Sizes | None:
    """Up to so many tiles of one size, and with more than one (or always: `overview`) the whole image in one more."""
    process = processor.image_processor
    given = getattr(processor, "images_kwargs", {})  # of the processor, stronger than what its image processor holds
    if not given.get("crop_to_patches", getattr(process, "crop_to_patches", True)):
        return None
    tile_px = _size(process)["height"]

    def pixels(num: int) -> int:
        return (num + (num > 1 or overview)) * tile_px**2

    def setting(num_least: int, num: int) -> Setting:
        values = {most: num} | ({least: num_least} if least else {})
        return Setting(
            pixels(num), pixels(num_least), values, _cut(num, tile_px), f"tiles of {tile_px} px, {most} {num}"
        )

    now = setting(getattr(process, least) if least else 1, getattr(process, most))
    num_least = 1
    if least and low is not None:
        num_least = next(num for num in range(1, low // tile_px**2 + 2) if pixels(num) >= low)
    elif least and high is None:
        num_least = getattr(process, least)
    last = max(getattr(process, most), num_least, (high or 0) // tile_px**2)
    return Sizes(now, [setting(num_least, num) for num in range(num_least, last + 1)])


def _grid(processor: ProcessorMixin, low: int | None, high: int | None) -> Sizes | None:
    """Idefics3 and SmolVLM: every image gets a longest edge of so many tiles, is cut into them, and shown whole."""
    process = processor.image_processor
    tile_px, edge = process.max_image_size["longest_edge"], _size(process).get("longest_edge")
    if not process.do_image_splitting or not edge:
        return None

    def setting(num: int) -> Setting:
        values = {"size": {"longest_edge": min(num * tile_px, edge)}}
        square, strip = (num**2 + 1, num + 1) if num > 1 else (1, 1)
        shown = ((edge, edge),)
        return Setting(square * tile_px**2, strip * tile_px**2, values, shown, f"tiles of {tile_px} px, {num} a side")

    choices = [setting(num) for num in range(1, math.ceil(edge / tile_px) + 1)]
    return Sizes(choices[-1], choices)


def _edges(processor: ProcessorMixin, low: int | None, high: int | None) -> Sizes:
    """Pixtral and Mistral 3: a longest edge, so that a square may fill the area and a long image does not; small images
    stay. Not above the edge that the tower's positions are made for."""
    process, token_px = processor.image_processor, processor.patch_size * processor.spatial_merge_size
    edge = max(px for px in _size(process).values() if px)

    def setting(px: int) -> Setting:
        return Setting(px**2, token_px**2, {"size": {"longest_edge": px}}, ((px, px),), f"longest edge {px} px")

    first = math.ceil(MAX_ASPECT / token_px) * token_px  # below it the longest images would have no height
    return Sizes(setting(edge), [setting(px) for px in range(first, edge, token_px)] + [setting(edge)])


def _slices(processor: ProcessorMixin, low: int | None, high: int | None) -> Sizes:
    """MiniCPM-V: the image whole at about `scale_resolution` squared, and cut into slices of that area, sides being
    rounded to the nearest token."""
    process = processor.image_processor
    side, token_px = process.scale_resolution, process.patch_size * (2 if process.downsample_mode == "4x" else 4)

    def setting(px: int, num: int) -> Setting:
        values = {"scale_resolution": px, "max_slice_nums": num}
        pixels = (num + (num > 1)) * px**2
        label = f"slices of {px} px, max_slice_nums {num}, sides rounded to {token_px} px"
        # Upright, for each row of slices begins a line.
        shown = _shapes(1.1 * num * px**2, ratios=[1 / (1 + n / 2) for n in range(9)])
        return Setting(pixels, px**2, values, (*_cut(num, px), *shown), label)

    now = setting(side, process.max_slice_nums if process.slice_mode else 1)
    smaller = [setting(px, 1) for px in range(token_px, side, token_px)]
    return Sizes(now, smaller + [setting(side, num + 1) for num in range(now.values["max_slice_nums"])])


def _split(processor: ProcessorMixin, low: int | None, high: int | None) -> Sizes:
    """LFM2-VL: a number of tokens; images of more than twice their area are cut into tiles, and shown whole as well."""
    process = processor.image_processor
    token_px, tile_px = process.encoder_patch_size * process.downsample_factor, process.tile_size
    whole = process.max_image_tokens

    def unsplit(num: int) -> Setting:
        least = _lower(process.min_image_tokens, num) if low is None else min(num, math.ceil(low / token_px**2))
        values = {"max_image_tokens": num, "min_image_tokens": least, "do_image_splitting": False}
        pixels, label = num * token_px**2, f"{token_px} px a token"
        return Setting(pixels, least * token_px**2, values, _fill(pixels, token_px), label)

    def split(num: int) -> Setting:
        small = unsplit(whole)
        values = small.values | {"do_image_splitting": True, "max_tiles": num, "min_tiles": min(process.min_tiles, num)}
        pixels = num * tile_px**2 + small.most * process.use_thumbnail
        return Setting(pixels, small.least, values, _cut(num, tile_px), f"tiles of {tile_px} px, max_tiles {num}")

    choices = [unsplit(num + 1) for num in range(whole)]
    if process.do_image_splitting:
        choices += [split(num) for num in range(2, process.max_tiles + 1)]
    return Sizes(choices[-1], choices)


def _pinpoints(processor: ProcessorMixin, low: int | None, high: int | None) -> Sizes:
    """LLaVA-NeXT and OneVision: the best of a list of sizes, cut into tiles, and the image whole in one more. The model
    has the list too (models/load.py, `follow_processor`)."""
    process = processor.image_processor
    tile_px = _size(process).get("height") or _size(process)["shortest_edge"]
    own = [tuple(sides) for sides in process.image_grid_pinpoints]
    areas = sorted({height * width for height, width in own})

    def setting(area: int) -> Setting:
        kept = [sides for sides in own if math.prod(sides) <= area]
        label = f"tiles of {tile_px} px, {area // tile_px**2} at most"
        values = {"image_grid_pinpoints": [list(sides) for sides in kept]}
        # What lies beside the image is left out: which shape fills a size best cannot be seen.
        shown = (*((width, height) for height, width in kept), *_shapes(4 * area))
        return Setting(area + tile_px**2, areas[0] + tile_px**2, values, shown, label)

    return Sizes(setting(areas[-1]), [setting(area) for area in areas])


def _lower(least: int, most: int) -> int:
    """A processor's own `least` below another `most`: sides of enlarged images are rounded up, and need room."""
    return min(least, max(1, most // 2))


def _size(process: ImageProcessingMixin) -> dict[str, int | None]:
    """The sides, edges or areas that the image processor keeps as its `size`."""
    size = getattr(process, "size", None) or {}
    return size if isinstance(size, dict) else vars(size)


def area_tokens(pixels: int, token_px: int) -> int:
    """The most tokens of an image of so many pixels, where each is a square of `token_px`."""
    return pixels // token_px**2


def _fill(pixels: int, token_px: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of an image, no longer than three times its height, of as many whole tokens as `pixels` hold."""
    num = area_tokens(pixels, token_px)
    rows = max(range(max(1, math.isqrt(num // 3)), math.isqrt(num) + 1), key=lambda rows: (num // rows) * rows)
    return ((num // rows * token_px, rows * token_px),)


def _shapes(pixels: float, ratios: Sequence[float] = ()) -> tuple[tuple[int, int], ...]:
    """(width, height) of images of this area. By default many, the longest with sides of 3 and 1, for families that
    count their tokens without processing an image."""
    ratios = ratios or [(1 + n / 16) ** sign for n in range(33) for sign in (1, -1)]
    return tuple((round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))) for ratio in ratios)


def _cut(num: int, px: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of images that are cut into `num` squares of `px`, or nearly."""
    side = math.ceil(math.sqrt(num))
    return ((num * px, px), (px, num * px), (side * px, side * px))


Rule = Callable[[ProcessorMixin, int | None, int | None], Sizes | None]
# By the names of image processors (transformers 5.23), without what they end with. Those with two areas in `size` need
# no row unless they mean something else by them.
_RULES: dict[str, Rule] = {
    "Glm4v": partial(_areas, counts_frames=True),
    "Glm46V": partial(_areas, counts_frames=True),
    "Glmga": partial(_areas, counts_frames=True),
    "Glm5Next": partial(_tokens, has_least=True),
    "MuseGlimmer": _tokens,
    "Kimi_K25": _padded,
    "Gemma4": _budgets,
    "Gemma4Unified": _budgets,
    "GotOcr2": partial(_tiles, most="max_patches", least="min_patches"),  # InternVL
    "Ovis2": partial(_tiles, most="max_patches", least="min_patches"),
    "Cohere2Vision": partial(_tiles, most="max_patches"),
    "Llama4": partial(_tiles, most="max_patches"),
    "Molmo2": partial(_tiles, most="max_crops", overview=True),
    "LlavaNext": _pinpoints,
    "LlavaOnevision": _pinpoints,
    "Idefics3": _grid,
    "SmolVLM": _grid,
    "Pixtral": _edges,
    "MiniCPMV4_6": _slices,
    "Lfm2Vl": _split,
}
