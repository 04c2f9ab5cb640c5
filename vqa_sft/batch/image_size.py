"""How many pixels (width x height) of an image a processor shows, and images at another scale.

For processors that keep an image's shape and count its pixels, as those of Qwen-VL do.
"""

import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vqa_sft.errors import InputError


def limit_pixels(processor: ProcessorMixin, name: str, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the processor's limits. Raises InputError where the model `name` has none."""
    if min_pixels is None and max_pixels is None:
        return
    size = processor.image_processor.size
    # Qwen-VL keeps pixel counts under these two names, in this release of transformers.
    low, high = getattr(size, "shortest_edge", None), getattr(size, "longest_edge", None)
    if not hasattr(processor.image_processor, "merge_size") or low is None or high is None:
        raise InputError(f"{name} shows every image at a size of its own ({size}); remove min_pixels and max_pixels.")
    limits = {"shortest_edge": min_pixels or min(low, max_pixels), "longest_edge": max_pixels or max(high, min_pixels)}
    processor.image_processor.size = limits


def process_images(processor: ProcessorMixin, images: list[Image.Image], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Pixels and grids of images with `scale` times the sides that the processor would give them, in whole tokens."""
    process = processor.image_processor
    if scale == 1:
        return dict(process(images, return_tensors="pt"))
    processed = []
    for image in images:
        image = _resize(processor, image, scale)
        area = image.width * image.height  # leaves it as it is
        size = {"shortest_edge": area, "longest_edge": area}
        processed.append(process([image], size=size, return_tensors="pt"))
    return {name: torch.cat([of_image[name] for of_image in processed]) for name in processed[0]}


def _resize(processor: ProcessorMixin, image: Image.Image, scale: float) -> Image.Image:
    px, limits = (
        processor.image_processor.patch_size * processor.image_processor.merge_size,
        processor.image_processor.size,
    )
    sides = smart_resize(image.height, image.width, px, limits["shortest_edge"], limits["longest_edge"])
    height, width = (max(1, round(side * scale / px)) * px for side in sides)
    return image.resize((width, height), Image.Resampling.BICUBIC)
