"""Tiny checkpoints with the names of weights that the Hub's have, where transformers renames them when it loads.

Written here by hand and not by transformers' own way back, which would hide a mistake in both. RENAMED has, for each
family, regular expressions of a model's names and what stands in their place; CHANGED what it does to the weights.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

Weights = dict[str, torch.Tensor]
QWEN = {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."}
LLAVA = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.language_model\.": "language_model.model.",
    r"^model\.vision_tower\.": "vision_tower.",
    r"^model\.multi_modal_projector\.": "multi_modal_projector.",
    r"^model\.image_newline": "image_newline",
}
# The towers of CLIP and SigLIP had a part of their own within them.
WITHIN = {r"^model\.vision_tower\.": "vision_tower.vision_model."}
MOLMO_LAYERS = {
    r"(language_model.*)\.input_layernorm\.": r"\1.attn_norm.",
    r"(language_model.*)\.post_attention_layernorm\.": r"\1.ff_norm.",
    r"(language_model.*)\.self_attn\.o_proj": r"\1.self_attn.attn_out",
    r"(language_model.*)\.mlp\.down_proj": r"\1.mlp.ff_out",
    r"^model\.language_model\.layers\.": "model.transformer.blocks.",
    r"^model\.language_model\.norm\.": "model.transformer.ln_f.",
}
MOLMO_TOWER = {
    r"^model\.vision_tower\.layers\.": "model.vision_backbone.image_vit.transformer.resblocks.",
    r"^model\.vision_tower\.": "model.vision_backbone.image_vit.",
    r"(resblocks.*)\.self_attn\.([qkvo])_proj": r"\1.attention.w\2",
    r"(resblocks.*)\.mlp\.fc([12])": r"\1.feed_forward.w\2",
    r"(resblocks.*)\.layer_norm1": r"\1.attention_norm",
    r"(resblocks.*)\.layer_norm2": r"\1.ffn_norm",
    r"image_projector\.gate_proj": "image_projector.w1",
    r"image_projector\.down_proj": "image_projector.w2",
    r"image_projector\.up_proj": "image_projector.w3",
    r"image_pooling_2d\.([qkvo])_proj": r"image_pooling_2d.w\1",
    r"^model\.multi_modal_projector\.": "model.vision_backbone.",
}
KIMI = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.language_model\.": "language_model.model.",
    r"patch_embed\.pos_emb\.position_embeddings": "patch_embed.pos_emb.weight",
    r"^model\.vision_tower\.patch_embed\.": "vision_tower.patch_embed.",
    r"^model\.vision_tower\.layers\.": "vision_tower.encoder.blocks.",
    r"^model\.vision_tower\.": "vision_tower.encoder.",
    r"(blocks.*)\.attn\.proj": r"\1.wo",
    r"(blocks.*)\.norm1": r"\1.norm0",
    r"(blocks.*)\.norm2": r"\1.norm1",
    r"(blocks.*)\.mlp\.fc1": r"\1.mlp.fc0",
    r"(blocks.*)\.mlp\.fc2": r"\1.mlp.fc1",
    r"^model\.mm_projector\.in_proj": "mm_projector.proj.0",
    r"^model\.mm_projector\.out_proj": "mm_projector.proj.2",
}
RENAMED: dict[str, dict[str, str]] = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "llava": LLAVA | WITHIN,
    "llava_next": LLAVA | WITHIN,
    "llava_onevision": LLAVA | WITHIN,
    "gemma3": LLAVA | WITHIN,
    "internvl": LLAVA,
    "mistral3": LLAVA,
    "lfm2_vl": {r"^model\.vision_tower\.": "model.vision_tower.vision_model."},
    "cohere2_vision": {r"^model\.vision_tower\.": "model.vision_tower.vision_model."},
    "gemma4_unified": {
        r"embed_vision\.(patch_ln1|patch_ln2|patch_dense|pos_embedding|pos_norm)": r"vision_embedder.\1",
        r"embed_vision\.multimodal_embedder\.": "embed_vision.",
    },
    "lfm3_vl": {
        r"(language_model.*)\.self_attn\.g_proj\.": r"\1.self_attn.gate_proj.",
        r"(vision_tower.*)\.patch_embed\.": r"\1.patchifier.",
        r"(vision_tower.*\.[qk])_norm": r"\1_layernorm",
    },
    "hyperclovax_vision_v2": {
        r"^lm_head\.": "model.language_model.lm_head.",
        r"^model\.language_model\.(?!lm_head)": "model.language_model.model.",
        r"^model\.projector\.": "model.vision_projector.",
    },
    "qwen3_vl_moe": {},
    "qwen3_5_moe": {},
    "glm4v_moe": {},
    "qwen4_exp": {},
    "kimi_k25": KIMI,
    "molmo2": MOLMO_LAYERS | MOLMO_TOWER,
}


def experts_apart(weights: Weights, config: dict) -> Weights:
    """One linear layer of each expert, in the place of (E, gate and up, in) and (E, out, in)."""
    apart = {}
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        if not path.endswith(".experts"):
            apart[name] = weight
            continue
        for number, expert in enumerate(weight):
            parts = zip(("gate", "up"), expert.chunk(2), strict=True) if kind == "gate_up_proj" else [("down", expert)]
            apart |= {f"{path}.{number}.{part}_proj.weight": value for part, value in parts}
    return apart


def experts_turned(weights: Weights, config: dict) -> Weights:
    """(E, in, out)."""
    return {name: weight.mT if ".experts." in name else weight for name, weight in weights.items()}


def shards_of_ngrams(weights: Weights, config: dict) -> Weights:
    weights = experts_apart(weights, config)
    for name in [name for name in weights if name.endswith("ngram_embedding.weight")]:
        path, shards = name.removesuffix(".weight"), weights.pop(name).chunk(2)
        weights |= {f"{path}.shard_{number}.weight": shard for number, shard in enumerate(shards)}
    return weights


def fused_kimi(weights: Weights, config: dict) -> Weights:
    """The tower's q, k and v in one, q and k as (a0, b0, a1, b1, ...) of a head's halves a and b."""
    weights = experts_apart(weights, config)
    heads = config["vision_config"]["num_attention_heads"]
    for name in [name for name in weights if ".attn.q_proj." in name]:
        q, k, v = (weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv")
        q, k = (part.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) for part in (q, k))
        weights[name.replace("attn.q_proj", "wqkv")] = torch.cat([q, k, v])
    return weights


def fused_molmo(weights: Weights, config: dict) -> Weights:
    """Q, k and v in one, up and gate in one, and the tokens that were added apart from the others."""
    layers = "model.language_model.layers."
    for name in [name for name in weights if name.startswith(layers) and name.endswith(".q_proj.weight")]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj", "att_proj")] = torch.cat(parts)
    for name in [name for name in weights if name.startswith(layers) and name.endswith(".up_proj.weight")]:
        parts = [weights.pop(name), weights.pop(name.replace("up_proj", "gate_proj"))]
        weights[name.replace("up_proj", "ff_proj")] = torch.cat(parts)
    tokens = weights.pop("model.language_model.embed_tokens.weight")
    old, new = tokens.split([len(tokens) - 8, 8])
    return weights | {"model.transformer.wte.embedding": old, "model.transformer.wte.new_embedding": new}


CHANGED: dict[str, Callable[[Weights, dict], Weights]] = {
    "qwen3_vl_moe": experts_turned,
    "qwen3_5_moe": experts_apart,
    "glm4v_moe": experts_apart,
    "qwen4_exp": shards_of_ngrams,
    "kimi_k25": fused_kimi,
    "molmo2": fused_molmo,
}


def save_layouts(family: str, base: str, folder: Path) -> tuple[str, str]:
    """The base with the names of its modules, and with those that the Hub's checkpoints have."""
    new, old = (Path(shutil.copytree(base, folder / name)) for name in ("new", "old"))
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(new, save_original_format=False)
    weights = load_file(new / "model.safetensors")
    names = {*weights}
    if family in CHANGED:
        weights = CHANGED[family](weights, json.loads((new / "config.json").read_text()))
    weights = {_old_name(name, RENAMED[family]): weight.contiguous() for name, weight in weights.items()}
    assert family == "qwen3_vl_moe" or names != {*weights}
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    return str(new), str(old)


def _old_name(name: str, renamed: dict[str, str]) -> str:
    for pattern, old in renamed.items():
        name = re.sub(pattern, old, name)
    return name
