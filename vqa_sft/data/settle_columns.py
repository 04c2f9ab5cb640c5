"""What only the cells of all rows tell of their columns, once these are found by name. No torch.

Which of several columns is the answer; which column is no choice; how a text becomes choices; whether choices begin
with labels. Raises InputError where that can be understood in two ways.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vqa_sft.data.answers import FORMATS, find_answer_column
from vqa_sft.data.cells import (
    EMPTY_WORDS,
    SEPARATORS,
    SPLITS,
    read_answer,
    read_label,
    read_list,
    split_text,
    strip_labels,
)
from vqa_sft.data.columns import IN_QUESTION
from vqa_sft.data.find_columns import find_choice_columns, find_others
from vqa_sft.data.read_row import RowReader, columns_with_images
from vqa_sft.data.settle_classes import check_class_columns
from vqa_sft.errors import InputError, name_rows, safe

Rows = Callable[[], Iterator[tuple[int, str | None, dict]]]  # those of RowReader.rows, from the start at every call
Texts = Callable[[], Iterator[tuple[str, Sequence[str]]]]  # the answer's cell and a text for each column of choices
_NUMBER = re.compile(r"[-+]?[0-9]+([.,][0-9]+)*([eE][-+]?[0-9]+)?%?")
_IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def settle_columns(reader: RowReader, rows: Rows, given: Mapping[str, Any], answer_format: str | None) -> None:
    """Fix `reader.columns` and how its choices are read; columns that are `given` stay."""
    in_arrow = columns_with_images(reader.source)
    texts = [name for name in reader.source.columns if name not in in_arrow and name not in reader.keep_rows]
    others = find_others(texts, reader.columns, given, reader.options)
    _settle_choices(reader, rows, given, others, texts)
    _check_other_choices(reader, rows, others.get("choices", ()))
    _settle_answer(reader, rows, others, answer_format)
    _check_other_images(reader, rows, others.get("image", ()))
    unread = [f"{other} ({key})" for key, found in others.items() for other in found]
    if unread:
        reader.notes.append(f"not read, though their names are usual: {', '.join(unread)}")
    if _all_have_labels(reader, rows):
        reader.columns = replace(reader.columns, has_labels=True)
        reader.notes.append('the labels before the choices ("A. ...") are left out: the model gets its own')
    reader.notes = [safe(f"{reader.source.name}: {note}") for note in reader.notes]


def _settle_choices(
    reader: RowReader, rows: Rows, given: Mapping[str, Any], others: dict[str, list[str]], texts: Sequence[str]
) -> None:
    name, trained = reader.columns.choices, reader.options.trained
    if name == IN_QUESTION or reader.columns.fixed_choices is not None:
        unread = others.pop("choices", []) + [*(find_choice_columns(texts) or ())]
        if unread:
            reader.notes.append(f"choices are {reader.columns.describe_choices()}; not read: {', '.join(unread)}")
    elif isinstance(name, str):
        reader.split = find_split(row[name] for _, _, row in rows())
        if reader.split:
            reader.notes.append(f"the texts in {name} become choices by their {reader.split!r}")
    elif "choices" not in given and (trained is None or trained.choices != reader.columns.choices):
        _leave_stray_out(reader, rows)


def _settle_answer(reader: RowReader, rows: Rows, others: dict[str, list[str]], answer_format: str | None) -> None:
    """Of several columns that may be the answer, the one that is."""
    names, trained = [reader.columns.answer, *others.get("answer", ())], reader.options.trained
    if trained is not None and trained.answer in names:  # the first of those that mean the same
        names.sort(key=lambda name: name != trained.answer)
    if reader.options.is_classification:
        check_class_columns(
            reader.source.name,
            names,
            lambda: ([reader.value(reader.answer_cell(row, name)) for name in names] for _, _, row in rows()),
        )
    elif len(names) > 1 and names[0] in reader.source.columns:
        cells = (
            ([reader.value(reader.answer_cell(row, name)) for name in names], reader.choices(row))
            for _, _, row in rows()
        )
        chosen = find_answer_column(names, cells, [answer_format] if answer_format else FORMATS)
        reader.columns = replace(reader.columns, answer=chosen)
        others["answer"] = [name for name in names if name != chosen]


def _leave_stray_out(reader: RowReader, rows: Rows) -> None:
    def cells() -> Iterator[tuple[str, list[str]]]:
        for _, _, row in rows():
            yield reader.value(reader.answer_cell(row)), [reader.value(row[name]) for name in reader.columns.choices]

    while len(reader.columns.choices) > 2:
        *kept, last = list(reader.columns.choices)
        if not is_stray(cells, last.isupper() != kept[0].isupper()):
            break
        reader.columns = replace(reader.columns, choices=tuple(kept))
        reader.stray.append(last)
        why = "never the answer, and it holds numbers beside words or is named in another case"
        hint = f"`columns: {{choices: [{', '.join([*kept, last])}]}}` makes it one"
        reader.notes.append(f"{last} is no choice and left out: {why}; {hint}")
    if len(reader.columns.choices) > 2 and is_sparse(cells):
        reader.sparse = reader.columns.choices[-1]


def _check_other_choices(reader: RowReader, rows: Rows, others: Sequence[str]) -> None:
    """Raises InputError where another column holds lists of other choices."""
    taken = reader.columns.choices if isinstance(reader.columns.choices, str) else ", ".join(reader.columns.choices)
    for name in others:
        for _, _, row in rows():
            listed = read_list(row[name])
            if listed is None:
                break
            listed = [text for text in map(reader.value, listed) if text]
            if listed and listed != [text for text in reader.choices(row) if text]:
                raise InputError(
                    f"{reader.source.name}: {taken} and {name} may both be the choices and differ: "
                    f"{reader.choices(row)!r:.100} and {listed!r:.100}. Name one in the recipe: "
                    f"`columns: {{choices: {name}}}`."
                )


def _check_other_images(reader: RowReader, rows: Rows, others: Sequence[str]) -> None:
    """Raises InputError where another column names other files that are there as well."""
    for name in others if reader.images.named else ():
        for _, folder, row in rows():
            one, other = reader.value(row[reader.images.named[0]]), reader.value(row[name])
            if not _is_image_name(one) or not _is_image_name(other):
                break
            files = [reader.images.root_of(folder) / text for text in (one, other)]
            if files[0] != files[1] and all(file.is_file() for file in files):
                raise InputError(
                    f"{reader.source.name}: {reader.images.named[0]} and {name} name different files, {one[:60]!r} and "
                    f"{other[:60]!r}. Name one in the recipe, or both: `columns: {{image: [{reader.images.named[0]}, "
                    f"{name}]}}`."
                )


def _all_have_labels(reader: RowReader, rows: Rows) -> bool:
    num_rows, out_of_order = 0, []
    for number, _, row in rows():
        choices = reader.choices(row)
        if len(choices) > 1:
            num_rows += 1
            if strip_labels(choices) is None:
                labels = [read_label(choice) for choice in choices]
                if None in labels or sorted(place for place, _ in labels) != [*range(len(choices))]:
                    return False
                out_of_order.append(f"number {number} ({choices!r:.100})")
    if len(out_of_order) >= 3:
        raise InputError(
            f"{reader.source.name}: every choice begins with a label, and not with that of its own place in "
            f"{name_rows(out_of_order, num_rows)}. Put the choices in the order of their labels, or take these off."
        )
    return num_rows > 0 and not out_of_order


def find_split(cells: Iterable[object]) -> str | None:
    """The one of SPLITS by which the cells of a column become choices; None for a column of lists.

    Labels come first, as they count. A cell that cannot be split as the others are is for the caller to name. Raises
    InputError where two separators would do and mean other choices.
    """
    fits: Counter[str] = Counter()
    alone: Counter[tuple[str, str]] = Counter()
    examples: dict[frozenset[str], str] = {}
    num_lists = num_texts = 0
    for cell in cells:
        if not isinstance(cell, str) or read_list(cell) is not None:
            num_lists += cell is not None
            if num_lists >= 1_000 and not num_texts:
                return None
            continue
        found = {how: choices for how in SPLITS if (choices := split_text(cell, how))}
        num_texts += bool(cell.strip())
        fits.update(found.keys())
        alone.update((one, other) for one in found for other in SPLITS if other not in found)
        for how in found:
            examples.setdefault(frozenset((how, *found)), cell)
    if not fits or num_lists >= num_texts:
        return None
    best = max(SPLITS, key=lambda how: (fits[how], how == "labels"))
    enough = max(3, num_texts / 100)
    if fits["labels"] and alone[best, "labels"] < enough:
        return "labels"
    left = [how for how in SEPARATORS if fits[how] and alone[best, how] < enough]
    both = [cell for names, cell in examples.items() if len(names & {*left}) > 1]
    if both and best != "labels":
        raise InputError(
            f"the choices can be split by {' and by '.join(f'{how!r} ({fits[how]:,} cells)' for how in left)}, such as "
            f"{both[0]!r:.200}. Write them as a JSON list or in columns a, b, c, ..."
        )
    return best


def is_stray(rows: Texts, is_other_case: bool) -> bool:
    """Whether the last column of the choices is none; `rows` gives the answer's cell and a text for each column.

    It is none where it is never the answer and holds numbers in three rows or more, beside words in nine of ten, or
    where `is_other_case`: its name is written in another case than the others.
    """
    numbers = words = beside_words = 0
    for _, texts in rows():
        if not texts[-1] or texts[-1].casefold() in EMPTY_WORDS:
            continue
        if _NUMBER.fullmatch(texts[-1]):
            numbers += 1
        elif is_other_case:
            words += 1
        else:
            return False
        beside_words += any(text and not _NUMBER.fullmatch(text) for text in texts[:-1])
    is_numeric = not words and numbers >= 3 and beside_words >= 0.9 * numbers
    if not is_numeric and not (is_other_case and any(cell for cell, _ in rows())):  # without answers, who knows
        return False
    return _is_never_right(rows())


def is_sparse(rows: Texts) -> bool:
    """Whether the last column of the choices is filled in few rows, at most one in twenty, and never the answer."""
    num_rows = filled = 0
    for num_rows, (_, texts) in enumerate(rows(), 1):
        filled += bool(texts[-1])
        if filled > 1 + num_rows / 20:
            return False
    return 0 < filled <= num_rows / 20 and _is_never_right(rows())


def _is_never_right(rows: Iterator[tuple[str, Sequence[str]]]) -> bool:
    """Whether the format that reads the most answers reads as many without the last column."""
    fits, fits_without = Counter(), Counter()
    for cell, texts in rows:
        fits.update(name for name in FORMATS if read_answer(cell, texts, name) is not None)
        fits_without.update(name for name in FORMATS if read_answer(cell, texts[:-1], name) is not None)
    return max(fits.values(), default=0) == max(fits_without.values(), default=0)


def _is_image_name(text: str) -> bool:
    return text.lower().endswith(_IMAGE_NAMES) and "\0" not in text
