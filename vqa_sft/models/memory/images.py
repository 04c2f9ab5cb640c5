"""The images that a model is shown: their pixels and tokens, from its processor or from its published shape."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoProcessor, PreTrainedConfig, ProcessorMixin
from trl import ModelConfig

from vqa_sft.batch.image_rules import Setting, Sizes, area_tokens, sizes_of
from vqa_sft.batch.image_size import describe_images, largest_image, limit_pixels
from vqa_sft.config.training import RecipeArguments
from vqa_sft.models.load import LOADING_ERRORS

MAX_PIXELS = 12_845_056  # the processors' own limit, where a recipe sets none and the processor is not at hand
# What a configuration calls the sides of the square of patches that becomes one token.
_MERGES = ("spatial_merge_size", "pooling_kernel_size", "downsample_factor", "scale_factor")


@dataclass(frozen=True)
class Images:
    """Of the largest image: what the model is shown of it."""

    pixels: int  # width x height, of all tiles
    tokens: int
    areas: tuple[int, ...]  # pixels that images can be limited to; empty: any number of tokens


def patch_and_merge(config: PreTrainedConfig) -> tuple[int, int]:
    """A patch is so many pixels wide, and a token so many patches."""
    vision = config.vision_config
    patch_px = getattr(vision, "patch_size", 0) or getattr(config, "patch_size", 0) or 1
    if ratio := getattr(config, "downsample_ratio", None):  # InternVL
        merge = round(1 / ratio)
    else:
        found = [getattr(part, name, None) for name in _MERGES for part in (vision, config)]
        merge = next((value for value in found if isinstance(value, int)), 1)
    return max(patch_px) if isinstance(patch_px, list | tuple) else patch_px, merge


def read_images(model_args: ModelConfig, arguments: RecipeArguments, config: PreTrainedConfig) -> tuple[Images, str]:
    """The largest image that is shown with the recipe's limits, and a line about it: from the model's processor, where
    that is not on this machine as its published image processor would have it, or Qwen-VL's."""
    name, limits = model_args.model_name_or_path, (arguments.min_pixels, arguments.max_pixels)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=model_args.model_revision, local_files_only=True)
    except LOADING_ERRORS:
        return _from_shape(name, config, *limits)
    limit_pixels(processor, name, *limits)
    return see_images(processor), describe_images(processor, arguments.max_pixels)


def see_images(processor: ProcessorMixin) -> Images:
    """The images of a processor whose limits are set."""
    pixels, tokens = largest_image(processor)
    return Images(pixels, tokens, _areas(sizes_of(processor), pixels))


def _areas(sizes: Sizes | None, pixels: int) -> tuple[int, ...]:
    if sizes is None:
        return (pixels,)
    areas = sorted({setting.most for setting in sizes.choices})
    return tuple(areas) if len(areas) > 1 else ()


def _from_shape(name: str, config: PreTrainedConfig, low: int | None, high: int | None) -> tuple[Images, str]:
    token_px = math.prod(patch_and_merge(config))
    if config.model_type in _PUBLISHED:
        processor = _PUBLISHED[config.model_type](config)
        limit_pixels(processor, name, low, high)
        sizes: Any = sizes_of(processor)
        setting: Setting = sizes.now
        pixels, areas, label = setting.most, _areas(sizes, setting.most), setting.label
    else:
        pixels, areas, label = high or MAX_PIXELS, (), f"{token_px} px a token"
    tokens = area_tokens(pixels, token_px)
    if config.model_type == "mistral3":  # each row of them ends with one more
        tokens += math.isqrt(tokens)
    return Images(pixels, tokens, areas), f"images: at most {pixels:,} pixels, {tokens:,} tokens each ({label})"


def _tiles(config: PreTrainedConfig) -> Any:
    height, width = config.vision_config.image_size
    size = {"height": height, "width": width}
    return SimpleNamespace(image_processor=transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True))


def _edges(config: PreTrainedConfig) -> Any:
    size = {"longest_edge": config.vision_config.image_size}
    return SimpleNamespace(
        image_processor=transformers.PixtralImageProcessor(size=size),
        patch_size=config.vision_config.patch_size,
        spatial_merge_size=config.spatial_merge_size,
    )


def _budgets(config: PreTrainedConfig) -> Any:
    return SimpleNamespace(image_processor=transformers.Gemma4ImageProcessor())


# By model_type: what stands for the processor of a published shape, where images are not limited as Qwen-VL's are.
_PUBLISHED: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "internvl": _tiles,
    "mistral3": _edges,
    "gemma4": _budgets,
    "gemma4_unified": _budgets,
}
