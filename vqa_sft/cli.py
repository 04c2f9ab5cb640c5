"""`vqa-sft score | push`: laptop tools, a thin shell over the modules."""

import argparse
from pathlib import Path

from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.quiet import quiet


@exits_with_message
def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(prog="vqa-sft", description="Score prediction files; push runs to the Hub.")
    commands = parser.add_subparsers(required=True, metavar="command")

    score = commands.add_parser("score", help="accuracy, NLL and ECE of prediction files, as a table")
    score.add_argument("predictions", nargs="+", help="FILE.parquet or NAME=FILE.parquet")
    score.add_argument("--answers", help="CSV with id and answer; default: the answers in the prediction files")
    score.set_defaults(run=lambda args: print(score_table(args.predictions, args.answers)))

    push = commands.add_parser("push", help="upload a finished run to the Hub")
    push.add_argument("run_folder")
    push.add_argument("--repo", help="user/name; default: hub_model_id of the recipe, else the folder's name")
    push.add_argument("--private", action="store_true", default=None)
    push.set_defaults(run=lambda args: print(_push(args)))

    args = parser.parse_args()
    args.run(args)


def _push(args: argparse.Namespace) -> str:
    from vqa_sft.hub import push_run

    return push_run(args.run_folder, args.repo, private=args.private)


def score_table(files: list[str], answers_file: str | None) -> str:
    """A table with one line a prediction file: rows, accuracy, NLL in nats, ECE."""
    from vqa_sft.metrics import all_metrics, softmax
    from vqa_sft.predictions import read_answers, read_predictions, with_answers

    answers = read_answers(answers_file) if answers_file else None
    lines = [("", "rows", "accuracy", "nll", "ece")]
    for item in files:
        name, _, path = ("", "", item) if Path(item).exists() else item.partition("=")
        predictions = read_predictions(path)
        if answers is not None:
            predictions = with_answers(predictions, answers)
        if None in predictions.answers:
            raise InputError(f"{path} holds rows without an answer. Give --answers FILE.csv.")
        values = all_metrics(softmax(predictions.choice_logits), predictions.answers)
        lines.append((name or path, str(len(predictions.ids)), *(f"{value:.4f}" for value in values.values())))
    return "\n".join("  ".join([line[0].ljust(24), *(cell.rjust(8) for cell in line[1:])]) for line in lines)


if __name__ == "__main__":
    main()
