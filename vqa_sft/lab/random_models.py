"""Models of published shapes with random weights, as folders that load as the real ones do but hold no weights, and
images and questions for them.

A folder has a configuration, a processor of the family's own classes with their published settings, and the tiny base's
vocabulary. `draw_weights()` lets this process load it: transformers draws every weight where the device map puts it, as
it does for a weight that a checkpoint does not have. 61 GB of a mixture of experts need no disk and no memory of the
CPU, and take seconds.
"""

import csv
import random
import shutil
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    modeling_utils,
)

from vqa_sft.models.shapes import SHAPES, shape_config
from vqa_sft.tiny import TINY_PATH

WORDS = ["which", "of", "these", "is", "the", "colour", "shape", "digit", "place", "left", "right", "larger", "picture"]
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# model_type -> names by which a processor asks its tokenizer, or the configuration, for a token
_GEMMA = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_GEMMA |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
_INTERNVL = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_INTERNVL |= {"video_token": "<video>"}
_TOKENS = {"gemma4": _GEMMA, "gemma4_unified": _GEMMA, "internvl": _INTERNVL, "mistral3": {"image_token": "[IMG]"}}
# What `small_shape` makes of the numbers of a shape; head widths stay, for the sections of the positions fit them.
_SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
_SMALL |= {"vocab_size": 2000, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SMALL |= {"shared_expert_intermediate_size": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
_SMALL |= {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 6}
_SMALL_TOWER = {"depth": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
_SMALL_TOWER |= {"num_attention_heads": 2, "out_hidden_size": 128, "mm_embed_dim": 128, "output_proj_dims": 128}
_SMALL_TILE = 112  # px
_NUM_LAYERS = {
    "gemma4": 12,
    "gemma4_unified": 6,
}  # five with a window and one without; else three and one, or all alike


def small_shape(name: str) -> str:
    """The name of a small model with the keys of `name`, for a CPU; SHAPES has it from now on."""
    model_type, text, vision, *others = SHAPES[name]
    text = text | {key: value for key, value in _SMALL.items() if key in text} | {"vocab_size": 2000}
    text["num_hidden_layers"] = _NUM_LAYERS.get(model_type, 4)
    given = {"depth", "num_heads"} if model_type.startswith("qwen") else {"num_hidden_layers", "num_attention_heads"}
    given |= {"hidden_size", "intermediate_size"} | vision.keys()
    if model_type == "qwen2_5_vl":
        text["num_attention_heads"] = 1  # of 128, which is nowhere said
    elif model_type == "gemma4":
        text["vocab_size_per_layer_input"] = 2000
        vision = vision | {"num_key_value_heads": 2, "head_dim": 16}
        others = [{"audio_config": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}}]
    elif model_type == "gemma4_unified":
        given = vision.keys()
    elif model_type == "internvl":
        vision = vision | {"image_size": [_SMALL_TILE, _SMALL_TILE]}
    vision = vision | {key: value for key, value in _SMALL_TOWER.items() if key in given}
    if model_type.startswith("qwen3_vl"):
        vision["deepstack_visual_indexes"] = [0, 1]
    SHAPES[f"small {name}"] = (model_type, text, vision, *others)
    return f"small {name}"


# --- Folders ----------------------------------------------------------------------------------------------------------


def save_random_model(name: str, folder: Path) -> Path:
    """The configuration and the processor of `name`, without weights."""
    if (folder / "name").is_file() and (folder / "name").read_text() == name:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    processor = build_processor(SHAPES[name][0], is_small=name.startswith("small "))
    tokenizer = processor.tokenizer
    config = shape_config(name, pad_token_id=tokenizer.pad_token_id, **_token_ids(processor, SHAPES[name][0]))
    config.get_text_config().update({"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id})
    config.dtype = torch.bfloat16
    config.architectures = [AutoModelForImageTextToText._model_mapping[type(config)].__name__]
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "name").write_text(name)
    return folder


def build_processor(model_type: str, *, is_small: bool = False) -> ProcessorMixin:
    """A processor of the family's classes with the settings that its published checkpoints have, or for `small_shape`
    with fewer tokens an image."""
    tiny = AutoProcessor.from_pretrained(TINY_PATH)
    tokenizer, image = tiny.tokenizer, _QWEN_IMAGE
    named = _TOKENS.get(model_type, {})
    tokenizer.add_special_tokens({"additional_special_tokens": list(named.values())})
    tokenizer._set_model_specific_special_tokens(special_tokens=named)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "video_processor": tiny.video_processor}
    if model_type == "qwen2_5_vl":
        processor = tiny
    elif model_type.startswith("qwen3"):
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        parts["image_processor"] = transformers.Qwen2VLImageProcessor(patch_size=16, **half)
        processor = transformers.Qwen3VLProcessor(**parts)
    elif model_type.startswith("gemma4"):
        family, image = "Gemma4Unified" if model_type == "gemma4_unified" else "Gemma4", "<|image|>"
        budget = {"max_soft_tokens": 70} if is_small else {}  # else 280
        parts["image_processor"] = getattr(transformers, f"{family}ImageProcessor")(**budget)
        parts["video_processor"] = getattr(transformers, f"{family}VideoProcessor")()
        parts["feature_extractor"] = getattr(transformers, f"{family}AudioFeatureExtractor")()
        processor = getattr(transformers, f"{family}Processor")(**parts)
    elif model_type == "internvl":
        side, num_tiles = (_SMALL_TILE, 1) if is_small else (448, 12)
        tiles = {"size": {"height": side, "width": side}, "min_patches": 1, "max_patches": num_tiles}
        parts["image_processor"], image = transformers.GotOcr2ImageProcessor(**tiles), "<IMG_CONTEXT>"
        parts["image_seq_length"] = (side // 28) ** 2
        parts["video_processor"] = transformers.InternVLVideoProcessor()
        processor = transformers.InternVLProcessor(**parts)
    elif model_type == "mistral3":
        tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG_BREAK]", "[IMG_END]"]})
        edges = {"size": {"longest_edge": 1540}, "patch_size": {"height": 14, "width": 14}}
        image_processor, image = transformers.PixtralImageProcessor(**edges), "[IMG]"
        processor = transformers.PixtralProcessor(image_processor, tokenizer, patch_size=14, spatial_merge_size=2)
    else:
        raise ValueError(f"no processor is known for {model_type}")
    processor.chat_template = tiny.chat_template.replace(_QWEN_IMAGE, image)
    return processor


def _token_ids(processor: ProcessorMixin, model_type: str) -> dict[str, int]:
    """What the configuration calls the tokens of images."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    if model_type.startswith("qwen"):
        ids = {f"{key}_token_id": token_id(f"<|{key}_pad|>") for key in ("image", "video")}
        return ids | {f"vision_{side}_token_id": token_id(f"<|vision_{side}|>") for side in ("start", "end")}
    if model_type == "mistral3":
        return {"image_token_index": token_id("[IMG]")}
    if model_type == "internvl":
        return {"image_token_id": token_id("<IMG_CONTEXT>")}
    ids = {f"{name}_id": token_id(token) for name, token in _GEMMA.items() if name != "eoa_token"}
    return ids | {"eoa_token_index": token_id("<audio|>"), "video_token_id": token_id("<|video|>")}


# --- Weights ----------------------------------------------------------------------------------------------------------


def draw_weights() -> None:
    """From now on `from_pretrained` draws the weights of a folder that has none."""
    find, load = modeling_utils._get_resolved_checkpoint_files, PreTrainedModel._load_pretrained_model
    finish = PreTrainedModel._finalize_model_loading

    def find_or_none(*args: Any, **kwargs: Any) -> tuple[list[str] | None, dict | None]:
        return (None, None) if _is_drawn(kwargs["pretrained_model_name_or_path"]) else find(*args, **kwargs)

    def load_or_draw(model: PreTrainedModel, state_dict: Any, files: Any, load_config: Any, *args: Any) -> tuple:
        if _is_drawn(load_config.pretrained_model_name_or_path):
            # transformers initialises what is missing; layers that are quantised as they are loaded must be there.
            quantizer, state_dict, load_config = load_config.hf_quantizer, {}, _placed(load_config)
            if quantizer is not None:
                shapes = {key: weight.shape for key, weight in model.state_dict().items()}
                drawn = {key for key in shapes if quantizer.param_needs_quantization(model, key)}
                drawn |= {key.removesuffix("weight") + "bias" for key in drawn} & shapes.keys()
                state_dict = {key: _Drawn(shapes[key]) for key in shapes if key in drawn}
        return load(model, state_dict, files, load_config, *args)

    def finish_drawn(model: PreTrainedModel, load_config: Any, info: Any) -> Any:
        if not _is_drawn(load_config.pretrained_model_name_or_path):
            return finish(model, load_config, info)
        torch.manual_seed(0)
        said = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # every weight would be reported missing
        info = finish(model, _placed(load_config), info)
        transformers.logging.set_verbosity(said)
        info.missing_keys.clear()
        return info

    modeling_utils._get_resolved_checkpoint_files = find_or_none
    PreTrainedModel._load_pretrained_model = staticmethod(load_or_draw)
    PreTrainedModel._finalize_model_loading = staticmethod(finish_drawn)


def _is_drawn(name: str | None) -> bool:
    folder = Path(name or "")
    return (folder / "name").is_file() and not any(folder.glob("*.safetensors"))


def _placed(load_config: Any) -> Any:
    """Drawn on the GPU where there is one, also where the caller would load them on the CPU first."""
    if load_config.device_map is None and torch.cuda.is_available():
        return replace(load_config, device_map={"": torch.cuda.current_device()})
    return load_config


class _Drawn:
    """A weight of a checkpoint, drawn when it is read."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.randn(self.shape, dtype=torch.bfloat16, device=device) * 0.02


# --- Data -------------------------------------------------------------------------------------------------------------


def write_data(
    folder: Path,
    num_rows: int,
    *,
    num_words: tuple[int, int] = (10, 60),
    side_px: tuple[int, int] = (320, 1280),
    num_choices: int = 4,
    seed: int = 0,
) -> Path:
    """Noise images with sides and questions with numbers of words drawn from the two ranges; train.csv and test.csv.

    A word is one token of the random models.
    """
    rng, letters = random.Random(seed), string.ascii_lowercase[:num_choices]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_rows):
        path = f"images/{i:05d}.jpg"
        width, height = rng.randint(*side_px), rng.randint(*side_px)
        Image.effect_noise((width, height), 80).convert("RGB").save(folder / path, quality=90)
        question = " ".join(rng.choices(WORDS, k=rng.randint(*num_words))) + "?"
        row = {"id": f"row_{i:05d}", "path": path, "question": question}
        rows.append(row | {letter: " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for letter in letters})
    for name, extra in (("train.csv", True), ("test.csv", False)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=[*rows[0], "answer"] if extra else [*rows[0]])
            writer.writeheader()
            writer.writerows(row | ({"answer": rng.choice(letters)} if extra else {}) for row in rows)
    return folder
