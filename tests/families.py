"""Tiny models with random weights, one of each family, saved as folders that load as any Hub model does.

A builder takes the tokenizer and gives model and processor. `@tiny(image)` says what an image is in the chat template
that the processor gets, so that a test can write the prompt by itself.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from vqa_sft.tiny.build import CHAT_TEMPLATE, build_config, build_processor, build_tokenizer

# The families that tests of one part of the road go through.
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "smolvlm")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
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
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_TOWER = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
LINEAR_ATTENTION |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
PIXELS = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}  # of an image, for processors that count them
Built = tuple[PreTrainedModel, ProcessorMixin]


@dataclass(frozen=True)
class Tiny:
    build: Callable[[PreTrainedTokenizerBase], Built]
    image: str  # of a prompt
    is_plain: bool = False  # PLAIN_TEMPLATE, else turns between <|im_start|> and <|im_end|>

    @property
    def template(self) -> str:
        return PLAIN_TEMPLATE if self.is_plain else CHAT_TEMPLATE.replace(QWEN_IMAGE, self.image)


TINY: dict[str, Tiny] = {}


def tiny(image: str, is_plain: bool = False) -> Callable:
    def register(build: Callable[[PreTrainedTokenizerBase], Built]) -> Callable:
        TINY[build.__name__] = Tiny(build, image, is_plain)
        return build

    return register


def save_family(family: str, folder: Path, seed: int = 0) -> Path:
    """Build the family with random weights under `folder` and return the folder."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(["Which digit is this? A. one\nB. two\nC. three\nAnswer the question."] * 4)
    model, processor = TINY[family].build(tokenizer)
    processor.chat_template = TINY[family].template
    # Random weights answer with nearly equal logits; larger ones make every difference visible.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def skeleton(folder: str) -> PreTrainedModel:
    """The model of a folder without its weights."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def add_tokens(tokenizer: PreTrainedTokenizerBase, *tokens: str, **named: str) -> Callable[[str], int]:
    """Add control tokens, some of them under names that a processor asks for; returns what gives a token's id."""
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    tokenizer._set_model_specific_special_tokens(special_tokens=named)
    return tokenizer.convert_tokens_to_ids


def model_of(model_type: str, tokenizer: PreTrainedTokenizerBase, text: dict, vision: dict, **own: Any) -> Any:
    """A model from the configuration of its parts; TEXT, the vocabulary and the padding are added."""
    text = TEXT | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | text
    # A configuration writes into what it is given.
    config = AutoConfig.for_model(model_type, **copy.deepcopy({"text_config": text, "vision_config": vision}), **own)
    return AutoModelForImageTextToText.from_config(config)


@tiny(QWEN_IMAGE)
def qwen2_5_vl(tokenizer) -> Built:
    config = build_config(tokenizer)
    config.text_config.update({**TEXT, "rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}})
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.update({"depth": 2, "hidden_size": 32, "intermediate_size": 52, "num_heads": 2})
    config.vision_config.update({"out_hidden_size": 32, "fullatt_block_indexes": [1]})
    config.tie_word_embeddings = False
    return Qwen2_5_VLForConditionalGeneration(config), build_processor(tokenizer)


@tiny(QWEN_IMAGE)
def qwen2_vl(tokenizer) -> Built:
    text = {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    processor = qwen_processor("Qwen2VL", tokenizer, patch_size=14)
    return model_of("qwen2_vl", tokenizer, text, vision, **qwen_ids(tokenizer)), processor


@tiny(QWEN_IMAGE)
def qwen3_vl(tokenizer) -> Built:
    return qwen3("qwen3_vl", tokenizer, {"num_hidden_layers": 3}, deepstack_visual_indexes=[0, 1])


@tiny(QWEN_IMAGE)
def qwen3_vl_moe(tokenizer) -> Built:
    # The checkpoint has them as (E, in, out), the model as (E, out, in); of square ones nobody could tell.
    text = {"num_hidden_layers": 3} | EXPERTS | {"moe_intermediate_size": 48}
    return qwen3("qwen3_vl_moe", tokenizer, text, deepstack_visual_indexes=[0, 1])


@tiny(QWEN_IMAGE)
def qwen3_5(tokenizer) -> Built:
    return qwen3("qwen3_5", tokenizer, LINEAR_ATTENTION | {"head_dim": 16, "rope_parameters": HALF_ROPE})


@tiny(QWEN_IMAGE)
def qwen3_5_moe(tokenizer) -> Built:
    text = LINEAR_ATTENTION | EXPERTS | {"shared_expert_intermediate_size": 16, "head_dim": 16}
    return qwen3("qwen3_5_moe", tokenizer, text | {"rope_parameters": HALF_ROPE})


HALF_ROPE = MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 0.5}


def qwen3(model_type: str, tokenizer: PreTrainedTokenizerBase, text: dict, **vision: Any) -> Built:
    text = {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}} | text
    vision = QWEN_TOWER | {"num_position_embeddings": 64} | vision
    model = model_of(model_type, tokenizer, text, vision, **qwen_ids(tokenizer))
    return model, qwen_processor("Qwen3VL", tokenizer, patch_size=16)


def qwen_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def qwen_processor(name: str, tokenizer: PreTrainedTokenizerBase, **own: Any) -> ProcessorMixin:
    """A processor that takes its images as Qwen-VL does: `name` is that of its class and of its videos'."""
    video = getattr(transformers, f"{name}VideoProcessor", transformers.Qwen2VLVideoProcessor)
    return getattr(transformers, f"{name}Processor")(
        image_processor=Qwen2VLImageProcessor(size=PIXELS, **own),
        tokenizer=tokenizer,
        video_processor=video(size=PIXELS),
    )


@tiny("<image>", is_plain=True)
def llava(tokenizer) -> Built:
    ids = add_tokens(tokenizer, "<image>")
    vision = TOWER | {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    own = {"image_token_id": ids("<image>"), "vision_feature_layer": -2}
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model_of("llava", tokenizer, {"model_type": "llama"}, vision, **own), processor


@tiny("<image>", is_plain=True)
def smolvlm(tokenizer) -> Built:
    ids = add_tokens(tokenizer, "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>")
    own = {"image_token_id": ids("<image>"), "scale_factor": 2, "pad_token_id": tokenizer.pad_token_id}
    vision = TOWER | {"image_size": 64, "patch_size": 16}
    edges = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}}
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**edges, do_image_splitting=False),
        tokenizer=tokenizer,
        video_processor=transformers.SmolVLMVideoProcessor(**edges),
        image_seq_len=4,
    )
    return model_of("smolvlm", tokenizer, {"model_type": "llama"}, vision, **own), processor


import more_families  # noqa: E402, F401  registers the others

# What tests/models/test_families.py goes through; the quick ones are those that are most unlike each other.
QUICK = ("qwen2_5_vl", "qwen3_vl", "qwen3_5_moe + experts", "gemma4", "internvl", "smolvlm", "lfm2_vl", "glm4v")
ROADS = (*TINY, *(f"{name} + experts" for name in ("qwen3_vl_moe", "qwen3_5_moe", "gemma4_moe", "glm4v_moe")))
