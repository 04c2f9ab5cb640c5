"""The published shapes of the models our recipes name, for random weights and for counting without any."""

from transformers import PreTrainedConfig

from vqa_sft.models.families import PACKED

SHAPES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
        | {"intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        "qwen3_vl",
        {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
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


def shape_config(name: str, pad_token_id: int | None = None, **token_ids: int) -> PreTrainedConfig:
    """The configuration of `name` from its published shape."""
    model_type, text, vision = SHAPES[name]
    family = PACKED[model_type]
    return family.config_class(
        text_config=text | {"rope_parameters": family.rope, "pad_token_id": pad_token_id},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **token_ids,
    )
