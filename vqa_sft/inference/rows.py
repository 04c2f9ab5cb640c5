"""What is scored: the rows of a source, or each run's own validation rows. No torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from vqa_sft.config.prediction import PredictionArguments
from vqa_sft.config.training import RecipeArguments
from vqa_sft.data.columns import Columns
from vqa_sft.data.examples import Loaded, read_examples, stream_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.problems import GUESSED, PREDICTION_HINT, Problems
from vqa_sft.data.scan import scan_images
from vqa_sft.data.split import VALIDATION, read_parts, select
from vqa_sft.errors import InputError, name_rows
from vqa_sft.questions.letters import LETTERS

BLOCK_ROWS = 10_000  # of a stream

if TYPE_CHECKING:  # it loads torch
    from vqa_sft.runs.folder import Run


@dataclass
class Rows:
    """The rows of each run, and the sources that they come from."""

    sources: list[Loaded]
    of_run: list[Dataset | IterableDataset]
    trained: Columns | None  # the columns that the first run was trained on

    @property
    def num_choices(self) -> int:
        """The most choices of a row."""
        whole = [rows for rows in self.of_run if isinstance(rows, Dataset)]
        return max(max(map(len, rows["choices"])) for rows in whole) if whole else self.sources[0].num_choices

    @property
    def notes(self) -> list[str]:
        return [note for source in self.sources for note in source.notes]

    @property
    def ids(self) -> list[str]:
        """Those of all rows of the sources, in their order."""
        return [row_id for source in self.sources for row_id in source.examples["id"]]


def read_rows(args: PredictionArguments, runs: list["Run"]) -> Rows:
    """The rows that each run scores. Raises InputError."""
    if args.part == VALIDATION:
        return _read_validation(args, runs)
    check_classes(runs)
    options = args.data_options(runs[0].recipe, runs[0].columns, runs[0].classes, runs[0].num_letters)
    num_letters = min((run.num_letters for run in runs if run.num_letters), default=None)
    if args.streaming:
        loaded = stream_examples(args.data, replace(options, max_choices=num_letters))
    else:
        loaded = read_examples(args.data, options)
        loaded.problems.raise_if_any(loaded.name, args.on_bad_row, PREDICTION_HINT)
        if num_letters and loaded.num_choices > num_letters:
            beyond = (
                f"{loaded.name}: rows of up to {loaded.num_choices} choices, and training had at most {num_letters}"
            )
            loaded.notes.append(f"{beyond}; letters after {LETTERS[num_letters - 1]} are as the base knows them")
    return Rows([loaded], [loaded.examples] * len(runs), runs[0].columns)


def check_classes(runs: list["Run"]) -> None:
    """Raises InputError for runs of which some are of a classification, and not all of the same one."""
    ways = []
    for run in runs:
        shown = run.num_letters, run.recipe.get("absent") == "none_of_these"
        ways.append((run.classes.names, *shown) if run.classes else None)
        if ways[-1] != ways[0]:
            raise InputError(
                f"{run.folder} and {runs[0].folder} were trained on other classes, or choose among another number of "
                "candidates. Score one at a time."
            )


def _read_validation(args: PredictionArguments, runs: list["Run"]) -> Rows:
    """Every run's own validation rows, as its recipe reads them."""
    sources: dict[str, list[Loaded]] = {}
    of_run: list[Any] = []
    for run in runs:
        own = RecipeArguments.of_run(run.recipe)
        named = sources_of(args, own, run)
        key = repr(named)
        if named and key not in sources:
            sources[key] = [read_examples(source, options) for source, options in named]
            for source in sources[key]:
                source.problems.raise_if_any(source.name, own.on_bad_row)
        hint = "Give --data with the rows that it was trained on, in their order."
        rows = named and select(sources[key], read_parts(run.folder, sources[key], hint, VALIDATION), VALIDATION)
        if not named or rows is None:
            raise InputError(
                f"{run.folder} was trained without validation rows. Give --data with rows it has not seen."
            )
        of_run.append(rows)
    if len(sources) > 1:
        raise InputError("the runs were trained on different data. Score the validation rows of one at a time.")
    ids = [row_id for rows in of_run for row_id in rows["id"]]
    twice = [row_id for row_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"several of the runs validate on {name_rows(twice, len(ids))}. Give the folds of one run.")
    return Rows(next(iter(sources.values())), of_run, runs[0].columns)


def sources_of(
    args: PredictionArguments | None, own: RecipeArguments, run: "Run"
) -> list[tuple[str | list[str], ReadOptions]]:
    """What a run read its training and validation rows from, where `args` do not say where that is now."""
    image_root = (args and args.image_root) or own.image_root
    named = []
    if not own.streaming:  # a stream is trained on as a whole
        options = own.with_candidates(own.data_options, args.candidates if args else None)
        options = replace(options, image_root=image_root, classes=run.classes or options.classes)
        named.append(((args and args.data) or own.train_data, options))
    if own.validation_data is not None:
        options = own.validation_options(run.columns, run.classes)
        named.append((own.validation_data, replace(options, image_root=image_root)))
    return named


def blocks_of(examples: Dataset | IterableDataset) -> Iterator[Dataset]:
    """The rows, of a stream BLOCK_ROWS at a time."""
    if isinstance(examples, Dataset):
        yield examples
        return
    rows: list[dict] = []
    seen: set[int] = set()  # 70 to 90 bytes a row
    for row in examples:
        if hash(row["id"]) in seen:
            raise InputError(f"the id {row['id']} is in the data more than once. Give every row one of its own.")
        seen.add(hash(row["id"]))
        rows.append(row)
        if len(rows) == BLOCK_ROWS:
            yield Dataset.from_list(rows, features=examples.features)
            rows = []
    if rows:
        yield Dataset.from_list(rows, features=examples.features)


def find_blank(loaded: Loaded, on_bad_row: str) -> dict[str, tuple[int, ...]]:
    """Row id -> positions of its images that cannot be used; raises InputError for them unless they may be guessed."""
    scan, problems = scan_images(loaded.examples, hashes=False), Problems(len(loaded.examples))
    scan.add_problems(problems, loaded.examples["id"][:], loaded.numbers or None)
    problems.raise_if_any(loaded.name, on_bad_row, PREDICTION_HINT)
    return {row_id: scan.bad(row) for row, row_id in enumerate(loaded.examples["id"]) if scan.bad(row)}


def guessed_rows(rows: Rows, examples: Dataset) -> set[str]:
    """Ids of the rows that are answered although something is missing from their texts, or an image was not opened."""
    found = set()
    for source in rows.sources:
        numbers = {*source.problems.bad_rows(*GUESSED)}
        if numbers and isinstance(source.examples, Dataset):
            found |= {i for i, number in zip(source.examples["id"], source.numbers, strict=True) if number in numbers}
    for row in examples.select_columns(["id", "question", "choices"]):  # of a stream nothing else is known
        if not row["question"] or len({*row["choices"]}) < 2:
            found.add(row["id"])
    return found
