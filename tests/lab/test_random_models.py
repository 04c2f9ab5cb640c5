"""Models of every published shape, made small, and the count of what they must compute."""

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from trl import ModelConfig

from vqa_sft.lab import random_models
from vqa_sft.lab.needed_work import count_work
from vqa_sft.models import shapes
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.scoring import find_letter_ids

NAMES = [name for name in shapes.SHAPES if name != "tiny"]
ONE_A_FAMILY = list({shapes.SHAPES[name][0]: name for name in NAMES}.values())


@pytest.fixture
def small_folder(tmp_path, monkeypatch, as_it_loads):
    """Saves the small model of a name; its weights are drawn when it is loaded."""
    monkeypatch.setattr(shapes, "SHAPES", dict(shapes.SHAPES))
    monkeypatch.setattr(random_models, "SHAPES", shapes.SHAPES)
    random_models.draw_weights()
    return lambda name: str(random_models.save_random_model(random_models.small_shape(name), tmp_path / "model"))


def inputs(folder, size):
    processor = AutoProcessor.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    image = Image.effect_noise(size, 80).convert("RGB")
    return processor, processor(text=[text], images=[[image]], return_tensors="pt")


@pytest.mark.parametrize("name", NAMES)
def test_the_published_shape_has_as_many_parameters_as_its_name_says(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.shape_config(name))
    billions = sum(weight.numel() for weight in model.parameters()) / 1e9
    said = {"google/gemma-4-E4B-it": 8.0, "OpenGVLab/InternVL3_5-4B-HF": 4.7, "Qwen/Qwen2.5-VL-7B-Instruct": 8.3}
    said |= {"Qwen/Qwen2.5-VL-3B-Instruct": 3.75}  # with towers and tables, which those names do not count
    size = next((part for part in name.split("-") if part[-1] == "B" and part[0].isdigit()), "0B")
    assert billions == pytest.approx(said.get(name, float(size[:-1])), rel=0.15)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_folder_without_weights_loads_as_the_real_model_does(small_folder, name):
    folder = small_folder(name)
    processor, batch = inputs(folder, (448, 448))
    assert len(find_letter_ids(load_processor(folder), 4)) == 4
    model = load_model(ModelConfig(model_name_or_path=folder, dtype="float32"), "fp32")  # refuses what is missing
    assert model.config.model_type == shapes.SHAPES[name][0]
    with torch.no_grad():
        logits = model(**batch, logits_to_keep=1).logits
    assert logits.isfinite().all() and logits.std() > 0.01


@pytest.mark.parametrize("name, num_biases", [("Qwen/Qwen3-VL-2B-Instruct", 0), ("Qwen/Qwen2.5-VL-3B-Instruct", 3)])
def test_weights_that_are_rounded_when_they_are_loaded_are_drawn_too(small_folder, name, num_biases):
    folder = small_folder(name)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["visual", "lm_head"])
    model, loaded = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=four_bit, dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8 and weight.float().std() > 10
    biases = [values for key, values in model.named_parameters() if "layers.0" in key and key.endswith("bias")]
    assert len(biases) == num_biases and all(0.01 < values.std() < 0.03 for values in biases)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_needed_work_is_what_a_plain_forward_computes_but_for_what_it_need_not(small_folder, name):
    folder = small_folder(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if shapes.SHAPES[name][0].endswith("moe"):
        model.set_experts_implementation("eager")  # the others hide their products from the counter
    # 70 tokens of Gemma's 70: no padding. 256 tokens in all fill the chunks of the gated delta rule.
    processor, batch = inputs(folder, (480, 336) if "gemma" in name else (448, 448))
    work, text = count_work(model.config), model.config.get_text_config()
    num_tokens = batch["input_ids"].shape[1]
    width, height = (480, 336) if "gemma" in name else (448, 448)
    needed = work.decoder(num_tokens, is_plain=True) + work.tower(work.num_patches(processor, height, width))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(**batch)
    computed = counted.get_total_flops()
    if work.states:  # transformers' chunks of 64 do more than the recurrence: see torch_chunk_gated_delta_rule
        k, v = text.linear_key_head_dim, text.linear_value_head_dim
        padded = -(-num_tokens // 64) * 64
        of_heads = work.states / (k * v)
        computed -= padded * of_heads * (6 * k * v + 4 * 64 * k + 2 * 64 * v) - num_tokens * 6 * work.states
    # Line breaks count as tokens of Ministral's images; a window of Qwen2.5-VL is counted whole.
    assert needed == pytest.approx(computed, rel=0.04 if "Ministral" in name else 0.02)


def test_needed_work_leaves_out_what_no_answer_needs(small_folder):
    """By hand, for layers with and without a window, and a long text."""
    work = count_work(AutoModelForImageTextToText.from_pretrained(small_folder("google/gemma-4-12B-it")).config)
    num_tokens, wide = 3000, 1024
    layers = {width: sum(1 for own, _, _ in work.attention if own == width) for width in (512, 1024)}
    assert layers == {512: 5, 1024: 1} and all(window in (None, wide) for _, window, _ in work.attention)
    pairs = [sum(min(i + 1, wide) for i in range(num_tokens)), num_tokens * (num_tokens + 1) / 2]
    attention = 4 * (5 * 512 * pairs[0] + 1024 * pairs[1])
    weights = 2 * (num_tokens * work.weights + work.answer_weights)
    assert work.decoder(num_tokens) == pytest.approx(weights + attention, rel=1e-3)
