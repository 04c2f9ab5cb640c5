"""What `base_precision: fp8` changes: letter logits of a model in its true shape, and the losses of a short training.

    python -m vqa_sft.lab.fp8_price                                            # Qwen2.5-VL-7B's shape, on a GPU
    python -m vqa_sft.lab.fp8_price --model Qwen/Qwen2.5-VL-3B-Instruct --rows 8 --use_cpu --steps 0    # emulated
    python -m vqa_sft.lab.fp8_price --model vqa_sft/tiny/base --use_cpu        # a folder with weights

Letter logits on noise images, of random weights unless --model is a folder with others: each row's less their mean, as
a softmax sees them. The error is the norm of the difference over the norm of the whole base's; beside it that of
another rounding, whole weights in bf16 against fp32, on a GPU. Losses: lab/digits.yaml from the tiny base, twice with
one seed. What it costs in accuracy: ablation.py.
"""

import argparse
import csv
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from vqa_sft.errors import exits_with_message
from vqa_sft.lab.ablation import DIGITS, run_recipe

WHOLE, ROUNDED, IN_FP32 = "whole base", "FP8 base", "whole base in fp32"


@exits_with_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="a name in models/shapes.py, or a folder"
    )
    parser.add_argument("--rows", type=int, default=128, help="questions whose letters are scored")
    parser.add_argument("--steps", type=int, default=50, help="of the training; 0: none")
    parser.add_argument("--work", type=Path, default=Path("runs/fp8_price"), help="folder for models, data and runs")
    parser.add_argument(
        "--use_cpu", action="store_true", help="FP8 is emulated: the bytes of a GPU, multiplied in fp32"
    )
    args = parser.parse_args()
    bases = [WHOLE, ROUNDED] + ([] if args.use_cpu else [IN_FP32])
    logits = {base: in_own_process(score, base, args) for base in bases}
    print(f"{args.model}, {args.rows} rows, letter logits with a deviation of {logits[WHOLE].std():.3f}:")
    for base, reference in ((ROUNDED, WHOLE), (WHOLE, IN_FP32))[: len(bases) - 1]:
        print(f"  {base} against {reference}: {describe(logits[base], logits[reference])}")
    if args.steps:
        losses = {base: in_own_process(train, base, args) for base in (WHOLE, ROUNDED)}
        print_losses(losses)


def in_own_process(function: Callable[..., np.ndarray], base: str, args: argparse.Namespace) -> np.ndarray:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, base, args).result()


def score(base: str, args: argparse.Namespace) -> np.ndarray:
    """Choice logits (rows, 4) of a random model, the same for every `base`."""
    from vqa_sft.batch.prompts import Prompts
    from vqa_sft.data.examples import read_examples
    from vqa_sft.inference import scorer as scorers
    from vqa_sft.lab.random_models import draw_weights, save_random_model, write_data
    from vqa_sft.models.scoring import score_batches
    from vqa_sft.questions.letters import Views
    from vqa_sft.runs.folder import Run

    _allow_emulation(args)
    draw_weights()
    model = args.model if Path(args.model).is_dir() else save_random_model(args.model, args.work / "model")
    side = 84 if "tiny" in args.model else 448  # px; with these words 430 tokens a row
    data = write_data(args.work / f"data{args.rows}", args.rows, num_words=(95, 95), side_px=(side, side))
    examples = read_examples(str(data / "train.csv")).examples
    recipe = {"model_name_or_path": str(model), "max_pixels": 200704}
    recipe |= {"base_precision": "fp8"} if base == ROUNDED else {}
    recipe |= {"bf16": False, "fp16": False} if base == IN_FP32 else {}
    (group,) = scorers.groups_of([Run(None, recipe, Prompts())], args.use_cpu)
    scorer = scorers.load(group, most_choices=4, examples=examples, compile_layers=False)
    batches = [range(start, min(start + 16, args.rows)) for start in range(0, args.rows, 16)]
    found = score_batches(scorer, examples, batches, scorer.collators(Views()))
    return np.array([row[0] for part in found for row in part.choice_logits])


def describe(logits: np.ndarray, reference: np.ndarray) -> str:
    centred, expected = (x - x.mean(1, keepdims=True) for x in (logits, reference))
    error = np.linalg.norm(centred - expected) / np.linalg.norm(expected)
    differ = (logits.argmax(1) != reference.argmax(1)).sum()
    return f"relative error {error:.2%}, the largest {np.abs(centred - expected).max():.4f}, {differ} answers differ"


def train(base: str, args: argparse.Namespace) -> np.ndarray:
    """The loss of each step (steps,)."""
    from vqa_sft.tiny.digits import write_digits

    _allow_emulation(args)
    write_digits(args.work / "digits")
    run = args.work / base.replace(" ", "_")
    values = {"config": DIGITS, "train_data": args.work / "digits" / "train.csv", "output_dir": run, "overwrite": True}
    values |= {"max_steps": args.steps, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    values |= {"load_best_model_at_end": False, "early_stopping_patience": "null", "disable_tqdm": True}
    values |= {"use_cpu": args.use_cpu, "compile_layers": False, "validation_fraction": 0}
    run_recipe("sft.py", values | ({"base_precision": "fp8"} if base == ROUNDED else {}))
    with (run / "log.csv").open() as file:
        return np.array([float(line["loss"]) for line in csv.DictReader(file) if line["loss"]])


def _allow_emulation(args: argparse.Namespace) -> None:
    if args.use_cpu:
        from vqa_sft.models import fp8_base

        fp8_base.why_not = lambda device: None


def print_losses(losses: dict[str, np.ndarray]) -> None:
    print("| step | " + " | ".join(losses) + " |\n|---|---|---|")
    num_steps = len(losses[WHOLE])
    for step in sorted({1, *range(5, num_steps + 1, 5), num_steps}):
        print(f"| {step} | " + " | ".join(f"{of_base[step - 1]:.4f}" for of_base in losses.values()) + " |")
    apart = np.abs(losses[ROUNDED] - losses[WHOLE])
    print(f"They differ by {apart.mean():.4f} on average, at most by {apart.max():.4f} (step {apart.argmax() + 1}).")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
