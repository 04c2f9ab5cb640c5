"""Any source -> canonical `datasets.Dataset`; every bad row named at once. No torch.

    row of a CSV, JSONL, Parquet or Hub source         canonical example
    id    path       question  a    b    answer   ->   id    images             question  choices     answer
    t_1   img/1.png  What?     cat  dog  b             t_1   [{path, bytes}]    What?     [cat, dog]  1

`images` holds what `datasets.Image(decode=False)` holds, so that nothing is decoded before a worker needs it; it is
empty for a row without an image. `context` is "" where there is none; `question_type` is found by rules.
"""

import base64
import hashlib
import itertools
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqa_sft.data.answers import (
    FORMATS,
    UNKNOWN,
    find_answer_column,
    infer_formats,
    is_plain,
    is_upper_case,
    read_answer,
    unwrap,
)
from vqa_sft.data.cells import EMPTY_WORDS, find_split, read_label, read_list, split_text, strip_labels
from vqa_sft.data.columns import (
    IN_QUESTION,
    Columns,
    are_here,
    fields_of,
    fill,
    find_choice_columns,
    find_columns,
    find_others,
    is_sparse,
    is_stray,
)
from vqa_sft.data.in_question import split_choices
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.paths import ImagePaths
from vqa_sft.data.problems import PREDICTION_HINT, STREAM_HINT, Problems
from vqa_sft.data.question_types import find_type
from vqa_sft.data.references import find_references
from vqa_sft.data.sources import Source, holds_images, open_source
from vqa_sft.errors import InputError, name_rows, printable, safe
from vqa_sft.letters import LETTERS

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
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
_NUMBER = "vqa_sft_number"  # of a streamed row in its source
_LONG_TEXT = 20_000  # characters, some five thousand tokens
_SHOWN = 10  # values of a column in a message
_MANY = 10  # rows that should not all have one answer
# Where rows need no answers: what is no answer of a choice; and of how many rows one and the same answer is none.
PLACEHOLDERS = ("hidden", "unknown", "n/a", "na", "tbd", "todo", "x", "_", "--", "...", "<hidden>", "[hidden]")
_CONSTANT = 10
# How JPEG, PNG, GIF and WebP begin in base64: benchmark files in TSV hold their images so.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")


@dataclass
class Loaded:
    """What was read from a source, and what is to be said about it.

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
    limit, answer_format = options.limit, options.answer_format
    opened, given, reader = _open(source, options, streaming=False)
    reader.settle_columns(lambda: itertools.islice(reader.rows(), limit), given, answer_format)
    numbers, tables = [], []
    rows = itertools.islice(reader.rows(), limit)
    features, schema = reader.features, _READ_SCHEMA
    if reader.columns.targets:
        schema = schema.append(pa.field("targets", pa.list_(pa.float32())))
    while batch := list(itertools.islice(rows, _BATCH)):
        numbers += [number for number, _, _ in batch]
        folder = batch[-1][1]
        tables.append(pa.Table.from_pylist([reader.read(*item) for item in batch], schema=schema))
    if not numbers:
        raise InputError(f"{opened.name} has no rows{reader.describe_kept()}.")
    reader.problems.total = len(numbers)
    texts = pa.concat_tables(tables)
    reader.settle_answers(partial(_cells_and_choices, texts), answer_format, are_all=limit is None)
    targets = texts["targets"].to_pylist() if reader.columns.targets else itertools.repeat(None, len(numbers))
    found = [
        reader.answer(cell, choices, row_id.as_py(), number, target)
        for (cell, choices), row_id, number, target in zip(
            _cells_and_choices(texts), texts["id"], numbers, targets, strict=True
        )
    ]
    has_one_answer = len({*found}) == 1 and found[0] is not None
    texts = texts.append_column("answer", pa.array(found, pa.int64())).select(list(features))
    examples = datasets.Dataset(datasets.table.InMemoryTable(texts.cast(features.arrow_schema)))
    if reader.inside:
        root = reader.root_of(folder)
        images = _images_inside(opened.table.select(numbers), reader.inside, root)
        examples = datasets.concatenate_datasets([examples.remove_columns("images"), images], axis=1)
        examples = examples.select_columns(list(features))
        other = {}  # paths that are spelled otherwise, or lead outside: None
        for i, paths in enumerate(_paths_only(images)):
            if paths is None:
                reader.problems.add("no_image", examples[i]["id"], numbers[i])
            for path in paths or ():
                found = reader.paths.find(root, path)
                if found is None:
                    reader.problems.add("path_outside", examples[i]["id"], numbers[i], path[:60])
                if found != path:
                    other[path] = found
        if other:  # nobody opens those outside
            how = {"other": other, "unopened": reader.unopened}
            examples = examples.map(partial(_replace_paths, **how), desc="Naming images")
    reader.check_that_some_have_images(len(numbers))
    notes = [*opened.notes, *reader.notes, reader.describe(len(numbers)), *reader.paths.notes()]
    notes += note_kept_orders(opened.name, reader.problems)
    if has_one_answer and limit is not None and len(numbers) == limit >= _MANY:
        notes.append(f"{opened.name}: the first {limit:,} rows have one answer. A sorted file? Then shuffle its rows.")
    num_choices = pc.max(pc.list_value_length(texts["choices"])).as_py()
    return Loaded(opened.name, examples, reader.columns, reader.problems, numbers, notes, num_choices)


def note_kept_orders(name: str, problems: Problems) -> list[str]:
    """One line on the rows whose choices, or whose last choice, are never shuffled; none where there are none."""
    said = []
    for kind, kept in (("keeps_order", "the order of their choices"), ("keeps_last", "their last choice")):
        found = problems.found(kind)
        if found:
            said.append(f"{len(found):,} of {problems.total:,} rows keep {kept}, such as {found[0][0]}")
    return [safe(f"{name}: never shuffled: {'; '.join(said)}")] if said else []


def row_digest(example: Mapping[str, Any]) -> str:
    """16 hex digits that tell a row from others, whatever its id: of question, choices and images.

    An image counts by its content where the row holds it, else by the name of its file without suffix and case, so that
    a folder may move and a name be spelled as another disk has it. The answer does not count: a test set may come with
    answers and without; nor does the context: of two runs, one may have been trained without it.
    """
    images = [
        unicodedata.normalize("NFC", Path(image["path"]).stem).casefold()
        if image["bytes"] is None
        else hashlib.sha256(image["bytes"]).hexdigest()
        for image in example["images"]
    ]
    texts = [example["question"], example["choices"], images]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _cells_and_choices(texts: pa.Table) -> Iterator[tuple[str, list[str]]]:
    """The answer's cell and the choices of every row, a batch at a time."""
    for batch in texts.select(["cell", "choices"]).to_batches(_BATCH):
        yield from zip(batch["cell"].to_pylist(), batch["choices"].to_pylist(), strict=True)


def stream_examples(source: str | Sequence[str], options: ReadOptions = ReadOptions()) -> Loaded:
    """Rows of a source as they are needed: `examples` is an `IterableDataset`, and nothing is held.

    Columns, answer format and the most choices come from the first rows. A row with a problem raises InputError when it
    comes, unless `on_bad_row` is "guess" and it can be answered all the same, and so does one with more choices.
    """
    limit, answer_format = options.limit, options.answer_format
    opened, given, reader = _open(source, options, streaming=True)
    first = list(itertools.islice(reader.rows(), min(_HEAD, limit or _HEAD)))
    reader.settle_columns(lambda: iter(first), given, answer_format)
    head = [reader.read(*item) for item in first]
    head_problems = reader.problems
    head_problems.total = len(head)
    reader.raise_if_any()
    if not head:
        raise InputError(f"{opened.name} has no rows{reader.describe_kept()}.")
    if not reader.inside:
        reader.check_that_some_have_images(len(head))
    are_all = len(head) < _HEAD or limit == len(head)
    reader.settle_answers(lambda: ((row["cell"], row["choices"]) for row in head), answer_format, are_all)
    reader.max_choices = options.max_choices or max(len(row["choices"]) for row in head)
    if reader.inside:
        reader.folder = first[-1][1]
        # Numbered before rows are left out: without a column for them, ids are those numbers.
        numbered = opened.table.map(_number, with_indices=True)
        numbered = numbered.filter(reader.keeps) if options.keep_rows else numbered
        dropped = [*opened.columns, _NUMBER]
        examples = numbered.map(reader.numbered_example, remove_columns=dropped, features=reader.features)
    else:
        # In training every part reads the whole text and yields each sixteenth row: text is cheap, and workers share
        # the images. Prediction keeps the order of the rows.
        num_parts = _PARTS if options.answers == "required" else 1
        parts = {"reader": reader, "parts": list(range(num_parts)), "num_parts": num_parts}
        examples = datasets.IterableDataset.from_generator(_stream_parts, features=reader.features, gen_kwargs=parts)
    if limit is not None:
        examples = examples.take(limit)
    notes = [*opened.notes, *reader.notes, safe(f"{opened.name}: a stream; {reader.columns.describe()}")]
    notes += [f"{note} (in the first {len(head):,} rows)" for note in reader.paths.notes()]
    notes += note_kept_orders(opened.name, head_problems)
    return Loaded(opened.name, examples, reader.columns, reader.problems, (), notes, reader.max_choices)


def _open(
    source: str | Sequence[str], options: ReadOptions, streaming: bool
) -> tuple[Source, dict[str, Any], "RowReader"]:
    """The source, the columns that are given and are there, and a reader of its rows."""
    opened = open_source(
        source, split=options.split, config=options.config, encoding=options.encoding, streaming=streaming
    )
    given = are_here(options.known_columns, opened.columns) | dict(options.columns or {})
    fixed = {"fixed_question": options.fixed_question, "fixed_choices": options.fixed_choices}
    found = find_columns(opened.columns, given, options.answers, _columns_with_images(opened), **fixed)
    return opened, given, RowReader(opened, found, options)


def _columns_with_images(source: Source) -> list[str]:
    return [name for name, kind in (source.features or {}).items() if holds_images(kind)]


def _number(row: dict, number: int) -> dict:
    return row | {_NUMBER: number}


def _stream_parts(reader: "RowReader", parts: list[int], num_parts: int) -> Iterator[dict]:
    for part in parts:
        for number, folder, row in reader.rows():
            if number % num_parts == part:
                yield reader.example(row, number, folder)


class RowReader:
    """One raw row -> the texts and image paths of an example; what is wrong with it goes to `problems`."""

    def __init__(self, source: Source, columns: Columns, options: ReadOptions = ReadOptions()) -> None:
        in_arrow = _columns_with_images(source)
        texts = [name for name in [*columns.names, *(options.keep_rows or {})] if name not in columns.image]
        wrong = [name for name in texts if name in in_arrow]
        if wrong:
            raise InputError(f"{source.name}: {', '.join(wrong)} must hold text; got images or bytes.")
        self.source = source
        self.columns = columns
        self.keep_rows = {
            name: [text_of(value) for value in (values if isinstance(values, list) else [values])]
            for name, values in (options.keep_rows or {}).items()
        }
        self.empty_cells = {*(options.empty_cells or ()), ""}
        self.root = options.image_root
        self.problems = Problems()
        self.max_choices = len(LETTERS)
        self.answers = options.answers
        self.trained = options.trained
        self.on_bad_row = options.on_bad_row
        # In place of an image that is not opened, where its row is answered all the same.
        self.unopened = [{"bytes": b"", "path": None}] if options.on_bad_row == "guess" else []
        self.notes: list[str] = []
        self.constant: str | None = None  # the answer of every row, which is none
        self.left_out = 0
        self._first_split: str | None = None  # of choices in the question, to look at
        self._values: dict[str, dict[str, None]] = {name: {} for name in self.keep_rows}  # some that are there
        self.split: str | None = None  # how a text becomes choices, one of cells.SPLITS
        self.stray: list[str] = []  # columns that look like choices and are none
        self.sparse: str | None = None  # one that may be none
        self.inside = [name for name in columns.image if name in in_arrow]
        self._paths = [name for name in columns.image if name not in self.inside]
        if self.inside and self._paths:
            raise InputError(f"the columns {', '.join(columns.image)} hold both paths and images. Name one kind.")
        self._seen: set[str] = set()
        self._roots: dict[str | None, Path] = {}
        self.paths = ImagePaths()
        self.folder: str | None = None  # of a streamed table
        missing = [name for name in self.keep_rows if name not in source.columns]
        if missing:
            raise InputError(
                f"keep_rows names columns that are not in {source.name}: {', '.join(map(str, missing))}. It has "
                f"{printable(', '.join(source.columns), 500)}."
            )

    @property
    def features(self) -> datasets.Features:
        """Of the examples."""
        return datasets.Features(FEATURES | ({"targets": TARGETS} if self.columns.targets else {}))

    def rows(self) -> Iterator[tuple[int, str | None, dict]]:
        """(number in the source, folder of its file, raw row) of every row that is kept."""
        self.left_out = 0
        for number, (folder, row) in enumerate(self.source.rows()):
            if self.keeps(row):
                yield number, folder, row
            else:
                self.left_out += 1

    def keeps(self, row: dict) -> bool:
        """Whether the row's columns hold what `keep_rows` asks for."""
        for name, there in self._values.items():
            if len(there) <= _SHOWN:
                there[text_of(row[name])] = None
        return all(text_of(row[name]) in values for name, values in self.keep_rows.items())

    def describe_kept(self) -> str:
        """Of a source without rows: what the columns of `keep_rows` hold, for the user."""
        if not self.keep_rows:
            return ""
        there = [f"{name} holds {', '.join(map(repr, [*found][:_SHOWN]))}" for name, found in self._values.items()]
        more = ["..." for found in self._values.values() if len(found) > _SHOWN]
        return safe(f" that keep_rows {self.keep_rows} keeps: {'; '.join([*there, *more[:1]])}")

    def raise_if_any(self) -> None:
        """Raises InputError for problems of a stream's row."""
        hint = STREAM_HINT if self.answers == "required" else PREDICTION_HINT
        self.problems.raise_if_any(self.source.name, self.on_bad_row, hint)

    def example(self, row: dict, number: int, folder: str | None = None) -> dict:
        """One row of a stream, whole. Raises InputError for a row with a problem."""
        self.problems, self._seen = Problems(1), set()  # a stream is too long to remember its ids
        texts = self.read(number, folder, row)
        if self.columns.id is None and self.answers == "required":  # workers that share a stream count from 0 each
            named = "\n".join([texts["question"], texts["context"], *texts["choices"]])
            texts["id"] = hashlib.sha256(named.encode()).hexdigest()[:16]
        cell, targets = texts.pop("cell"), texts.get("targets")
        answer = self.answer(cell, texts["choices"], texts["id"], number, targets)
        if len(texts["choices"]) > self.max_choices:
            self.problems.add("more_choices", texts["id"], number, f"{len(texts['choices'])}, not {self.max_choices}")
        self.raise_if_any()
        if self.inside:
            root = self.root_of(folder)
            texts |= _collect_images(row, self.inside, str(root))
            for image in texts["images"]:
                found = self.paths.find(root, image["path"]) if image["bytes"] is None else image["path"]
                if found is None and image["bytes"] is None:
                    self.problems.add("path_outside", texts["id"], number, image["path"][:60])
                    image["bytes"] = b""
                image["path"] = found
            self.raise_if_any()
        return texts | {"answer": answer}

    def numbered_example(self, row: dict) -> dict:
        return self.example(row, row[_NUMBER], self.folder)

    def read(self, number: int, folder: str | None, row: dict) -> dict:
        """The canonical fields of a row but for `answer`, whose cell stays text until its format is known."""
        columns = self.columns
        row_id = str(number) if columns.id is None else self._value(row[columns.id])
        question = columns.fixed_question if columns.question is None else row[columns.question]
        texts = {"id": row_id, "question": question, "cell": self._cell(row)}
        texts["context"] = row[columns.context] if columns.context else None
        if columns.choices == IN_QUESTION:
            texts["question"], choices = split_choices(self._value(question))
            if choices is None:
                self.problems.add("no_choices_in_question", row_id, number, repr(question)[:60])
            elif self._first_split is None:
                self._first_split = f"{texts['question']!r:.200} with the choices {choices!r:.300}"
        else:
            choices = self._choices(row)
            if choices is None:
                self.problems.add("bad_choices", row_id, number, repr(row[columns.choices])[:60])
        for name in ("question", "context", "cell"):
            texts[name] = self._checked(texts[name], row_id, number)
        is_list, choices = choices is not None, [self._checked(choice, row_id, number) for choice in choices or []]
        while choices and not choices[-1]:
            choices.pop()
        if is_list and (columns.has_labels or (self.trained is not None and self.trained.has_labels)):
            bare = strip_labels(choices)
            if bare is None and columns.has_labels:
                self.problems.add("bad_choices", row_id, number, f"not labelled as in the other rows: {choices!r:.60}")
            choices = bare or choices
        for name in self.stray:
            if text := self._value(row[name]):
                self.problems.add("stray_column", row_id, number, f"{name}: {text!r:.60}")
        if self.sparse and (text := self._value(row[self.sparse])):
            self.problems.add("sparse_column", row_id, number, f"{self.sparse}: {text!r:.60}")
        self._check_texts(texts, choices if is_list else None, number)
        images = [] if self.inside else self._images(row, folder, row_id, number)
        kind = find_type(texts["question"], choices)
        texts |= {"choices": choices, "images": images, "question_type": kind}
        if columns.targets:
            texts["targets"] = self._targets(row[columns.targets], len(choices), row_id, number)
        return texts

    def settle_columns(
        self,
        rows: Callable[[], Iterator[tuple[int, str | None, dict]]],
        given: Mapping[str, Any],
        answer_format: str | None,
    ) -> None:
        """Fix what only the cells of all rows tell: how a text becomes choices, whether choices begin with labels, and
        of columns that are not `given`, which is the answer and which is no choice.

        Raises InputError where that can be understood in two ways.
        """
        in_arrow = _columns_with_images(self.source)
        texts = [name for name in self.source.columns if name not in in_arrow and name not in self.keep_rows]
        others = find_others(texts, self.columns, given)
        name = self.columns.choices
        if name == IN_QUESTION or self.columns.fixed_choices is not None:
            unread = others.pop("choices", []) + [*(find_choice_columns(texts) or ())]
            if unread:
                self.notes.append(f"choices are {self.columns.describe_choices()}; not read: {', '.join(unread)}")
        elif isinstance(name, str):
            self.split = find_split(row[name] for _, _, row in rows())
            if self.split:
                self.notes.append(f"the texts in {name} become choices by their {self.split!r}")
        elif "choices" not in given and (self.trained is None or self.trained.choices != self.columns.choices):
            self._leave_stray_out(rows)
        self._check_other_choices(rows, others.get("choices", ()))
        names = [self.columns.answer, *others.get("answer", ())]
        if self.trained is not None and self.trained.answer in names:  # the first of those that mean the same
            names.sort(key=lambda name: name != self.trained.answer)
        if len(names) > 1 and names[0] in self.source.columns:
            cells = (([self._value(self._cell(row, name)) for name in names], self._texts(row)) for _, _, row in rows())
            chosen = find_answer_column(names, cells, [answer_format] if answer_format else FORMATS)
            self.columns = replace(self.columns, answer=chosen)
            others["answer"] = [name for name in names if name != chosen]
        self._check_other_images(rows, others.get("image", ()))
        unread = [f"{other} ({key})" for key, found in others.items() for other in found]
        if unread:
            self.notes.append(f"not read, though their names are usual: {', '.join(unread)}")
        if self._all_have_labels(rows):
            self.columns = replace(self.columns, has_labels=True)
            self.notes.append('the labels before the choices ("A. ...") are left out: the model gets its own')
        self.notes = [safe(f"{self.source.name}: {note}") for note in self.notes]

    def _leave_stray_out(self, rows: Callable[[], Iterator[tuple[int, str | None, dict]]]) -> None:
        def cells() -> Iterator[tuple[str, list[str]]]:
            for _, _, row in rows():
                yield self._value(self._cell(row)), [self._value(row[name]) for name in self.columns.choices]

        while len(self.columns.choices) > 2:
            *kept, last = self.columns.choices
            if not is_stray(cells, last.isupper() != kept[0].isupper()):
                break
            self.columns = replace(self.columns, choices=tuple(kept))
            self.stray.append(last)
            why = "never the answer, and it holds numbers beside words or is named in another case"
            hint = f"`columns: {{choices: [{', '.join([*kept, last])}]}}` makes it one"
            self.notes.append(f"{last} is no choice and left out: {why}; {hint}")
        if len(self.columns.choices) > 2 and is_sparse(cells):
            self.sparse = self.columns.choices[-1]

    def _check_other_choices(
        self, rows: Callable[[], Iterator[tuple[int, str | None, dict]]], others: Sequence[str]
    ) -> None:
        """Raises InputError where another column holds lists of other choices."""
        taken = self.columns.choices if isinstance(self.columns.choices, str) else ", ".join(self.columns.choices)
        for name in others:
            for _, _, row in rows():
                listed = read_list(row[name])
                if listed is None:
                    break
                listed = [text for text in map(self._value, listed) if text]
                if listed and listed != [text for text in self._texts(row) if text]:
                    raise InputError(
                        f"{self.source.name}: {taken} and {name} may both be the choices and differ: "
                        f"{self._texts(row)!r:.100} and {listed!r:.100}. Name one in the recipe: "
                        f"`columns: {{choices: {name}}}`."
                    )

    def _check_other_images(
        self, rows: Callable[[], Iterator[tuple[int, str | None, dict]]], others: Sequence[str]
    ) -> None:
        """Raises InputError where another column names other files that are there as well."""
        for name in others if self._paths else ():
            for _, folder, row in rows():
                one, other = self._value(row[self._paths[0]]), self._value(row[name])
                if not _is_image_name(one) or not _is_image_name(other):
                    break
                files = [self.root_of(folder) / text for text in (one, other)]
                if files[0] != files[1] and all(file.is_file() for file in files):
                    raise InputError(
                        f"{self.source.name}: {self._paths[0]} and {name} name different files, {one[:60]!r} and "
                        f"{other[:60]!r}. Name one in the recipe, or both: `columns: {{image: [{self._paths[0]}, "
                        f"{name}]}}`."
                    )

    def _all_have_labels(self, rows: Callable[[], Iterator[tuple[int, str | None, dict]]]) -> bool:
        num_rows, out_of_order = 0, []
        for number, _, row in rows():
            choices = self._texts(row)
            if len(choices) > 1:
                num_rows += 1
                if strip_labels(choices) is None:
                    labels = [read_label(choice) for choice in choices]
                    if None in labels or sorted(place for place, _ in labels) != [*range(len(choices))]:
                        return False
                    out_of_order.append(f"number {number} ({choices!r:.100})")
        if len(out_of_order) >= 3:
            raise InputError(
                f"{self.source.name}: every choice begins with a label, and not with that of its own place in "
                f"{name_rows(out_of_order, num_rows)}. Put the choices in the order of their labels, or take these off."
            )
        return num_rows > 0 and not out_of_order

    def _choices(self, row: dict) -> list | None:
        """The cells of the choices; None where their one cell is no list."""
        name = self.columns.choices
        if self.columns.fixed_choices is not None:
            return [*self.columns.fixed_choices]
        if name == IN_QUESTION:
            return split_choices(self._value(row[self.columns.question]))[1]
        if not isinstance(name, str):
            return [row[name] for name in self.columns.choices]
        listed = read_list(row[name])
        return split_text(row[name], self.split) if listed is None and self.split and row[name] else listed

    def _texts(self, row: dict) -> list[str]:
        """The choices as texts, without the empty ones at their end."""
        texts = [self._value(choice) for choice in self._choices(row) or ()]
        while texts and not texts[-1]:
            texts.pop()
        return texts

    def settle_answers(
        self,
        cells_and_choices: Callable[[], Iterator[tuple[str, list[str]]]],
        answer_format: str | None,
        are_all: bool = True,
    ) -> None:
        """Fix how the source writes its answers: as given, else as those of the training if that fits, else as most of
        its rows do. Where answers are optional, placeholders are no answers; that one answer in all rows is one can be
        said where these `are_all`."""
        if self.answers == "optional":
            self._find_placeholders(cells_and_choices(), may_be_constant=are_all and answer_format is None)

        def known() -> Iterator[tuple[str, list[str]]]:
            pairs = cells_and_choices()
            return ((cell, choices) for cell, choices in pairs if cell in choices or not self._is_none(cell))

        if next(known(), None) is not None:
            if answer_format and self.answers == "optional" and not _read_some(known(), answer_format):
                found = self._find_formats(known)[0]
                self.notes.append(
                    f"{self.source.name}: no answer is written as {answer_format}; they are read as {found}"
                )
                answer_format = found
            answer_format, *others = [answer_format] if answer_format else self._find_formats(known)
            self.columns = replace(self.columns, other_formats=tuple(others))
            is_upper = answer_format == "letter" and is_upper_case(cell for cell, _ in known())
            for cell, choices in known():
                index = read_answer(cell, choices, answer_format)
                if index is not None and not is_plain(cell, choices, answer_format):
                    said = f"an answer such as {cell!r:.60} means choice {index + 1} of {choices!r:.100}"
                    self.notes.append(safe(f"{self.source.name}: {said}"))
                    break
        else:  # nothing is known of a source without answers
            is_upper = isinstance(self.columns.choices, tuple) and self.columns.choices[:1] == ("A",)
        self.columns = replace(self.columns, answer_format=answer_format, answers_are_upper=is_upper)
        if self._first_split is not None:
            self.notes.append(safe(f"{self.source.name}: choices are read from the question: {self._first_split}"))
        if self.trained is not None and (unlike := self.columns.unlike(self.trained)):
            self.notes.append(safe(f"{self.source.name}: unlike the training data: {unlike}"))

    def _find_placeholders(self, cells_and_choices: Iterator[tuple[str, list[str]]], may_be_constant: bool) -> None:
        """What test sets write in place of answers: usual words, and what stands in each of many rows."""
        cells, words, num_rows = Counter(), Counter(), 0
        for cell, choices in cells_and_choices:
            num_rows += 1
            if cell.casefold() in PLACEHOLDERS and cell not in choices:
                words[cell] += 1
            elif cell.casefold() not in UNKNOWN:
                cells[cell] += 1
        if may_be_constant and len(cells) == 1 and cells.total() == num_rows >= _CONSTANT:
            self.constant = next(iter(cells))
            words |= cells
        if words:
            shown = ", ".join(repr(cell) for cell in [*words][:5])
            said = f"{words.total():,} rows have {shown:.100} for an answer, which counts as none"
            said += f"; answer_format reads {self.constant!r}" if self.constant is not None else ""
            self.notes.append(safe(f"{self.source.name}: {said}"))

    def _is_none(self, cell: str) -> bool:
        """Whether a cell stands for no answer."""
        words = (*UNKNOWN, *PLACEHOLDERS) if self.answers == "optional" else UNKNOWN
        return cell.casefold() in words or cell == self.constant

    def _find_formats(self, known: Callable[[], Iterator[tuple[str, list[str]]]]) -> list[str]:
        """As `infer_formats`; those of the training come first, where they read all answers. Raises InputError where
        training could not tell two of them apart, and these rows could."""
        trained = self.trained
        formats = [trained.answer_format, *trained.other_formats] if trained and trained.answer_format else []
        fit = [name for name in formats if all(read_answer(*pair, name) is not None for pair in known())]
        for cell, choices in known() if len(fit) > 1 else ():
            if len({read_answer(cell, choices, name) for name in fit}) > 1:
                raise InputError(
                    f"{self.source.name}: the answers can be read as {' or '.join(fit)}, as those of the training "
                    f"could: {cell!r:.60} of {choices!r:.100} means different choices. Set answer_format to one."
                )
        if fit:
            return fit
        try:
            return infer_formats(known())
        except InputError:
            if not formats or not _read_some(known(), formats[0]):
                raise
            return formats[:1]

    def answer(
        self,
        cell: str,
        choices: Sequence[str],
        row_id: str,
        number: int,
        targets: Sequence[float] | None = None,
    ) -> int | None:
        """The index of the right choice; in a row without one, of the largest target."""
        if len(choices) < 2:  # said already
            return None
        if targets and cell.casefold() in UNKNOWN:
            return targets.index(max(targets))
        if cell and cell == self.constant:
            return None
        index = read_answer(cell, choices, self.columns.answer_format or "letter")
        if index is None and not (self.answers == "optional" and self._is_none(cell)):
            self.problems.add("bad_answer" if cell else "no_answer", row_id, number, repr(cell)[:60] if cell else "")
        elif index is not None and not choices[index]:
            self.problems.add("bad_answer", row_id, number, f"{cell!r}, which is empty")
        return index

    def check_that_some_have_images(self, num_rows: int) -> None:
        """Raises InputError when the columns for images are empty in all of the rows."""
        if self.columns.image and len(self.problems.bad_rows("no_image")) == num_rows:
            raise InputError(
                f"no row of {self.source.name} has an image in {', '.join(self.columns.image)}. Name the column with "
                "the images in the recipe (`columns: {image: ...}`; for none: `image: []`)."
            )

    def describe(self, num_rows: int) -> str:
        """One line: how many rows, and which column was taken for what."""
        left_out = f" ({self.left_out:,} left out by keep_rows)" if self.left_out else ""
        return safe(f"{self.source.name}: {num_rows:,} rows{left_out}; {self.columns.describe()}")

    def _cell(self, row: dict, name: str | None = None) -> object:
        """The cell of the answer, or of the column that is named."""
        name = name or self.columns.answer
        if name is None or name not in row:
            return None
        kind = (self.source.features or {}).get(name)
        if isinstance(kind, datasets.ClassLabel) and isinstance(row[name], int) and 0 <= row[name] < kind.num_classes:
            return kind.int2str(row[name])
        return row[name] if isinstance(row[name], str) else unwrap(row[name])

    def _checked(self, cell: object, row_id: str, number: int) -> str:
        """The cell as text that every later stage can hold."""
        text = self._value(cell)
        if isinstance(cell, list | dict | bytes):
            self.problems.add("bad_text", row_id, number, f"{text[:40]!r} is a {type(cell).__name__}")
        elif "\0" in text or not _is_whole(text):
            self.problems.add("bad_text", row_id, number, repr(text[:40]))
            text = text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
        return text

    def _value(self, cell: object) -> str:
        text = text_of(cell)
        return "" if text in self.empty_cells else text

    def _check_texts(self, texts: dict, choices: list[str] | None, number: int) -> None:
        row_id = texts["id"]
        add = self.problems.add
        if not row_id:
            add("empty_id", row_id, number)
        elif row_id in self._seen:
            add("duplicate_id", row_id, number)
        if not _is_whole(row_id) or any(unicodedata.category(char) == "Cc" for char in row_id):
            add("bad_text", repr(row_id)[:60], number, "the id")  # a line break in it would break files of ids
            texts["id"] = row_id.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
        self._seen.add(row_id)
        if not texts["question"]:
            add("empty_question", row_id, number)
        if choices is None:
            return
        if len(choices) < 2:
            add("few_choices", row_id, number)
        elif len(choices) > len(LETTERS):
            add("many_choices", row_id, number, str(len(choices)))
        elif len(set(choices)) == 1:
            add("same_choices", row_id, number)
        elif len(set(choices)) < len(choices):
            add("equal_choices", row_id, number, repr(max(choices, key=choices.count))[:60])
        if "" in choices:
            add("empty_choice", row_id, number)
        for text in (*choices, texts["context"]):
            if text.casefold() in EMPTY_WORDS:
                add("nan_choice", row_id, number, repr(text))
                break
        num_free, reference = find_references(texts["question"], choices)
        if num_free < len(choices):
            add("keeps_last" if num_free else "keeps_order", row_id, number, repr(reference)[:60])
        if len(texts["question"]) + len(texts["context"]) + sum(map(len, choices)) > _LONG_TEXT:
            add("long_text", row_id, number)

    def _targets(self, cell: object, num_choices: int, row_id: str, number: int) -> list[float] | None:
        """What each choice should have, in all 1; None where nothing is given."""
        values = read_list(cell)
        if values is None and not self._value(cell):
            return None
        try:
            numbers = [float(value) for value in values or ()]
        except (TypeError, ValueError):
            numbers = []
        total = sum(numbers)
        if len(numbers) != num_choices or min(numbers, default=-1) < 0 or not 0 < total < math.inf:
            self.problems.add("bad_targets", row_id, number, repr(cell)[:60])
            return None
        return [value / total for value in numbers]

    def _images(self, row: dict, folder: str | None, row_id: str, number: int) -> list[dict]:
        """{bytes, path} of every image that the row names; a path that leads out of the root is a problem."""
        images, num_named = [], 0
        for cell in itertools.chain.from_iterable(self._named(row, name, row_id) for name in self._paths):
            text = self._value(cell)
            if not text:
                continue
            num_named += 1
            if text.startswith(_BASE64) and len(text) > 200 or text.startswith("data:image/"):
                images.append({"bytes": _decode_base64(text), "path": None})
            elif "://" in text[:10]:
                self.problems.add("image_address", row_id, number, text[:60])
                images += self.unopened
            elif "\0" in text or not _is_whole(text):
                self.problems.add("missing_image", row_id, number, repr(text)[:60])
                images += self.unopened
            else:
                path = self.paths.find(self.root_of(folder), text)
                if path is not None:
                    images.append({"bytes": None, "path": path})
                else:  # nobody opens it
                    self.problems.add("path_outside", row_id, number, text[:60])
                    images += self.unopened
        if not num_named and self._paths:
            self.problems.add("no_image", row_id, number)
        return images

    def _named(self, row: dict, name: str, row_id: str) -> list:
        """The paths in a column, or the one that a template gives."""
        parts = fields_of(name, self.columns.id)
        if not parts:
            cells = [row[name]] if isinstance(row[name], dict) else _as_list(row[name])
            # As `datasets` writes an image into JSON.
            return [cell.get("path") if isinstance(cell, dict) and "path" in cell else cell for cell in cells]
        return [fill(name, {part: self._value(row.get(part)) for part in parts} | {"id": row_id})]

    def root_of(self, folder: str | None) -> Path:
        if self.root is not None and not os.path.isdir(self.root):
            raise InputError(f"image_root is no folder: {self.root}. It is relative to where you launched.")
        if folder not in self._roots:
            self._roots[folder] = Path(self.root or folder or ".").resolve()
        return self._roots[folder]


def _read_some(cells_and_choices: Iterator[tuple[str, list[str]]], answer_format: str) -> bool:
    """Whether half of the cells or more are answers in this format."""
    readable = [read_answer(cell, choices, answer_format) is not None for cell, choices in cells_and_choices]
    return sum(readable) * 2 >= len(readable)


def text_of(cell: object) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()  # NaN is not equal to itself


def _is_whole(text: str) -> bool:
    """Whether the text can be written; JSON may hold half a character ("\\ud800")."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _as_list(cell: object) -> list:
    listed = read_list(cell)
    return [cell] if listed is None else listed


def _is_image_name(text: str) -> bool:
    return (
        text.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")) and "\0" not in text
    )


def _decode_base64(text: str) -> bytes:
    """The bytes of an image in base64; empty when it is none, which is found when the image is opened."""
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        return b""


def _images_inside(table: datasets.Dataset, names: Sequence[str], root: Path) -> datasets.Dataset:
    """The column `images` from columns that hold images themselves. Bytes are not copied where every row has one
    image; else `datasets` writes the lists to its cache, so that they are not held in memory either."""
    features = datasets.Features({"images": FEATURES["images"]})
    column = table.data.column(names[0])
    if len(names) == 1 and table._indices is None and _is_one_image_a_row(column):
        storage = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        chunks = [
            pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk.cast(storage))
            for chunk in column.chunks
        ]
        lists = pa.table({"images": pa.chunked_array(chunks, type=pa.list_(storage))})
        return datasets.Dataset(datasets.table.InMemoryTable(lists.cast(features.arrow_schema)))
    # Not beside a saved dataset, which may lie on a disk that cannot be written.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "vqa_sft"
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((table._fingerprint, names, str(root))).encode()).hexdigest()[:24]
    return table.select_columns(list(names)).map(
        partial(_collect_images, names=list(names), root=str(root)),
        remove_columns=list(names),
        features=features,
        cache_file_name=str(cache / f"images-{key}.arrow"),
        desc="Collecting images",
    )


def _collect_images(row: dict, names: Sequence[str], root: str) -> dict:
    images = [image for name in names for image in _images_of(row[name])]
    for image in images:
        if image["bytes"] is None:
            image["path"] = os.path.abspath(os.path.join(root, image["path"]))
    return {"images": images}


def _replace_paths(row: dict, other: Mapping[str, str | None], unopened: Sequence[dict]) -> dict:
    """The images of a row with their other paths; `unopened` in place of those whose other path is None."""
    images = []
    for image in row["images"]:
        path = other.get(image["path"], image["path"])
        images += [image | {"path": path}] if image["bytes"] is not None or path is not None else unopened
    return {"images": images}


def _paths_only(images: datasets.Dataset) -> Iterator[list[str] | None]:
    """Of every row, the paths of the images whose bytes it does not hold; None for a row without images."""
    for chunk in images.data.column("images").chunks:
        paths = pc.if_else(chunk.flatten().field("bytes").is_valid(), None, chunk.flatten().field("path")).to_pylist()
        lengths = pc.list_value_length(chunk).to_pylist()
        start = 0
        for length in lengths:
            yield [path for path in paths[start : start + length] if path is not None] if length else None
            start += length or 0


def _is_one_image_a_row(column: pa.ChunkedArray) -> bool:
    """Whether every row holds the bytes of one image."""
    is_struct = pa.types.is_struct(column.type) and {field.name for field in column.type} == {"bytes", "path"}
    if not is_struct or column.null_count:
        return False
    return all(chunk.field("bytes").null_count == 0 for chunk in column.chunks)  # looks at validity, not at bytes


def _images_of(cell: Any) -> list[dict]:
    """{bytes, path} of what one cell of an image column holds."""
    if isinstance(cell, list):
        return [image for item in cell for image in _images_of(item)]
    if isinstance(cell, bytes):
        return [{"bytes": cell, "path": None}]
    if cell is None or (cell.get("bytes") is None and cell.get("path") is None):
        return []
    return [{"bytes": cell["bytes"], "path": cell["path"]}]
