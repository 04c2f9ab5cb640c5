"""The published shapes of the models our recipes name, for random weights and for counting without any.

A row holds what differs from the defaults of transformers' configuration of its `model_type`, as the config.json of the
Hub id has it, or a public copy of it, or its model card (read in November 2026). What no source says has the defaults:
the vision tower of Qwen3.5-35B-A3B but for its output, that of Gemma 4 E4B but for `use_clipped_linears`, its audio
tower, and the tower and `rope_parameters` of Ministral 3.
"""

from transformers import AutoConfig, PreTrainedConfig

# Towers that several models have.
_QWEN3_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
_QWEN3_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
_QWEN2_5 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_INTERNVIT_300M = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_INTERNVIT_300M |= {"attention_bias": True}
_QWEN3_8B = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
_QWEN3_8B |= {"head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False}
_QWEN3_4B = _QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728}
_GATED_DELTA = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128}
_GATED_DELTA |= {"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}
_QWEN3_5_9B = _GATED_DELTA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 16}
_QWEN3_5_9B |= {"num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 12288, "vocab_size": 248320}
_QWEN3_5_9B |= {"tie_word_embeddings": False}

# Hub id -> model_type, language model, vision tower, and what else the configuration has (Gemma 4 hears)
SHAPES: dict[str, tuple] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
        | {"intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True},
        _QWEN2_5 | {"out_hidden_size": 2048},
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
        _QWEN2_5 | {"out_hidden_size": 3584},
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (
        "qwen3_vl",
        {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "tie_word_embeddings": True},
        _QWEN3_SMALL | {"out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3_vl", _QWEN3_8B, _QWEN3_LARGE | {"out_hidden_size": 4096}),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (
        "qwen3_vl_moe",
        {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "tie_word_embeddings": False}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        _QWEN3_LARGE | {"out_hidden_size": 2048},
    ),
    "Qwen/Qwen3.5-4B": (
        "qwen3_5",
        _QWEN3_5_9B | {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True},
        _QWEN3_SMALL | {"out_hidden_size": 2560},
    ),
    "Qwen/Qwen3.5-9B": ("qwen3_5", _QWEN3_5_9B, _QWEN3_LARGE | {"out_hidden_size": 4096}),
    "Qwen/Qwen3.5-35B-A3B": (
        "qwen3_5_moe",
        _GATED_DELTA
        | {"hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2}
        | {"head_dim": 256, "vocab_size": 248320, "num_experts": 256, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False},
        {"out_hidden_size": 2048},
    ),
    "google/gemma-4-E4B-it": (
        "gemma4",
        {"hidden_size": 2560, "num_hidden_layers": 42, "num_attention_heads": 8, "num_key_value_heads": 2}
        | {"intermediate_size": 10240, "num_kv_shared_layers": 18, "hidden_size_per_layer_input": 256}
        | {"sliding_window": 512, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
        {"use_clipped_linears": True},
        {"audio_config": {}},
    ),
    # It has no tower: pixels are projected into the language model. Its layers with full attention have one key head.
    "google/gemma-4-12B-it": (
        "gemma4_unified",
        {"hidden_size": 3840, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"intermediate_size": 15360, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {"sliding_window": 1024, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
        {"mm_embed_dim": 3840, "output_proj_dims": 3840},
        {"audio_config": {}},
    ),
    "OpenGVLab/InternVL3_5-4B-HF": ("internvl", _QWEN3_4B | {"model_type": "qwen3"}, _INTERNVIT_300M),
    "OpenGVLab/InternVL3_5-8B-HF": ("internvl", _QWEN3_8B | {"model_type": "qwen3"}, _INTERNVIT_300M),
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": (
        "mistral3",
        {"hidden_size": 4096, "num_hidden_layers": 34, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128, "intermediate_size": 14336, "vocab_size": 131072, "tie_word_embeddings": False}
        | {"model_type": "ministral3"},
        {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"intermediate_size": 4096, "patch_size": 14, "image_size": 1540},
    ),
    # For a CPU.
    "tiny": (
        "qwen2_5_vl",
        {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
        | {"intermediate_size": 128, "vocab_size": 2000, "tie_word_embeddings": True},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 52, "num_heads": 2, "out_hidden_size": 128}
        | {"fullatt_block_indexes": [1]},
    ),
}

# Where the defaults of the model_type are others; the sections are those of Qwen's 3-D positions.
_MROPE = {"rope_type": "default", "mrope_interleaved": True}
_QWEN3_VL = _MROPE | {"rope_theta": 5e6, "mrope_section": [24, 20, 20]}
_QWEN3_5 = _MROPE | {"rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
_ROPE = {
    "qwen2_5_vl": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "internvl": {"rope_type": "default", "rope_theta": 1e6},
}


def shape_config(name: str, pad_token_id: int | None = None, **token_ids: int) -> PreTrainedConfig:
    """The configuration of `name` from its published shape."""
    model_type, text, vision, *others = SHAPES[name]
    text = text | {"pad_token_id": pad_token_id}
    if model_type in _ROPE:
        text["rope_parameters"] = _ROPE[model_type]
    return AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **(others[0] if others else {}),
        **token_ids,
    )
