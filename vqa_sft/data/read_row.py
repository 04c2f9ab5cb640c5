"""One raw row -> the texts and images of an example; what is wrong with it goes to `problems`. No torch."""

import hashlib
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import datasets

from vqa_sft.data.answers import PLACEHOLDERS, UNKNOWN
from vqa_sft.data.cells import (
    EMPTY_WORDS,
    is_writable,
    read_answer,
    read_list,
    split_text,
    strip_labels,
    text_of,
    unwrap,
)
from vqa_sft.data.columns import IN_QUESTION, Columns
from vqa_sft.data.images_in_tables import read_inside
from vqa_sft.data.in_question import split_choices
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.problems import PREDICTION_HINT, STREAM_HINT, Problems
from vqa_sft.data.read_arrow import holds_images
from vqa_sft.data.read_images import ImageReader
from vqa_sft.data.sources import Source
from vqa_sft.errors import InputError, printable, safe
from vqa_sft.questions.letters import LETTERS
from vqa_sft.questions.references import find_references
from vqa_sft.questions.types import find_type

NUMBER = "vqa_sft_number"  # of a streamed row in its source
_SHOWN = 10  # values of a column in a message
_LONG_TEXT = 20_000  # characters, some five thousand tokens


class RowReader:
    """Reads the rows of one source. `settle_columns` and `settle_answers` fix what one row does not tell."""

    def __init__(self, source: Source, columns: Columns, options: ReadOptions) -> None:
        in_arrow = columns_with_images(source)
        keep_rows = options.keep_rows or {}
        texts = [name for name in [*columns.names, *keep_rows] if name not in columns.image]
        wrong = [name for name in texts if name in in_arrow]
        if wrong:
            raise InputError(f"{source.name}: {', '.join(wrong)} must hold text; got images or bytes.")
        missing = [name for name in keep_rows if name not in source.columns]
        if missing:
            raise InputError(
                f"keep_rows names columns that are not in {source.name}: {', '.join(map(str, missing))}. It has "
                f"{printable(', '.join(source.columns), 500)}."
            )
        self.source, self.columns, self.options = source, columns, options
        self.images = ImageReader(columns, in_arrow, options)
        self.problems = Problems()
        self.notes: list[str] = []
        self.max_choices = len(LETTERS)
        self.keep_rows = {
            name: [text_of(value) for value in (values if isinstance(values, list) else [values])]
            for name, values in keep_rows.items()
        }
        self.left_out = 0
        self.folder: str | None = None  # of a streamed table
        # What `settle_columns` and `settle_answers` find.
        self.split: str | None = None  # how a text becomes choices, one of cells.SPLITS
        self.stray: list[str] = []  # columns that look like choices and are none
        self.sparse: str | None = None  # one that may be none
        self.constant: str | None = None  # the answer of every row, which is none
        self.first_split: str | None = None  # of choices in the question, to show
        self._is_classification = options.is_classification
        self._kinds = source.features or {}
        self._empty_cells = {*(options.empty_cells or ()), ""}
        self._values: dict[str, dict[str, None]] = {name: {} for name in keep_rows}  # some that are there
        self._seen: set[str] = set()

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
        for name, values in self._values.items():
            if len(values) <= _SHOWN:
                values[text_of(row[name])] = None
        return all(text_of(row[name]) in values for name, values in self.keep_rows.items())

    def describe_kept(self) -> str:
        """Of a source without rows: what the columns of `keep_rows` hold, for the user."""
        if not self.keep_rows:
            return ""
        held = [f"{name} holds {', '.join(map(repr, [*values][:_SHOWN]))}" for name, values in self._values.items()]
        if any(len(values) > _SHOWN for values in self._values.values()):
            held.append("...")
        return safe(f" that keep_rows {self.keep_rows} keeps: {'; '.join(held)}")

    def describe(self, num_rows: int) -> str:
        """One line: how many rows, and which column was taken for what."""
        left_out = f" ({self.left_out:,} left out by keep_rows)" if self.left_out else ""
        return safe(f"{self.source.name}: {num_rows:,} rows{left_out}; {self.columns.describe()}")

    def check_that_some_have_images(self, num_rows: int) -> None:
        """Raises InputError when the columns for images are empty in all of the rows."""
        if self.columns.image and len(self.problems.bad_rows("no_image")) == num_rows:
            raise InputError(
                f"no row of {self.source.name} has an image in {', '.join(self.columns.image)}. Name the column with "
                "the images in the recipe (`columns: {image: ...}`; for none: `image: []`)."
            )

    def value(self, cell: object) -> str:
        """The text of a cell; "" for an empty one."""
        text = text_of(cell)
        return "" if text in self._empty_cells else text

    def answer_cell(self, row: dict, name: str | None = None) -> object:
        """The cell of the answer, or of the column that is named."""
        name = name or self.columns.answer
        if name is None or name not in row:
            return None
        kind = self._kinds.get(name)
        if isinstance(kind, datasets.ClassLabel) and isinstance(row[name], int) and 0 <= row[name] < kind.num_classes:
            return kind.int2str(row[name])
        return row[name] if isinstance(row[name], str) else unwrap(row[name])

    def _question_cell(self, row: dict) -> object:
        return self.columns.fixed_question if self.columns.question is None else row[self.columns.question]

    def choices(self, row: dict) -> list[str]:
        """The choices as texts, without the empty ones at their end."""
        return _without_empty_end([self.value(choice) for choice in self._choice_cells(row) or ()])

    def _choice_cells(self, row: dict) -> list | None:
        """The cells of the choices; None where their one cell is no list."""
        name = self.columns.choices
        if self.columns.fixed_choices is not None:
            return [*self.columns.fixed_choices]
        if name == IN_QUESTION:
            return split_choices(self.value(self._question_cell(row)))[1]
        if not isinstance(name, str):
            return [row[name] for name in self.columns.choices]
        listed = read_list(row[name])
        return split_text(row[name], self.split) if listed is None and self.split and row[name] else listed

    def read(self, number: int, folder: str | None, row: dict) -> dict:
        """The canonical fields of a row but for `answer`, whose cell stays text until its format is known."""
        columns = self.columns
        row_id = str(number) if columns.id is None else self.value(row[columns.id])
        report = partial(self.problems.add, row_id, number)
        question = self._question_cell(row)
        texts: dict[str, Any] = {"id": row_id, "question": question, "cell": self.answer_cell(row)}
        texts["context"] = row[columns.context] if columns.context else None
        if columns.choices == IN_QUESTION:
            texts["question"], cells = split_choices(self.value(question))
            if cells is None:
                report("no_choices_in_question", repr(question)[:60])
            elif self.first_split is None:
                self.first_split = f"{texts['question']!r:.200} with the choices {cells!r:.300}"
        else:
            cells = self._choice_cells(row)
            if cells is None:
                report("bad_choices", repr(row[columns.choices])[:60])
        for name in ("question", "context", "cell"):
            texts[name] = _clean_text(texts[name], self.value(texts[name]), report)
        choices = _without_empty_end([_clean_text(cell, self.value(cell), report) for cell in cells or ()])
        if cells is not None:
            choices = self._without_labels(choices, report)
        self._report_left_out(row, report)
        texts["id"] = self._clean_id(row_id, number)
        has_choices = cells is not None and not self._is_classification
        _check_texts(texts["question"], texts["context"], choices if has_choices else None, report)
        images = [] if self.images.inside else self.images.read(row, folder, row_id, self.value, report)
        texts |= {"choices": choices, "images": images, "question_type": find_type(texts["question"], choices)}
        if columns.targets:
            cell = row[columns.targets]
            texts["targets"] = _read_targets(cell, not self.value(cell), len(choices), report)
        return texts

    def _without_labels(self, choices: list[str], report: Callable[..., None]) -> list[str]:
        trained = self.options.trained
        if not self.columns.has_labels and not (trained and trained.has_labels):
            return choices
        bare = strip_labels(choices)
        if bare is None and self.columns.has_labels:
            report("bad_choices", f"not labelled as in the other rows: {choices!r:.60}")
        return bare or choices

    def _report_left_out(self, row: dict, report: Callable[..., None]) -> None:
        """Texts in columns that look like choices and are not, or may not be."""
        kinds = [("stray_column", name) for name in self.stray]
        kinds += [("sparse_column", self.sparse)] if self.sparse else []
        for kind, name in kinds:
            if text := self.value(row[name]):
                report(kind, f"{name}: {text!r:.60}")

    def _clean_id(self, row_id: str, number: int) -> str:
        """The id as files can hold it: a line break in it would break files of ids."""
        if not row_id:
            self.problems.add(row_id, number, "empty_id")
        elif row_id in self._seen:
            self.problems.add(row_id, number, "duplicate_id")
        self._seen.add(row_id)
        if is_writable(row_id) and not any(unicodedata.category(char) == "Cc" for char in row_id):
            return row_id
        self.problems.add(repr(row_id)[:60], number, "bad_text", "the id")
        return _without_odd_characters(row_id)

    def is_no_answer(self, cell: str) -> bool:
        """Whether a cell stands for no answer."""
        words = (*UNKNOWN, *PLACEHOLDERS) if self.options.answers == "optional" else UNKNOWN
        return cell.casefold() in words or cell == self.constant

    def answer(
        self, cell: str, choices: Sequence[str], row_id: str, number: int, targets: Sequence[float] | None = None
    ) -> int | None:
        """The index of the right choice; in a row without one, of the largest target."""
        if len(choices) < 2:  # reported already
            return None
        if targets and cell.casefold() in UNKNOWN:
            return targets.index(max(targets))
        if cell and cell == self.constant:
            return None
        index = read_answer(cell, choices, self.columns.answer_format or "letter")
        if index is None and not (self.options.answers == "optional" and self.is_no_answer(cell)):
            self.problems.add(row_id, number, "bad_answer" if cell else "no_answer", repr(cell)[:60] if cell else "")
        elif index is not None and not choices[index]:
            self.problems.add(row_id, number, "bad_answer", f"{cell!r}, which is empty")
        return index

    def example(self, row: dict, number: int, folder: str | None = None) -> dict:
        """One row of a stream, whole. Raises InputError for a row with a problem."""
        self.problems, self._seen = Problems(1), set()  # a stream is too long to remember its ids
        texts = self.read(number, folder, row)
        if self.columns.id is None and self.options.answers == "required":
            # Workers that share a stream count from 0 each.
            named = "\n".join([texts["question"], texts["context"], *texts["choices"]])
            texts["id"] = hashlib.sha256(named.encode()).hexdigest()[:16]
        cell, targets = texts.pop("cell"), texts.get("targets")
        answer = self.answer(cell, texts["choices"], texts["id"], number, targets)
        if len(texts["choices"]) > self.max_choices:
            self.problems.add(texts["id"], number, "more_choices", f"{len(texts['choices'])}, not {self.max_choices}")
        self.raise_if_any()
        if self.images.inside:
            texts["images"] = read_inside(self.images, row, folder, partial(self.problems.add, texts["id"], number))
            self.raise_if_any()
        return texts | {"answer": answer}

    def numbered_example(self, row: dict) -> dict:
        return self.example(row, row[NUMBER], self.folder)

    def raise_if_any(self) -> None:
        """Raises InputError for problems of a stream's row."""
        hint = STREAM_HINT if self.options.answers == "required" else PREDICTION_HINT
        self.problems.raise_if_any(self.source.name, self.options.on_bad_row, hint)


def columns_with_images(source: Source) -> list[str]:
    """The columns that hold images themselves."""
    return [name for name, kind in (source.features or {}).items() if holds_images(kind)]


def _without_empty_end(choices: list[str]) -> list[str]:
    while choices and not choices[-1]:
        choices.pop()
    return choices


def _clean_text(cell: object, text: str, report: Callable[..., None]) -> str:
    """The text of a cell as every later stage can hold it."""
    if isinstance(cell, list | dict | bytes):
        report("bad_text", f"{text[:40]!r} is a {type(cell).__name__}")
    elif "\0" in text or not is_writable(text):
        report("bad_text", repr(text[:40]))
        return _without_odd_characters(text)
    return text


def _without_odd_characters(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _check_texts(question: str, context: str, choices: Sequence[str] | None, report: Callable[..., None]) -> None:
    """`choices` None: the row has none, or its cell was no list, which is reported already."""
    if not question:
        report("empty_question")
    if choices is None:
        return
    if len(choices) < 2:
        report("few_choices")
    elif len(choices) > len(LETTERS):
        report("many_choices", str(len(choices)))
    elif len(set(choices)) == 1:
        report("same_choices")
    elif len(set(choices)) < len(choices):
        report("equal_choices", repr(max(choices, key=choices.count))[:60])
    if "" in choices:
        report("empty_choice")
    empty_words = [text for text in (*choices, context) if text.casefold() in EMPTY_WORDS]
    if empty_words:
        report("nan_choice", repr(empty_words[0]))
    num_free, reference = find_references(question, choices)
    if num_free < len(choices):
        report("keeps_last" if num_free else "keeps_order", repr(reference)[:60])
    if len(question) + len(context) + sum(map(len, choices)) > _LONG_TEXT:
        report("long_text")


def _read_targets(cell: object, is_empty: bool, num_choices: int, report: Callable[..., None]) -> list[float] | None:
    """The target of each choice, in all 1; None where nothing is given."""
    values = read_list(cell)
    if values is None and is_empty:
        return None
    try:
        numbers = [float(value) for value in values or ()]
    except (TypeError, ValueError):
        numbers = []
    total = sum(numbers)
    if len(numbers) != num_choices or min(numbers, default=-1) < 0 or not 0 < total < math.inf:
        report("bad_targets", repr(cell)[:60])
        return None
    return [value / total for value in numbers]
