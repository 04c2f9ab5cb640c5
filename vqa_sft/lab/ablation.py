"""An ablation of training: what each trick is worth, in one table, on sets with known answers.

    python -m vqa_sft.lab.ablation                                  # every set and recipe, five seeds; minutes on a GPU
    python -m vqa_sft.lab.ablation --sets few --recipes plain EMA --seeds 2
    python -m vqa_sft.lab.ablation --work runs/ablation             # again: finished runs are not repeated

The tiny base learns handwritten digits, and two-digit numbers of them with similar choices, few rows, wrong answers
and skewed letters (vqa_sft/tiny/numbers.py). Each run is recipes/sft.py and recipes/predict.py with lab/digits.yaml and
the keys of one of the `RECIPES`: `plain` supervises the answer token alone and does nothing else, the next ones add one
trick each to it, `all together` has several, `defaults` is a recipe that names none. `naive` is TRL's SFTTrainer with
its own collator on the same rows: the loss on every token, no shuffling, the last weights. The last one is beside
`shuffled choices` for the price of `base_precision: fp8`, which `--use_cpu` emulates.

Test rows are scored once under each rotation of their choices. The letter bias is the largest difference in recall
between answer letters. Brackets hold the middle 95% of 1,000 resamples of seeds and test rows; a difference compares
the same test rows. `cost` is the time of the training, its evaluations included, against `plain`, with other runs
at the same time.
"""

import argparse
import csv
import functools
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.predictions.file import read_predictions
from vqa_sft.predictions.metrics import minus_log
from vqa_sft.runs.folder import is_finished
from vqa_sft.tiny.numbers import SETS, TaskSet, write_set

ROOT = Path(__file__).parents[2]
DIGITS, SCORED = Path(__file__).parent / "digits.yaml", "test.parquet"
NUM_RESAMPLES, NUM_BINS = 1000, 15
LAST = {"eval_strategy": "no", "load_best_model_at_end": False}
PLAIN = {"vocabulary_weight": 1.0, "shuffle_choices": False, **LAST}
TRICKS: dict[str, dict[str, Any]] = {
    "loss over the letters": {"vocabulary_weight": 0.0},
    "both losses": {"vocabulary_weight": 0.2},
    "shuffled choices": {"shuffle_choices": True},
    "letter smoothing": {"letter_smoothing": 0.1},
    "best epoch by NLL": {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "nll"},
    "best epoch by calibrated NLL": {"eval_strategy": "epoch", "load_best_model_at_end": True},
    "EMA": {"averaging": "ema"},
    "SWA": {"averaging": "swa"},
    "augmented images": {"image_augmentation": 0.1, "cache_image_features": False},
    "adapted tower": {"adapt_tower": True, "cache_image_features": False},
}
NAIVE, SOUP, DEFAULTS = "naive", "soup of three seeds", "defaults"
SHUFFLED_FP8 = "shuffled choices, FP8 base"
# Without those of which another is taken.
TOGETHER = [name for name in TRICKS if name not in ("both losses", "SWA", "best epoch by NLL")]
RECIPES: dict[str, dict[str, Any]] = {
    NAIVE: {},
    "plain": PLAIN,
    **{name: PLAIN | keys for name, keys in TRICKS.items()},
    SOUP: {},
    "all together": PLAIN | {key: value for name in TOGETHER for key, value in TRICKS[name].items()},
    DEFAULTS: {},
    SHUFFLED_FP8: PLAIN | TRICKS["shuffled choices"] | {"base_precision": "fp8"},
}


@exits_with_message
def main() -> None:
    args = parse_args()
    tasks = {name: SETS[name] for name in args.sets}
    for name, task in tasks.items():
        write_set(args.work / name, task)
    seeds = range(args.seeds)
    trained = [(s, r, seed) for seed in seeds for r in args.recipes if r != SOUP for s in tasks]
    soups = []
    if SOUP in args.recipes:  # of a seed and the two after it; the last ones no other recipe has
        soups = [(s, SOUP, seed) for seed in seeds for s in tasks]
        trained += [(s, "plain", args.seeds + number) for number in range(2) for s in tasks]
    for part in (trained, soups):  # a soup is of runs of the first part
        run_all(args.work, part, args.jobs, args.use_cpu)
    print(report(args.work, args.sets, args.recipes, args.seeds))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS], metavar="SET", help=", ".join(SETS))
    parser.add_argument(
        "--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES], metavar="RECIPE", help="; ".join(RECIPES)
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: one a core")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of data, runs and table")
    parser.add_argument("--use_cpu", action="store_true", help="do not use the GPUs")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        raise InputError(f"--seeds and --jobs must be at least 1; got {args.seeds} and {args.jobs}.")
    if SOUP in args.recipes and "plain" not in args.recipes:
        raise InputError(f"{SOUP!r} is made of the runs of `plain`. Add it to --recipes.")
    return args


# --- Runs -------------------------------------------------------------------------------------------------------------


Run = tuple[str, str, int]  # set, recipe, seed


def run_all(work: Path, runs: Sequence[Run], jobs: int, use_cpu: bool) -> None:
    """Runs without predictions, dealt to several processes."""
    left = [run for run in runs if not (run_folder_of(work, *run) / SCORED).is_file()]
    num_gpus = 0 if use_cpu else _num_gpus()
    jobs = min(jobs, len(left))
    workers = []
    for job in range(jobs):
        # Many processes share the cores. Each imports the libraries once for all its runs.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = str(job % num_gpus) if num_gpus else ""
        code = f"from vqa_sft.lab.ablation import train_and_score\nfor run in {left[job::jobs]!r}:\n"
        code += f"    train_and_score({str(work)!r}, *run, use_cpu={not num_gpus})"
        with (work / f"worker{job}.log").open("w") as log:
            workers.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log))
    try:
        while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
            time.sleep(1)
            num_done = sum((run_folder_of(work, *run) / SCORED).is_file() for run in left)
            print(f"\r{num_done} of {len(left)} runs", end="", file=sys.stderr, flush=True)
        for job, code in enumerate(codes):
            if code:
                raise InputError(f"a run failed with exit code {code}; {work}/worker{job}.log says why.")
        print(file=sys.stderr)
    finally:
        for worker in workers:
            worker.kill()


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def train_and_score(work: str, set_name: str, recipe: str, seed: int, use_cpu: bool) -> None:
    """One run and its predictions for the test rows."""
    data, run = Path(work) / set_name, run_folder_of(Path(work), set_name, recipe, seed)
    if use_cpu and recipe == SHUFFLED_FP8:
        from vqa_sft.models import fp8_base

        fp8_base.why_not = lambda device: None  # emulated: what it rounds is what a GPU would round
    values = recipe_values(SETS[set_name], RECIPES[recipe], data, run, seed, use_cpu)
    if recipe == SOUP:
        from vqa_sft.runs.soup import make_soup

        others = [run_folder_of(Path(work), set_name, "plain", seed + number) for number in range(3)]
        if not is_finished(run):
            print(make_soup([str(other) for other in others], str(run)))
    elif recipe == NAIVE:
        train_naive(values)
    else:
        run_recipe("sft.py", {"config": DIGITS} | values)
    score = {"run": run, "data": data / "test.csv", "output": run / "test.csv", "batch_size": 250, "num_workers": 0}
    run_recipe("predict.py", score | ({"use_cpu": ""} if use_cpu else {}))


def run_recipe(script: str, arguments: dict[str, Any]) -> None:
    """A script of recipes/ in this process; an argument that is empty is a flag."""
    tokens = [token for name, value in arguments.items() for token in (f"--{name}", str(value)) if token]
    sys.argv = [str(ROOT / "recipes" / script), *tokens]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_folder_of(work: Path, set_name: str, recipe: str, seed: int) -> Path:
    return work / set_name / recipe.replace(" ", "_") / f"seed{seed}"


def recipe_values(task: TaskSet, keys: dict, data: Path, run: Path, seed: int, use_cpu: bool) -> dict[str, Any]:
    values = {"train_data": data / "train.csv", "output_dir": run, "seed": seed, "num_train_epochs": task.num_epochs}
    values |= {"use_cpu": use_cpu, "compile_layers": False, "check_images": False, "disable_tqdm": True}
    values |= {"overwrite": True, "cache_image_features": True}
    return values | keys


def train_naive(values: dict[str, Any]) -> None:
    """TRL by default on the rows of the recipe: its collator, the loss on every token, the last weights."""
    from datasets import Dataset, Features, Image, List, Value
    from trl import SFTConfig, SFTTrainer

    from vqa_sft.batch.prompts import render_messages
    from vqa_sft.config.recipe import read_recipe
    from vqa_sft.data.examples import read_examples
    from vqa_sft.data.split import TRAIN, choose_parts, select
    from vqa_sft.models import load as models
    from vqa_sft.models.lora import lora_config
    from vqa_sft.questions.letters import LETTERS, identity_order
    from vqa_sft.runs import folder as run_folder
    from vqa_sft.training import curves

    given = [str(token) for name, value in ({"config": DIGITS} | values).items() for token in (f"--{name}", value)]
    recipe = read_recipe(given)
    own = recipe.arguments
    loaded = [read_examples(own.train_data)]
    names = ("check_images", "validation_fraction", "duplicate_distance")
    parts = choose_parts(loaded, seed=values["seed"], **{name: getattr(own, name) for name in names})
    rows = select(loaded, parts, TRAIN)

    def conversation(row: dict) -> list[dict]:
        messages = render_messages(row, identity_order(len(row["choices"])), own.prompts)
        texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
        asked = [{"role": message["role"], "content": text} for message, text in zip(messages, texts, strict=True)]
        return [*asked, {"role": "assistant", "content": LETTERS[row["answer"]]}]

    texts = [conversation(row) for row in rows]
    images = rows.select_columns(["images"]).cast_column("images", List(Image(decode=False)))["images"]
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"messages": message, "images": List(Image())})
    dataset = Dataset.from_dict({"messages": texts, "images": [*images]}, features=features)
    precision = models.choose_precision(recipe.values)
    model = models.load_model(recipe.model_args(), precision)
    processor = models.load_processor(recipe.values["model_name_or_path"])
    shared = ("learning_rate", "lr_scheduler_type", "warmup_steps", "seed", "num_train_epochs", "use_cpu", "output_dir")
    arguments = {name: recipe.values[name] for name in shared}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            **arguments,
            per_device_train_batch_size=own.global_batch_size,
            max_length=None,
            gradient_checkpointing=False,
            bf16=precision == "bf16",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=lora_config(recipe.model_args(), model),
        callbacks=[curves.WriteCurves()],
    )
    run_folder.start(values["output_dir"], recipe.values, overwrite=True)
    trainer.train()
    trainer.save_model()
    own_letters, columns = loaded[0].num_choices, loaded[0].columns
    run_folder.describe(
        run_folder.Run(values["output_dir"], recipe.values, own.prompts, own_letters, columns, precision),
        num_rows={"train": len(rows)},
        num_processes=1,
        micro_batch=own.global_batch_size,
        accumulation=1,
    )


# --- Table ------------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Of the test rows of one set by the runs of one recipe: S seeds, N rows, R rotations."""

    of_answer: np.ndarray  # (S, N, R) probability of the answer
    confidence: np.ndarray  # (S, N, R) the largest probability
    correct: np.ndarray  # (S, N, R)
    letters: np.ndarray  # (N, R) the letter of the answer
    train_s: float  # median

    @property
    def values(self) -> dict[str, float]:
        """Means over the seeds."""
        num_seeds, num_rows, _ = self.correct.shape
        once = self.drawn(np.ones((1, num_seeds)), np.ones((1, num_rows)))
        return {name: float(value[0]) for name, value in once.items()}

    def drawn(self, seeds: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of K resamples, (K,) each: `seeds` (K, S) and `rows` (K, N) say how often each of them is drawn.

        Everything is a sum over rows before it is anything else, so a product with `rows` does all resamples at once.
        """
        num_seeds, num_rows, num_rotations = self.correct.shape
        # As in metrics.ece_of and metrics.nll.
        bins = np.clip(np.ceil(self.confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
        is_in = bins[..., None] == np.arange(NUM_BINS)  # (S, N, R, B)
        gaps = np.einsum("snr,snrb->snb", self.confidence - self.correct, is_in)
        nlls = minus_log(self.of_answer)
        is_under = self.letters[..., None] == np.unique(self.letters)  # (N, R, L)
        right = np.einsum("snr,nrl->snl", self.correct.astype(float), is_under)
        recalls = rows @ right / (rows @ is_under.sum(axis=1))  # (S, K, L)
        of_seeds = {  # (S, K)
            "accuracy": self.correct.mean(axis=2) @ rows.T / num_rows,
            "nll": nlls.mean(axis=2) @ rows.T / num_rows,
            "ece": np.abs(rows @ gaps).sum(axis=2) / (num_rows * num_rotations),
            "letter bias": np.ptp(recalls, axis=2),  # the largest difference in recall between answer letters
        }
        return {name: (seeds * value.T).sum(axis=1) / num_seeds for name, value in of_seeds.items()}


def read_scores(work: Path, set_name: str, recipe: str, num_seeds: int) -> Scores:
    from vqa_sft.training.curves import LOG

    probs, train_s = [], []
    for seed in range(num_seeds):
        run = run_folder_of(work, set_name, recipe, seed)
        found = read_predictions(run / SCORED)
        logits = np.stack(found.choice_logits)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs.append(odds / odds.sum(axis=1, keepdims=True))
        trained = run_folder_of(work, set_name, "plain", seed) if recipe == SOUP else run  # a soup has no log
        with (trained / LOG).open(encoding="utf-8") as file:
            train_s.append(float([*csv.DictReader(file)][-1]["train_runtime"]))
    num_rotations = probs[0].shape[1]
    stacked = np.stack(probs).reshape(num_seeds, -1, num_rotations, num_rotations)  # seeds, rows, rotations, choices
    letters = np.array(found.answers).reshape(-1, num_rotations)
    return Scores(
        of_answer=np.take_along_axis(stacked, letters[None, ..., None], axis=-1)[..., 0],
        confidence=stacked.max(axis=-1),
        correct=stacked.argmax(axis=-1) == letters,
        letters=letters,
        train_s=float(np.median(train_s)) * (3 if recipe == SOUP else 1),
    )


def report(work: Path, sets: Sequence[str], recipes: Sequence[str], num_seeds: int) -> str:
    """One table for each set."""
    return "\n\n".join(
        f"{name}: {SETS[name].about}\n\n{table({r: read_scores(work, name, r, num_seeds) for r in recipes})}"
        for name in sets
    )


def table(scores: dict[str, Scores]) -> str:
    """A line a recipe, with differences to the naive one, or to the first where that is missing."""
    base = NAIVE if NAIVE in scores else next(iter(scores))
    cost = "plain" if "plain" in scores else base
    head = ["recipe", "accuracy", "NLL", "ECE", "letter bias", f"accuracy - {base}", f"NLL - {base}", "cost"]
    lines = [head, ["---"] * len(head)]
    for name, own in scores.items():
        values, intervals = own.values, intervals_of(own.drawn, own)
        cells = [f"{value:.3f} [{intervals[key][0]:.3f}, {intervals[key][1]:.3f}]" for key, value in values.items()]
        differences = {} if name == base else intervals_of(functools.partial(difference, own, scores[base]), own)
        for key in ("accuracy", "nll"):
            if name == base:
                cells.append("")
                continue
            low, high = differences[key]
            cells.append(f"{values[key] - scores[base].values[key]:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append([name, *cells, f"{own.train_s / scores[cost].train_s:.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def difference(one: Scores, other: Scores, seeds: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    values, others = one.drawn(seeds, rows), other.drawn(seeds, rows)
    return {name: values[name] - others[name] for name in values}


def intervals_of(measure: Callable, scores: Scores) -> dict[str, tuple[float, float]]:
    """The middle 95% of what `measure(seeds, rows)` gives for seeds and test rows drawn with replacement; the rotations
    of a row stay together."""
    drawn = measure(*resamples(*scores.correct.shape[:2]))
    return {name: tuple(np.percentile(values, [2.5, 97.5])) for name, values in drawn.items()}


@functools.cache
def resamples(num_seeds: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed (K, S) and each row (K, N) is drawn; the same for all recipes of a set."""
    rng = np.random.default_rng(0)
    seeds, rows = np.empty((NUM_RESAMPLES, num_seeds)), np.empty((NUM_RESAMPLES, num_rows))
    for k in range(NUM_RESAMPLES):
        for counts in (seeds, rows):
            size = counts.shape[1]
            counts[k] = np.bincount(rng.integers(size, size=size), minlength=size)
    return seeds, rows


if __name__ == "__main__":
    main()
