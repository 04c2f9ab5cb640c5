"""What a model family needs beyond what transformers gives every model: one row a family, by its `model_type`.

A model without a row trains and predicts too: its language model, vision tower and merger are found in the model itself
(parts.py), its pixel limits in its processor (batch/pixels.py). A row adds rows without padding, the fast vision tower,
features on disk, several image scales, fused adapters, compiled layers and the memory estimate.

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

from vqa_sft.models.fast import tower_inputs


@dataclass(frozen=True)
class Family:
    label: str  # in messages
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]  # its `get_rope_index` gives the positions of a prompt with images
    # (vision_config, grid (images, 3)) -> arguments of the tower's forward
    tower_inputs: Callable[[PreTrainedConfig, torch.Tensor], dict[str, Any]]
    tower_mlp: tuple[str, ...]  # linear layers of the MLP of a tower's block; the last one takes what the others give
    rope: dict[str, Any]  # of the published shapes (shapes.py)
    tower: str = "model.visual"


FAMILIES = {
    "qwen2_5_vl": Family(
        label="Qwen2.5-VL",
        config_class=Qwen2_5_VLConfig,
        model_class=Qwen2_5_VLModel,
        tower_inputs=tower_inputs.qwen2_5_vl,
        tower_mlp=("gate_proj", "up_proj", "down_proj"),
        rope={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    ),
    "qwen3_vl": Family(
        label="Qwen3-VL",
        config_class=Qwen3VLConfig,
        model_class=Qwen3VLModel,
        tower_inputs=tower_inputs.qwen3_vl,
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
