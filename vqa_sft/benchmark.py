"""Runs recipes on random weights in the true shapes of the models, and says what they need.

    python -m vqa_sft.benchmark recipes/qwen7b.yaml recipes/qwen3b_t4.yaml --steps 8
    python -m vqa_sft.benchmark recipes/qwen3b_t4.yaml --as-t4

Weights are drawn on the GPU and saved under --work, pictures are noise of mixed sizes, and then the recipe itself runs:
`recipes/sft.py` and `recipes/predict.py`, each in a process of its own. Speed and memory do not depend on what the
weights are; accuracy means nothing here.

`--as-t4` shows a recipe what a T4 shows it: an allocator that ends at 13.8 GiB (14.56 less its context), compute
capability 7.5, neither flash nor cuDNN attention. Its speed cannot be had that way.
"""

import argparse
import csv
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

T4_GIB = 13.8
# Published configurations of the models, as far as they set a shape.
SHAPES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
        | {"intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        "qwen3_vl",
        {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipe files")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps per recipe")
    parser.add_argument("--rows", type=int, default=160, help="rows of the data")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="folder for models, data and runs")
    parser.add_argument("--as-t4", action="store_true", help="show the recipes a T4")
    args = parser.parse_args()

    data = write_data(args.work / "data", args.rows)
    results = []
    for recipe in map(Path, args.recipes):
        run, model = args.work / recipe.stem, None
        try:
            model = save_random_model(_model_name(recipe), args.work / "model")
            common = ["--as-t4"] if args.as_t4 else []
            train = ["--config", str(recipe), "--model_name_or_path", str(model), "--output_dir", str(run)]
            train += ["--train_data", str(data / "train.csv"), "--max_steps", str(args.steps), "--overwrite"]
            _run("recipes/sft.py", train, common)
            scored = run / "submission.csv"
            _run(
                "recipes/predict.py",
                ["--run", str(run), "--data", str(data / "test.csv"), "--output", str(scored)],
                common,
            )
            results.append((recipe.stem, json.loads((run / "metrics.json").read_text())))
        except subprocess.CalledProcessError as error:
            results.append((recipe.stem, {"failed": error.returncode}))
        print(results[-1], flush=True)
    print(table(results))


def _model_name(recipe: Path) -> str:
    import yaml

    return yaml.safe_load(recipe.read_text(encoding="utf-8"))["model_name_or_path"]


def table(results: list[tuple[str, dict]]) -> str:
    """A Markdown table, one line a recipe."""
    lines = ["| recipe | precision | examples/s | peak GiB |", "|---|---|---|---|"]
    for name, metrics in results:
        if "failed" in metrics:
            lines.append(f"| {name} | failed with exit code {metrics['failed']} | | |")
        else:
            speed, memory = metrics["train_examples_per_s"], metrics["peak_memory_gib"]
            lines.append(f"| {name} | {metrics['precision']} | {speed:.1f} | {memory:.1f} |")
    return "\n".join(lines)


def _run(script: str, arguments: list[str], options: list[str]) -> None:
    command = [sys.executable, "-m", "vqa_sft.benchmark", "--inside", script, *options, "--", *arguments]
    subprocess.run(command, check=True)


def run_inside(argv: list[str]) -> None:
    """`--inside SCRIPT [--as-t4] -- arguments`: run a recipe script in this process, as on a T4 if asked."""
    script, options, arguments = argv[0], argv[1 : argv.index("--")], argv[argv.index("--") + 1 :]
    if "--as-t4" in options:
        import torch

        total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(T4_GIB / total_gib)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.get_device_capability = lambda device=None: (7, 5)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def save_random_model(name: str, folder: Path) -> Path:
    """Random weights in the shape of `name`, bf16, with a processor whose vocabulary is the tiny base's."""
    import torch
    from transformers import (
        AutoModelForImageTextToText as Auto,
        AutoProcessor,
        Qwen2_5_VLConfig,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLProcessor,
    )

    from vqa_sft.tiny import TINY_PATH

    if (folder / "name").is_file() and (folder / "name").read_text() == name:
        return folder
    family, text, vision = SHAPES[name]
    processor = AutoProcessor.from_pretrained(TINY_PATH)
    tokens = {
        f"{key}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for key, token in (("image", "image_pad"), ("video", "video_pad"))
        + (("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    sections = [16, 24, 24] if family == "qwen2_5_vl" else [24, 20, 20]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    if family == "qwen3_vl":
        rope |= {"rope_theta": 5e6, "mrope_interleaved": True}
        processor = Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
            tokenizer=processor.tokenizer,
            video_processor=processor.video_processor,
            chat_template=processor.chat_template,
        )
    kind = Qwen2_5_VLConfig if family == "qwen2_5_vl" else Qwen3VLConfig
    config = kind(
        text_config=text | {"rope_parameters": rope, "pad_token_id": processor.tokenizer.pad_token_id},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **tokens,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = Auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)
    (folder / "name").write_text(name)
    del model
    torch.cuda.empty_cache()
    return folder


def write_data(folder: Path, num_rows: int, seed: int = 0) -> Path:
    """Noise pictures of mixed sizes and aspects with questions of 10 to 60 words; train.csv and test.csv."""
    from PIL import Image

    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    words = [
        "which",
        "of",
        "these",
        "is",
        "the",
        "colour",
        "shape",
        "digit",
        "place",
        "left",
        "right",
        "larger",
        "picture",
    ]
    rows = []
    for i in range(num_rows):
        path = f"images/{i:05d}.jpg"
        width, height = rng.randint(320, 1280), rng.randint(320, 1280)
        Image.effect_noise((width, height), 80).convert("RGB").save(folder / path, quality=90)
        question = " ".join(rng.choices(words, k=rng.randint(10, 60))) + "?"
        row = {"id": f"row_{i:05d}", "path": path, "question": question}
        rows.append(row | {letter: " ".join(rng.choices(words, k=rng.randint(1, 6))) for letter in "abcd"})
    for name, extra in (("train.csv", True), ("test.csv", False)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=[*rows[0]] + ["answer"] * extra)
            writer.writeheader()
            writer.writerows(row | ({"answer": rng.choice("abcd")} if extra else {}) for row in rows)
    return folder


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1:2] == ["--inside"]:
        run_inside(sys.argv[2:])
    else:
        main()
