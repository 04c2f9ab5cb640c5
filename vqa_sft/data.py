"""Any source -> canonical `datasets.Dataset`; every bad row named at once. No torch.

    row of a CSV, JSONL, Parquet or Hub source         canonical example
    id    path       question  a    b    answer   ->   id    images             question  choices     answer
    t_1   img/1.png  What?     cat  dog  b             t_1   [{path, bytes}]    What?     [cat, dog]  1

`images` holds what `datasets.Image(decode=False)` holds, so that nothing is decoded before a worker needs it; it is
empty for a row without a picture. `context` is "" where there is none; `question_type` is found by rules.
"""

import ast
import base64
import hashlib
import itertools
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqa_sft.answers import UNKNOWN, infer_format, is_upper_case, read_answer
from vqa_sft.columns import Columns, find_columns
from vqa_sft.errors import InputError, safe
from vqa_sft.mcq import LETTERS
from vqa_sft.problems import Problems
from vqa_sft.question_types import find_type
from vqa_sft.sources import Source, holds_pictures, open_source

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
# How JPEG, PNG, GIF and WebP begin in base64: benchmark files in TSV hold their pictures so.
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


def load_examples(source: str | Sequence[str], **options: Any) -> tuple[datasets.Dataset, Columns]:
    """The canonical examples of a source and the columns that they came from; `options` as in `read_examples`.

    Raises InputError with every bad row at once.
    """
    loaded = read_examples(source, **options)
    loaded.problems.raise_if_any(loaded.name)
    return loaded.examples, loaded.columns


def read_examples(
    source: str | Sequence[str],
    *,
    split: str = "train",
    config: str | Sequence[str] | None = None,
    encoding: str | None = None,
    columns: Mapping[str, Any] | None = None,
    answer_format: str | None = None,
    keep_rows: Mapping[str, Any] | None = None,
    empty_cells: Sequence[str] | None = None,
    image_root: str | None = None,
    answers: str = "required",
    limit: int | None = None,
) -> Loaded:
    """Canonical examples of a source, and everything that is wrong with its texts; pictures are not opened.

    `columns` names the columns that are not found by themselves; `answer_format` is inferred when it is None.
    `keep_rows` keeps the rows whose columns hold the given value, or one of the given values. A cell that holds one of
    `empty_cells` counts as empty. `answers` is "required" (training) or "optional" (prediction). Picture paths are
    relative to `image_root` and must stay in it; by default it is the folder of the file.

    Raises InputError when nothing can be read, a column is missing, or the answers can be read in two ways.
    """
    opened = open_source(source, split=split, config=config, encoding=encoding)
    reader = RowReader(opened, find_columns(opened.columns, columns or {}, answers), keep_rows, empty_cells, image_root)
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
        raise InputError(f"{opened.name} has no rows{' that keep_rows keeps' if keep_rows else ''}.")
    reader.problems.total = len(numbers)
    texts = pa.concat_tables(tables)
    reader.settle_answers(partial(_cells_and_choices, texts), answer_format)
    targets = texts["targets"].to_pylist() if reader.columns.targets else itertools.repeat(None, len(numbers))
    found = [
        reader.answer(cell, choices, row_id.as_py(), number, answers, target)
        for (cell, choices), row_id, number, target in zip(
            _cells_and_choices(texts), texts["id"], numbers, targets, strict=True
        )
    ]
    texts = texts.append_column("answer", pa.array(found, pa.int64())).select(list(features))
    examples = datasets.Dataset(datasets.table.InMemoryTable(texts.cast(features.arrow_schema)))
    if reader.inside:
        root = reader.root_of(folder)
        pictures = _pictures_inside(opened.table.select(numbers), reader.inside, root)
        examples = datasets.concatenate_datasets([examples.remove_columns("images"), pictures], axis=1)
        examples = examples.select_columns(list(features))
        for i, paths in enumerate(_paths_only(pictures)):
            if paths is None:
                reader.problems.add("no_picture", examples[i]["id"], numbers[i])
            for path in paths or ():
                if not Path(path).is_relative_to(root):
                    reader.problems.add("path_outside", examples[i]["id"], numbers[i], path[:60])
        if reader.problems.bad_rows("path_outside"):  # nobody opens them
            examples = examples.map(partial(_drop_outside, root=str(root)), desc="Leaving pictures out")
    reader.check_that_some_have_pictures(len(numbers))
    notes = [*opened.notes, reader.describe(len(numbers))]
    num_choices = pc.max(pc.list_value_length(texts["choices"])).as_py()
    return Loaded(opened.name, examples, reader.columns, reader.problems, numbers, notes, num_choices)


def row_digest(example: Mapping[str, Any]) -> str:
    """16 hex digits that tell a row from others, whatever its id: of question, context, choices and images.

    An image counts by its content where the row holds it, else by the name of its file, so that a folder may move. The
    answer does not count: a test set may come with answers and without.
    """
    images = [
        Path(image["path"]).name if image["bytes"] is None else hashlib.sha256(image["bytes"]).hexdigest()
        for image in example["images"]
    ]
    texts = [example["question"], example["context"], example["choices"], images]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _cells_and_choices(texts: pa.Table) -> Iterator[tuple[str, list[str]]]:
    """The answer's cell and the choices of every row, a batch at a time."""
    for batch in texts.select(["cell", "choices"]).to_batches(_BATCH):
        yield from zip(batch["cell"].to_pylist(), batch["choices"].to_pylist(), strict=True)


def stream_examples(
    source: str | Sequence[str],
    *,
    split: str = "train",
    config: str | Sequence[str] | None = None,
    encoding: str | None = None,
    columns: Mapping[str, Any] | None = None,
    answer_format: str | None = None,
    keep_rows: Mapping[str, Any] | None = None,
    empty_cells: Sequence[str] | None = None,
    image_root: str | None = None,
    max_choices: int | None = None,
    answers: str = "required",
    limit: int | None = None,
) -> Loaded:
    """Rows of a source as they are needed: `examples` is an `IterableDataset`, and nothing is held.

    Columns, answer format and the most choices come from the first rows. A row with a problem raises InputError when it
    comes, and so does one with more choices.
    """
    opened = open_source(source, split=split, config=config, encoding=encoding, streaming=True)
    reader = RowReader(opened, find_columns(opened.columns, columns or {}, answers), keep_rows, empty_cells, image_root)
    reader.answers = answers
    head = [reader.read(*item) for item in itertools.islice(reader.rows(), min(_HEAD, limit or _HEAD))]
    reader.problems.total = len(head)
    reader.problems.raise_if_any(opened.name)
    if not head:
        raise InputError(f"{opened.name} has no rows{' that keep_rows keeps' if keep_rows else ''}.")
    if not reader.inside:
        reader.check_that_some_have_pictures(len(head))
    reader.settle_answers(lambda: ((row["cell"], row["choices"]) for row in head), answer_format)
    reader.max_choices = max_choices or max(len(row["choices"]) for row in head)
    if reader.inside:
        # Numbered before rows are left out: without a column for them, ids are those numbers.
        numbered = opened.table.map(_number, with_indices=True)
        numbered = numbered.filter(reader.keeps) if keep_rows else numbered
        dropped = [*opened.columns, _NUMBER]
        examples = numbered.map(reader.numbered_example, remove_columns=dropped, features=reader.features)
    else:
        # In training every part reads the whole text and yields each sixteenth row: text is cheap, and workers share
        # the pictures. Prediction keeps the order of the rows.
        num_parts = _PARTS if answers == "required" else 1
        parts = {"reader": reader, "parts": list(range(num_parts)), "num_parts": num_parts}
        examples = datasets.IterableDataset.from_generator(_stream_parts, features=reader.features, gen_kwargs=parts)
    if limit is not None:
        examples = examples.take(limit)
    notes = [*opened.notes, safe(f"{opened.name}: a stream; {reader.columns.describe()}")]
    return Loaded(opened.name, examples, reader.columns, reader.problems, (), notes, reader.max_choices)


def _number(row: dict, number: int) -> dict:
    return row | {_NUMBER: number}


def _stream_parts(reader: "RowReader", parts: list[int], num_parts: int) -> Iterator[dict]:
    for part in parts:
        for number, folder, row in reader.rows():
            if number % num_parts == part:
                yield reader.example(row, number, folder)


class RowReader:
    """One raw row -> the texts and picture paths of an example; what is wrong with it goes to `problems`."""

    def __init__(
        self,
        source: Source,
        columns: Columns,
        keep_rows: Mapping[str, Any] | None = None,
        empty_cells: Sequence[str] | None = None,
        image_root: str | None = None,
    ) -> None:
        in_arrow = [name for name, kind in (source.features or {}).items() if holds_pictures(kind)]
        texts = [name for name in [*columns.names, *(keep_rows or {})] if name not in columns.image]
        wrong = [name for name in texts if name in in_arrow]
        if wrong:
            raise InputError(f"{source.name}: {', '.join(wrong)} must hold text; got pictures or bytes.")
        self.source = source
        self.columns = columns
        self.keep_rows = {
            name: [_text(value) for value in (values if isinstance(values, list) else [values])]
            for name, values in (keep_rows or {}).items()
        }
        self.empty_cells = {*(empty_cells or ()), ""}
        self.root = image_root
        self.problems = Problems()
        self.max_choices = len(LETTERS)
        self.answers = "required"
        self.left_out = 0
        self.inside = [name for name in columns.image if name in in_arrow]
        self._paths = [name for name in columns.image if name not in self.inside]
        if self.inside and self._paths:
            raise InputError(f"the columns {', '.join(columns.image)} hold both paths and pictures. Name one kind.")
        self._seen: set[str] = set()
        self._roots: dict[str | None, Path] = {}
        missing = [name for name in self.keep_rows if name not in source.columns]
        if missing:
            raise InputError(f"keep_rows names columns that are not in {source.name}: {', '.join(map(str, missing))}.")

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
        return all(_text(row[name]) in values for name, values in self.keep_rows.items())

    def example(self, row: dict, number: int, folder: str | None = None) -> dict:
        """One row of a stream, whole. Raises InputError for a row with a problem."""
        self.problems, self._seen = Problems(1), set()  # a stream is too long to remember its ids
        texts = self.read(number, folder, row)
        if self.columns.id is None and self.answers == "required":  # workers that share a stream count from 0 each
            named = "\n".join([texts["question"], texts["context"], *texts["choices"]])
            texts["id"] = hashlib.sha256(named.encode()).hexdigest()[:16]
        cell, targets = texts.pop("cell"), texts.get("targets")
        answer = self.answer(cell, texts["choices"], texts["id"], number, self.answers, targets)
        if len(texts["choices"]) > self.max_choices:
            self.problems.add("more_choices", texts["id"], number, f"{len(texts['choices'])}, not {self.max_choices}")
        self.problems.raise_if_any(self.source.name)
        if self.inside:
            root = self.root_of(folder)
            texts |= _collect_pictures(row, self.inside, str(root))
            for picture in texts["images"]:
                if picture["bytes"] is None and not Path(picture["path"]).is_relative_to(root):
                    self.problems.add("path_outside", texts["id"], number, picture["path"][:60])
            self.problems.raise_if_any(self.source.name)
        return texts | {"answer": answer}

    def numbered_example(self, row: dict) -> dict:
        return self.example(row, row[_NUMBER])

    def read(self, number: int, folder: str | None, row: dict) -> dict:
        """The canonical fields of a row but for `answer`, whose cell stays text until its format is known."""
        columns = self.columns
        row_id = str(number) if columns.id is None else self._value(row[columns.id])
        texts = {"id": row_id, "question": row[columns.question], "cell": self._cell(row)}
        texts["context"] = row[columns.context] if columns.context else None
        listed = row[columns.choices] if isinstance(columns.choices, str) else [row[name] for name in columns.choices]
        choices = _as_list(listed)
        if choices is None:
            self.problems.add("bad_choices", row_id, number, repr(listed)[:60])
        for name in ("question", "context", "cell"):
            texts[name] = self._checked(texts[name], row_id, number)
        is_list, choices = choices is not None, [self._checked(choice, row_id, number) for choice in choices or []]
        while choices and not choices[-1]:
            choices.pop()
        self._check_texts(texts, choices if is_list else None, number)
        images = [] if self.inside else self._pictures(row, folder, row_id, number)
        kind = find_type(texts["question"], choices)
        texts |= {"choices": choices, "images": images, "question_type": kind}
        if columns.targets:
            texts["targets"] = self._targets(row[columns.targets], len(choices), row_id, number)
        return texts

    def settle_answers(
        self, cells_and_choices: Callable[[], Iterator[tuple[str, list[str]]]], answer_format: str | None
    ) -> None:
        """Fix how the source writes its answers: as given, else as most of its rows do."""
        if any(cell.casefold() not in UNKNOWN for cell, _ in cells_and_choices()):
            is_upper = is_upper_case(cell for cell, _ in cells_and_choices())
            answer_format = answer_format or infer_format(cells_and_choices())
        else:  # nothing is known of a source without answers
            is_upper = not isinstance(self.columns.choices, str) and self.columns.choices[0].isupper()
            answer_format = None
        self.columns = replace(self.columns, answer_format=answer_format, answers_are_upper=is_upper)

    def answer(
        self,
        cell: str,
        choices: Sequence[str],
        row_id: str,
        number: int,
        answers: str,
        targets: Sequence[float] | None = None,
    ) -> int | None:
        """The index of the right choice; in a row without one, of the largest target. `answers` is "required" or
        "optional"."""
        if len(choices) < 2:  # said already
            return None
        if targets and cell.casefold() in UNKNOWN:
            return targets.index(max(targets))
        index = read_answer(cell, choices, self.columns.answer_format or "letter")
        if index is None and not (answers == "optional" and cell.casefold() in UNKNOWN):
            self.problems.add("bad_answer" if cell else "no_answer", row_id, number, repr(cell)[:60] if cell else "")
        elif index is not None and not choices[index]:
            self.problems.add("bad_answer", row_id, number, f"{cell!r}, which is empty")
        return index

    def check_that_some_have_pictures(self, num_rows: int) -> None:
        """Raises InputError when the columns for pictures are empty in all of the rows."""
        if self.columns.image and len(self.problems.bad_rows("no_picture")) == num_rows:
            raise InputError(
                f"no row of {self.source.name} has a picture in {', '.join(self.columns.image)}. Name the column with "
                "the pictures in the recipe (`columns: {image: ...}`; for none: `image: []`)."
            )

    def describe(self, num_rows: int) -> str:
        """One line: how many rows, and which column was taken for what."""
        left_out = f" ({self.left_out:,} left out by keep_rows)" if self.left_out else ""
        return safe(f"{self.source.name}: {num_rows:,} rows{left_out}; {self.columns.describe()}")

    def _cell(self, row: dict) -> object:
        name = self.columns.answer
        if name is None or name not in row:
            return None
        kind = (self.source.features or {}).get(name)
        if isinstance(kind, datasets.ClassLabel) and isinstance(row[name], int) and 0 <= row[name] < kind.num_classes:
            return kind.int2str(row[name])
        return row[name]

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
        text = _text(cell)
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
        if len(texts["question"]) + len(texts["context"]) + sum(map(len, choices)) > _LONG_TEXT:
            add("long_text", row_id, number)

    def _targets(self, cell: object, num_choices: int, row_id: str, number: int) -> list[float] | None:
        """What each choice should have, in all 1; None where nothing is given."""
        values = _as_list(cell)
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

    def _pictures(self, row: dict, folder: str | None, row_id: str, number: int) -> list[dict]:
        """{bytes, path} of every picture that the row names; a path that leads out of the root is a problem."""
        images, num_named = [], 0
        for cell in itertools.chain.from_iterable(_as_list(row[name], or_one=True) for name in self._paths):
            text = self._value(cell)
            if not text:
                continue
            num_named += 1
            if text.startswith(_BASE64) and len(text) > 200 or text.startswith("data:image/"):
                images.append({"bytes": _decode_base64(text), "path": None})
            elif "://" in text[:10]:
                self.problems.add("picture_address", row_id, number, text[:60])
            elif "\0" in text or not _is_whole(text):
                self.problems.add("missing_picture", row_id, number, repr(text)[:60])
            else:
                root = self.root_of(folder)
                path = os.path.abspath(root / text)
                if Path(path).is_relative_to(root):
                    images.append({"bytes": None, "path": path})
                else:  # nobody opens it
                    self.problems.add("path_outside", row_id, number, text[:60])
        if not num_named and self._paths:
            self.problems.add("no_picture", row_id, number)
        return images

    def root_of(self, folder: str | None) -> Path:
        if self.root is not None and not os.path.isdir(self.root):
            raise InputError(f"image_root is no folder: {self.root}. It is relative to where you launched.")
        if folder not in self._roots:
            self._roots[folder] = Path(self.root or folder or ".").resolve()
        return self._roots[folder]


def _text(cell: object) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()  # NaN is not equal to itself


def _is_whole(text: str) -> bool:
    """Whether the text can be written; JSON may hold half a character ("\\ud800")."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _as_list(cell: object, or_one: bool = False) -> list | None:
    """A list, or a text that spells one in JSON or Python, or {"A": ..., "B": ...}; None for anything else, or with
    `or_one` the cell itself in a list."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        # Numbers stay as they are written.
        for read in (partial(json.loads, parse_float=str, parse_int=str), ast.literal_eval):
            try:
                cell = read(cell)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if isinstance(cell, dict) and list(map(str.upper, map(str, cell))) == list(LETTERS[: len(cell)]):
        cell = list(cell.values())
    if isinstance(cell, list | tuple):
        return list(cell)
    return [cell] if or_one else None


def _decode_base64(text: str) -> bytes:
    """The bytes of a picture in base64; empty when it is none, which is found when the picture is opened."""
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        return b""


def _pictures_inside(table: datasets.Dataset, names: Sequence[str], root: Path) -> datasets.Dataset:
    """The column `images` from columns that hold pictures themselves. Bytes are not copied where every row has one
    picture; else `datasets` writes the lists to its cache, so that they are not held in memory either."""
    features = datasets.Features({"images": FEATURES["images"]})
    column = table.data.column(names[0])
    if len(names) == 1 and table._indices is None and _is_one_picture_a_row(column):
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
        partial(_collect_pictures, names=list(names), root=str(root)),
        remove_columns=list(names),
        features=features,
        cache_file_name=str(cache / f"pictures-{key}.arrow"),
        desc="Collecting pictures",
    )


def _collect_pictures(row: dict, names: Sequence[str], root: str) -> dict:
    pictures = [picture for name in names for picture in _pictures_of(row[name])]
    for picture in pictures:
        if picture["bytes"] is None:
            picture["path"] = os.path.abspath(os.path.join(root, picture["path"]))
    return {"images": pictures}


def _drop_outside(row: dict, root: str) -> dict:
    kept = [image for image in row["images"] if image["bytes"] is not None or Path(image["path"]).is_relative_to(root)]
    return {"images": kept}


def _paths_only(pictures: datasets.Dataset) -> Iterator[list[str] | None]:
    """Of every row, the paths of the pictures whose bytes it does not hold; None for a row without pictures."""
    for chunk in pictures.data.column("images").chunks:
        paths = pc.if_else(chunk.flatten().field("bytes").is_valid(), None, chunk.flatten().field("path")).to_pylist()
        lengths = pc.list_value_length(chunk).to_pylist()
        start = 0
        for length in lengths:
            yield [path for path in paths[start : start + length] if path is not None] if length else None
            start += length or 0


def _is_one_picture_a_row(column: pa.ChunkedArray) -> bool:
    """Whether every row holds the bytes of one picture."""
    is_struct = pa.types.is_struct(column.type) and {field.name for field in column.type} == {"bytes", "path"}
    if not is_struct or column.null_count:
        return False
    return all(chunk.field("bytes").null_count == 0 for chunk in column.chunks)  # looks at validity, not at bytes


def _pictures_of(cell: Any) -> list[dict]:
    """{bytes, path} of what one cell of a picture column holds."""
    if isinstance(cell, list):
        return [picture for item in cell for picture in _pictures_of(item)]
    if isinstance(cell, bytes):
        return [{"bytes": cell, "path": None}]
    if cell is None or (cell.get("bytes") is None and cell.get("path") is None):
        return []
    return [{"bytes": cell["bytes"], "path": cell["path"]}]
