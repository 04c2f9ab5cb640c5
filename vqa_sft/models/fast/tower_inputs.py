"""What a vision tower would compute on the GPU from the grids (images, 3), by the library's own functions.

The names are those of arguments of the tower's forward, without their "image_".
"""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


def round_up(length: int) -> int:
    """The next power of two: kernels take any number that is large enough, and compiled code is made for few."""
    return max(64, 1 << (length - 1).bit_length())


def _longest(cu_seqlens: torch.Tensor) -> int:
    return round_up(int(cu_seqlens.diff().max()))


def qwen2_5_vl(config: PreTrainedConfig, grid: torch.Tensor) -> dict[str, Any]:
    cu_seqlens = get_vision_cu_seqlens(grid)
    window_index, cu_window_seqlens = get_vision_window_index(
        grid, config.spatial_merge_size, config.window_size, config.patch_size
    )
    return {
        "position_ids": get_vision_position_ids(grid, config.spatial_merge_size),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": _longest(cu_seqlens),
        "window_index": window_index,
        "cu_window_seqlens": cu_window_seqlens,
        "max_window_seqlen": _longest(cu_window_seqlens),
    }


def qwen3_vl(config: PreTrainedConfig, grid: torch.Tensor) -> dict[str, Any]:
    cu_seqlens = get_vision_cu_seqlens(grid)
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=int(config.num_position_embeddings**0.5),
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=config.spatial_merge_size,
    )
    return {
        "interp_indices": indices,
        "interp_weights": weights,
        "position_ids": get_vision_position_ids(grid, config.spatial_merge_size),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": _longest(cu_seqlens),
    }
