"""Image augmentation in training; the collator seeds it by seed, epoch, row and place. No torch."""

import random

from PIL import Image, ImageEnhance

from vqa_sft.images import MAX_ASPECT


def augment(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """The image with each side, brightness, contrast and colour times a factor from [1 - strength, 1 + strength]."""
    width, height, *factors = (rng.uniform(1 - strength, 1 + strength) for _ in range(5))
    size = max(1, round(image.width * width)), max(1, round(image.height * height))
    if max(size) <= MAX_ASPECT * min(size):
        image = image.resize(size)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, factors, strict=True):
        image = enhancer(image).enhance(factor)
    return image
