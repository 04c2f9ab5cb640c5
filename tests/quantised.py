"""Tiny checkpoints that are quantised, made of the families of families.py and written as the Hub's are."""

import json
import re
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from families import skeleton
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BESIDE = ["visual", "model.visual", "vision_tower", "model.vision_tower", "multi_modal_projector", "lm_head"]
BESIDE += ["model.multi_modal_projector", "model.vision_model", "model.connector"]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8 |= {"modules_to_not_convert": BESIDE}


def _groups(layout: str, **weights) -> dict:
    weights |= {"symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    ignored = ["re:.*visual.*", "re:.*vision.*", "re:.*projector.*", "re:.*connector.*", "re:.*lm_head"]
    return {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"} | {
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


# What config.json says, and how a weight is stored.
KINDS = {
    "fp8": FP8,
    "compressed fp8": _groups("float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed int4": _groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "bitsandbytes 4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes 8 bit": {"load_in_8bit": True},
}
# Kinds whose packages are not among ours: all that a test can show is what is said.
OTHERS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "nvfp4": {"quant_method": "nvfp4"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
}


def save_quantised(base: str, kind: str, folder: Path, *, inside_text: bool = False) -> str:
    """The checkpoint of `base` with the language model's linear layers rounded as `kind` has it, or said to be by
    config.json alone where it is one of the `OTHERS`; with `inside_text` that is said at the language model."""
    if kind.startswith("bitsandbytes"):
        asked = BitsAndBytesConfig(**KINDS[kind], llm_int8_skip_modules=BESIDE)
        model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=asked, dtype=torch.float32)
        shutil.copytree(base, folder)
        model.save_pretrained(folder)
        return str(folder)
    shutil.copytree(base, folder)
    said = KINDS.get(kind) or OTHERS[kind]
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        is_linear = name.endswith(".weight") and name.split(".")[-2] in LINEAR
        is_beside = any(part in name for part in ("visual", "vision", "projector", "connector"))
        is_rounded = kind in KINDS and is_linear and not is_beside
        weights |= _stored(kind, name, weight) if is_rounded else {name: weight}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        folder, lambda config: (config["text_config"] if inside_text else config).update(quantization_config=said)
    )
    return str(folder)


def _stored(kind: str, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a layer's weight (N, K)."""
    if kind == "fp8":  # one block
        scale = weight.abs().max().float().reshape(1, 1) / 448
        return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    if kind == "compressed fp8":
        scale = weight.abs().amax(1, keepdim=True).float() / 448
        return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    groups = weight.reshape(weight.shape[0], -1, 32)
    scale = groups.abs().amax(2).float() / 7  # (N, K / 32)
    rounded = (groups / scale[..., None]).round().reshape(weight.shape).to(torch.int8)
    packed = pack_to_int32(rounded, 4)
    return {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}


def edit_config(folder: Path | str, change) -> None:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path | str, change) -> None:
    """`change` takes the weights by name and returns them."""
    path = Path(folder) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# Tiny families whose experts (Llama 4, Gemma 4 26B) or fused layers (Molmo 2) transformers 5.23 does not read in FP8.
NOT_IN_FP8 = ("llama4", "gemma4_moe", "molmo2")
BLOCK = 16  # rows and columns that share a scale in `save_fp8`
# What FP8 checkpoints round, by name: products of the language model's layers, and experts one by one or fused.
ROUNDED = r"(layers|blocks)\.\d+\.(.*\.)?(\w*_(proj|proj_with_mqa|qkv|z)\.weight|experts\.\w+)$"


def save_fp8(base: str, folder: Path, *, per_layer: bool = False) -> tuple[str, str]:
    """Two checkpoints of `base` with the language model's layers rounded to FP8 in blocks, as Qwen's are: one holds
    numbers of 8 bit and scales, the other whole weights of the same numbers. `per_layer`: with one scale a layer, and
    another of what goes in, as Ministral 3's."""
    rounded, whole = (Path(shutil.copytree(base, folder / name)) for name in ("fp8", "whole"))
    stored, same = {}, {}
    for name, weight in load_file(Path(base) / "model.safetensors").items():
        stored[name] = same[name] = weight
        if _is_rounded(name, weight):
            stored[name], stored[f"{name}_scale_inv"], same[name] = _in_blocks(weight, per_layer)
            if per_layer:
                stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.1)
    save_file(stored, rounded / "model.safetensors", metadata={"format": "pt"})
    save_file(same, whole / "model.safetensors", metadata={"format": "pt"})
    layers = {name: layer for name, layer in skeleton(base).named_modules() if isinstance(layer, torch.nn.Linear)}
    beside = [name for name, layer in layers.items() if not _is_rounded(f"{name}.weight", layer.weight)]
    own = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    if per_layer:
        own |= {"activation_scheme": "static", "weight_block_size": None}
    edit_config(rounded, lambda config: config.update(quantization_config=own | {"modules_to_not_convert": beside}))
    return str(rounded), str(whole)


def _is_rounded(name: str, weight: torch.Tensor) -> bool:
    is_beside = re.search("visual|vision|image|audio|projector|merger|connector|indexer", name)
    fits = weight.ndim >= 2 and not any(size % BLOCK for size in weight.shape[-2:])
    return bool(re.search(ROUNDED, name)) and fits and not is_beside


def _in_blocks(weight: torch.Tensor, per_layer: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of 8 bit (..., N, K), scales (..., N / BLOCK, K / BLOCK) or (), and their products."""
    if per_layer:
        scale = weight.abs().max() / 448
        numbers = (weight / scale).to(torch.float8_e4m3fn)
        return numbers, scale, numbers.float() * scale
    *experts, rows, columns = weight.shape
    blocks = weight.reshape(*experts, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((-3, -1), keepdim=True) / 448
    numbers = (blocks / scales).to(torch.float8_e4m3fn)
    whole = (numbers.float() * scales).reshape(weight.shape)
    return numbers.reshape(weight.shape), scales.squeeze((-3, -1)), whole
