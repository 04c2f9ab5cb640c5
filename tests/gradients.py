"""Logits and gradients of two ways to compute the same."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from trl import ModelConfig

from vqa_sft.data.examples import load_examples
from vqa_sft.models.families import FAMILIES
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.lora import lora_config
from vqa_sft.models.scoring import answer_logits, find_letter_ids

QUICK = ("qwen3_vl_moe", "qwen3_5", "internvl")
PACKED_FAMILIES = [name for name, family in FAMILIES.items() if family.packs_rows or family.packed]
PACKED_FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PACKED_FAMILIES]


def road_of(folder, contest, **adapted):
    """A model with a LoRA that does something, its processor, letter ids, and rows of many lengths and images.
    `adapted`: parts that `lora_config` is asked to adapt."""
    examples, _ = load_examples(str(contest / "train.csv"))
    rows = [examples[i] for i in range(5)]
    rows[1] = rows[1] | {"question": "Which of these is the colour of the square that stands in the image?"}
    rows[2] = rows[2] | {"images": []}
    rows[3] = rows[3] | {"images": rows[3]["images"] + rows[0]["images"]}
    processor = load_processor(folder)
    args = ModelConfig(model_name_or_path=folder, dtype=None, use_peft=True, lora_r=4, lora_dropout=0.0)
    base = load_model(args, "fp32")
    model = get_peft_model(base, lora_config(args, base, **adapted))
    torch.manual_seed(0)  # rounding is larger for some weights than the tests allow
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, processor, find_letter_ids(processor, 4), rows


@contextmanager
def compiler():
    """What `compile_layers` sets of torch is put back, and what was compiled is forgotten."""
    configs = {
        torch._dynamo.config: ("recompile_limit", "suppress_errors", "optimize_ddp", "specialize_float"),
        torch._functorch.config: ("activation_memory_budget", "autograd_cache_allow_custom_autograd_functions"),
        torch.compiler.config: ("cache_key_tag",),
    }
    before = [(config, name, getattr(config, name)) for config, names in configs.items() for name in names]
    torch._dynamo.reset()
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)
        torch._dynamo.reset()


def gradients_of(model, batch, letter_ids):
    """Answer logits (B, V), and the gradient of every trained weight."""
    model.zero_grad()
    logits = answer_logits(model, batch)
    F.cross_entropy(logits, letter_ids[batch["answers"]], reduction="sum").backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-5, rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys() and len(theirs[1]) > 10
    for name, expected in theirs[1].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours[1][name], expected, atol=2e-5 * max(scale, 1), rtol=1e-4, msg=name)
