"""Score the letters of every question with a fine-tuned run, or with a base model, and write a submission.

    accelerate launch recipes/predict.py --run runs/demo --data data/digits/test.csv --output runs/demo/submission.csv
    accelerate launch recipes/predict.py --run none --model Qwen/Qwen2.5-VL-7B-Instruct --max_pixels 200704 \\
        --data test.csv --output zero_shot/submission.csv

One forward a batch, the letters' logits at the last prompt position. Beside the submission (id and answer letter, in
the data's own format) stands the prediction file: submission.parquet, with log-probabilities of every choice.
"""

import argparse
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from vqa_sft.quiet import quiet

quiet()

from vqa_sft import run_folder
from vqa_sft.answers import FORMATS
from vqa_sft.columns import Columns, check_columns, with_context_of
from vqa_sft.config import Recipe, RecipeArguments
from vqa_sft.data import Loaded, read_examples
from vqa_sft.errors import InputError, exits_with_message, explains_breakdown, name_rows
from vqa_sft.predictions import Predictions, read_predictions, write_predictions
from vqa_sft.prompts import Prompts
from vqa_sft.scan import scan_pictures
from vqa_sft.submission import write_submission

MOST_ORDERS = 120  # of one row; all of five choices


@exits_with_message
def main() -> None:
    args = parse_args()
    is_main = os.environ.get("RANK", "0") == "0"

    # What to score, and how: all of it is in the run folder.
    run = run_folder.read_run(args.run) if args.run != "none" else base_run(args)
    prompts, trained = Prompts(**run["prompts"]), run["columns"] and Columns(**run["columns"])
    loaded = read_examples(args.data, answers="optional", **data_options(args, run["recipe"], trained))
    for note in loaded.notes * is_main:
        print(note)
    loaded.problems.raise_if_any(loaded.name)
    examples, num_letters = loaded.examples, run["num_letters"] or loaded.num_choices
    if trained is not None:
        check_choices(trained, loaded.columns, examples, num_letters)
    if args.orders == "all" and math.factorial(loaded.num_choices) > MOST_ORDERS:
        raise InputError(
            f"--orders all: rows of {loaded.num_choices} choices have {math.factorial(loaded.num_choices):,} orders. "
            "Give rotations, or a number."
        )
    blank = find_blank(loaded, args.on_bad_image) if is_main else None

    from accelerate import PartialState

    from vqa_sft import cache, launch, model as models, speed
    from vqa_sft.collator import AnswerCollator, check_texts
    from vqa_sft.scoring import average_views, find_letter_ids, score_examples

    launch.check_processes(args.use_cpu)
    state = PartialState(cpu=args.use_cpu)
    blank = launch.from_main(blank)

    # Processor, base and adapter
    recipe = Recipe(run["recipe"] | {"use_cpu": args.use_cpu}, arguments=None)
    model_args, trust = recipe.model_args(), {"trust_remote_code": bool(run["recipe"].get("trust_remote_code"))}
    source = model_args.model_name_or_path if args.run == "none" else args.run
    limits = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    processor = models.load_processor(source, **limits, **trust)
    letter_ids = find_letter_ids(processor, num_letters, prompts)
    check_texts(processor, examples, prompts)
    precision = models.choose_precision(recipe.values, trained=run.get("precision"))
    model = models.load_trained(args.run, model_args, precision, device_map=launch.device_map(), **trust)
    model.to(state.device).eval().requires_grad_(False)
    packer = features = None
    if run["recipe"].get("fast", True):
        packer = speed.pack_rows(model, precision)
        if run["recipe"].get("cache_image_features"):
            features = cache.open_store(model, processor, packer, precision)
        compile_layers = speed.pays_compilation(len(examples), args.compile_layers)
        speed.speed_up(model, compile_layers=compile_layers)

    # Score
    if packer is None and args.scales != [1.0]:
        raise InputError("--scales needs rows without padding, which this model or `fast: false` does not have.")
    of_scales = []
    for scale in args.scales:
        stored = features if scale == 1 else None  # features are those of the pictures as they are
        collator = AnswerCollator(processor, prompts, num_letters, blank, packer, stored, args.orders, scale)
        if stored is not None:
            cache.fill_store(model, collator, [examples], precision, args.batch_size, args.num_workers)
        how = (args.batch_size, precision, args.num_workers, state, args.average)
        of_scales.append(score_examples(model, examples, collator, letter_ids, *how))
    choice_logits = [average_views([*row], [0] * len(row), args.average)[0] for row in zip(*of_scales, strict=True)]
    if state.is_main_process:
        metadata = {
            "base_model": model_args.model_name_or_path,
            "run": None if args.run == "none" else args.run,
            "orders": args.orders,
            "scales": args.scales,
            "average": args.average,
            "prompts_digest": prompts.digest,
            "precision": precision,
        }
        ids = examples["id"][:]
        predictions = Predictions(ids, choice_logits, examples["answer"][:], metadata, [i in blank for i in ids])
        answers = submission_columns(loaded.columns, trained, args.answer_format)
        with explains_breakdown(f"for {args.output}", lambda: "writes it."):
            write_predictions(Path(args.output).with_suffix(".parquet"), predictions)
            write_submission(args.output, predictions, answers, examples["choices"][:])
        print(f"Wrote {len(predictions.ids):,} answers to {args.output}")
        if blank:
            print(f"Guessed without their pictures, which could not be used: {name_rows([*blank], len(ids))}")
    launch.leave()


def check_output(args: argparse.Namespace) -> None:
    """Raises InputError where the two files cannot be written, or would replace what we did not write."""
    output = Path(args.output)
    parquet = output.with_suffix(".parquet")
    if output.resolve() == Path(args.data).resolve():
        raise InputError(f"--output is --data ({args.data}). Name another --output.")
    if output.suffix != ".csv":
        raise InputError(f"--output must end in .csv; got {args.output}.")
    if parquet.name == run_folder.VALIDATION and run_folder.is_finished(output.parent):
        raise InputError(f"{parquet} holds the run's own validation predictions. Name another --output.")
    if output.exists() and not is_ours(parquet) or parquet.exists() and not is_ours(parquet):
        raise InputError(f"{output} or {parquet} exists and is none of our submissions. Name another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error}.") from error


def is_ours(parquet: Path) -> bool:
    try:
        return bool(read_predictions(parquet).metadata)
    except InputError:
        return False


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder, or none to score a base model as it is")
    parser.add_argument("--model", help="base model, with --run none")
    parser.add_argument("--data", required=True, help="file (CSV, TSV, JSONL, Parquet) or glob, saved or Hub dataset")
    parser.add_argument("--output", required=True, help="submission to write (.csv)")
    parser.add_argument("--split", default="test", help="split of a Hub dataset (default: test)")
    parser.add_argument("--data_config", help="configuration of a Hub dataset")
    parser.add_argument("--image_root", help="folder of the pictures; default: the folder of the file")
    parser.add_argument("--columns", type=mapping, help="as in a recipe: '{id: key, image: photo}'; default: found")
    parser.add_argument("--keep_rows", type=mapping, help="as in a recipe: '{column: value}'")
    parser.add_argument("--answer_format", choices=FORMATS, help="how answers are written; default: as in training")
    parser.add_argument("--encoding", help="of text files; default: detected")
    parser.add_argument(
        "--on_bad_image",
        choices=("error", "blank"),
        default="error",
        help="pictures that cannot be used: stop, or answer without them and say so",
    )
    parser.add_argument(
        "--orders",
        type=orders,
        default="identity",
        metavar="ORDERS",
        help="of the choices in which each row is scored: identity (default), rotations (each choice once under each "
        f"letter), all, or a number of them; at most {MOST_ORDERS}",
    )
    parser.add_argument(
        "--scales",
        type=scales,
        default=[1.0],
        metavar="0.9,1.0,1.1",
        help="of the pictures' sides, one pass over the data each (default: 1.0; Qwen2.5-VL and Qwen3-VL)",
    )
    parser.add_argument(
        "--average",
        choices=("mean", "log"),
        default="mean",
        help="over orders and scales: of the probabilities (default), or of their logarithms",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="rows per forward and process, each order counted as one"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read pictures")
    parser.add_argument(
        "--compile_layers",
        action=argparse.BooleanOptionalAction,
        help="compile the layers, about a minute at the start; default: for thousands of rows",
    )
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--min_pixels", type=int, help="with --run none; a run has its own")
    parser.add_argument("--max_pixels", type=int, help="with --run none; a run has its own")
    parser.add_argument("--use_cpu", action="store_true", help="do not use the GPU")
    args = parser.parse_args()
    if (args.run == "none") == (args.model is None):
        raise InputError("give --model together with --run none, and only then: a run knows its base model.")
    if args.run != "none" and (args.min_pixels, args.max_pixels) != (None, None):
        raise InputError("min_pixels and max_pixels belong to the run; they go with --run none only.")
    for name, low in (("batch_size", 1), ("num_workers", 0), ("limit", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise InputError(f"--{name} must be at least {low}; got {getattr(args, name)}.")
    check_columns(args.columns or {})
    check_output(args)
    return args


def orders(text: str) -> str | int:
    """What mcq.view_orders takes."""
    if text in ("identity", "rotations", "all"):
        return text
    if not text.isdecimal() or not 1 <= int(text) <= MOST_ORDERS:
        raise ValueError(text)
    return int(text)


def scales(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(0.25 <= scale <= 4 for scale in found) or len(set(found)) < len(found):
        raise ValueError(text)
    return found


def mapping(text: str) -> dict:
    """A mapping in YAML's short form, as a recipe writes it."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def base_run(args: argparse.Namespace) -> dict:
    """What run.json would say of a base model that nobody tuned: our defaults."""
    own = RecipeArguments(train_data="none", min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    return {
        "recipe": {"model_name_or_path": args.model},
        "prompts": vars(own.prompts),
        "columns": None,
        "num_letters": None,
    }


def data_options(args: argparse.Namespace, recipe: dict, trained: Columns | None) -> dict[str, Any]:
    """How to read the data: as given here, else as the recipe of the run says, else found again."""
    names = ("columns", "keep_rows", "encoding", "image_root")
    options = {name: getattr(args, name) or recipe.get(name) for name in names}
    options["columns"] = (recipe.get("columns") or {}) | (args.columns or {})
    options["empty_cells"] = recipe.get("empty_cells")
    options["image_root"] = args.image_root  # test pictures lie where the test data say, not where training did
    if trained is not None:
        options["columns"] = with_context_of(trained, options["columns"])
    options["answer_format"] = args.answer_format or (trained and trained.answer_format)
    return options | {"split": args.split, "config": args.data_config, "limit": args.limit}


def find_blank(loaded: Loaded, on_bad_image: str) -> dict[str, tuple[int, ...]]:
    """Row id -> positions of its pictures that cannot be used; raises InputError for them unless they may be blank."""
    scan = scan_pictures(loaded.examples, hashes=False)
    scan.add_problems(loaded.problems, loaded.examples["id"][:], loaded.numbers)
    if on_bad_image == "error":
        loaded.problems.raise_if_any(loaded.name)
    return {row_id: scan.bad(row) for row, row_id in enumerate(loaded.examples["id"]) if scan.bad(row)}


def submission_columns(columns: Columns, trained: Columns | None, answer_format: str | None) -> Columns:
    """The names and the answer format of a submission: the data's own, or those of training where it has no answers."""
    how = {"id": columns.id or "id", "answer": columns.answer or (trained and trained.answer) or "answer"}
    if columns.answer_format is None and trained is not None:  # no row has an answer
        how |= {"answer_format": trained.answer_format, "answers_are_upper": trained.answers_are_upper}
    return replace(columns, **how | ({"answer_format": answer_format} if answer_format else {}))


def check_choices(trained: Columns, columns: Columns, examples: Dataset, num_letters: int) -> None:
    before, now = ([found] if isinstance(found, str) else found for found in (trained.choices, columns.choices))
    if len(before) != len(now):
        raise InputError(
            f"the run was trained on the choice columns {', '.join(before)}; this data has {', '.join(now)}. Give data "
            "with the same columns."
        )
    longer = [row["id"] for row in examples.select_columns(["id", "choices"]) if len(row["choices"]) > num_letters]
    if longer:
        raise InputError(
            f"the run was trained on rows of at most {num_letters} choices; there are more in "
            f"{name_rows(longer, len(examples))}."
        )


if __name__ == "__main__":
    main()
