"""Any source -> canonical `datasets.Dataset`; every bad row named at once. No torch.

    row of a CSV, JSONL, Parquet or Hub source         canonical example
    id    path       question  a    b    answer   ->   id    images             question  choices     answer
    t_1   img/1.png  What?     cat  dog  b             t_1   [{path, bytes}]    What?     [cat, dog]  1

    open_source -> find_columns -> settle_columns -> RowReader.read -> settle_answers -> RowReader.answer

`images` holds what `datasets.Image(decode=False)` holds, so that nothing is decoded before a worker needs it; it is
empty for a row without an image. `context` is "" where there is none; `question_type` is found by rules. Rows of a
classification have a `class_index`, and choices and an answer only by their candidates (candidates.py).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from vqa_sft.data.candidates import classes_in, join_candidates
from vqa_sft.data.classes import Classes
from vqa_sft.data.columns import Columns, are_here
from vqa_sft.data.find_columns import find_columns
from vqa_sft.data.image_folder import find_image_folder, open_image_folder
from vqa_sft.data.images_in_tables import IMAGES, add_images
from vqa_sft.data.options import CLASS, ReadOptions
from vqa_sft.data.problems import Problems
from vqa_sft.data.read_class_probs_table import read_any_class_probs
from vqa_sft.data.read_row import NUMBER, RowReader, columns_with_images
from vqa_sft.data.settle_answers import settle_answers
from vqa_sft.data.settle_classes import count_rows, describe_classes, read_labels, settle_classes
from vqa_sft.data.settle_columns import settle_columns
from vqa_sft.data.sources import open_source
from vqa_sft.errors import InputError, safe

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": IMAGES,
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int64"),
        "context": datasets.Value("string"),
        "question_type": datasets.Value("string"),
    }
)
TARGETS = datasets.List(datasets.Value("float32"))  # a column more, where there are any
_READ_SCHEMA = FEATURES.arrow_schema.remove(4).append(pa.field("cell", pa.string()))  # before answers are understood
_BATCH = 1_000  # rows turned into Arrow at a time
_HEAD = 1_000  # rows of a stream that tell its columns, answer format and number of choices
_PARTS = 16  # workers and processes among which a streamed text file can be dealt
_MANY = 10  # rows that should not all have one answer


@dataclass
class Loaded:
    """The examples of a source, and notes on it for the user.

    `examples` holds every row that `keep_rows` did not leave out, those with problems too; `numbers[i]` is the number
    of example i in the source, from 0. A row has at most `num_choices` choices.
    """

    name: str
    examples: datasets.Dataset | datasets.IterableDataset
    columns: Columns
    problems: Problems
    numbers: Sequence[int]
    notes: list[str]
    num_choices: int
    classes: Classes | None = None  # of a classification
    candidates: str = ""  # what the candidates of a classification were made by
    candidates_file: str | None = None
    image_digests: list[str] | None = None  # of every row, by content; None where nobody looked at the images


def load_examples(
    source: str | Sequence[str], options: ReadOptions = ReadOptions()
) -> tuple[datasets.Dataset, Columns]:
    """The canonical examples of a source and the columns that they came from.

    Raises InputError with every bad row at once.
    """
    loaded = read_examples(source, options)
    loaded.problems.raise_if_any(loaded.name)
    return loaded.examples, loaded.columns


def read_examples(source: str | Sequence[str], options: ReadOptions = ReadOptions()) -> Loaded:
    """Canonical examples of a source, and everything that is wrong with its texts; images are not opened.

    Raises InputError when nothing can be read, a column is missing, or the answers can be read in two ways.
    """
    reader, given = _open(source, options, streaming=False)
    name, limit = reader.source.name, options.limit
    settle_columns(reader, lambda: itertools.islice(reader.rows(), limit), given, options.answer_format)
    texts, numbers, folder = _read_texts(reader, limit)
    reader.problems.total = len(numbers)
    features, classes = _features(reader.columns), None
    if options.is_classification:
        probs = read_any_class_probs(options.candidates, None) if options.candidates else None
        if probs is not None and options.classes is None:
            reader.options = replace(reader.options, classes=classes_in(probs, str(options.candidates)))
        classes = settle_classes(reader, texts["cell"])
        answers = read_labels(reader, classes, texts["cell"].to_pylist(), texts["id"].to_pylist(), numbers)
        texts = texts.append_column(CLASS, pa.array(answers, pa.int64())).append_column("answer", pa.nulls(len(texts)))
        features = datasets.Features(features | {CLASS: datasets.Value("int64")})
    else:
        settle_answers(reader, partial(_cells_and_choices, texts), options.answer_format, are_all=limit is None)
        answers = _read_answers(reader, texts, numbers)
        texts = texts.append_column("answer", pa.array(answers, pa.int64()))
    texts = texts.select(list(features))
    examples = datasets.Dataset(datasets.table.InMemoryTable(texts.cast(features.arrow_schema)))
    if reader.images.inside:

        def report(row: int, kind: str, detail: str = "") -> None:
            reader.problems.add(examples[row]["id"], numbers[row], kind, detail)

        examples = add_images(examples, reader.source.table.select(numbers), reader.images, folder, report)
    reader.check_that_some_have_images(len(numbers))
    notes = [*reader.source.notes, *reader.notes, reader.describe(len(numbers)), *reader.images.paths.notes()]
    notes += note_kept_orders(name, reader.problems)
    if classes is not None and options.answers == "required" and options.trained is None and limit is None:
        notes += describe_classes(name, classes, count_rows(classes, answers))
    has_one_answer = len({*answers}) == 1 and answers[0] is not None
    if has_one_answer and limit is not None and len(numbers) == limit >= _MANY:
        notes.append(f"{name}: the first {limit:,} rows have one answer. A sorted file? Then shuffle its rows.")
    loaded = Loaded(name, examples, reader.columns, reader.problems, numbers, notes, 0, classes)
    if classes is not None and probs is not None:
        joined = join_candidates(examples, numbers, reader.problems, classes, options, probs)
        loaded.examples, loaded.candidates, said = joined
        loaded.candidates_file = options.candidates
        loaded.notes += said
    loaded.num_choices = pc.max(pc.list_value_length(loaded.examples.with_format("arrow")["choices"][:])).as_py()
    return loaded


def _open(source: str | Sequence[str], options: ReadOptions, streaming: bool) -> tuple[RowReader, dict]:
    """A reader of the source's rows, and the columns that are named and are there."""
    folder = find_image_folder(source) if options.is_classification else None
    if folder is None:
        opened = open_source(
            source, split=options.split, config=options.config, encoding=options.encoding, streaming=streaming
        )
    else:  # paths are its own
        opened, options = open_image_folder(folder), replace(options, image_root=None)
    given = are_here(options.known_columns, opened.columns) | dict(options.columns or {})
    columns = find_columns(opened.columns, given, options, columns_with_images(opened))
    return RowReader(opened, columns, options), given


def _features(columns: Columns) -> datasets.Features:
    return datasets.Features(FEATURES | ({"targets": TARGETS} if columns.targets else {}))


def _read_texts(reader: RowReader, limit: int | None) -> tuple[pa.Table, list[int], str | None]:
    """All but the answers of the first rows, their numbers in the source, and the folder of the last."""
    schema = _READ_SCHEMA
    if reader.columns.targets:
        schema = schema.append(pa.field("targets", pa.list_(pa.float32())))
    numbers, tables, folder = [], [], None
    rows = itertools.islice(reader.rows(), limit)
    while batch := list(itertools.islice(rows, _BATCH)):
        numbers += [number for number, _, _ in batch]
        folder = batch[-1][1]
        tables.append(pa.Table.from_pylist([reader.read(*item) for item in batch], schema=schema))
    if not numbers:
        raise InputError(f"{reader.source.name} has no rows{reader.describe_kept()}.")
    return pa.concat_tables(tables), numbers, folder


def _read_answers(reader: RowReader, texts: pa.Table, numbers: Sequence[int]) -> list[int | None]:
    names = ["cell", "choices", "id", *(["targets"] if reader.columns.targets else [])]
    answers: list[int | None] = []
    for start in range(0, len(numbers), _BATCH):
        cells, choices, ids, *targets = texts.select(names).slice(start, _BATCH).to_pydict().values()
        answers += map(reader.answer, cells, choices, ids, numbers[start : start + _BATCH], *targets)
    return answers


def _cells_and_choices(texts: pa.Table) -> Iterator[tuple[str, list[str]]]:
    """The answer's cell and the choices of every row, a batch at a time."""
    for batch in texts.select(["cell", "choices"]).to_batches(_BATCH):
        yield from zip(batch["cell"].to_pylist(), batch["choices"].to_pylist(), strict=True)


def note_kept_orders(name: str, problems: Problems) -> list[str]:
    """One line on the rows whose choices, or whose last choice, are never shuffled; none where there are none."""
    said = []
    for kind, kept in (("keeps_order", "the order of their choices"), ("keeps_last", "their last choice")):
        found = problems.found(kind)
        if found:
            said.append(f"{len(found):,} of {problems.total:,} rows keep {kept}, such as {found[0][0]}")
    return [safe(f"{name}: never shuffled: {'; '.join(said)}")] if said else []


def stream_examples(source: str | Sequence[str], options: ReadOptions = ReadOptions()) -> Loaded:
    """Rows of a source as they are needed: `examples` is an `IterableDataset`, and nothing is held.

    Columns, answer format and the most choices are those of the first rows. A row with a problem raises InputError when
    it is read, unless `on_bad_row` is "guess" and it can be answered all the same; so does one with more choices.
    """
    reader, given = _open(source, options, streaming=True)
    name = reader.source.name
    first = list(itertools.islice(reader.rows(), min(_HEAD, options.limit or _HEAD)))
    settle_columns(reader, lambda: iter(first), given, options.answer_format)
    head = [reader.read(*item) for item in first]
    head_problems = reader.problems
    head_problems.total = len(head)
    reader.raise_if_any()
    if not head:
        raise InputError(f"{name} has no rows{reader.describe_kept()}.")
    if not reader.images.inside:
        reader.check_that_some_have_images(len(head))
    are_all = len(head) < _HEAD or options.limit == len(head)
    settle_answers(reader, lambda: ((row["cell"], row["choices"]) for row in head), options.answer_format, are_all)
    reader.max_choices = options.max_choices or max(len(row["choices"]) for row in head)
    reader.folder = first[-1][1]
    examples = _stream_table(reader) if reader.images.inside else _stream_rows(reader)
    if options.limit is not None:
        examples = examples.take(options.limit)
    notes = [*reader.source.notes, *reader.notes, safe(f"{name}: a stream; {reader.columns.describe()}")]
    notes += [f"{note} (in the first {len(head):,} rows)" for note in reader.images.paths.notes()]
    notes += note_kept_orders(name, head_problems)
    return Loaded(name, examples, reader.columns, reader.problems, (), notes, reader.max_choices)


def _stream_table(reader: RowReader) -> datasets.IterableDataset:
    """Of a table that holds the images itself."""
    # Numbered before rows are left out: without a column for them, ids are those numbers.
    numbered = reader.source.table.map(_number, with_indices=True)
    numbered = numbered.filter(reader.keeps) if reader.keep_rows else numbered
    dropped = [*reader.source.columns, NUMBER]
    return numbered.map(reader.numbered_example, remove_columns=dropped, features=_features(reader.columns))


def _number(row: dict, number: int) -> dict:
    return row | {NUMBER: number}


def _stream_rows(reader: RowReader) -> datasets.IterableDataset:
    # In training every part reads the whole text and yields each sixteenth row: text is cheap, and workers share the
    # images. Prediction keeps the order of the rows.
    num_parts = _PARTS if reader.options.answers == "required" else 1
    parts = {"reader": reader, "parts": list(range(num_parts)), "num_parts": num_parts}
    features = _features(reader.columns)
    return datasets.IterableDataset.from_generator(_read_parts, features=features, gen_kwargs=parts)


def _read_parts(reader: RowReader, parts: list[int], num_parts: int) -> Iterator[dict]:
    for part in parts:
        for number, folder, row in reader.rows():
            if number % num_parts == part:
                yield reader.example(row, number, folder)
