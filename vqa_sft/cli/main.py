"""`vqa-sft check | folds | score | calibrate | submit | ...`: laptop tools, a thin shell over the modules."""

import argparse
import contextlib
import json
import sys
import typing
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqa_sft.environment import set_library_defaults
from vqa_sft.errors import InputError, exits_with_message, printable
from vqa_sft.files import whole, write_whole

if TYPE_CHECKING:
    from vqa_sft.config.recipe import RecipeArguments
    from vqa_sft.data.examples import Loaded
    from vqa_sft.data.folds import Deviation
    from vqa_sft.data.problems import Problems

# How the data or the answers beside a prediction file are read; as fields of a recipe, but for the split.
DATA_OPTIONS = ("columns", "answer_format", "encoding", "keep_rows", "empty_cells", "image_root", "data_config")
DATA_OPTIONS += ("fixed_question", "fixed_choices")
# Options of SOURCE that a recipe has under the same names; a data file has only these.
SOURCE_OPTIONS = (
    "train_split",
    "data_config",
    "image_root",
    "columns",
    "answer_format",
    "encoding",
    "limit",
    "duplicate_distance",
)
# And those that follow as --key value, for a data file too.
DATA_FIELDS = ("keep_rows", "empty_cells", "fixed_question", "fixed_choices", "max_choices", "validation_data")
DATA_FIELDS += ("validation_split", "on_bad_row")
FOLDS_START = b'"id","fold"'  # how a folds file begins
MAX_COMPARED = 20_000  # rows for which scikit-learn's folds are made too; it needs seconds
JSON_START = '{\n "clean"'  # how a report begins


@exits_with_message
def main() -> None:
    set_library_defaults()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of the data
    parser = argparse.ArgumentParser(
        prog="vqa-sft",
        description="Check data, make folds; score, calibrate and combine predictions; average, merge and push runs.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_check(commands)
    _add_folds(commands)
    _add_memory(commands)

    _add_score(commands)
    _add_calibrate(commands)
    _add_ensemble(commands)
    _add_submit(commands)
    _add_diff(commands)
    _add_doubt(commands)

    soup = commands.add_parser("soup", help="one adapter from several runs: the mean of what they change in the base")
    soup.add_argument("run_folders", nargs="+", metavar="RUN", help="folders of finished runs on one base")
    soup.add_argument("--output", required=True, metavar="FOLDER", help="a new run folder, for predict")
    soup.add_argument("--weights", nargs="+", type=float, metavar="W", help="of the runs; default: equal")
    soup.add_argument("--rank", type=int, metavar="R", help="at most; default: as many as the mean has")
    soup.set_defaults(run=lambda args: print(_soup(args)))

    merge = commands.add_parser("merge", help="whole weights with a run's adapter inside, for transformers or vLLM")
    merge.add_argument("run_folder", metavar="RUN", help="folder of a finished run, or of a soup")
    merge.add_argument("output", metavar="OUT", help="a new folder")
    merge.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: that of the base's checkpoint")
    merge.add_argument("--model", help="where the base is now, if not where it was in training")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier merge in OUT")
    merge.set_defaults(run=lambda args: print(_merge(args)))

    push = commands.add_parser("push", help="upload a finished run to the Hub")
    push.add_argument("run_folder")
    push.add_argument("--repo", help="user/name; default: hub_model_id of the recipe, else the folder's name")
    push.add_argument("--private", action="store_true", default=None)
    push.set_defaults(run=lambda args: print(_push(args)))

    args, args.rest = parser.parse_known_args()
    if args.rest and not hasattr(args, "source"):
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    args.run(args)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="read every row and every image, and say what is there and what is wrong",
        description="Read every row and every image, and say what is there and what is wrong with it. Exit code: 0 "
        "no errors, 1 rows with errors, 2 nothing could be read.",
    )
    _add_source(check)
    check.add_argument("--test", metavar="FILE", help="also check a test set, and whether training has its images")
    check.add_argument("--test-image-root", metavar="FOLDER", help="folder of its images; default: that of the file")
    check.add_argument("--fix", metavar="OUT", help="write a copy of the training rows that can be used")
    check.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to a file, or in place of the table")
    check.add_argument("--html", metavar="OUT", help="write a page with plots and sample rows")
    check.add_argument("--max-length", type=int, metavar="N", help="say what share of the prompts N tokens would cut")
    check.set_defaults(run=_check)


def _add_folds(commands: Any) -> None:
    folds = commands.add_parser(
        "folds",
        allow_abbrev=False,
        help="split rows into folds that share no image",
        description="Split rows into folds, balanced by answer, question type and number of choices. Rows with the "
        "same or nearly the same image stay together.",
    )
    _add_source(folds)
    how = folds.add_mutually_exclusive_group(required=True)
    how.add_argument("--num-folds", type=int, metavar="N")
    how.add_argument("--holdout", type=float, metavar="SHARE", help="one split: fold 0 is held out, the rest is -1")
    folds.add_argument("--output", required=True, metavar="FILE", help="CSV of id and fold")
    folds.add_argument("--seed", type=int, help="default: the recipe's, else 42")
    folds.add_argument("--overwrite", action="store_true", help="replace another FILE")
    folds.set_defaults(run=_folds)


def _add_memory(commands: Any) -> None:
    memory = commands.add_parser(
        "memory",
        allow_abbrev=False,
        help="say what a recipe needs of a GPU's memory",
        description="Say what a recipe needs of one GPU's memory, from the shape of its model: without weights and "
        "without a GPU. Exit code: 0, or 1 where it does not fit --gpu-gib, 2 where it cannot be said.",
    )
    memory.add_argument("source", metavar="RECIPE", help="a recipe; its fields may follow as --key value")
    memory.add_argument("--gpu-gib", type=float, metavar="GIB", help="a GPU's memory: say whether and what fits")
    memory.add_argument("--text-tokens", type=int, default=160, metavar="N", help="of a row, with the template")
    memory.add_argument("--images", type=int, default=1, metavar="N", help="of a row, each of max_pixels")
    memory.set_defaults(run=_memory)


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="accuracy, NLL, Brier score and ECE of prediction files, as a table",
        description="Accuracy, NLL (nats), Brier score, ECE (bins of equal width, and of equally many rows), each with "
        "the 95% interval of 1,000 bootstrap resamples. A file that knows its calibration has a line without it and a "
        "line with it. Example: vqa-sft score runs/a/validation.parquet mine=runs/b/validation.parquet",
    )
    score.add_argument("predictions", nargs="+", help="FILE.parquet or NAME=FILE.parquet")
    score.add_argument(
        "--answers",
        metavar="FILE",
        help="ids and answers, or data with answers, read as the run's data are; default: those of the predictions",
    )
    score.add_argument(
        "--data", metavar="TEST", help="the data that were predicted, where answers are written as texts"
    )
    _add_data_options(score)
    score.set_defaults(run=_score)


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="find a run's temperature on rows that it did not train on",
        description="Find how sure a run may be: a temperature, and a bias of its letters where that proves itself; of "
        "images at several scales also what weight each has. "
        "Written to calibration.json in RUN, which later predictions with the same orders and scales use. Prints what "
        "it does to NLL, Brier score and ECE. Example: vqa-sft calibrate runs/mine",
    )
    calibrate.add_argument("run_folder", metavar="RUN", help="folder of a finished run, or of all its folds")
    calibrate.add_argument(
        "--predictions",
        metavar="FILE",
        help="prediction file of this run with answers; default: out_of_fold.parquet in RUN, else validation.parquet",
    )
    calibrate.set_defaults(run=_calibrate)


def _add_ensemble(commands: Any) -> None:
    ensemble = commands.add_parser(
        "ensemble",
        help="one prediction file from several: a weighted mean of their calibrated probabilities",
        description="One prediction file from several for the same rows, aligned by id. Example: vqa-sft ensemble "
        "a/test.parquet b/test.parquet --output both.parquet --weights learned --learn-on a/out_of_fold.parquet "
        "b/out_of_fold.parquet",
    )
    ensemble.add_argument("predictions", nargs="+", metavar="FILE", help="prediction files; the first gives the order")
    ensemble.add_argument("--output", required=True, metavar="OUT", help="prediction file to write (.parquet)")
    ensemble.add_argument(
        "--average",
        choices=("mean", "log", "vote"),
        default="mean",
        help="of probabilities (default), of their logarithms (the geometric mean), or of best choices: 0.99 of a vote "
        "goes to its choice, the rest to all",
    )
    ensemble.add_argument(
        "--weights",
        default="mean",
        metavar="W",
        help="mean (default: equal), learned, numbers such as 0.6,0.4, or a file of --save-weights",
    )
    ensemble.add_argument(
        "--learn-on",
        nargs="+",
        default=[],
        metavar="FILE",
        help="prediction files with answers, one for each FILE in their order, of rows that the runs did not train on; "
        "learned weights that do no better there than equal ones are not used",
    )
    ensemble.add_argument("--save-weights", metavar="JSON", help="write the weights, for --weights")
    ensemble.set_defaults(run=_ensemble)


def _add_submit(commands: Any) -> None:
    from vqa_sft.data.answers import FORMATS

    submit = commands.add_parser(
        "submit",
        help="write a submission from a prediction file, as a contest's sample has it",
        description="Write a submission from a prediction file: id and answer letter, or columns, rows and format as "
        "in a template. Example: vqa-sft submit both.parquet --output submission.csv --template sample_submission.csv",
    )
    submit.add_argument("predictions", metavar="FILE", help="prediction file")
    submit.add_argument("--output", required=True, metavar="CSV", help="submission to write")
    submit.add_argument(
        "--template",
        metavar="CSV",
        help="sample submission: a column with the ids of FILE, and one for the answer or one for the probability of "
        "each choice",
    )
    submit.add_argument(
        "--answer-format",
        choices=(*FORMATS, "probabilities"),
        help="how answers are written; default: as in the template, else as in the run's data",
    )
    submit.add_argument(
        "--data", metavar="TEST", help="the data that were predicted, for answers and columns that are texts of choices"
    )
    _add_data_options(submit, with_format=False)
    submit.add_argument("--overwrite", action="store_true", help="replace a file with other columns")
    submit.set_defaults(run=_submit)


def _add_diff(commands: Any) -> None:
    diff = commands.add_parser(
        "diff",
        help="say which answers changed between two submissions or prediction files",
        description="Say which answers changed between two submissions (.csv) or prediction files (.parquet), aligned "
        "by id. Example: vqa-sft diff old.csv new.csv --data test.csv",
    )
    diff.add_argument("before", metavar="A")
    diff.add_argument("after", metavar="B")
    diff.add_argument("--data", metavar="TEST", help="the data: show the question and both choices of a changed row")
    _add_data_options(diff)
    diff.add_argument("--all", action="store_true", help="name all changed rows, not the first 20")
    diff.set_defaults(run=_diff)


def _add_doubt(commands: Any) -> None:
    doubt = commands.add_parser(
        "doubt",
        help="say how sure each answer is, and give sets that hold the answer as often as asked",
        description="Say how sure each answer of a prediction file is: probability, margin over the second choice, "
        "entropy; where answers are known, what errors are left if the doubtful rows go to somebody else. Example: "
        "vqa-sft doubt test.parquet --coverage 0.9 --calibrate-on runs/mine/validation.parquet --output doubt.csv",
    )
    doubt.add_argument("predictions", metavar="FILE", help="prediction file")
    doubt.add_argument(
        "--coverage",
        type=float,
        metavar="SHARE",
        help="give sets of choices that hold the answer in this share of rows",
    )
    doubt.add_argument(
        "--calibrate-on",
        metavar="HELD_OUT",
        help="prediction file with answers, scored as FILE is and with none of its rows, that says how large the sets "
        "must be: validation or out-of-fold rows, which share none with test rows",
    )
    doubt.add_argument("--output", metavar="CSV", help="write a line for every row")
    doubt.add_argument("--overwrite", action="store_true", help="replace a file with other columns")
    doubt.set_defaults(run=_doubt)


def _score(args: argparse.Namespace) -> None:
    from vqa_sft.predictions.score import score_table

    print(score_table(args.predictions, args.answers, args.data, **_data_options(args)))


def _calibrate(args: argparse.Namespace) -> None:
    from vqa_sft.predictions.calibration import calibrate_run

    print(calibrate_run(args.run_folder, args.predictions))


def _ensemble(args: argparse.Namespace) -> None:
    from vqa_sft.predictions.ensemble import write_ensemble

    how = {"average": args.average, "weights": args.weights, "learn_on": args.learn_on}
    print(write_ensemble(args.predictions, args.output, **how, save_weights=args.save_weights))


def _submit(args: argparse.Namespace) -> None:
    from vqa_sft.predictions.submission import submit

    how = _data_options(args) | {"answer_format": args.answer_format}
    how |= {"template": args.template, "data": args.data, "overwrite": args.overwrite}
    print(submit(args.predictions, args.output, **how))


def _diff(args: argparse.Namespace) -> None:
    from vqa_sft.predictions.compare import describe

    print(describe(args.before, args.after, data=args.data, show_all=args.all, **_data_options(args)))


def _doubt(args: argparse.Namespace) -> None:
    from vqa_sft.predictions.uncertainty import describe

    how = {"coverage": args.coverage, "calibrate_on": args.calibrate_on, "output": args.output}
    print(describe(args.predictions, **how, overwrite=args.overwrite))


def _add_data_options(parser: argparse.ArgumentParser, with_format: bool = True) -> None:
    """Those of `_data_options`; of a parser that has its own --answer-format all others."""
    of = "of the file of answers or of --data"
    parser.add_argument("--columns", help=f"{of}, as in a recipe: '{{id: key, answer: label}}'; default: found")
    if with_format:
        parser.add_argument(
            "--answer-format", help="letter, index_from_0, index_from_1 or text; default: that of the run's data"
        )
    parser.add_argument("--fixed-question", help="the question of every row of --data, as in a recipe")
    parser.add_argument("--fixed-choices", help="the choices of every row of --data, as in a recipe: '[yes, no]'")
    parser.add_argument("--encoding", help=f"{of}; default: detected")
    parser.add_argument("--keep-rows", help=f"{of}, as in a recipe: '{{column: value}}'")
    parser.add_argument("--empty-cells", help="cells of --data that count as empty, as in a recipe: '[NA]'")
    parser.add_argument("--image-root", metavar="FOLDER", help="folder that image paths of --data are relative to")
    parser.add_argument("--split", help="of a Hub dataset (default: test)")
    parser.add_argument("--data-config", help="configuration of a Hub dataset")


def _data_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `matched.read_rows` takes: the options of `_add_data_options` that were given, checked as in a recipe."""
    from vqa_sft.config.fields import checked, from_tokens
    from vqa_sft.config.recipe import RecipeArguments
    from vqa_sft.data.columns import check_columns, check_fixed

    given = {name: getattr(args, name) for name in DATA_OPTIONS if getattr(args, name, None) is not None}
    if given.get("answer_format") == "probabilities":  # of submit, and no format of data
        del given["answer_format"]
    known = {name: (hint, None) for name, hint in typing.get_type_hints(RecipeArguments).items()}
    values = {name: checked(name, from_tokens(name, [value], known), known) for name, value in given.items()}
    check_columns(values.get("columns") or {})
    check_fixed(values.get("fixed_question"), values.get("fixed_choices"))
    if "data_config" in values:
        values["config"] = values.pop("data_config")
    return values | ({"split": args.split} if args.split else {})


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"As in a recipe, for a data file too: --{', --'.join(DATA_FIELDS)}."
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a recipe (its fields may follow as --key value), a data file, a glob, a saved or Hub dataset",
    )
    parser.add_argument("--split", dest="train_split", help="split of a Hub dataset (default: train)")
    parser.add_argument("--data-config", help="configuration of a Hub dataset")
    parser.add_argument("--image-root", metavar="FOLDER", help="folder that image paths are relative to")
    parser.add_argument("--columns", help="as in a recipe: '{id: key, image: photo}'; default: found")
    parser.add_argument("--answer-format", help="letter, index_from_0, index_from_1 or text; default: inferred")
    parser.add_argument("--encoding", help="of text files; default: detected")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    parser.add_argument(
        "--distance",
        dest="duplicate_distance",
        metavar="BITS",
        help="by which the hashes of nearly the same images may differ; null: equal files only",
    )


def _arguments(args: argparse.Namespace) -> "tuple[RecipeArguments, dict[str, Any]]":
    """The fields of the recipe (or what a data file makes of them) and its values, which a data file has not."""
    from vqa_sft.config.fields import checked, from_tokens, read_command_line
    from vqa_sft.config.recipe import RecipeArguments, read_recipe

    given = {name: str(getattr(args, name)) for name in SOURCE_OPTIONS if getattr(args, name, None) is not None}
    if Path(args.source).suffix in (".yaml", ".yml"):
        overrides = [f"--{name}={value}" for name, value in given.items()]
        recipe = read_recipe(["--config", args.source, *overrides, *args.rest])
        return recipe.arguments, recipe.values
    known = {name: (hint, None) for name, hint in typing.get_type_hints(RecipeArguments).items()}
    tokens = {name: [value] for name, value in given.items()} | read_command_line(args.rest)
    unknown = [name for name in tokens if name not in (*SOURCE_OPTIONS, *DATA_FIELDS)]
    if unknown:
        raise InputError(
            f"--{printable(unknown[0])} is no option for a data file; only a recipe has more fields than "
            f"{', '.join((*SOURCE_OPTIONS, *DATA_FIELDS))}."
        )
    values = {name: checked(name, from_tokens(name, words, known), known) for name, words in tokens.items()}
    return RecipeArguments(train_data=args.source, **values), {}


def _check(args: argparse.Namespace) -> None:
    from vqa_sft.data.check import as_dict, check
    from vqa_sft.data.fix import check_copy
    from vqa_sft.report.check_page import describe, write_page

    with contextlib.redirect_stdout(sys.stderr):  # where libraries may say what they like
        arguments, values = _arguments(args)
        _check_outputs(args)
        if args.fix:
            if arguments.limit:
                raise InputError("--fix copies the whole file, and limit checks its first rows only. Give one of them.")
            check_copy(args.fix, arguments.train_data, arguments.image_root)
        data = _read_data(arguments, args.test, args.test_image_root)
        processor, tokens_note = _load_processor(arguments, values)
        how = {"distance": arguments.duplicate_distance, "prompts": arguments.prompts, "max_length": args.max_length}
        reports = check(data, processor=processor, tokens_note=tokens_note, **how)
    # ASCII, for a terminal obeys some characters that JSON leaves as they are.
    text = json.dumps(as_dict(reports), indent=1)
    if args.json not in (None, "-"):
        write_whole(args.json, text + "\n")
    print(text if args.json == "-" else describe(reports))
    if args.html:
        write_page(args.html, reports)
    if args.fix and reports[0].num_bad == reports[0].num_rows:
        print(f"No row can be used, so {args.fix} was not written.")
    elif args.fix:
        print(_fix(args.fix, arguments, data[0][1].problems), file=sys.stderr if args.json == "-" else sys.stdout)
    sys.exit(int(any(report.num_bad for report in reports)))


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError, before everything is read, where the JSON or the page cannot be written."""
    from vqa_sft.report.check_page import PAGE_START

    for name, suffix, start in (("json", ".json", JSON_START), ("html", ".html", PAGE_START)):
        if getattr(args, name) in (None, "-"):
            continue
        path = Path(getattr(args, name))
        if path.suffix.lower() != suffix:
            raise InputError(f"--{name} writes a {suffix} file; got {path}.")
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent} to write {path.name} into.")
        if path.exists() and not path.read_bytes().startswith(start.encode()):
            raise InputError(f"{path} exists and is no report of `vqa-sft check`. Name another file.")


def _read_data(
    arguments: "RecipeArguments", test: str | None = None, test_image_root: str | None = None
) -> "list[tuple[str, Loaded]]":
    """(role, rows) of the training, the validation and the test data; only texts are read."""
    from vqa_sft.data.check import TEST, TRAINING, VALIDATION
    from vqa_sft.data.examples import read_examples

    if arguments.streaming:
        raise InputError(
            "the recipe streams its rows, and they are only checked as a whole. Give --streaming false (a Hub dataset "
            "is then downloaded), or a part of it: --streaming false --split 'train[:1000]'."
        )
    rows = read_examples(arguments.train_data, arguments.data_options)
    data = [(TRAINING, rows)]
    options = arguments.options_for_other_data(rows.columns)
    if arguments.validation_data:
        data.append((VALIDATION, read_examples(arguments.validation_data, options)))
    if test:
        # Test images lie where the test data say, not where training did.
        options = replace(options, split="test", answers="optional", image_root=test_image_root, limit=None)
        data.append((TEST, read_examples(test, options)))
    return data


def _load_processor(arguments: "RecipeArguments", values: dict[str, Any]) -> tuple[Any, str]:
    """The processor of the recipe's model, or None and why there is none."""
    if not values:
        return None, "a data file names no model; check a recipe."
    from vqa_sft.models.load import load_processor

    try:
        processor = load_processor(
            values["model_name_or_path"],
            min_pixels=arguments.min_pixels,
            max_pixels=arguments.max_pixels,
            revision=values.get("model_revision", "main"),
            trust_remote_code=values.get("trust_remote_code", False),
        )
    except InputError as error:
        return None, str(error)
    return processor, ""


def _fix(path: str, arguments: "RecipeArguments", problems: "Problems") -> str:
    """Write the copy; returns what was left out."""
    from vqa_sft.data.fix import describe_copy, write_copy
    from vqa_sft.data.sources import open_source

    options = {"config": arguments.data_config, "encoding": arguments.encoding}
    source = open_source(arguments.train_data, split=arguments.train_split, **options)
    num_rows = write_copy(path, source, problems.bad_rows())
    return describe_copy(path, num_rows, arguments.train_data, arguments.image_root, problems)


def _folds(args: argparse.Namespace) -> None:
    from vqa_sft.data.duplicates import row_groups
    from vqa_sft.data.folds import hold_out_rows, make_folds, max_deviation
    from vqa_sft.data.scan import scan_images
    from vqa_sft.data.split import strata_of
    from vqa_sft.report.check_page import describe_folds, printable_line

    arguments, values = _arguments(args)
    _check_folds_file(args.output)
    seed = args.seed if args.seed is not None else values.get("seed", 42)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be between 0 and {2**32 - 1}; got {seed}.")
    ((_, loaded),) = _read_data(replace(arguments, validation_data=None))
    for note in loaded.notes:
        print(printable_line(note))
    loaded.problems.raise_if_any(loaded.name, arguments.on_bad_row)
    scan = scan_images(loaded.examples)
    scan.add_problems(loaded.problems, loaded.examples["id"], loaded.numbers)
    loaded.problems.raise_if_any(loaded.name, arguments.on_bad_row)
    groups, strata = row_groups(scan, arguments.duplicate_distance), strata_of(loaded.examples)
    if args.holdout is None:
        folds, shares = make_folds(strata, groups, args.num_folds, seed), [1 / args.num_folds] * args.num_folds
        deviation, plain = max_deviation(strata, folds, shares), _plain_deviation(strata, groups, args.num_folds, seed)
    else:
        folds = [0 if held_out else -1 for held_out in hold_out_rows(strata, groups, args.holdout, seed)]
        deviation, plain = max_deviation(strata, folds, [args.holdout, 1 - args.holdout]), None
    _write_folds(args.output, loaded.examples["id"][:], folds, args.overwrite)
    print(describe_folds(folds, groups, deviation, plain))
    print(f"\nWrote {args.output}. To train without fold 0 and validate on it:\n  folds_file: {args.output}\n  fold: 0")


def _plain_deviation(strata: list[tuple], groups: list[int], num_folds: int, seed: int) -> "Deviation | None":
    """That of scikit-learn's folds, where they can be made and take no time."""
    if len(strata) > MAX_COMPARED:
        return None
    from sklearn.model_selection import StratifiedGroupKFold

    from vqa_sft.data.folds import max_deviation

    numbers: dict[tuple, int] = {}
    labels = [numbers.setdefault(stratum, len(numbers)) for stratum in strata]
    folds = [0] * len(strata)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings(action="ignore"):  # strata with fewer rows than folds
            for fold, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
                for row in rows:
                    folds[row] = fold
    except ValueError:  # no stratum has as many rows as there are folds
        return None
    return max_deviation(strata, folds, [1 / num_folds] * num_folds)


def _check_folds_file(path: str) -> None:
    """Raises InputError for what cannot be, or must not be, written."""
    if Path(path).suffix.lower() != ".csv":
        raise InputError(f"folds are written as .csv; got --output {path}.")
    if Path(path).exists() and not Path(path).read_bytes().startswith(FOLDS_START):
        raise InputError(f"{path} exists and is no file of `vqa-sft folds`. Name another file.")


def _write_folds(path: str, ids: list[str], folds: list[int], overwrite: bool) -> None:
    from vqa_sft.data.folds import write_folds

    with whole(path) as new:
        write_folds(new, ids, folds)
        if Path(path).exists() and not overwrite and Path(path).read_bytes() != new.read_bytes():
            raise InputError(
                f"{path} holds other folds, which runs may rely on. Name another file, or give --overwrite."
            )


def _memory(args: argparse.Namespace) -> None:
    for name, value in (("gpu-gib", args.gpu_gib), ("text-tokens", args.text_tokens), ("images", args.images)):
        if value is not None and not 0 < value < 1e9:
            raise InputError(f"--{name} must be above 0; got {value}.")
    if Path(args.source).suffix not in (".yaml", ".yml"):
        raise InputError(f"memory needs a recipe (.yaml); got {args.source}.")
    from vqa_sft.config.recipe import read_recipe
    from vqa_sft.models.memory.describe import describe_recipe

    with contextlib.redirect_stdout(sys.stderr):  # where libraries may say what they like
        recipe = read_recipe(["--config", args.source, *args.rest])
        text, fits = describe_recipe(recipe, text_tokens=args.text_tokens, images=args.images, gpu_gib=args.gpu_gib)
    print(text)
    sys.exit(int(not fits))


def _soup(args: argparse.Namespace) -> str:
    from vqa_sft.runs.soup import make_soup

    if args.rank is not None and args.rank < 1:
        raise InputError(f"--rank must be at least 1; got {args.rank}.")
    return make_soup(args.run_folders, args.output, weights=args.weights, rank=args.rank)


def _merge(args: argparse.Namespace) -> str:
    from vqa_sft.runs.merge import merge_run

    return merge_run(args.run_folder, args.output, dtype=args.dtype, overwrite=args.overwrite, model=args.model)


def _push(args: argparse.Namespace) -> str:
    from vqa_sft.runs.hub import push_run

    return push_run(args.run_folder, args.repo, private=args.private)


if __name__ == "__main__":
    main()
