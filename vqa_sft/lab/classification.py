"""Many classes: what a classifier is worth alone, a model that chooses among its candidates, and both fused.

    python -m vqa_sft.lab.classification --set numbers                 # 100 classes; minutes on a GPU
    python -m vqa_sft.lab.classification --set drawn --priors cnn --use_cpu
    python -m vqa_sft.lab.classification --set drawn --quick --use_cpu      # does it run? its figures mean nothing

The sets are those of class_sets.py. Two priors: a linear probe on features of the base's own vision tower (`vqa-sft
candidates`), and a small CNN that was trained on the same images (small_cnn.py); both give training rows out of fold.
The tiny base learns to choose among the candidates of each, in five folds. Every line of the table is of the same test
rows, whose labels only the table reads:

    prior alone                        the classifier's probabilities as they are, and at the temperature that suits its
                                       training rows, out of fold
    model alone                        the first fold, candidates in the order of the prior; softmax at the temperature
                                       that suits its held-out rows, and the rest of the mass evenly on other classes
    fused                              the same predictions by `vqa-sft fuse`, fitted on that fold's held-out rows
    fused, folds and permutations      all folds, each candidate once under each letter; fitted on all rows, out of fold

What is done is kept in --work. Brackets hold the middle 95% of 1,000 resamples of the test rows; the last columns
compare the log loss of the same rows to that of the prior at its temperature, and to that of the model alone.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from vqa_sft.data.class_probs import ClassProbs, keep_likely, read_class_probs
from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.lab.ablation import DIGITS, run_recipe
from vqa_sft.lab.class_sets import NUM_FOLDS, QUESTIONS, WRITERS, read_rows
from vqa_sft.predictions.class_ensemble import fit_temperature, tempered
from vqa_sft.predictions.class_metrics import differences, with_intervals
from vqa_sft.predictions.file import Predictions, read_predictions
from vqa_sft.predictions.metrics import describe
from vqa_sft.runs.folder import is_finished

TOWER, CNN = "tower", "cnn"
PRIORS = {TOWER: "linear probe on the base's own tower", CNN: "small CNN"}
METRICS = {"nll": "log loss", "accuracy": "accuracy", "top_5": "top-5"}
RANKS = (1, 2, 5, 10, 25)  # of recall@K


@dataclass(frozen=True)
class Setting:
    """How the tiny base and the small CNN learn a set."""

    num_candidates: int
    num_epochs: int
    learning_rate: float
    cnn_epochs: int
    cnn_width: int  # numbers: the whole network, 25 epochs, is right in 99%, which leaves nothing to gain


SETTINGS = {"numbers": Setting(6, 4, 2e-3, 12, 4), "drawn": Setting(6, 8, 2e-3, 25, 16)}
QUICK = {"num_train": 400, "num_test": 100}


@exits_with_message
def main() -> None:
    args = parse_args()
    data = args.work / "data"
    if not (data / "sample_submission.csv").is_file():  # written last
        WRITERS[args.set](data, args.seed, **(QUICK if args.quick else {}))
    for prior in args.priors:
        make_prior(args, prior)
        train(args, prior)
        predict_and_fuse(args, prior)
    report = describe_set(args)
    (args.work / "table.md").write_text(report + "\n", encoding="utf-8")
    print(report)


def parse_args(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=[*SETTINGS], required=True)
    parser.add_argument("--priors", nargs="+", default=[*PRIORS], choices=[*PRIORS], metavar="PRIOR", help=str(PRIORS))
    parser.add_argument("--epochs", type=float, help="of each fold's training; default: what suits the set")
    parser.add_argument("--cnn_epochs", type=int, help="default: what suits the set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder of data, runs and table; default: runs/classification/SET")
    parser.add_argument("--use_cpu", action="store_true", help="do not use the GPU")
    parser.add_argument("--quick", action="store_true", help="few rows and one epoch, to see that it runs")
    args = parser.parse_args(given)
    args.cnn_epochs = SETTINGS[args.set].cnn_epochs if args.cnn_epochs is None else args.cnn_epochs
    args.work = args.work or Path("runs/classification") / args.set
    if args.quick:
        args.epochs, args.cnn_epochs = args.epochs or 1, 1
    if (args.epochs or 1) <= 0 or args.cnn_epochs < 1:
        raise InputError(f"--epochs and --cnn_epochs must be above 0; got {args.epochs} and {args.cnn_epochs}.")
    return args


# --- Steps ------------------------------------------------------------------------------------------------------------


def make_prior(args: argparse.Namespace, prior: str) -> None:
    """WORK/PRIOR/train.parquet, out of fold, and test.parquet."""
    data, folder = args.work / "data", args.work / prior
    if (folder / "test.parquet").is_file():
        return
    values = {"config": DIGITS, **data_of(args), "output": folder, "test": data / "test.csv"}
    if prior == CNN:
        import torch

        from vqa_sft.lab.small_cnn import classify

        device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
        print(classify(data, data / "cnn", args.cnn_epochs, args.seed, device, SETTINGS[args.set].cnn_width))
        files = [data / "cnn" / "train.npz", data / "cnn" / "test.npz"]
        run_command("candidates", values, ["--out_of_fold", "--probs", *files])
    else:
        run_command("candidates", values, ["--seed", args.seed, *(["--use_cpu"] if args.use_cpu else [])])


def data_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "task": "classification",
        "train_data": args.work / "data" / "train",
        "fixed_question": QUESTIONS[args.set],
    }


def recipe_of(args: argparse.Namespace, prior: str) -> dict[str, Any]:
    """The recipe of a run that chooses among the candidates of a prior."""
    data, setting = args.work / "data", SETTINGS[args.set]
    return {
        "config": DIGITS,
        **data_of(args),
        "candidates": args.work / prior / "train.parquet",
        "num_candidates": setting.num_candidates,
        "validation_fraction": 0,
        "folds_file": data / "folds.csv",
        "fold": "all",
        "output_dir": args.work / prior / "run",
        "num_train_epochs": args.epochs or setting.num_epochs,
        "learning_rate": setting.learning_rate,
        "global_batch_size": 16,
        "per_device_train_batch_size": 16,
        "seed": args.seed,
        "use_cpu": args.use_cpu,
        "cache_image_features": True,
        "compile_layers": False,
        "disable_tqdm": True,
    }


def train(args: argparse.Namespace, prior: str) -> None:
    run = args.work / prior / "run"
    if not all(is_finished(run / f"fold{fold}") for fold in range(NUM_FOLDS)):
        run_recipe("sft.py", recipe_of(args, prior))


def predict_and_fuse(args: argparse.Namespace, prior: str) -> None:
    """Prediction files of held-out and test rows, and their fused tables, by one fold in one order and by all."""
    folder = args.work / prior
    for name, run, orders in (("one", folder / "run" / "fold0", "identity"), ("all", folder / "run", "rotations")):
        how = {
            "run": run,
            "orders": orders,
            "batch_size": 250,
            "num_workers": 0,
            "use_cpu": "" if args.use_cpu else None,
        }
        how = {key: value for key, value in how.items() if value is not None}
        held_out, test = folder / f"{name}_held_out.csv", folder / f"{name}_test.csv"
        if not held_out.is_file():
            run_recipe("predict.py", how | {"part": "validation", "output": held_out})
        if not test.is_file():
            given = {"data": args.work / "data" / "test.csv", "candidates": folder / "test.parquet", "output": test}
            run_recipe("predict.py", how | given)
        files = {"prior": folder / "test.parquet", "fit": held_out.with_suffix(".parquet")}
        files |= {"fit_prior": folder / "train.parquet", "output": folder / f"{name}_fused.parquet"}
        if not files["output"].is_file():
            run_command("fuse", files, [test.with_suffix(".parquet")])


def run_command(command: str, options: dict[str, Any], arguments: Sequence[Any] = ()) -> None:
    """`vqa-sft COMMAND ARGUMENTS --OPTION VALUE ...` in this process."""
    named = [str(token) for name, value in options.items() for token in (f"--{name}", value)]
    sys.argv = ["vqa-sft", command, *map(str, arguments), *named]
    try:
        runpy.run_module("vqa_sft.cli", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


# --- Table ------------------------------------------------------------------------------------------------------------


def describe_set(args: argparse.Namespace) -> str:
    """Both tables: of the ways, and of the priors' recall."""
    names, train, test = read_rows(args.work / "data")
    of_train, of_test = ({row.row_id: row.label for row in rows} for rows in (train, test))
    lines = [["", *METRICS.values(), "log loss - prior", "log loss - model"]]
    recalls = [["recall@K of", *map(str, RANKS)]]
    for prior in args.priors:
        folder, said = args.work / prior, PRIORS[prior]
        own = with_labels(read_class_probs(folder / "test.parquet"), names, of_test)
        fit = with_labels(read_class_probs(folder / "train.parquet"), names, of_train)
        at_its_best = tempered(own, fit_temperature(fit))
        predictions = [read_predictions(folder / f"one_{part}.parquet") for part in ("held_out", "test")]
        tables = {"prior alone": own, "prior alone, at its temperature": at_its_best}
        tables["model alone, its candidates"] = model = with_labels(model_alone(*predictions), names, of_test)
        for way, file in (("fused", "one"), ("fused, folds and permutations", "all")):
            tables[way] = with_labels(read_class_probs(folder / f"{file}_fused.parquet"), names, of_test)
        recalls.append([said, *recall_of(own)])
        for way, table in tables.items():
            cells = describe(with_intervals(table), [*METRICS])
            lines.append([f"{said}: {way}", *cells, *(difference_to(voice, table) for voice in (at_its_best, model))])
    size = f"{args.set}: {len(names)} classes, {len(train):,} training rows, {len(test):,} test rows"
    return "\n\n".join([size, markdown(lines), markdown(recalls)])


def difference_to(before: ClassProbs, after: ClassProbs) -> str:
    """The log loss of the second table minus that of the first, with its interval; nothing for the table itself."""
    return "" if before is after else describe(differences(before, after), ["nll"], "+")[0]


def with_labels(table: ClassProbs, names: Sequence[str], labels: dict[str, int]) -> ClassProbs:
    """The table with the classes in the order of `names`, and the rows in that of `labels`."""
    place = {name: number for number, name in enumerate(names)}
    row_of = {row_id: row for row, row_id in enumerate(table.ids)}
    if set(place) != set(table.names) or set(labels) != set(row_of):
        raise InputError("a table has other classes or rows than the set. Remove the folder --work, and run it again.")
    order = np.array([place[name] for name in table.names], np.int32)
    table = table.take([row_of[row_id] for row_id in labels])
    own = np.array([*labels.values()], np.int32)
    return replace(table.in_classes(names, order), labels=own)


def model_alone(held_out: Predictions, test: Predictions) -> ClassProbs:
    """The model's table: softmax of its logits at the temperature, and the share of labels among the candidates, of the
    held-out rows; other classes have the rest evenly."""
    answered = [row for row, answer in enumerate(held_out.answers) if answer is not None]
    logits = np.array([held_out.choice_logits[row] for row in answered])
    own = np.arange(len(answered)), np.array([held_out.answers[row] for row in answered])
    inside = (len(answered) + 0.5) / (len(held_out.ids) + 1)

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[own].mean())

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))
    names, candidates = test.metadata["classes"], np.array(test.candidates)
    probs = np.full((len(test.ids), len(names)), (1 - inside) / (len(names) - candidates.shape[1]))
    of_candidates = inside * softmax(np.array(test.choice_logits) / temperature, axis=1)
    np.put_along_axis(probs, candidates, of_candidates, axis=1)
    return keep_likely(test.ids, names, probs, source="the model")


def recall_of(table: ClassProbs) -> list[str]:
    """The share of rows whose label is among the K most likely classes, with its standard error."""
    cells = []
    for rank in RANKS:
        share = float((table.indices[:, :rank] == table.labels[:, None]).any(axis=1).mean())
        cells.append(f"{share:.3f} ± {np.sqrt(share * (1 - share) / len(table)):.3f}")
    return cells


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


if __name__ == "__main__":
    main()
