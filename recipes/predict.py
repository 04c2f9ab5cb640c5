"""Score the letters of every question with fine-tuned runs, or with a base model, and write a submission.

    accelerate launch recipes/predict.py --run runs/demo --data data/digits/test.csv --output runs/demo/submission.csv
    accelerate launch recipes/predict.py --run runs/fold0 runs/fold1 --orders rotations --data test.csv --output out.csv
    accelerate launch recipes/predict.py --run runs/demo --part validation --orders rotations --output validation.csv
    accelerate launch recipes/predict.py --run none --model Qwen/Qwen2.5-VL-7B-Instruct --max_pixels 200704 \\
        --data test.csv --output zero_shot/submission.csv

One forward a batch, the letters' logits at the last prompt position. Beside the submission (id and answer letter, in
the data's own format) stands the prediction file: submission.parquet, with log-probabilities of every choice. Of
several runs each has a prediction file too, and the submission is of their probabilities' mean.

What is scored is kept in submission.csv.parts/ as it comes: the same command goes on where a killed one stopped.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from datasets import Dataset, IterableDataset

from vqa_sft.environment import set_library_defaults

set_library_defaults()

from vqa_sft.config.fields import load_yaml, settle_words
from vqa_sft.config.recipe import RecipeArguments
from vqa_sft.data.answers import FORMATS
from vqa_sft.data.columns import Columns, check_columns, check_fixed, known_columns
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import Loaded, read_examples, stream_examples
from vqa_sft.data.find_files import find_files
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.problems import GUESSED, PREDICTION_HINT, Problems
from vqa_sft.data.scan import scan_images
from vqa_sft.data.split import VALIDATION, read_parts, select
from vqa_sft.errors import InputError, exits_with_message, explains, explains_breakdown, name_rows
from vqa_sft.files import held
from vqa_sft.inference import shards
from vqa_sft.inference.results import Block, block_of_parts, blocks_of_runs, check_outputs, write_results
from vqa_sft.letters import LETTERS, MOST_ORDERS, view_orders
from vqa_sft.predictions.calibration import read_calibration, views_key, worth_of_scales
from vqa_sft.predictions.ensemble import AVERAGES
from vqa_sft.predictions.file import ANSWERS, answers_as
from vqa_sft.predictions.style import PROBABILITIES, STYLES, Style
from vqa_sft.runs import folder as run_folder
from vqa_sft.runs.folder import Run

# What a run's or a base's numbers depend on, and not what is made of them later.
MODEL_FILES = ("*.safetensors", "run.json", "*config.json", "chat_template*", "tokenizer*")


@dataclass
class Data:
    """What is to be scored: the rows of each run, whose sources are `loaded`."""

    loaded: list[Loaded]
    of_run: list[Dataset | IterableDataset]  # the rows of each run
    trained: Columns | None  # of the first run

    @property
    def num_choices(self) -> int:
        of_rows = [
            max(map(len, rows["choices"])) if isinstance(rows, Dataset) else self.loaded[0].num_choices
            for rows in self.of_run
        ]
        return max(of_rows)


@dataclass
class Pass:
    """Rows that some runs of one model score."""

    group: list[Run]  # that the model has
    runs: list[int]  # which of them
    examples: Dataset | IterableDataset


@exits_with_message
def main() -> None:
    args = parse_args()
    is_main = os.environ.get("RANK", "0") == "0"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is scored is written first

    # What to score, and how: all of it is in the run folders.
    folders = run_folder.runs_in(args.run)
    runs = [base_run(args)] if "none" in folders else run_folder.read_runs(folders, args.model)
    check_outputs(Path(args.output), {"--data": args.data, "--template": args.template}, folders)
    # Of several processes of one launch the main one holds it for all.
    with held([args.output] if is_main else [], "--output"):
        predict(args, runs, is_main)


def predict(args: argparse.Namespace, runs: list[Run], is_main: bool) -> None:
    """Score the rows, and write what is said of them."""
    data = read_data(args, runs)
    # A template of other rows and a damaged calibration are found before the rows are scored.
    style = style_of(args, data)
    views = {"orders": args.orders, "scales": args.scales, "average": args.average}
    for run in runs:
        about_run(args, run, views)
    notes = [note for source in data.loaded for note in source.notes]
    notes += style.notes
    if args.part == "all":
        notes += worth_of_scales([run.folder for run in runs if run.folder], views)
    for note in dict.fromkeys(notes * is_main):
        print(note)
    if args.orders == "all" and math.factorial(data.num_choices) > MOST_ORDERS:
        raise InputError(
            f"--orders all: rows of {data.num_choices} choices have {math.factorial(data.num_choices):,} orders. Give "
            "rotations, or a number."
        )
    is_known = args.part == "all" and not args.streaming
    blank = find_blank(data.loaded[0], args.on_bad_row) if is_known and is_main else {}

    from accelerate import PartialState

    from vqa_sft.inference import scorer
    from vqa_sft.models import processes as launch

    launch.check_processes(args.use_cpu)
    with explains((ValueError, RuntimeError), "the processes do not find each other: use accelerate launch"):
        PartialState(cpu=args.use_cpu)
    blank = launch.from_main(blank)

    # One pass for the runs that one model scores together; for a run's own validation rows one for each run.
    groups = scorer.groups_of(runs)
    rows_of = {run.folder: rows for run, rows in zip(runs, data.of_run, strict=True)}
    runs = [run for group in groups for run in group]
    precisions = {group[0].folder or "none": scorer.precision_of(group[0], args.use_cpu) for group in groups}
    for group in groups[1:] * is_main:
        names = ", ".join(run.folder for run in group)
        print(f"Speed: the base is loaded again for {names}: another base, prompt, image size or adapter.")
    if args.part == VALIDATION:
        passes = [Pass(group, [i], rows_of[run.folder]) for group in groups for i, run in enumerate(group)]
    else:
        passes = [Pass(group, [*range(len(group))], rows_of[group[0].folder]) for group in groups]
    goes_on = "goes on with what was scored."
    with explains_breakdown(f"for {args.output}", lambda: goes_on):
        plan = describe_plan(args, runs, data) | {"precision": precisions} if is_main else {}
        parts, is_begun = launch.from_main(shards.open_parts(Path(args.output), plan) if is_main else None)
        if is_begun and is_main:
            print(f"Going on with what {parts} holds.")
        loaded_group, model = None, None
        for number, of_pass in enumerate(passes):
            for block, examples in enumerate(blocks_of(of_pass.examples)):
                folder = parts / f"pass{number}-block{block}"
                if args.streaming and is_main:  # whose images the plan does not know
                    shards.begin_block(folder, digest_rows(examples))
                if launch.from_main(shards.is_finished(folder) if is_main else None):
                    continue
                if loaded_group != of_pass.group:
                    model = None  # its memory is needed
                    how = load_options(args, data) | {"precision": precisions[of_pass.group[0].folder or "none"]}
                    model, loaded_group = scorer.load(of_pass.group, examples=examples, **how), of_pass.group
                if args.streaming:
                    found = find_blank(replace(data.loaded[0], examples=examples), args.on_bad_row) if is_main else {}
                    blank = launch.from_main(found)
                score(args, model, of_pass.runs, examples, blank, folder, guessed_rows(data, examples))
        if is_main:
            written_as = answers_as(submission_columns(data.loaded[0].columns, data.trained, args.answer_format))
            about = {run.folder or "none": about_run(args, run, views) for run in runs}
            for group in groups:
                for run in group:
                    about[run.folder or "none"] |= {
                        "precision": precisions[group[0].folder or "none"],
                        ANSWERS: written_as,
                    }
            print(finish(args, data, about, len(passes), parts))
            shutil.rmtree(parts)
    launch.leave()


def score(
    args: argparse.Namespace,
    model: Any,
    runs: Sequence[int],
    examples: Dataset,
    blank: dict[str, Any],
    folder: Path,
    guessed: set[str],
) -> None:
    """Score a block of rows, all but those that are scored already, into `folder` and the file beside it. Rows of fewer
    than two choices are not shown to the model."""
    from accelerate import PartialState

    from vqa_sft.models import processes as launch
    from vqa_sft.models.scoring import plan_batches, score_batches

    state = PartialState()
    collators = model.collators(args.orders, args.scales, blank)
    unasked = {row for row, choices in enumerate(examples["choices"]) if len(choices) < 2}
    asked = examples.select([row for row in range(len(examples)) if row not in unasked]) if unasked else examples
    model.fill_store(collators, asked, args.batch_size, args.num_workers)
    done = launch.from_main(shards.rows_done(folder) if state.is_main_process else None)
    batches = plan_batches(examples, args.orders, args.batch_size)
    batches = [[row for row in batch if row not in unasked] for batch in batches]
    batches = [batch for batch in batches if not done.issuperset(batch)]
    scored = shards.Shards(folder)
    if state.is_main_process and (left := sorted(unasked - done)):
        of_scales = [[0.0]] * len(args.scales) if len(args.scales) > 1 else []
        of_row = [[0.0]] * len(runs), [1.0] * len(runs), [of_scales] * len(runs)  # their only choice is certain
        scored.add(left, *([value] * len(left) for value in of_row))
    how = {"precision": model.precision, "num_workers": args.num_workers, "average": args.average}
    how |= {"adapters": model.adapters, "runs": runs}
    try:
        for batch in score_batches(model.model, examples, batches, collators, model.letter_ids, **how):
            scored.add(batch.rows, batch.choice_logits, batch.agreement, batch.scale_logits)
    finally:
        scored.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        ids = examples["id"][:]
        blanked = [row_id in blank or row_id in guessed for row_id in ids]
        beside = {"id": ids, "answer": examples["answer"][:], "blanked": blanked, "digest": digests_of(examples)}
        beside["choices"] = [texts or [""] for texts in examples["choices"]]
        shards.finish_block(folder, pa.table(beside))
    state.wait_for_everyone()


def finish(args: argparse.Namespace, data: Data, about: dict[str, dict], num_passes: int, parts: Path) -> str:
    """Write the results; what was done, in words. `about` holds the metadata of each run."""
    blocks = blocks_of_runs(parts, num_passes)
    if args.part == VALIDATION:
        ids = [row_id for source in data.loaded for row_id in source.examples["id"]]
        blocks = block_of_parts(parts, num_passes, ids)
        for metadata in about.values():
            metadata["split"] = VALIDATION if len(about) == 1 else "out-of-fold"
    how = (style_of(args, data), args.average_runs)
    num_rows, blanked = write_results(Path(args.output), parts, blocks, about, *how)
    said = f"Wrote {num_rows:,} answers to {args.output}"
    if blanked:
        said += f"\nGuessed, because something of them could not be used: {name_rows(blanked, num_rows)}"
    bare = [folder for folder, metadata in about.items() if "calibration" not in metadata]
    if bare and bare != ["none"] and args.part == "all":
        key = views_key(about[bare[0]])
        said += f"\nProbabilities are as they were scored: no temperature is known of {', '.join(bare)} for {key}. To "
        said += "find one: --part validation with the same views, then vqa-sft calibrate."
    return said


def about_run(args: argparse.Namespace, run: Run, metadata: dict) -> dict[str, Any]:
    """The metadata of a run's prediction file, with the temperature that was found for it and these views."""
    about = metadata | {
        "base_model": run.base_model,
        "run": run.folder,
        "prompts_digest": run.prompts.digest,
    }
    # A temperature is fitted on validation rows as they were scored.
    found = read_calibration(run.folder, metadata) if run.folder and args.part == "all" else None
    return about | ({"calibration": found.as_dict} if found else {})


def style_of(args: argparse.Namespace, data: Data) -> Style:
    """How the submission is written: as the template, else in the names and the answer format of the data, or those of
    training where the data have no answers. Raises InputError for a template of other rows."""
    columns = submission_columns(data.loaded[0].columns, data.trained, args.answer_format)
    if args.template:
        rows = data.loaded[0].examples
        counts, choices = list(map(len, rows["choices"])), rows["choices"][:]
        how = (args.answer_format, choices, answers_as(columns))
        return Style.from_template(args.template, rows["id"][:], counts, *how)
    return Style.plain(args.answer_format, data.num_choices, answers_as(columns))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        help="run folders (one that `fold: all` made stands for its folds), or none to score a base model as it is",
    )
    parser.add_argument("--model", help="base model of --run none; of a run, where its base is now")
    parser.add_argument("--data", help="file (CSV, TSV, JSONL, Parquet) or glob, saved or Hub dataset")
    parser.add_argument(
        "--part",
        choices=("all", VALIDATION),
        default="all",
        help="all rows of --data, or each run's own validation rows, of all folds those out of fold; --data is "
        "then what the run was trained on, by default where its recipe says",
    )
    parser.add_argument("--output", required=True, help="submission to write (.csv)")
    parser.add_argument("--split", default="test", help="split of a Hub dataset (default: test)")
    parser.add_argument("--data_config", help="configuration of a Hub dataset")
    parser.add_argument("--image_root", help="folder of the images; default: the folder of the file")
    parser.add_argument("--columns", type=mapping, help="as in a recipe: '{id: key, image: photo}'; default: found")
    parser.add_argument("--fixed_question", help="the question of every row; default: as in training")
    parser.add_argument("--fixed_choices", nargs="+", help="the choices of every row; default: as in training")
    parser.add_argument("--keep_rows", type=mapping, help="as in a recipe: '{column: value}'")
    parser.add_argument("--answer_format", choices=STYLES, help="how answers are written; default: as in training")
    parser.add_argument("--template", help="a contest's sample submission, whose columns, rows and letters are taken")
    parser.add_argument("--encoding", help="of text files; default: detected")
    parser.add_argument(
        "--on_bad_row",
        choices=("error", "guess"),
        default="error",
        help="rows whose image, question or choices cannot be used: stop, or answer without them, mark and count them",
    )
    parser.add_argument(
        "--orders",
        type=orders,
        default="identity",
        metavar="ORDERS",
        help="of the choices in which each row is scored: identity (default), rotations (each choice once under each "
        f"letter), all, or a number of them; at most {MOST_ORDERS}. Choices that refer to others keep their places",
    )
    parser.add_argument(
        "--scales",
        type=scales,
        default=[1.0],
        metavar="0.9,1.0,1.1",
        help="of the images' sides, one pass over the data each (default: 1.0; Qwen2.5-VL and Qwen3-VL), with the "
        "weights that vqa-sft calibrate found, else equal ones",
    )
    parser.add_argument(
        "--average",
        choices=("mean", "log"),
        default="mean",
        help="over orders and scales: of the probabilities (default), or of their logarithms",
    )
    parser.add_argument(
        "--average_runs",
        choices=AVERAGES,
        default="log",
        help="over several runs: of the logarithms of their calibrated probabilities (default), of the probabilities, "
        "or of their votes",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="rows per forward and process, each order counted as one"
    )
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read images")
    parser.add_argument(
        "--compile_layers",
        action=argparse.BooleanOptionalAction,
        help="compile the layers, about a minute at the start; default: for thousands of rows",
    )
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument(
        "--streaming", action="store_true", help="read rows as they are needed: memory does not grow with them"
    )
    parser.add_argument("--min_pixels", type=int, help="with --run none; a run has its own")
    parser.add_argument("--max_pixels", type=int, help="with --run none; a run has its own")
    parser.add_argument("--use_cpu", action="store_true", help="do not use the GPU")
    args = parser.parse_args()
    if "none" in args.run and (len(args.run) > 1 or args.part != "all"):
        raise InputError("--run none scores a base model alone, and has no validation rows.")
    if "none" in args.run and args.model is None:
        raise InputError("--run none needs --model: the base model to score.")
    if "none" not in args.run and (args.min_pixels, args.max_pixels) != (None, None):
        raise InputError("min_pixels and max_pixels belong to the run; they go with --run none only.")
    if args.data is None and args.part == "all":
        raise InputError("--data is missing: the rows to score.")
    if args.part == VALIDATION and (args.streaming or args.limit or args.template):
        raise InputError("--part validation scores the run's own rows: no --streaming, --limit or --template with it.")
    if args.part == VALIDATION and args.on_bad_row != "error":
        raise InputError("--part validation: bad rows were found in training. Leave --on_bad_row out.")
    if args.template and args.streaming:
        raise InputError("--template needs rows that are known. Leave it out, and give it to vqa-sft submit later.")
    for name, low in (("batch_size", 1), ("num_workers", 0), ("limit", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise InputError(f"--{name} must be at least {low}; got {getattr(args, name)}.")
    check_columns(args.columns or {})
    check_fixed(args.fixed_question, args.fixed_choices)
    return args


def orders(text: str) -> str | int:
    """What mcq.view_orders takes."""
    if text in ("identity", "rotations", "all"):
        return text
    if not text.isdecimal() or not 1 <= int(text) <= MOST_ORDERS:
        known = f"identity, rotations, all or a number from 1 to {MOST_ORDERS}"
        raise argparse.ArgumentTypeError(f"{known} is needed; got {text!r}.")
    return int(text)


def scales(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0.25 <= scale <= 4 for scale in found) or len(set(found)) < len(found):
        known = "different numbers from 0.25 to 4, such as 0.9,1.0,1.1,"
        raise argparse.ArgumentTypeError(f"{known} are needed; got {text!r}.")
    return found


def mapping(text: str) -> dict:
    """A mapping in YAML's short form, as a recipe writes it."""
    try:
        value = settle_words(load_yaml(text), are_texts=True)
    except (yaml.YAMLError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a mapping such as '{{id: key}}' is needed; got {text!r}.")
    return value


def base_run(args: argparse.Namespace) -> Run:
    """A base model that nobody fine-tuned, with our default prompts."""
    own = RecipeArguments(train_data="none", min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    recipe = {"model_name_or_path": args.model, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    return Run(None, recipe, own.prompts)


def data_options(args: argparse.Namespace, recipe: dict, trained: Columns | None) -> ReadOptions:
    """How to read the data: as given here, else as the recipe of the run says where that fits, else found again."""
    names = ("keep_rows", "encoding", "fixed_question", "fixed_choices")
    options = {name: getattr(args, name) or recipe.get(name) for name in names}
    given, named = args.columns or {}, recipe.get("columns")
    for role in ("question", "choices"):
        if given.get(role) and getattr(args, f"fixed_{role}") is None:  # a column in place of what was the same for all
            options[f"fixed_{role}"] = None
        elif getattr(args, f"fixed_{role}") is not None:
            named = {key: name for key, name in (named or {}).items() if key != role}
    options["columns"] = {key: name for key, name in given.items() if key != "targets"}
    options |= {"known_columns": known_columns(trained, named), "trained": trained}
    options["empty_cells"] = recipe.get("empty_cells")
    options["image_root"] = args.image_root  # test images lie where the test data say, not where training did
    options["answer_format"] = args.answer_format if args.answer_format != PROBABILITIES else None
    options |= {"split": args.split, "config": args.data_config, "limit": args.limit}
    return ReadOptions(**options, answers="optional", on_bad_row=args.on_bad_row)


def read_data(args: argparse.Namespace, runs: list[Run]) -> Data:
    """The rows to be scored by each run."""
    trained = runs[0].columns
    if args.part == VALIDATION:
        return read_validation(args, runs)
    options = data_options(args, runs[0].recipe, trained)
    known = [run.num_letters for run in runs if run.num_letters]
    if args.streaming:
        loaded = stream_examples(args.data, replace(options, max_choices=min(known, default=None)))
    else:
        loaded = read_examples(args.data, options)
        loaded.problems.raise_if_any(loaded.name, args.on_bad_row, PREDICTION_HINT)
        if loaded.num_choices > min(known, default=26):
            beyond = f"{loaded.name}: rows of up to {loaded.num_choices} choices, and training had at most {min(known)}"
            loaded.notes.append(f"{beyond}; letters after {LETTERS[min(known) - 1]} are as the base knows them")
    return Data([loaded], [loaded.examples] * len(runs), trained)


def read_validation(args: argparse.Namespace, runs: list[Run]) -> Data:
    """Every run's own validation rows, as its recipe reads them."""
    sources, of_run = {}, []
    for run in runs:
        own = RecipeArguments.of_run(run.recipe)
        image_root = args.image_root or own.image_root
        named = []
        if not own.streaming:  # a stream is trained on as a whole
            named.append((args.data or own.train_data, replace(own.data_options, image_root=image_root)))
        if own.validation_data is not None:
            options = own.options_for_other_data(run.columns)
            named.append((own.validation_data, replace(options, image_root=image_root)))
        if not named:
            raise _no_validation_rows(run)
        key = repr(named)
        if key not in sources:
            sources[key] = [read_examples(source, options) for source, options in named]
            for source in sources[key]:
                source.problems.raise_if_any(source.name, own.on_bad_row)
        hint = "Give --data with the rows that it was trained on, in their order."
        rows = select(sources[key], read_parts(run.folder, sources[key], hint, VALIDATION), VALIDATION)
        if rows is None:
            raise _no_validation_rows(run)
        of_run.append(rows)
    if len(sources) > 1:
        raise InputError("the runs were trained on different data. Score the validation rows of one at a time.")
    ids = [row_id for rows in of_run for row_id in rows["id"]]
    twice = [row_id for row_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"several of the runs validate on {name_rows(twice, len(ids))}. Give the folds of one run.")
    return Data(next(iter(sources.values())), of_run, runs[0].columns)


def _no_validation_rows(run: Run) -> InputError:
    return InputError(f"{run.folder} was trained without validation rows. Give --data with rows it has not seen.")


def blocks_of(examples: Dataset | IterableDataset) -> Iterator[Dataset]:
    """The rows, of a stream some at a time."""
    if isinstance(examples, Dataset):
        yield examples
        return
    rows: list[dict] = []
    seen: set[int] = set()  # 70 to 90 bytes a row
    for row in examples:
        if hash(row["id"]) in seen:
            raise InputError(f"the id {row['id']} stands more than once in the data. Give every row one of its own.")
        seen.add(hash(row["id"]))
        rows.append(row)
        if len(rows) == shards.BLOCK_ROWS:
            yield Dataset.from_list(rows, features=examples.features)
            rows = []
    if rows:
        yield Dataset.from_list(rows, features=examples.features)


def load_options(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """What scorer.load takes beside the runs and the rows."""
    num_views = len(view_orders(data.num_choices, args.orders)) * len(args.scales)
    return {"compile_layers": args.compile_layers, "most_choices": data.num_choices, "views_a_row": num_views}


def describe_plan(args: argparse.Namespace, runs: list[Run], data: Data) -> dict[str, Any]:
    """What the numbers depend on: another plan begins anew."""
    names = ("model", "part", "data", "orders", "scales", "average", "batch_size", "on_bad_row", "streaming")
    names += ("min_pixels", "max_pixels", "limit", "use_cpu", "columns", "keep_rows", "image_root", "split")
    names += ("data_config", "encoding", "answer_format", "fixed_question", "fixed_choices")
    plan: dict[str, Any] = {name: getattr(args, name) for name in names}
    for folder in [
        *(run.folder or "none" for run in runs),
        *{run.base_model for run in runs},
    ]:  # a base may be a folder
        files = [path for pattern in MODEL_FILES for path in sorted(Path(folder).glob(pattern))]
        plan.setdefault("models", []).append([folder, [describe_file(path) for path in files]])
    digest = hashlib.sha256()
    for source in data.loaded:
        digest.update(f"{source.name} {source.columns}".encode())
        if isinstance(source.examples, Dataset):
            digest.update(digest_rows(source.examples).encode())
        else:  # its rows are not known: the files that they come from
            files = find_files([args.data]) or sorted(Path(args.data).rglob("*"))
            digest.update(json.dumps([describe_file(path) for path in files]).encode())
    return plan | {"rows": digest.hexdigest(), "columns of rows": [*Block.COLUMNS]}


def digest_rows(examples: Dataset) -> str:
    """What tells rows from others: their texts and answers, and what `describe_image` says."""
    digest = hashlib.sha256()
    for row in examples.select_columns(["id", "question", "context", "choices", "answer", "images"]):
        images = [describe_image(image) for image in row.pop("images")]
        digest.update(json.dumps([row, images]).encode())
    return digest.hexdigest()


def describe_image(image: dict) -> list:
    """What tells one {bytes, path} from another: its content, or the path, size and time of its file."""
    if image["bytes"] is not None:
        return [hashlib.sha256(image["bytes"]).hexdigest()]
    return describe_file(image["path"])


def describe_file(path: str | Path) -> list:
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return [str(path)]
    return [str(path), facts.st_size, facts.st_mtime_ns]


def find_blank(loaded: Loaded, on_bad_row: str) -> dict[str, tuple[int, ...]]:
    """Row id -> positions of its images that cannot be used; raises InputError for them unless they may be guessed."""
    scan, problems = scan_images(loaded.examples, hashes=False), Problems(len(loaded.examples))
    scan.add_problems(problems, loaded.examples["id"][:], loaded.numbers or None)
    problems.raise_if_any(loaded.name, on_bad_row, PREDICTION_HINT)
    return {row_id: scan.bad(row) for row, row_id in enumerate(loaded.examples["id"]) if scan.bad(row)}


def guessed_rows(data: Data, examples: Dataset) -> set[str]:
    """Ids of the rows that are answered although something is missing from their texts, or an image was not opened."""
    found = set()
    for source in data.loaded:
        numbers = {*source.problems.bad_rows(*GUESSED)}
        if numbers and isinstance(source.examples, Dataset):
            found |= {i for i, number in zip(source.examples["id"], source.numbers, strict=True) if number in numbers}
    for row in examples.select_columns(["id", "question", "choices"]):  # of a stream nothing else is known
        if not row["question"] or len({*row["choices"]}) < 2:
            found.add(row["id"])
    return found


def submission_columns(columns: Columns, trained: Columns | None, answer_format: str | None) -> Columns:
    """The names and the answer format of a submission: the data's own, or those of training where it has no answers."""
    how = {"id": columns.id or "id", "answer": columns.answer or (trained and trained.answer) or "answer"}
    if columns.answer_format is None and trained is not None:  # no row has an answer
        how |= {"answer_format": trained.answer_format, "answers_are_upper": trained.answers_are_upper}
    return replace(columns, **how | ({"answer_format": answer_format} if answer_format in FORMATS else {}))


if __name__ == "__main__":
    main()
