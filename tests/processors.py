"""Processors of many families, built from their classes with a small tokenizer, in the sizes of published checkpoints.
Image processors need no weights."""

import functools
import json

import transformers
from transformers import ProcessorMixin, Qwen2Tokenizer

from vqa_sft.tiny.build import SPECIAL_TOKENS, build_tokenizer

# Placeholders and what surrounds them, by the name that processors ask a tokenizer for.
TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
    "image_thumbnail_token": "<thumbnail>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
    "img_line_break_token": "<line>",
}
OTHERS = ["[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
OTHERS += ["<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>"]
OTHERS += ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>"]
OTHERS += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
OTHERS += [f"<|img_row_{row}_col_{col}|>" for row in range(1, 11) for col in range(1, 11)]
TEMPLATE = """\
{%- for message in messages -%}
{%- for part in message.content -%}{{- "IMAGE" if part.type == "image" else part.text -}}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "\\nAnswer: " -}}{%- endif -%}
"""


def square(px: int) -> dict[str, int]:
    return {"height": px, "width": px}


# family -> processor, image processor, what the image processor is given, what the processor is given
FAMILIES = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", {}, {}),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor", {"patch_size": 16}, {}),
    "glm4v": ("Glm4vProcessor", "Glm4vImageProcessor", {}, {}),
    "glm46v": ("Glm46VProcessor", "Glm46VImageProcessor", {}, {}),
    "kimi_k25": ("Kimi_K25Processor", "Kimi_K25ImageProcessor", {}, {}),
    "gemma4": ("Gemma4Processor", "Gemma4ImageProcessor", {}, {"feature_extractor": "Gemma4AudioFeatureExtractor"}),
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessor", {"size": square(448)}, {}),
    "cohere2_vision": ("Cohere2VisionProcessor", "Cohere2VisionImageProcessor", {}, {}),
    "llama4": ("Llama4Processor", "Llama4ImageProcessor", {}, {}),
    "molmo2": ("Molmo2Processor", "Molmo2ImageProcessor", {}, {}),
    "llava_next": (
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": square(336)},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        {},
        {"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
    ),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessor", {}, {"image_seq_len": 169}),
    "smolvlm": (
        "SmolVLMProcessor",
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        {"image_seq_len": 64},
    ),
    "mistral3": (
        "PixtralProcessor",
        "PixtralImageProcessor",
        {"size": {"longest_edge": 1540}, "patch_size": square(14)},
        {"patch_size": 14, "spatial_merge_size": 2, "image_token": "<image>"},
    ),
    "minicpmv": ("MiniCPMV4_6Processor", "MiniCPMV4_6ImageProcessor", {}, {}),
    "lfm2_vl": ("Lfm2VlProcessor", "Lfm2VlImageProcessor", {}, {}),
    "llava": (
        "LlavaProcessor",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": square(336)},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessor", {"size": square(896)}, {"image_seq_length": 256}),
}


def build(family: str) -> ProcessorMixin:
    """The family's processor as its checkpoints have it."""
    name, image_processor, of_images, of_processor = FAMILIES[family]
    processor_class, tokenizer = getattr(transformers, name), _tokenizer()
    parts = {"image_processor": getattr(transformers, image_processor)(**of_images), "tokenizer": tokenizer}
    if "video_processor" in processor_class.get_attributes():
        video = {"Qwen2_5_VL": "Qwen2VL", "Kimi_K25": "Kimi_K25"}.get(name.removesuffix("Processor"))
        video = video or name.removesuffix("Processor")
        parts["video_processor"] = getattr(transformers, f"{video}VideoProcessor")()
    given = {
        key: getattr(transformers, value)() if key == "feature_extractor" else value
        for key, value in of_processor.items()
    }
    processor = processor_class(**parts | given, chat_template=TEMPLATE)
    token = getattr(processor, "image_token", "<image>")
    processor.chat_template = TEMPLATE.replace("IMAGE", token)
    return processor


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(build_tokenizer(["Which digit is this? Answer the question."] * 4).backend_tokenizer.to_str())
    return model["model"]["vocab"], [tuple(merge) for merge in model["model"]["merges"]]


def _tokenizer() -> Qwen2Tokenizer:
    vocab, merges = _vocabulary()
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=TOKENS
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *OTHERS]})
    return tokenizer
