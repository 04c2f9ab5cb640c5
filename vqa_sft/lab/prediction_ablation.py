"""An ablation of prediction: what each way is worth, one table for each set, with and without calibration.

    python -m vqa_sft.lab.prediction_ablation                          # three sets, 5,000 test rows; minutes on a GPU
    python -m vqa_sft.lab.prediction_ablation --sets few --rows 500 --views "one order" rotations --use_cpu
    python -m vqa_sft.lab.prediction_ablation --work runs/ways    # again: what is done is kept

The tiny base learns the sets of vqa_sft/lab/ablation.py in three folds, by lab/digits.yaml. Every way is
recipes/predict.py: for the rows out of fold, on which `vqa-sft calibrate` finds a temperature for these views and
weights of the scales, and for test rows. "One fold" is the first of them; the other lines are three together (the mean
of logarithms). Test rows are all different ones, but those of `digits` show each of its test images several times, with
other wrong choices. Those images have three tokens a side, and the folds have seen no other size. "Trained on
sizes" is one more run of the first fold: on the same images with eight tokens a side, changed by up to an eighth in
training, for twice as long; it is compared to its own first line. "Equal weights" is what scales give without
calibrate. Brackets hold the middle 95% of 1,000 resamples of the rows; a difference to one order of one fold compares
the same rows, both calibrated or both not.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from vqa_sft.data.folds import write_folds
from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.lab.ablation import DIGITS, ROOT
from vqa_sft.predictions.calibration import calibrate_run
from vqa_sft.predictions.check_file import CALIBRATION
from vqa_sft.predictions.ensemble import experts_of
from vqa_sft.predictions.file import Predictions, read_predictions
from vqa_sft.predictions.metrics import losses_of, with_intervals
from vqa_sft.predictions.pooling import pool
from vqa_sft.tiny.numbers import SETS, TaskSet, write_set

NUM_FOLDS = 3
SCALES, LARGE_SCALES = "0.67,1.0,1.33", "0.9,1.0,1.1"  # of three tokens a side, and of eight: one less and one more
LARGE_PX = 224
VIEWS: dict[str, list[str]] = {
    "one order": [],
    "rotations": ["--orders", "rotations"],
    "all orders": ["--orders", "all"],
    "three scales": ["--scales", SCALES],
    "rotations x scales": ["--orders", "rotations", "--scales", SCALES],
}
FIRST = "one order"
FOLDS, SIZED = "run", "run_sized"
LARGE = "large"  # folder of the large images
# The tower learns the sizes too.
SIZES = {"image_augmentation": 0.125, "min_pixels": LARGE_PX**2 // 2, "max_pixels": LARGE_PX**2 * 2}
SIZES |= {"adapt_tower": True, "cache_image_features": False}
Way = tuple[str, str, str]  # set, run, views


@exits_with_message
def main() -> None:
    args = parse_args()
    for name in args.sets:
        if not (args.work / name / f"{args.rows}_rows").is_file():
            write_rows(args.work / name, SETS[name], args.rows)
            enlarge(args.work / name, args.work / name / LARGE)
            for other in [*(args.work / name).glob("*_rows"), *(args.work / name).glob("*_test_*")]:
                other.unlink()  # of other rows
            (args.work / name / f"{args.rows}_rows").touch()
    runs = [(name, run) for name in args.sets for run in (FOLDS, SIZED)]
    new = [run for run in runs if not (args.work / "_".join(run)).is_file()]
    for name, run in new:
        for part in ("validation", "test"):  # of an earlier training
            for old in (args.work / name).glob(f"{run}_{part}_*"):
                old.unlink()
    run_all([train_command(args, *run) for run in new], args)
    for run in runs:
        (args.work / "_".join(run)).touch()  # is done
    ways: list[Way] = [(name, FOLDS, views) for name in args.sets for views in args.views]
    ways += [(name, SIZED, views) for name in args.sets for views in args.views if views in (FIRST, "three scales")]
    run_all(predict_commands(args, ways, "validation"), args)
    for way in ways:
        calibrate_run(args.work / way[0] / way[1], file_of(args, way, "validation"))
    run_all(predict_commands(args, ways, "test"), args)
    for name in args.sets:
        print(f"{name}: {SETS[name].about}\n\n{table(args, name)}\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ["digits", "similar", "few"]
    parser.add_argument("--sets", nargs="+", default=usual, choices=[*SETS], metavar="SET", help=", ".join(SETS))
    parser.add_argument(
        "--views", nargs="+", default=[*VIEWS], choices=[*VIEWS], metavar="VIEWS", help="; ".join(VIEWS)
    )
    parser.add_argument("--rows", type=int, default=5000, help="test rows")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="commands at a time; default: one a core")
    parser.add_argument("--work", type=Path, default=Path("runs/prediction_ablation"), help="folder of data and runs")
    parser.add_argument("--use_cpu", action="store_true", help="do not use the GPUs")
    args = parser.parse_args()
    if args.rows < 20 or args.jobs < 1:
        raise InputError(f"--rows must be at least 20 and --jobs at least 1; got {args.rows} and {args.jobs}.")
    if FIRST not in args.views:
        raise InputError(f"--views needs {FIRST!r}, to which the others are compared.")
    return args


# --- Runs -------------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, task: TaskSet, num_rows: int) -> None:
    """train.csv, test.csv with so many rows, and folds.csv."""
    if task.num_digits == 1:  # a round has every test digit once, with other wrong choices
        rows: list[dict] = []
        for seed in range(-(-num_rows // task.num_test)):
            write_set(folder, task, choice_seed=seed)
            rows += [row | {"id": f"{row['id']}_{seed}"} for row in _unturned(folder)]
    else:
        write_set(folder, replace(task, num_test=num_rows))
        rows = _unturned(folder)
    with (folder / "test.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows[:num_rows])
    with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    write_folds(folder / "folds.csv", ids, [i % NUM_FOLDS for i in range(len(ids))])


def enlarge(folder: Path, output: Path) -> None:
    """The same rows with larger images."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    for name in ("train.csv", "test.csv", "folds.csv"):
        shutil.copy(folder / name, output)
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as image:
            image.resize((LARGE_PX, LARGE_PX), Image.Resampling.BICUBIC).save(output / "images" / path.name)


def _unturned(folder: Path) -> list[dict]:
    with (folder / "test.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["id"].endswith("/0")]


def train_command(args: argparse.Namespace, name: str, run: str) -> list[str]:
    folder, epochs = args.work / name, SETS[name].num_epochs
    data = folder if run == FOLDS else folder / LARGE
    values = {"train_data": data / "train.csv", "folds_file": data / "folds.csv", "validation_fraction": 0}
    values |= {"fold": "all"} if run == FOLDS else SIZES | {"fold": 0}
    values |= {"output_dir": folder / run, "num_train_epochs": epochs if run == FOLDS else 2 * epochs}
    values |= {"use_cpu": args.use_cpu, "compile_layers": False, "disable_tqdm": True}
    tokens = [str(token) for key, value in values.items() for token in (f"--{key}", value)]
    return [str(ROOT / "recipes" / "sft.py"), "--config", str(DIGITS), *tokens]


def predict_commands(args: argparse.Namespace, ways: Sequence[Way], part: str) -> list[list[str]]:
    """Of those that are not done yet."""
    return [predict_command(args, way, part) for way in ways if not file_of(args, way, part).is_file()]


def predict_command(args: argparse.Namespace, way: Way, part: str) -> list[str]:
    name, run, views = way
    folder = args.work / name
    command = [str(ROOT / "recipes" / "predict.py"), "--run", str(folder / run), "--batch_size", "256"]
    command += ["--output", str(file_of(args, way, part).with_suffix(".csv"))]
    command += [LARGE_SCALES if run == SIZED and token == SCALES else token for token in VIEWS[views]]
    data = folder if run == FOLDS else folder / LARGE
    command += ["--part", "validation"] if part == "validation" else ["--data", str(data / "test.csv")]
    return [*command, "--use_cpu"] if args.use_cpu else command


def file_of(args: argparse.Namespace, way: Way, part: str) -> Path:
    name, run, views = way
    return args.work / name / f"{run}_{part}_{views.replace(' ', '_')}.parquet"


def run_all(commands: Sequence[list[str]], args: argparse.Namespace) -> None:
    """Some at a time, each on one of the GPUs. Raises InputError where one fails."""
    num_gpus = 0
    if not args.use_cpu:
        import torch

        num_gpus = torch.cuda.device_count()
    args.work.mkdir(parents=True, exist_ok=True)
    waiting, running = [*enumerate(commands)], {}  # process -> its log
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                number, command = waiting.pop(0)
                log = args.work / f"job{number}.log"
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                environment["CUDA_VISIBLE_DEVICES"] = str(number % num_gpus) if num_gpus else ""
                with log.open("w") as file:
                    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=file, stderr=file)
                running[process] = log
            for process in [process for process in running if process.poll() is not None]:
                log = running.pop(process)
                if process.returncode:
                    raise InputError(f"a command failed with exit code {process.returncode}; {log} says why.")
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()


# --- Table ------------------------------------------------------------------------------------------------------------


Probs = list[np.ndarray]  # of N rows, (C,) each


def read_ways(args: argparse.Namespace, name: str) -> dict[str, tuple[Probs, Probs | None, list[int]]]:
    """Of every line of the table: probabilities at temperature 1, and calibrated, and the answers."""
    found: dict[str, tuple[Probs, Probs | None, list[int]]] = {}
    for views in args.views:
        mean = file_of(args, (name, FOLDS, views), "test")
        folds = [read_predictions(mean.with_name(f"{mean.stem}.fold{fold}.parquet")) for fold in range(NUM_FOLDS)]
        runs = {"one fold": folds[:1], "three folds": folds}
        if (path := file_of(args, (name, SIZED, views), "test")).is_file():
            runs["trained on sizes"] = [read_predictions(path)]
        for run, files in runs.items():
            found[f"{run}, {views}"] = together(files)
            if files[0].scale_logits:
                equal = [replace(file, scale_logits=[], metadata={}) for file in files]
                raw, _, answers = together(equal)
                found[f"{run}, {views}, equal weights"] = raw, None, answers
    return found


def together(files: Sequence[Predictions]) -> tuple[Probs, Probs, list[int]]:
    """By the mean of logarithms, without their temperatures and with them; scales at their weights in both."""
    both = []
    for known in ((), ("temperature", "bias")):
        changed = [replace(file, metadata=_only(file.metadata, (*known, "scale_weights"))) for file in files]
        probs = pool(experts_of(changed, "log"), [1 / len(files)] * len(files), "log")
        both.append([row[: len(own)] for row, own in zip(probs, files[0].choice_logits, strict=True)])
    return both[0], both[1], [int(answer) for answer in files[0].answers]


def _only(metadata: dict, names: Sequence[str]) -> dict:
    """With no more of the calibration than this."""
    known = metadata.get(CALIBRATION) or {}
    return metadata | {CALIBRATION: {name: known[name] for name in names if name in known}}


def table(args: argparse.Namespace, name: str) -> str:
    ways = read_ways(args, name)
    blocks = ("one fold", "three folds", "trained")
    ways = dict(sorted(ways.items(), key=lambda way: [way[0].startswith(block) for block in blocks].index(True)))
    head = ["", "accuracy", "NLL", "calibrated NLL", "ECE", "calibrated ECE", "NLL - first", "calibrated NLL - first"]
    lines = [head, ["---"] * len(head)]
    for way, (raw, calibrated, answers) in ways.items():
        first = ways[("trained on sizes, " if way.startswith("trained") else "one fold, ") + FIRST]
        before = with_intervals(raw, answers)
        after = with_intervals(calibrated, answers) if calibrated else None
        cells = [_cell(before, "accuracy"), *(_cell(found, key) for key in ("nll", "ece") for found in (before, after))]
        for probs, others in zip((raw, calibrated), first[:2], strict=True):
            is_compared = probs and probs is not others
            cells.append(difference(losses_of(probs, answers), losses_of(others, answers)) if is_compared else "")
        lines.append([way, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: dict | None, key: str) -> str:
    if values is None:
        return ""
    low, high = values[f"{key}_95"]
    return f"{values[key]:.4f} [{low:.3f}, {high:.3f}]"


def difference(losses: np.ndarray, others: np.ndarray, num_resamples: int = 1000) -> str:
    """The mean difference of the rows' losses, and the middle 95% of its resamples."""
    gaps, rng = losses - others, np.random.default_rng(0)
    means = [gaps[rng.integers(len(gaps), size=len(gaps))].mean() for _ in range(num_resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{gaps.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
