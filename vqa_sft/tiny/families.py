"""The families that a tiny base may be of, and what is theirs: processor, configuration, where weights start, how fast
they learn.

Qwen3.5 has linear attention in three of four layers, Gemma 4 a window that is shorter than a row in two of three. Both
have about 2 M parameters and the vocabulary of the Qwen2.5-VL (build.py), as no tokenizer of their own is needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vqa_sft.tiny.build import CHAT_TEMPLATE, MAX_PIXELS, MIN_PIXELS, QWEN_IMAGE, build_config, build_processor
from vqa_sft.tiny.forward import GEMMA_PATCH_PX, GEMMA_POOLING, GEMMA_TOKENS, GRID, NUM_TOKENS

# Shares of the tasks (tasks.py) at the first step. The second has more answers in words: with the first, Gemma 4 knew
# no letters after 1,500 steps.
EARLY_SHARES = {"letter": 0.27, "variant": 0.15, "both": 0.13, "words": 0.25, "reading": 0.20}
WORDS_FIRST = {"letter": 0.10, "variant": 0.05, "both": 0.15, "words": 0.45, "reading": 0.25}
INITIAL_STD, PLACE_STD = 0.05, 0.3
QWEN_PICTURE = "<|image_pad|>" * NUM_TOKENS
GEMMA_TOKENS_BY_NAME = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
GEMMA_TOKENS_BY_NAME |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
TEXT: dict[str, object] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
TEXT |= {"max_position_embeddings": 4096, "initializer_range": INITIAL_STD, "bos_token_id": None}


@dataclass(frozen=True)
class Family:
    build_processor: Callable[[PreTrainedTokenizerBase], ProcessorMixin]
    build_config: Callable[[PreTrainedTokenizerBase], PreTrainedConfig]
    picture: str  # what the processor writes for a picture
    start: Callable[[PreTrainedModel], None] = lambda model: None  # mends weights that are a poor start
    learning_rate: float = 4e-4
    patch_rate: float = 0.2  # times the learning rate: that of the patch embedding
    early_shares: Mapping[str, float] = field(default_factory=lambda: WORDS_FIRST)


def build_model(family: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """The model with random weights, in float32."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(FAMILIES[family].build_config(tokenizer))
    with torch.no_grad():
        FAMILIES[family].start(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def text_config(tokenizer: PreTrainedTokenizerBase, **own: object) -> dict:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return TEXT | {"vocab_size": len(tokenizer)} | ids | own


# ---- Qwen3.5


def qwen3_5_processor(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLProcessor:
    """Patches of 14 px as in Qwen2.5-VL, so that a picture is nine tokens here too."""
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size, patch_size=14),
        chat_template=CHAT_TEMPLATE,
    )


def qwen3_5_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3_5Config:
    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = text_config(
        tokenizer,
        intermediate_size=192,
        num_hidden_layers=8,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        rope_parameters=rope | {"partial_rotary_factor": 0.5},
        tie_word_embeddings=True,
    )
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_heads": 3,
        "patch_size": 14,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": GRID**2,
        "initializer_range": INITIAL_STD,
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def start_qwen3_5(model: PreTrainedModel) -> None:
    """The library starts with states that forget within a token; here the heads remember 2 to 256 tokens. And it starts
    with places that are too faint beside white paper."""
    model.model.visual.patch_embed.proj.weight.mul_(0.3)
    torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=PLACE_STD)
    for layer in model.model.language_model.layers:
        if hasattr(layer, "linear_attn"):
            attention = layer.linear_attn
            attention.conv1d.reset_parameters()
            rates = 0.5 ** torch.linspace(1, 8, attention.num_v_heads)
            attention.A_log.zero_()
            attention.dt_bias.copy_(rates.expm1().log())  # softplus of it is the rate


# ---- Gemma 4


def gemma4_processor(tokenizer: PreTrainedTokenizerBase) -> Gemma4Processor:
    """The smallest budget that there is, 70 tokens: a square picture of any size becomes 96 x 96 px = 64 tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": [*GEMMA_TOKENS_BY_NAME.values(), "<|video|>"]})
    tokenizer._set_model_specific_special_tokens(special_tokens=GEMMA_TOKENS_BY_NAME)
    images = {"patch_size": GEMMA_PATCH_PX, "pooling_kernel_size": GEMMA_POOLING, "max_soft_tokens": 70}
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**images),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(**images),
        chat_template=CHAT_TEMPLATE.replace(QWEN_IMAGE, "<|image|>"),
        image_seq_length=GEMMA_TOKENS,
    )


def gemma4_config(tokenizer: PreTrainedTokenizerBase) -> Gemma4Config:
    """As the dense ones: no embeddings of each layer, no audio, pictures that see themselves in both directions."""
    token_id = tokenizer.convert_tokens_to_ids
    text = text_config(
        tokenizer,
        intermediate_size=384,
        num_hidden_layers=6,
        layer_types=[*["sliding_attention"] * 2, "full_attention"] * 2,
        sliding_window=32,
        global_head_dim=64,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=len(tokenizer),
        use_bidirectional_attention="vision",
    )
    vision = {
        "num_hidden_layers": 4,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "patch_size": GEMMA_PATCH_PX,
        "pooling_kernel_size": GEMMA_POOLING,
        "position_embedding_size": 140,  # patches on the long side of the flattest picture
        "initializer_range": INITIAL_STD,
    }
    return Gemma4Config(
        text_config=text,
        vision_config=vision,
        initializer_range=INITIAL_STD,
        boi_token_id=token_id("<|image>"),
        eoi_token_id=token_id("<image|>"),
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        boa_token_id=token_id("<|audio>"),
        eoa_token_index=token_id("<audio|>"),
        audio_token_id=token_id("<|audio|>"),
    )


def start_gemma4(model: PreTrainedModel) -> None:
    """Attention of Gemma 4 divides by nothing: with the library's start it is all but certain. Places start equal."""
    for module in model.modules():
        if hasattr(module, "q_norm"):
            module.q_norm.weight.fill_(module.head_dim**-0.5)
    torch.nn.init.normal_(model.model.vision_tower.patch_embedder.position_embedding_table, std=PLACE_STD)


FAMILIES = {
    "qwen2_5_vl": Family(
        build_processor, build_config, QWEN_PICTURE, learning_rate=1e-3, patch_rate=1.0, early_shares=EARLY_SHARES
    ),
    "qwen3_5": Family(qwen3_5_processor, qwen3_5_config, QWEN_PICTURE, start_qwen3_5),
    "gemma4": Family(gemma4_processor, gemma4_config, f"<|image>{'<|image|>' * GEMMA_TOKENS}<image|>", start_gemma4),
}
