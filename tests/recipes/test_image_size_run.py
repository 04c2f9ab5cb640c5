"""A family whose model holds the sizes of its processor, from training to prediction and to merged weights."""

import json

import pytest
import torch
from families import PLAIN_TEMPLATE, TEXT
from scripts import run_script
from transformers import (
    AutoConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs.export import export_run
from vqa_sft.tiny.build import build_tokenizer

TILE_PX, LIMIT = 28, 3 * 28 * 28
OWN = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
KEPT = [[28, 56], [56, 28]]


def predict(run, contest, output):
    run_script(
        "predict", "--run", run, "--data", contest / "test.csv", "--output", output, "--use_cpu", "--num_workers", 0
    )
    return torch.tensor(read_predictions(output.with_suffix(".parquet")).choice_logits)


@pytest.fixture
def llava_next(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["Which colour has the square? Answer."] * 4)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": TILE_PX, "width": TILE_PX}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(size=side, crop_size=side, image_grid_pinpoints=OWN),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN_TEMPLATE,
    )
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": TILE_PX, "patch_size": 14}
    config = LlavaNextConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config=vision,
        image_grid_pinpoints=OWN,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    folder = tmp_path / "llava_next"
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_run_with_a_limit_trains_predicts_and_merges_with_it(llava_next, contest, sft, tmp_path, capsys):
    run = sft(llava_next, tmp_path / "run", max_pixels=LIMIT, lora_r=4, validation_fraction=0.25)
    assert "images: at most 2,352 pixels, " in capsys.readouterr().out
    assert json.loads((run / "processor_config.json").read_text())["image_processor"]["image_grid_pinpoints"] == KEPT
    of_run = predict(run, contest, tmp_path / "run.csv")
    export_run(str(run), str(tmp_path / "merged"))
    assert AutoConfig.from_pretrained(tmp_path / "merged").image_grid_pinpoints == KEPT
    of_merged = predict(tmp_path / "merged", contest, tmp_path / "merged.csv")
    torch.testing.assert_close(of_merged, of_run, atol=1e-4, rtol=0)
    assert AutoConfig.from_pretrained(llava_next).image_grid_pinpoints == OWN
