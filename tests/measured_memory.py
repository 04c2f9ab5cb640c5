"""Peaks of memory that torch reserved on GPUs: what the estimate is held against, and what docs/models.md says of it. A
new point is a line here."""

import functools
from dataclasses import dataclass, replace

from trl import ModelConfig

from vqa_sft.models import shapes
from vqa_sft.models.memory.needs import Plan, read_shape

B7, B3, B8 = (f"Qwen/Qwen{name}-Instruct" for name in ("2.5-VL-7B", "2.5-VL-3B", "3-VL-8B"))
B30 = "Qwen/Qwen3-VL-30B-A3B-Instruct"


@dataclass(frozen=True)
class Point:
    model: str  # in vqa_sft/models/shapes.py
    plan: Plan
    gib: float
    within: int  # percent of it
    rank: int = 32
    adapt_experts: bool = False


def plans(text_tokens: int, pixels: int = 448 * 448, **common) -> functools.partial:
    # Measured before the adapters of attention were fused.
    return functools.partial(Plan, text_tokens=text_tokens, max_pixels=pixels, fused_attention=False, **common)


LESS = {"compiled": True, "memory_budget": 0.7}
T4 = {"bits": 4, "nested": True, "checkpointing": True, "attention": "repeated"}
FIXED = plans(167, shared_tokens=22)  # rows of docs/measurements/speed.md
MIXED = plans(105, shared_tokens=22)  # images of mixed sizes that reach their limit
OTHERS = plans(174, shared_tokens=22)  # the same rows in the templates of other families
COMPILED = functools.partial(OTHERS, fused_attention=True, **LESS)
GEMMA, BUDGET = "google/gemma-4-12B-it", 280 * 48**2
POINTS = [
    Point(B7, plans(167)(16, eval_batch=16, **LESS), 37.7, within=3),
    Point(B7, FIXED(12, compiled=True, memory_budget=0.2), 22.0, within=3),
    # The libraries' own paths, rows padded to about 120 tokens of text, and one of ours.
    Point(B3, plans(120, 384 * 384)(8, fast=False, **T4), 5.7, within=6, rank=16),
    Point(B7, plans(120, 384 * 384)(4, fast=False, **T4), 8.5, within=6, rank=16),
    Point(B7, plans(120)(4, **T4), 8.7, within=6, rank=16),
    # Recipes as they stand: scienceqa, mmbench, qwen3vl8b_a100.
    Point(B7, MIXED(8, eval_batch=16, checkpointing=True), 19.4, within=15, rank=16),
    Point(B3, replace(MIXED(4, eval_batch=8, checkpointing=True), max_pixels=401408), 10.0, within=15, rank=16),
    Point(B8, replace(MIXED(4, eval_batch=8), max_pixels=768 * 768), 37.5, within=15),
    # One H200, torch 2.11; `fast=False` is TRL by default.
    Point("OpenGVLab/InternVL3_5-8B-HF", OTHERS(16, checkpointing=True, **LESS), 28.4, within=5),
    Point("Qwen/Qwen3.5-9B", OTHERS(16), 73.7, within=5),
    Point(GEMMA, OTHERS(16, checkpointing=True, max_pixels=BUDGET), 31.1, within=5),
    Point(B8, FIXED(16, **LESS), 34.0, within=15),
    Point(B8, OTHERS(8, fast=False, checkpointing=True), 19.6, within=5),
    Point("OpenGVLab/InternVL3_5-8B-HF", OTHERS(8, fast=False, checkpointing=True), 19.9, within=5),
    Point("Qwen/Qwen3.5-9B", OTHERS(8, fast=False, checkpointing=True), 20.3, within=10),
    Point(GEMMA, OTHERS(8, fast=False, checkpointing=True, max_pixels=BUDGET), 26.9, within=5),
    # As a T4 sees them, recipes as they stand; Qwen3.5 in plain PyTorch.
    Point("Qwen/Qwen3.5-4B", replace(MIXED(4, eval_batch=8, kernels=False, **T4), max_pixels=384**2), 5.04, 10, 16),
    Point("google/gemma-4-E4B-it", replace(MIXED(4, eval_batch=8, **T4), max_pixels=140 * 48**2), 10.67, 5, 16),
    Point(B30, OTHERS(8, fast=False, checkpointing=True), 59.8, within=5),
    Point(B30, OTHERS(8, fast=False, checkpointing=True), 79.8, within=5, adapt_experts=True),
    Point(B8, COMPILED(16), 34.6, within=15),
    Point("OpenGVLab/InternVL3_5-8B-HF", COMPILED(16), 37.6, within=10),
    Point(GEMMA, COMPILED(16, max_pixels=BUDGET), 67.0, within=5),
    Point(GEMMA, COMPILED(16, max_pixels=BUDGET, memory_budget=1), 86.9, within=5),
    Point("Qwen/Qwen3.5-9B", COMPILED(16), 38.4, within=5),
    Point("Qwen/Qwen3.5-9B", COMPILED(32), 56.0, within=5),
    Point(B30, COMPILED(16), 70.3, within=5),
    Point(B30, COMPILED(16, checkpointing=True), 81.4, within=5, adapt_experts=True),
]


@functools.cache
def shape_of(name: str, rank: int = 32, adapt_experts: bool = False, **values):
    args = ModelConfig(model_name_or_path=name, use_peft=True, lora_r=rank, lora_dropout=0.0, dtype=None)
    return read_shape(replace(args, **values), shapes.shape_config(name), adapt_experts=adapt_experts)


def within(model_type: str) -> int | None:
    """Percent of all measured peaks of a family that their estimates are near; None where nothing was measured."""
    found = [point.within for point in POINTS if shapes.SHAPES[point.model][0] == model_type]
    return max(found, default=None)
