"""The command `candidates`: the most likely classes of every row of a classification, by a classifier of images."""

import contextlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Context, Option

from vqa_sft.cli.options import SourceOptions, check_positive, is_recipe, with_options
from vqa_sft.errors import InputError, name_rows, safe

if TYPE_CHECKING:
    from vqa_sft.config.training import RecipeArguments
    from vqa_sft.data.examples import Loaded
    from vqa_sft.data.scan import Scan
    from vqa_sft.models.candidates import Classified
    from vqa_sft.models.encoders import Encoder


@dataclass
class Options(SourceOptions):
    """Which rows are classified, and by what. Raises InputError for numbers out of bounds."""

    test: Annotated[list[str] | None, Option(metavar="DATA...", help="rows to predict, as one or several sets")] = None
    test_image_root: Annotated[
        str | None, Option(metavar="FOLDER", help="folder of their images; default: that of the file")
    ] = None
    encoder: Annotated[
        str, Option(metavar="NAME", help="own: the vision tower of the recipe's model; else a vision model of the Hub")
    ] = "own"
    classifier: Annotated[
        Literal["linear", "knn", "zero_shot"], Option(help="on its features; zero_shot: by the names of the classes")
    ] = "linear"
    probs: Annotated[
        list[str] | None,
        Option(metavar="FILE...", help="another classifier's probabilities: of training, then of each --test"),
    ] = None
    out_of_fold: Annotated[
        bool, Option("--out-of-fold", help="--probs of training rows are by models that had not seen them")
    ] = False
    folds: Annotated[int, Option(metavar="N", help="of the training rows")] = 5
    seed: Annotated[int | None, Option(help="of the folds; default: the recipe's, else 42")] = None
    model: Annotated[str | None, Option(help="the vision-language model of --encoder own; default: the recipe's")] = (
        None
    )
    max_pixels: Annotated[
        int | None, Option(metavar="N", help="largest width x height for its tower; default: the recipe's")
    ] = None
    batch_size: Annotated[int, Option(metavar="N", help="images at a time, on each GPU")] = 32
    use_cpu: Annotated[bool, Option("--use-cpu", help="do not use the GPU")] = False

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size, max_pixels=self.max_pixels)
        if not 3 <= self.folds <= 100:
            raise InputError(
                "--folds must be 3 to 100, for one is predicted, one chooses settings and the others train; got "
                f"{self.folds}."
            )
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and {2**32 - 1}; got {self.seed}.")

    def of_recipe(self, values: dict[str, Any]) -> "Options":
        """With the recipe's seed where none is given, and its use_cpu."""
        seed = self.seed if self.seed is not None else values.get("seed", 42)
        return replace(self, seed=seed, use_cpu=self.use_cpu or bool(values.get("use_cpu")))

    def check_model(self, values: dict[str, Any]) -> None:
        """Raises InputError where the encoder is that of a model, and neither an option nor the recipe names one."""
        if self.encoder == "own" and not (self.model or values.get("model_name_or_path")):
            raise InputError(
                "--encoder own is the vision tower of a recipe's model. Give --config, --model NAME or another encoder."
            )


@with_options(Options)
def candidates(
    context: Context,
    options: Options,
    output: Annotated[str, Option(metavar="FOLDER", help="for train.parquet and test.parquet")],
    data: Annotated[
        str | None, Argument(metavar="[DATA]", help="training rows as a file or an image folder, in place of --config")
    ] = None,
    config: Annotated[
        str | None, Option(metavar="RECIPE", help="a recipe; its fields may follow as --key value")
    ] = None,
) -> None:
    """Find each row's most likely classes, for a model to choose among.

    Fits a classifier on features of the images. Training rows are predicted out of fold (rows with the same or nearly
    the same image are in one fold), test rows by all training rows. Says how often the class is among the K most likely
    ones, and chooses K.

    Example: vqa-sft candidates --config recipes/classification.yaml --test data/test --output candidates
    """
    tests, files = options.test or [], options.probs or []
    with contextlib.redirect_stdout(sys.stderr):  # where libraries may print what they like
        arguments, values = read_arguments(options, data, config, context.args)
        options = options.of_recipe(values)
        paths = check_paths(output, part_names(arguments, tests), files)
        if not files:
            options.check_model(values)
        rows = read_rows(arguments, tests, options.test_image_root)
        if files:
            found = read_files(files, rows, options.out_of_fold)
        else:
            encoder = open_encoder(options, arguments, values)
            found = classify_rows(options, encoder, rows, arguments.duplicate_distance)
    finish(found, paths, arguments.num_candidates)


def read_arguments(
    options: SourceOptions, data: str | None, config: str | None, rest: list[str]
) -> tuple["RecipeArguments", dict[str, Any]]:
    """The fields of the recipe, or what a data file makes of them. Raises InputError."""
    if data is not None and data.startswith("--"):  # a field of the recipe, where no DATA is given
        data, rest = None, [data, *rest]
    if (data is None) == (config is None):
        raise InputError("give --config RECIPE or DATA, one of them.")
    if config is not None and not is_recipe(config):
        raise InputError(f"--config is a recipe (.yaml); got {config}.")
    is_task_named = any(token.replace("-", "_").startswith("__task") for token in rest)
    if data is not None and not is_recipe(data) and not is_task_named:
        rest = [*rest, "--task", "classification"]
    arguments, values = options.read(config or data, rest)
    if not arguments.data_options.is_classification:
        raise InputError("candidates are of a classification, and this is multiple_choice. Set task: classification.")
    return arguments, values


def part_names(arguments: "RecipeArguments", tests: Sequence[str]) -> list[str]:
    """Of the files: train, validation where the recipe has such data, test, test_2, ..."""
    validation = ["validation"] if arguments.validation_data else []
    return ["train", *validation, *("test" if i == 0 else f"test_{i + 1}" for i in range(len(tests)))]


def check_paths(output: str, names: Sequence[str], files: Sequence[str]) -> list[Path]:
    """Where each part is written. Raises InputError where it cannot be, or `files` are not one a part."""
    from vqa_sft.data.class_probs import is_class_probs
    from vqa_sft.files import check_output

    if files and len(files) != len(names):
        raise InputError(
            f"--probs takes one file for each of {', '.join(names)}, in this order; got {len(files)}. Give the others "
            "too, or leave out --test."
        )
    if Path(output).exists() and not Path(output).is_dir():
        raise InputError(f"--output {output} is a file. Name a folder.")
    paths = [Path(output) / f"{name}.parquet" for name in names]
    for path in [*paths, *earlier_parts(paths)]:
        check_output(path, suffix=".parquet", reads=files, is_ours=is_class_probs, kind="file of class probabilities")
    return paths


def earlier_parts(paths: Sequence[Path]) -> list[Path]:
    """What an earlier call wrote beside `paths` and this one does not replace: of another classifier, or other classes,
    which a later prediction would take for those of this call."""
    from vqa_sft.data.class_probs import is_class_probs

    beside = sorted(paths[0].parent.glob("*.parquet"))
    of_a_part = [path for path in beside if re.fullmatch(r"validation|test(_\d+)?", path.stem)]
    return [path for path in of_a_part if path not in paths and is_class_probs(path)]


def read_rows(
    arguments: "RecipeArguments", tests: Sequence[str], test_image_root: str | None
) -> "list[tuple[Loaded, Scan]]":
    """The rows of each part and their images, with what `check` says of their classes. Raises InputError where some
    cannot be used; training rows may be skipped."""
    from vqa_sft.cli.data import read_data, read_test
    from vqa_sft.data.problems import STREAM_HINT, TRAINING_HINT
    from vqa_sft.data.scan import scan_images
    from vqa_sft.report.check_text import printable_line

    parts = [loaded for _, loaded in read_data(arguments)]
    parts += [read_test(test, arguments, parts[0], test_image_root) for test in tests]
    rows = []
    for loaded in parts:
        for note in loaded.notes:
            print(printable_line(note))
    for looks_at_images in (False, True):  # texts first, which takes no time
        for loaded in parts:
            is_training = loaded is parts[0]
            on_bad_row = arguments.on_bad_row if is_training else "error"
            if looks_at_images:
                rows.append((loaded, scan_images(loaded.examples)))
                rows[-1][1].add_problems(loaded.problems, loaded.examples["id"], loaded.numbers)
            loaded.problems.raise_if_any(loaded.name, on_bad_row, TRAINING_HINT if is_training else STREAM_HINT)
    rows[0] = leave_out_bad(*rows[0])
    for loaded, scan in rows:
        note_classes(loaded, scan, None if loaded is rows[0][0] else rows[0][0])
    return rows


def leave_out_bad(loaded: "Loaded", scan: "Scan") -> "tuple[Loaded, Scan]":
    """Without the rows that cannot be used, which the recipe skips."""
    numbers = {*loaded.problems.bad_rows()}
    if not numbers:
        return loaded, scan
    good = [row for row, number in enumerate(loaded.numbers) if number not in numbers]
    print(f"{loaded.name}: {len(loaded.numbers) - len(good):,} rows that cannot be used are left out.")
    if not good:
        raise InputError(f"no row of {loaded.name} can be used.")
    kept = {"examples": loaded.examples.select(good), "numbers": [loaded.numbers[row] for row in good]}
    return replace(loaded, **kept), scan.take(good)


def note_classes(loaded: "Loaded", scan: "Scan", training: "Loaded | None") -> None:
    """Print what `check` warns of between rows and classes."""
    from vqa_sft.data.check_classes import find_class_problems

    find_class_problems(loaded, scan, (), None, training)
    for key, kind, labels in loaded.problems:
        if key in ("classes_differ", "only_of_class", "class_not_trained"):
            print(safe(f"{loaded.name}: {kind.what}: {name_rows(labels, len(loaded.examples))}"))


def open_encoder(options: Options, arguments: "RecipeArguments", values: dict[str, Any]) -> "Encoder":
    """Raises InputError where it cannot be had, or the classifier needs another."""
    from vqa_sft.config.packaged import find_base
    from vqa_sft.models.candidates import check_classifier
    from vqa_sft.models.encoders import load_encoder
    from vqa_sft.models.image_features import choose_devices
    from vqa_sft.models.load import choose_precision

    precision, device = choose_precision({"use_cpu": options.use_cpu}), choose_devices(options.use_cpu)[0]
    if options.encoder != "own":
        encoder = load_encoder(options.encoder, precision, device)
    else:
        how: dict[str, Any] = {"min_pixels": arguments.min_pixels}
        how["max_pixels"] = options.max_pixels or arguments.max_pixels
        if options.model is None:  # the recipe's
            how["revision"] = values.get("model_revision", "main")
            how["trust_remote_code"] = values.get("trust_remote_code", False)
        encoder = load_encoder(find_base(options.model or values["model_name_or_path"]), precision, device, **how)
    check_classifier(options.classifier, encoder)
    return encoder


def classify_rows(
    options: Options, encoder: "Encoder", rows: "Sequence[tuple[Loaded, Scan]]", distance: int | None
) -> "Classified":
    """The classifier's probabilities of all rows. Folds are balanced by class, and rows with nearly the same image are
    in one."""
    from vqa_sft.data.duplicates import row_groups
    from vqa_sft.data.folds import make_folds
    from vqa_sft.data.split import strata_of
    from vqa_sft.models.candidates import build_classifier, classify
    from vqa_sft.models.image_features import choose_devices

    parts = [(loaded.examples, scan) for loaded, scan in rows]
    (examples, scan), classes = parts[0], rows[0][0].classes
    fold_of = make_folds(strata_of(examples), row_groups(scan, distance), options.folds, options.seed)
    devices = choose_devices(options.use_cpu)
    classifier = build_classifier(options.classifier, encoder, classes)
    found = classify(parts, classes, encoder, classifier, fold_of, devices, options.batch_size)
    found.metadata |= {"seed": options.seed, "encoder": options.encoder, "classifier": options.classifier}
    return found


def read_files(files: Sequence[str], rows: "Sequence[tuple[Loaded, Scan]]", out_of_fold: bool) -> "Classified":
    """Another classifier's probabilities of the rows. Raises InputError where they are of other rows, or those of
    training may not be out of fold."""
    from vqa_sft.data.read_class_probs_table import of_rows, read_any_class_probs
    from vqa_sft.models.candidates import Classified

    found = []
    for path, (loaded, _) in zip(files, rows, strict=True):
        probs = read_any_class_probs(path, loaded.classes)
        found.append(of_rows(path, probs, loaded.examples))
    if not (out_of_fold or found[0].metadata.get("out_of_fold")):
        raise InputError(
            f"{files[0]} does not say whether its training rows are out of fold. If each was predicted by a classifier "
            "that had not seen it, give --out-of-fold; else its candidates would be better than those of new rows."
        )
    return Classified(found, {"source": ", ".join(Path(path).name for path in files)})


def finish(found: "Classified", paths: Sequence[Path], given: int | None) -> None:
    """Print recall and K, and write the files. `given` is the K of the recipe, which counts."""
    from vqa_sft.data.class_probs import write_class_probs
    from vqa_sft.predictions import recall as recalls

    measured = [recalls.measure_recall(probs) for probs in found.parts]
    chosen = recalls.choose_num_candidates(measured[0])
    removed = earlier_parts(paths)
    for path in removed:
        path.unlink()
    for number, (probs, recall, path) in enumerate(zip(found.parts, measured, paths, strict=True)):
        probs.metadata |= found.metadata | {"num_candidates": chosen, "out_of_fold": number == 0}
        if recall is not None:
            probs.metadata |= {"recall": recall.as_dict(), "log_loss": recall.log_loss}
        write_class_probs(path, probs)
    for note in found.notes:
        print(safe(note), file=sys.stderr)
    names = [path.stem + (", out of fold" if number == 0 else "") for number, path in enumerate(paths)]
    print(recalls.describe_recall(list(zip(names, measured, strict=True))))
    best = measured[0].at(chosen)
    if removed:
        print(f"\nRemoved {', '.join(map(str, removed))} of an earlier call, which this one does not write.")
    print(
        f"\nnum_candidates: {chosen} ({recalls.RULE}). A model that chooses among {chosen} is right in at most "
        f"{best:.1%} of the rows.\nWrote {', '.join(map(str, paths))}. In the recipe:\n  candidates: {paths[0]}"
    )
    if "validation" in names:
        print(f"  validation_candidates: {paths[1]}")
    if given not in (None, chosen):
        print(f"  num_candidates: {given}, as the recipe says now, counts; without the line it is {chosen}.")
