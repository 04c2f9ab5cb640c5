"""Command line of the tiny base.

    python -m vqa_sft.tiny numbers data/numbers        the demo's data: handwritten numbers as a contest's files
    python -m vqa_sft.tiny digits data/digits          single digits, which the base nearly reads already
    python -m vqa_sft.tiny draw --output runs/drawn    a contact sheet of what the base has seen
    python -m vqa_sft.tiny train --output runs/tiny    the base, from nothing; --family qwen3_5 or gemma4 for another
    python -m vqa_sft.tiny evaluate                    accuracy per kind on held-out drawn pictures

Drawing needs matplotlib, for its fonts only.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from vqa_sft.tiny import TINY_PATH
from vqa_sft.tiny.draw import KIND_NAMES


def main() -> None:
    args = parse_args()
    args.run(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vqa_sft.tiny", description="The tiny base: its data, training and score."
    )
    commands = parser.add_subparsers(required=True)

    numbers = commands.add_parser("numbers", help="write two-digit numbers of handwritten digits as PNG and CSV files")
    digits = commands.add_parser("digits", help="write scikit-learn's handwritten digits as PNG and CSV files")
    for command, run in ((numbers, run_numbers), (digits, run_digits)):
        command.add_argument("output", type=Path)
        command.set_defaults(run=run)

    draw = commands.add_parser("draw", help="draw examples and a contact sheet")
    draw.add_argument("--output", type=Path, required=True)
    draw.add_argument("--seed", type=int, default=0)
    draw.set_defaults(run=run_draw)

    train = commands.add_parser("train", help="train the base from nothing")
    train.add_argument("--output", type=Path, required=True)
    train.add_argument("--family", choices=("qwen2_5_vl", "qwen3_5", "gemma4"), default="qwen2_5_vl")
    train.add_argument("--steps", type=int, default=12_500)
    train.add_argument("--seconds", type=float, help="train for so long, compilation aside, whatever --steps says")
    train.add_argument("--pictures", type=int, default=480_000, help="drawn once; 2,000 others are held out")
    train.add_argument(
        "--kinds", choices=KIND_NAMES, nargs="+", default=KIND_NAMES, help="of questions; all if left out"
    )
    train.add_argument("--batch-size", type=int, default=512)
    train.add_argument("--learning-rate", type=float, help="the family's own if left out: 1e-3, or 4e-4 for the others")
    train.add_argument("--workers", type=int, help="processes that draw; all cores if left out")
    train.add_argument("--seed", type=int, default=0)
    train.set_defaults(run=run_train)

    evaluate = commands.add_parser("evaluate", help="accuracy per kind on held-out drawn pictures")
    evaluate.add_argument("--model", type=Path, default=TINY_PATH)
    evaluate.add_argument("--examples", type=int, default=3000)
    evaluate.set_defaults(run=run_evaluate)
    return parser.parse_args()


def run_numbers(args: argparse.Namespace) -> None:
    from vqa_sft.tiny.numbers import NUM_TEST_ROWS, NUM_TRAIN_ROWS, NUM_VALIDATION_ROWS, write_numbers

    write_numbers(args.output)
    numbers = f"{NUM_TRAIN_ROWS:,} training, {NUM_VALIDATION_ROWS} validation and {NUM_TEST_ROWS} test rows"
    print(f"{numbers} in {args.output}")


def run_digits(args: argparse.Namespace) -> None:
    from vqa_sft.tiny.digits import NUM_TEST, NUM_TRAIN, write_digits

    write_digits(args.output)
    print(f"{NUM_TRAIN} training and {NUM_TEST} test rows in {args.output}")


def run_draw(args: argparse.Namespace) -> None:
    from vqa_sft.tiny.draw import write_sheet

    write_sheet(args.output, args.seed)
    print(f"contact sheet and examples in {args.output}")


def run_train(args: argparse.Namespace) -> None:
    # fla refuses the backward pass on Hopper GPUs with Triton 3.6: the library's own PyTorch path trains everywhere.
    sys.modules["fla"] = None
    from vqa_sft.tiny.train import Settings, train

    train(args.output, Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)}))


def run_evaluate(args: argparse.Namespace) -> None:
    from vqa_sft.tiny.draw import draw_examples
    from vqa_sft.tiny.evaluate import accuracy_by_kind, format_table, load_base, predict_answers
    from vqa_sft.tiny.train import FONT_SEED, TEST_SEED, WORDING_SEED

    processor, model = load_base(args.model)
    sets = {
        "held-out pictures": draw_examples(args.examples, TEST_SEED),
        "held-out wordings": draw_examples(args.examples // 3, WORDING_SEED, held_out="wordings"),
        "held-out fonts": [
            example
            for kind in ("digit", "letter")
            for example in draw_examples(args.examples // 6, FONT_SEED, kind, held_out="fonts")
        ],
    }
    answers = {name: predict_answers(processor, model, examples) for name, examples in sets.items()}
    print(format_table({name: accuracy_by_kind(examples, answers[name]) for name, examples in sets.items()}))


if __name__ == "__main__":
    main()
