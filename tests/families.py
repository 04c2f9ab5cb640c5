"""Tiny models with random weights, one of each family, saved as folders that load as any Hub model does."""

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from vqa_sft.tiny.build import CHAT_TEMPLATE, build_config, build_processor, build_tokenizer

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "smolvlm")
# As LLaVA-1.5 and SmolVLM write their turns: no separator after the colon, so that the answer is " A".
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{- message.role.capitalize() + ":" -}}
{%- for part in message.content -%}
{{- "<image>" if part.type == "image" else " " + part.text -}}
{%- endfor -%}
{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "Assistant:" -}}{%- endif -%}
"""
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False}


def save_family(family: str, folder: Path, seed: int = 0) -> Path:
    """Build the family with random weights under `folder` and return the folder."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(["Which digit is this? A. one\nB. two\nC. three\nAnswer the question."] * 4)
    model, processor = globals()[f"_{family}"](tokenizer)
    # Random weights answer with nearly equal logits; larger ones make every difference visible.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen2_5_vl(tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    config = build_config(tokenizer)
    config.text_config.update(
        {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    )
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.update({"depth": 2, "hidden_size": 32, "intermediate_size": 52, "num_heads": 2})
    config.vision_config.update({"out_hidden_size": 32, "fullatt_block_indexes": [1]})
    config.tie_word_embeddings = False
    return Qwen2_5_VLForConditionalGeneration(config), build_processor(tokenizer)


def _qwen3_vl(tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "head_dim": 8, "pad_token_id": tokenizer.pad_token_id, "num_hidden_layers": 3}
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            }
        },
        vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
        | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    size = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _llava(tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        text_config=TEXT
        | {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    size = {"height": 56, "width": 56}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def _smolvlm(tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    config = SmolVLMConfig(
        text_config=TEXT
        | {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 64, "patch_size": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    edges = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**edges, do_image_splitting=False),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**edges),
        image_seq_len=4,
        chat_template=PLAIN_TEMPLATE,
    )
    return SmolVLMForConditionalGeneration(config), processor
