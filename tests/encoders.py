"""Tiny image encoders with random weights, saved as folders that load as any Hub model does."""

from pathlib import Path

import torch
import transformers
from transformers import CLIPImageProcessor

from vqa_sft.tiny.build import build_tokenizer

_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGES = {"image_size": 32, "patch_size": 8}
_PROCESSOR = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}


def _pair(name: str, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    text = _LAYERS | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    own = {"projection_dim": 16} if name == "CLIP" else {}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=_LAYERS | _IMAGES, **own)
    return getattr(transformers, f"{name}Model")(config)


def save_encoder(kind: str, folder: Path, seed: int = 0) -> Path:
    """`kind` is CLIP, Siglip, Dinov2, DINOv3ViT, ConvNext or ViT; returns the folder."""
    torch.manual_seed(seed)
    if kind in ("CLIP", "Siglip"):
        tokenizer = build_tokenizer(["a photo of a 0. one two three four five six seven eight nine"] * 4)
        model = _pair(kind, tokenizer)
        tokenizer.save_pretrained(folder)
    elif kind == "ConvNext":
        config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32)
        model = transformers.ConvNextModel(config)
    elif kind == "ViT":  # as many checkpoints on the Hub: a classifier, whose encoder has no pooling layer
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**_LAYERS, **_IMAGES))
    else:
        config = getattr(transformers, f"{kind}Config")(**_LAYERS, **_IMAGES)
        model = getattr(transformers, f"{kind}Model")(config)
    model.save_pretrained(folder)
    CLIPImageProcessor(**_PROCESSOR).save_pretrained(folder)
    return folder
