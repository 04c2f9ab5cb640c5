"""How many wrong answers `vqa-sft label-errors` finds, where they are known: 5% of 1,300 handwritten digits.

    python -m vqa_sft.lab.planted_errors --epochs 2      # five seeds of four folds; six minutes on two CPU cores
    python -m vqa_sft.lab.planted_errors --seeds 1 --epochs 1

Each seed draws the rows whose answer becomes another choice, trains lab/digits.yaml on each of four folds with them,
and ranks all rows by their out-of-fold probabilities. Among as many of the most suspicious rows as answers are wrong,
precision is recall. Beside it: a random order, the same by the base without any training, and what
`cleanlab.filter.find_label_issues` gives where that package is installed. For the likely errors: both.
"""

import argparse
import csv
import importlib.util
import random
import statistics
from pathlib import Path

import numpy as np

from vqa_sft.lab.ablation import DIGITS, run_recipe
from vqa_sft.predictions.file import Predictions, read_predictions, with_answers
from vqa_sft.predictions.label_errors import suspect
from vqa_sft.tiny import TINY_PATH
from vqa_sft.tiny.digits import LETTERS, write_digits

SHARE, NUM_FOLDS = 0.05, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=4, help="of the recipe's training")
    parser.add_argument("--work", type=Path, default=Path("runs/planted_errors"), help="folder of data and runs")
    args = parser.parse_args()
    write_digits(args.work)
    found = [measure(args.work, seed, args.epochs) for seed in range(args.seeds)]
    print("| seed | " + " | ".join(found[0]) + " |\n|" + "---|" * (1 + len(found[0])))
    for seed, values in enumerate(found):
        print(f"| {seed} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    means = [statistics.mean(values[name] for values in found) for name in found[0]]
    print("| mean | " + " | ".join(f"{value:.3f}" for value in means) + " |")


def measure(work: Path, seed: int, epochs: float) -> dict[str, float]:
    source = work / f"train{seed}.csv"
    planted, answers = plant(work / "train.csv", source, seed)
    run, base = work / f"seed{seed}", work / "base.csv"
    if not (run / "out_of_fold.parquet").is_file():
        folds = {row_id: number % NUM_FOLDS for number, row_id in enumerate(answers)}
        with (work / "folds.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "fold"), *folds.items()])
        split = {"folds_file": work / "folds.csv", "fold": "all", "validation_fraction": 0}
        how = {"train_data": source, "output_dir": run, "num_train_epochs": epochs, "seed": seed, "use_cpu": True}
        run_recipe("sft.py", {"config": DIGITS} | how | split | {"disable_tqdm": True})
    if not base.with_suffix(".parquet").is_file():
        score = {"run": "none", "model": TINY_PATH, "data": work / "train.csv", "output": base, "batch_size": 64}
        run_recipe("predict.py", score | {"num_workers": 0, "use_cpu": ""})
    of_folds = with_answers(read_predictions(run / "out_of_fold.parquet"), answers)
    of_base = with_answers(read_predictions(base.with_suffix(".parquet")), answers)
    likely = {of_folds.ids[row] for row in np.flatnonzero(suspect(of_folds).is_likely)}
    values = {"random": SHARE, "base, untrained": share_found(of_base, planted)}
    values["out of fold"] = share_found(of_folds, planted)
    values |= {"likely: precision": len(likely & planted) / max(1, len(likely))}
    values |= {"likely: recall": len(likely & planted) / len(planted)}
    return values | of_cleanlab(of_folds, planted)


def plant(train: Path, output: Path, seed: int) -> tuple[set[str], dict[str, int]]:
    """Write the rows with wrong answers in a share of them; the ids of these, and all answers by id."""
    with train.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    rng = random.Random(seed)
    planted = set()
    for row in rng.sample(rows, round(SHARE * len(rows))):
        row["answer"] = rng.choice([letter for letter in LETTERS if letter != row["answer"]])
        planted.add(row["id"])
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return planted, {row["id"]: LETTERS.index(row["answer"]) for row in rows}


def share_found(predictions: Predictions, planted: set[str]) -> float:
    """Of as many of the most suspicious rows as answers are wrong, the share that is."""
    first = suspect(predictions).ranked[: len(planted)]
    return sum(predictions.ids[row] in planted for row in first) / len(planted)


def of_cleanlab(predictions: Predictions, planted: set[str]) -> dict[str, float]:
    """Of cleanlab's order, and of the rows that it calls issues. It takes the letters for classes."""
    if importlib.util.find_spec("cleanlab") is None:
        return {}
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    labels, probs = np.array(predictions.answers), np.array(predictions.probs)
    order = np.argsort(get_label_quality_scores(labels, probs), kind="stable")[: len(planted)]
    issues = {predictions.ids[row] for row in np.flatnonzero(find_label_issues(labels, probs))}
    return {
        "cleanlab": sum(predictions.ids[row] in planted for row in order) / len(planted),
        "cleanlab's issues: precision": len(issues & planted) / max(1, len(issues)),
        "cleanlab's issues: recall": len(issues & planted) / len(planted),
    }


if __name__ == "__main__":
    main()
