"""Score the letters of every question with a fine-tuned run, or with a base model, and write a submission.

    accelerate launch recipes/predict.py --run runs/demo --data data/digits/test.csv --output runs/demo/submission.csv
    accelerate launch recipes/predict.py --run none --model Qwen/Qwen2.5-VL-7B-Instruct --max_pixels 200704 \\
        --data test.csv --output zero_shot/submission.csv

One forward a batch, the letters' logits at the last prompt position. Beside the submission (id and answer letter, in
the data's own format) stands the prediction file: submission.parquet, with log-probabilities of every choice.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from vqa_sft.quiet import quiet

quiet()

from vqa_sft import run_folder
from vqa_sft.config import Recipe, RecipeArguments
from vqa_sft.data import Columns, load_examples
from vqa_sft.errors import InputError, exits_with_message, name_rows
from vqa_sft.predictions import Predictions, read_predictions, write_predictions, write_submission
from vqa_sft.prompts import Prompts


@exits_with_message
def main() -> None:
    args = parse_args()
    is_main = os.environ.get("RANK", "0") == "0"

    # What to score, and how: all of it is in the run folder.
    run = run_folder.read_run(args.run) if args.run != "none" else base_run(args)
    prompts, trained = Prompts(**run["prompts"]), Columns(**run["columns"])
    examples, columns = load_examples(
        args.data,
        split=args.split,
        config=args.data_config,
        columns=columns_to_read(trained, run["recipe"]),
        image_root=args.image_root,
        answers="optional",
        limit=args.limit,
        check_images=is_main,
    )
    num_letters = run["num_letters"] or max(map(len, examples["choices"]))
    if args.run != "none":
        check_choices(trained, columns, examples, num_letters)

    from accelerate import PartialState

    from vqa_sft import launch, model as models
    from vqa_sft.collator import AnswerCollator, check_texts
    from vqa_sft.scoring import find_letter_ids, score_examples

    launch.check_processes(args.use_cpu)
    state = PartialState(cpu=args.use_cpu)
    state.wait_for_everyone()

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
    model.to(state.device).eval()

    # Score
    collator = AnswerCollator(processor, prompts, num_letters)
    choice_logits = score_examples(
        model, examples, collator, letter_ids, args.batch_size, precision, args.num_workers, state
    )
    if state.is_main_process:
        metadata = {
            "base_model": model_args.model_name_or_path,
            "run": None if args.run == "none" else args.run,
            "views": ["identity"],
            "prompts_digest": prompts.digest,
            "precision": precision,
        }
        predictions = Predictions(examples["id"], choice_logits, examples["answer"], metadata)
        write_predictions(Path(args.output).with_suffix(".parquet"), predictions)
        write_submission(args.output, predictions, columns)
        print(f"Wrote {len(predictions.ids):,} answers to {args.output}")
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
    parser.add_argument("--data", required=True, help="CSV file, folder of a saved dataset, or Hub dataset")
    parser.add_argument("--output", required=True, help="submission to write (.csv)")
    parser.add_argument("--split", default="test", help="split of a Hub dataset (default: test)")
    parser.add_argument("--data_config", help="configuration of a Hub dataset")
    parser.add_argument("--image_root", help="folder of the pictures; default: the CSV's folder")
    parser.add_argument("--batch_size", type=int, default=16, help="rows per forward and process")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read pictures")
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
    check_output(args)
    return args


def base_run(args: argparse.Namespace) -> dict:
    """What run.json would say of a base model that nobody tuned: our defaults."""
    own = RecipeArguments(train_data="none", min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    return {
        "recipe": {"model_name_or_path": args.model},
        "prompts": vars(own.prompts),
        "columns": vars(own.columns),
        "num_letters": None,
    }


def columns_to_read(trained: Columns, recipe: dict) -> Columns:
    """The run's own columns. What its recipe did not name is looked for again: the pictures of the test data may be a
    column `image` instead of `path`, and one more choice than in training must be seen."""
    found = {"image": "image_column", "choices": "choice_columns"}
    return replace(trained, **{name: None for name, key in found.items() if not recipe.get(key)})


def check_choices(trained: Columns, columns: Columns, examples: Dataset, num_letters: int) -> None:
    if len(columns.choices) != len(trained.choices):
        raise InputError(
            f"the run was trained on the choice columns {', '.join(trained.choices)}; this data has "
            f"{', '.join(columns.choices)}. Give data with the same columns."
        )
    longer = [row["id"] for row in examples.select_columns(["id", "choices"]) if len(row["choices"]) > num_letters]
    if longer:
        raise InputError(
            f"the run was trained on rows of at most {num_letters} choices; there are more in "
            f"{name_rows(longer, len(examples))}."
        )


if __name__ == "__main__":
    main()
