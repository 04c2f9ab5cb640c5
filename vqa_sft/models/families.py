"""The one table of model families, by their `model_type`: what no rule finds in the model or in its processor.

A model without a row trains and predicts too: its language model, vision tower, merger, routers and experts are found
in the model (parts.py, lora.py), its pixel limits in its processor (batch/image_size.py). A row names the family for
docs/models.md and messages. `packs_rows` says that its language model takes rows without padding: shared prefixes and
compiled layers come with it. `packed` adds the fast vision tower, features on disk and several image scales.

A new family is a row here and a tiny model in tests/families.py; `python tests/models_page.py` writes the page.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


@dataclass(frozen=True)
class Packed:
    """What rows without padding need of a family (fast/), and with them the memory estimate."""

    model_class: type[PreTrainedModel]  # its `get_rope_index` gives the positions of a prompt with images
    # (vision_config, grid (images, 3)) -> what the tower would compute of it on the GPU, as arguments of its forward
    tower_inputs: Callable[[PreTrainedConfig, torch.Tensor], dict[str, Any]]
    tower_mlp: tuple[str, ...]  # linear layers of the MLP of a tower's block; the last one takes what the others give
    tower: str = "model.visual"


@dataclass(frozen=True)
class Family:
    label: str  # in messages and in docs/models.md
    examples: tuple[str, ...]  # checkpoints on the Hub
    packed: Packed | None = None
    # Every layer attends to all earlier tokens, and positions count tokens.
    packs_rows: bool = False
    package: str | None = None  # that its processor needs, beside ours
    no_lora: tuple[str, ...] = ()  # names of linear layers that can have no adapter


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


PACKED = {
    "qwen2_5_vl": Packed(
        model_class=Qwen2_5_VLModel,
        tower_inputs=_qwen2_5_vl_tower,
        tower_mlp=("gate_proj", "up_proj", "down_proj"),
    ),
    "qwen3_vl": Packed(
        model_class=Qwen3VLModel,
        tower_inputs=_qwen3_vl_tower,
        tower_mlp=("linear_fc1", "linear_fc2"),
    ),
}
PACKED["qwen3_vl_moe"] = replace(PACKED["qwen3_vl"], model_class=Qwen3VLMoeModel)
PACKED["qwen3_5"] = replace(PACKED["qwen3_vl"], model_class=Qwen3_5Model)
PACKED["qwen3_5_moe"] = replace(PACKED["qwen3_vl"], model_class=Qwen3_5MoeModel)
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", ("Qwen/Qwen2-VL-7B-Instruct",)),
    "qwen2_5_vl": Family("Qwen2.5-VL", ("Qwen/Qwen2.5-VL-7B-Instruct",), PACKED["qwen2_5_vl"]),
    "qwen3_vl": Family("Qwen3-VL", ("Qwen/Qwen3-VL-8B-Instruct",), PACKED["qwen3_vl"]),
    "qwen3_vl_moe": Family("Qwen3-VL MoE", ("Qwen/Qwen3-VL-30B-A3B-Instruct",), PACKED["qwen3_vl_moe"]),
    "qwen3_5": Family("Qwen3.5", ("Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-27B"), PACKED["qwen3_5"]),
    "qwen3_5_moe": Family("Qwen3.5 MoE", ("Qwen/Qwen3.5-35B-A3B",), PACKED["qwen3_5_moe"]),
    "qwen4_exp": Family("Qwen4-Exp", ("Qwen/Qwen4-Exp",)),
    "gemma3": Family("Gemma 3", ("google/gemma-3-4b-it",)),
    "gemma4": Family("Gemma 4", ("google/gemma-4-E4B-it", "google/gemma-4-26B-A4B-it", "google/gemma-4-31B-it")),
    "gemma4_unified": Family("Gemma 4 12B", ("google/gemma-4-12B-it",)),
    "internvl": Family("InternVL3, 3.5", ("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3_5-8B-HF"), packs_rows=True),
    "mistral3": Family(
        "Mistral Small 3.1, Ministral 3",
        ("mistralai/Ministral-3-8B-Instruct-2512-BF16", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
        packs_rows=True,
    ),
    "glm4v": Family("GLM-4.1V, 4.6V-Flash", ("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.6V-Flash")),
    # PEFT 0.21 takes them for experts as transformers 4 had them, and adapts the routed ones in their place.
    "glm4v_moe": Family("GLM-4.5V", ("zai-org/GLM-4.5V",), no_lora=("gate_proj", "up_proj", "down_proj")),
    "glm46v": Family("GLM-4.6V", ()),
    "lfm2_vl": Family("LFM2-VL", ("LiquidAI/LFM2-VL-1.6B",)),
    "lfm3_vl": Family("LFM3-VL", ("LiquidAI/LFM3-VL-2B",)),
    "smolvlm": Family("SmolVLM", ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",), package="num2words", packs_rows=True),
    "idefics3": Family("Idefics3", ("HuggingFaceM4/Idefics3-8B-Llama3",), packs_rows=True),
    "llava": Family("LLaVA 1.5", ("llava-hf/llava-1.5-7b-hf",), packs_rows=True),
    "llava_next": Family("LLaVA-NeXT", ("llava-hf/llava-v1.6-mistral-7b-hf",), packs_rows=True),
    "llava_onevision": Family("LLaVA-OneVision", ("llava-hf/llava-onevision-qwen2-7b-ov-hf",), packs_rows=True),
    "minicpmv4_6": Family("MiniCPM-V 4.6", ("openbmb/MiniCPM-V-4.6",)),
    "minicpmv4_7": Family("MiniCPM-V 4.7", ("openbmb/MiniCPM-V-4.7-1B",)),
    "molmo2": Family("Molmo 2", ("allenai/Molmo2-8B",)),
    "kimi_k25": Family("Kimi K2.5, K2.6", ("moonshotai/Kimi-K2.6",)),
    "llama4": Family("Llama 4", ("meta-llama/Llama-4-Scout-17B-16E-Instruct",)),
    "cohere2_vision": Family("Command A Vision", ("CohereLabs/command-a-vision-07-2025",)),
    "exaone4_5": Family("EXAONE 4.5", ("LGAI-EXAONE/EXAONE-4.5-33B",)),
    "hyperclovax_vision_v2": Family("HyperCLOVAX-SEED Think", ("naver-hyperclovax/HyperCLOVAX-SEED-Think-32B",)),
}


def tower_of(model: PreTrainedModel) -> nn.Module:
    """The vision tower of a model whose family is packed."""
    return model.get_submodule(PACKED[model.config.model_type].tower)


def num_deepstack(config: PreTrainedConfig) -> int:
    """How many layers of the language model take image features beside its embeddings (Qwen3-VL)."""
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


def head_dim(text_config: PreTrainedConfig) -> int:
    """Width of an attention head of the language model."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
