"""How many pixels (width x height) of an image a processor shows, and images at another scale.

`min_pixels` and `max_pixels` mean the same for every family: the area that the model is given of one image. What they
become in its image processor is in image_rules.py.
"""

import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vqa_sft.batch.count_tokens import image_tokens
from vqa_sft.batch.image_rules import Setting, Sizes, sizes_of
from vqa_sft.errors import InputError

# (width, height) of images by which a processor without known limits is judged.
_SHAPES = ((640, 480), (300, 900), (1600, 1200), (64, 64))


def limit_pixels(processor: ProcessorMixin, name: str, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the processor's limits, as near as its family allows and never above `max_pixels`, up to whole tokens. Raises
    InputError where the model `name` has no such limits, or none between these two."""
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    fields = [field for field, pixels in given.items() if pixels is not None]
    if not fields:
        return
    sizes = sizes_of(processor, min_pixels, max_pixels)
    if sizes is None:
        areas = _own_areas(processor)
        own = "images at sizes of its own"
        if len(areas) == 1:
            own = f"every image at {areas[0]:,} pixels, whatever its size"
        elif areas:
            own += f" ({areas[0]:,} to {areas[-1]:,} pixels of those tried)"
        raise InputError(f"{name} shows {own}; remove {' and '.join(fields)}.")
    setting = _choose(sizes, name, min_pixels, max_pixels)
    for attribute, value in setting.values.items():
        setattr(processor.image_processor, attribute, SizeDict(**value) if attribute == "size" else value)


def _choose(sizes: Sizes, name: str, low: int | None, high: int | None) -> Setting:
    choices, most = sizes.choices, sizes.now.most if high is None else high
    fitting = [setting for setting in choices if setting.most <= most]
    if high is not None and not fitting:
        raise InputError(
            f"{name} shows an image at {choices[0].most:,} pixels or more; got max_pixels: {high}. Give at least "
            f"{choices[0].most}, or remove max_pixels."
        )
    if low is None:
        return fitting[-1]
    large = [setting for setting in choices if setting.least >= low]
    if not large:
        least = max(setting.least for setting in choices)
        raise InputError(
            f"{name} does not enlarge a small image to more than {least:,} pixels; got min_pixels: {low}. Give at most "
            f"{least}, or remove min_pixels."
        )
    between = [setting for setting in fitting if setting in large]
    if high is not None and not between:
        raise InputError(
            f"{name} has no size for images between min_pixels: {low} and max_pixels: {high}. Set max_pixels to "
            f"{large[0].most}, or remove min_pixels."
        )
    return between[-1] if between else large[0]


def _own_areas(processor: ProcessorMixin) -> list[int]:
    """The pixels that a processor whose limits cannot be set shows of images of several shapes; empty where it returns
    something that is not known here."""
    try:
        return sorted({_shown_pixels(processor, Image.new("RGB", size)) for size in _SHAPES})
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _shown_pixels(processor: ProcessorMixin, image: Image.Image) -> int:
    """The pixels (width x height) that the vision tower is given of one image, its tiles and thumbnail included."""
    process, how = processor.image_processor, getattr(processor, "images_kwargs", {})
    batch = process([image], **how | {"return_tensors": "pt"})
    if "image_grid_thw" in batch:
        return int(batch["image_grid_thw"].prod()) * process.patch_size**2
    pixels = batch["pixel_values"]
    shown = pixels.numel() / 3  # channels
    # What is there for the shape of the batch alone does not count.
    if "image_position_ids" in batch:
        shown *= float((batch["image_position_ids"][..., 0] >= 0).float().mean())
    if "pixel_attention_mask" in batch:
        shown *= float(batch["pixel_attention_mask"].float().mean())
    return round(shown)


def largest_image(processor: ProcessorMixin) -> tuple[int, int]:
    """The most pixels that the model is shown of one image, and the most tokens that one has in a prompt. Where the
    processor's limits cannot be set those of images that were tried, or no pixels where they cannot be told."""
    sizes = sizes_of(processor)
    shapes = _SHAPES if sizes is None else sizes.now.largest
    # A small one first: where the processor counts by itself, that is the one it is compared with.
    tokens = 1 + max(image_tokens(processor, [(224, 224), *shapes]).values())
    return max(_own_areas(processor), default=0) if sizes is None else sizes.now.most, tokens


def describe_images(processor: ProcessorMixin, max_pixels: int | None = None) -> str:
    """A line: the most pixels and tokens of an image, how the family puts it, and `max_pixels` where that is none of
    its sizes."""
    sizes, family = sizes_of(processor), type(processor).__name__.removesuffix("Processor")
    pixels, tokens = largest_image(processor)
    if sizes is None:
        is_one = len(_own_areas(processor)) == 1
        own = f"{pixels:,} pixels each, whatever their size" if is_one else "of sizes of their own"
        return f"images: {own}, {tokens:,} tokens at most ({family})"
    line = f"images: at most {pixels:,} pixels, {tokens:,} tokens each ({family}: {sizes.now.label})"
    if max_pixels is not None and pixels < max_pixels:
        line += f", the largest size within max_pixels {max_pixels:,}"
    return line


def scale_images(processor: ProcessorMixin, images: list[Image.Image], scale: float) -> dict[str, torch.Tensor]:
    """Pixels and grids of images with `scale` times the sides that the processor would give them, in whole tokens."""
    processed = []
    for image in images:
        image = _resize(processor, image, scale)
        area = image.width * image.height  # leaves it as it is
        size = {"shortest_edge": area, "longest_edge": area}
        processed.append(processor.image_processor([image], size=size, return_tensors="pt"))
    return {name: torch.cat([of_image[name] for of_image in processed]) for name in processed[0]}


def _resize(processor: ProcessorMixin, image: Image.Image, scale: float) -> Image.Image:
    px, limits = (
        processor.image_processor.patch_size * processor.image_processor.merge_size,
        processor.image_processor.size,
    )
    sides = smart_resize(image.height, image.width, px, limits["shortest_edge"], limits["longest_edge"])
    height, width = (max(1, round(side * scale / px)) * px for side in sides)
    return image.resize((width, height), Image.Resampling.BICUBIC)
