"""What a model family needs beyond what transformers gives every model: one row a family, by its `model_type`.

A model without a row trains and predicts too: its language model, vision tower and merger are found in the model itself
(parts.py), its pixel limits in its processor (batch/image_size.py). A row adds rows without padding, the fast vision
tower, features on disk, several image scales, fused adapters, compiled layers and the memory estimate.

A new family is a row here and a tiny model in tests/families.py: the tests of fast/ and memory/ run for every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


@dataclass(frozen=True)
class Family:
    label: str  # in messages
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]  # its `get_rope_index` gives the positions of a prompt with images
    # (vision_config, grid (images, 3)) -> what the tower would compute of it on the GPU, as arguments of its forward
    tower_inputs: Callable[[PreTrainedConfig, torch.Tensor], dict[str, Any]]
    tower_mlp: tuple[str, ...]  # linear layers of the MLP of a tower's block; the last one takes what the others give
    rope: dict[str, Any]  # of the published shapes (shapes.py)
    tower: str = "model.visual"


def round_up(length: int) -> int:
    """The next power of two: kernels take any number that is large enough, and compiled code is made for few."""
    return max(64, 1 << (length - 1).bit_length())


def _longest(cu_seqlens: torch.Tensor) -> int:
    return round_up(int(cu_seqlens.diff().max()))


def _qwen2_5_vl_tower(config: PreTrainedConfig, grid: torch.Tensor) -> dict[str, Any]:
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


def _qwen3_vl_tower(config: PreTrainedConfig, grid: torch.Tensor) -> dict[str, Any]:
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


FAMILIES = {
    "qwen2_5_vl": Family(
        label="Qwen2.5-VL",
        config_class=Qwen2_5_VLConfig,
        model_class=Qwen2_5_VLModel,
        tower_inputs=_qwen2_5_vl_tower,
        tower_mlp=("gate_proj", "up_proj", "down_proj"),
        rope={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    ),
    "qwen3_vl": Family(
        label="Qwen3-VL",
        config_class=Qwen3VLConfig,
        model_class=Qwen3VLModel,
        tower_inputs=_qwen3_vl_tower,
        tower_mlp=("linear_fc1", "linear_fc2"),
        rope={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    ),
}


def tower_of(model: PreTrainedModel) -> nn.Module:
    """The vision tower of a model whose family has a row."""
    return model.get_submodule(FAMILIES[model.config.model_type].tower)


def num_deepstack(config: PreTrainedConfig) -> int:
    """How many layers of the language model take image features beside its embeddings (Qwen3-VL)."""
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


def head_dim(text_config: PreTrainedConfig) -> int:
    """Width of an attention head of the language model."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
