"""Commands on data: `check` and `folds`. Their source is a recipe, or data as `train_data` names them in one."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from vqa_sft.cli.options import SourceOptions, with_options
from vqa_sft.errors import InputError

if TYPE_CHECKING:
    from vqa_sft.config.training import RecipeArguments
    from vqa_sft.data.examples import Loaded
    from vqa_sft.data.problems import Problems
    from vqa_sft.data.scan import Scan

JSON_START = '{\n "clean"'  # how a report begins
Source = Annotated[
    str,
    Argument(
        metavar="SOURCE",
        help="a recipe (its fields may follow as --key value), a data file, a glob, a saved or Hub dataset",
    ),
]


@with_options(SourceOptions)
def check(
    context: Context,
    source: Source,
    options: SourceOptions,
    test: Annotated[
        str | None, Option(metavar="FILE", help="also check a test set, and whether training has its images")
    ] = None,
    test_image_root: Annotated[
        str | None, Option(metavar="FOLDER", help="folder of its images; default: that of the file")
    ] = None,
    fix: Annotated[str | None, Option(metavar="OUT", help="write a copy of the training rows that can be used")] = None,
    only: Annotated[
        str | None,
        Option(metavar="IDS", help="copy only the rows of this file of ids, a line each, as report gives it"),
    ] = None,
    without: Annotated[
        str | None, Option(metavar="IDS", help="leave the rows of this file out of the copy too")
    ] = None,
    json_file: Annotated[
        str | None, Option("--json", metavar="[FILE]", help="JSON to a file, or in place of the table")
    ] = None,
    html: Annotated[str | None, Option(metavar="OUT", help="write a page with plots and sample rows")] = None,
    max_length: Annotated[
        int | None, Option(metavar="N", help="say what share of the prompts N tokens would cut")
    ] = None,
) -> None:
    """Check every row and every image.

    Prints what there is and what is wrong with it. Exit code: 0 no errors, 1 rows with errors, 2 nothing could be read.
    """
    import json

    from vqa_sft.data.check import check as check_rows
    from vqa_sft.data.fix import choose_by_ids
    from vqa_sft.files import write_whole
    from vqa_sft.report.check_json import as_dict
    from vqa_sft.report.check_page import write_page
    from vqa_sft.report.check_text import describe

    with contextlib.redirect_stdout(sys.stderr):  # where libraries may print what they like
        arguments, values = options.read(source, context.args)
        check_reports(json_file, html)
        check_fix(fix, only, without, arguments)
        data = read_data(arguments, test, test_image_root)
        by_ids = choose_by_ids(data[0][1], only, without)
        checks, images = token_checks(arguments, values)
        reports = check_rows(data, distance=arguments.duplicate_distance, max_length=max_length, **checks)
    # ASCII, for a terminal obeys some characters that JSON leaves as they are.
    text = json.dumps(as_dict(reports), indent=1)
    if json_file not in (None, "-"):
        write_whole(json_file, text + "\n")
    print(text if json_file == "-" else describe(reports))
    has_candidates = arguments.candidates is not None and Path(arguments.candidates).is_file()
    if data[0][1].classes is not None and not has_candidates and json_file != "-":
        print("Next: vqa-sft candidates, which finds the likely classes of each row for a model to choose among.")
    if images:
        print(images, file=sys.stderr if json_file == "-" else sys.stdout)
    if html:
        write_page(html, reports)
    if fix:
        wrote = write_fix(fix, arguments, data[0][1].problems, by_ids, reports[0].num_rows)
        print(wrote, file=sys.stderr if json_file == "-" else sys.stdout)
    sys.exit(int(any(report.num_bad for report in reports)))


@with_options(SourceOptions)
def folds(
    context: Context,
    source: Source,
    options: SourceOptions,
    output: Annotated[str, Option(metavar="FILE", help="CSV of id and fold")],
    num_folds: Annotated[int | None, Option(metavar="N", help="so many folds")] = None,
    holdout: Annotated[
        float | None, Option(metavar="SHARE", help="one split: fold 0 is held out, the rest is -1")
    ] = None,
    seed: Annotated[int | None, Option(help="default: the recipe's, else 42")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="replace another FILE")] = False,
) -> None:
    """Split rows into folds that share no image.

    Give --num-folds or --holdout. Folds are balanced by answer, question type and number of choices. Rows with the same
    or nearly the same image are in one fold.
    """
    from vqa_sft.data.duplicates import row_groups
    from vqa_sft.data.folds import (
        check_folds_file,
        hold_out_rows,
        make_folds,
        max_deviation,
        stratified_deviation,
        write_folds,
    )
    from vqa_sft.data.split import strata_of
    from vqa_sft.report.folds_text import describe_folds

    if (num_folds is None) == (holdout is None):
        raise InputError("give --num-folds N or --holdout SHARE, one of them.")
    arguments, values = options.read(source, context.args)
    check_folds_file(output)
    seed = seed if seed is not None else values.get("seed", 42)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be between 0 and {2**32 - 1}; got {seed}.")
    loaded, scan = read_all_rows(arguments)
    groups, strata = row_groups(scan, arguments.duplicate_distance), strata_of(loaded.examples)
    if num_folds is not None:
        fold_of, shares = make_folds(strata, groups, num_folds, seed), [1 / num_folds] * num_folds
        plain = stratified_deviation(strata, groups, num_folds, seed)
    else:
        fold_of = [0 if held_out else -1 for held_out in hold_out_rows(strata, groups, holdout, seed)]
        shares, plain = [holdout, 1 - holdout], None
    write_folds(output, loaded.examples["id"][:], fold_of, overwrite)
    print(describe_folds(fold_of, groups, max_deviation(strata, fold_of, shares), plain))
    print(f"\nWrote {output}. To train without fold 0 and validate on it:\n  folds_file: {output}\n  fold: 0")


def check_reports(json_file: str | None, html: str | None) -> None:
    """Raises InputError, before everything is read, where the JSON or the page cannot be written."""
    from vqa_sft.files import begins_with, check_output
    from vqa_sft.report.check_page import PAGE_START

    written = (("--json", json_file, ".json", JSON_START), ("--html", html, ".html", PAGE_START))
    for option, path, suffix, start in written:
        if path in (None, "-"):
            continue
        check_output(path, option=option, suffix=suffix, is_ours=begins_with(start), kind="report of `vqa-sft check`")
        if not Path(path).parent.is_dir():
            raise InputError(f"there is no folder {Path(path).parent} to write {Path(path).name} into.")


def check_fix(path: str | None, only: str | None, without: str | None, arguments: "RecipeArguments") -> None:
    """Raises InputError where no copy can be written to `path`, or rows are chosen for none."""
    from vqa_sft.data.fix import check_copy
    from vqa_sft.data.image_folder import find_image_folder

    if only and without:
        raise InputError("--only and --without are two ways to choose. Give one of them.")
    if not path:
        if only or without:
            raise InputError("--only and --without choose the rows of a copy: give --fix OUT too.")
        return
    if arguments.data_options.is_classification and find_image_folder(arguments.train_data):
        raise InputError(f"--fix copies files of rows, and {arguments.train_data} is an image folder. Leave it out.")
    if arguments.limit:
        raise InputError("--fix copies the whole file, and limit checks its first rows only. Give one of them.")
    check_copy(path, arguments.train_data, arguments.image_root)


def read_data(
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
    options = replace(arguments.options_for_other_data(rows.columns), classes=rows.classes)
    if arguments.validation_data:
        data.append((VALIDATION, read_examples(arguments.validation_data, options)))
    if test:
        data.append((TEST, read_test(test, arguments, rows, test_image_root)))
    return data


def read_test(test: str, arguments: "RecipeArguments", training: "Loaded", image_root: str | None) -> "Loaded":
    """Test rows, as those of training are read."""
    from vqa_sft.data.examples import read_examples

    options = replace(arguments.options_for_other_data(training.columns), classes=training.classes)
    # Test images lie where the test data say, not where training did.
    return read_examples(test, replace(options, split="test", answers="optional", image_root=image_root, limit=None))


def token_checks(arguments: "RecipeArguments", values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What `data.check.check` takes to count tokens with the recipe's model, or why it cannot; and a line about the
    sizes of its images."""
    if not values:
        return {"tokens_note": "a data file names no model; check a recipe."}, ""
    if arguments.data_options.is_classification:
        return {"tokens_note": "the prompts of a classification hold candidates, and rows are checked without."}, ""
    from vqa_sft.batch.count_tokens import prompt_checks
    from vqa_sft.batch.image_size import describe_images
    from vqa_sft.batch.prompts import settle_prompts
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
        return {"tokens_note": str(error)}, ""
    prompts, lines = settle_prompts(processor, arguments.prompts)
    for line in lines:
        print(line)
    return prompt_checks(processor, prompts), describe_images(processor, arguments.max_pixels)


def write_fix(path: str, arguments: "RecipeArguments", problems: "Problems", by_ids: set[int], num_rows: int) -> str:
    """Write the copy; returns what was left out of `num_rows`: rows that cannot be used, and numbers of rows `by_ids`.
    Where that is all of them, nothing is written."""
    from vqa_sft.data.fix import describe_copy, write_copy
    from vqa_sft.data.sources import open_source

    left_out = {*problems.bad_rows(), *by_ids}
    if len(left_out) == num_rows:
        return f"No row is left, so {path} was not written."
    source = open_source(
        arguments.train_data,
        split=arguments.train_split,
        config=arguments.data_config,
        encoding=arguments.encoding,
    )
    num_written = write_copy(path, source, left_out)
    return describe_copy(path, num_written, arguments.train_data, arguments.image_root, problems, by_ids)


def read_all_rows(arguments: "RecipeArguments") -> "tuple[Loaded, Scan]":
    """The training rows and their images. Raises InputError where some cannot be used, unless the recipe skips them."""
    from vqa_sft.data.scan import scan_images
    from vqa_sft.report.check_text import printable_line

    ((_, loaded),) = read_data(replace(arguments, validation_data=None))
    for note in loaded.notes:
        print(printable_line(note))
    loaded.problems.raise_if_any(loaded.name, arguments.on_bad_row)
    scan = scan_images(loaded.examples)
    scan.add_problems(loaded.problems, loaded.examples["id"], loaded.numbers)
    loaded.problems.raise_if_any(loaded.name, arguments.on_bad_row)
    return loaded, scan
