"""What only the cells of all rows tell of their answers: how they are written, and which of them are none. No torch."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from vqa_sft.data.answers import PLACEHOLDERS, UNKNOWN, infer_formats, is_plain
from vqa_sft.data.cells import is_upper_case, read_answer
from vqa_sft.data.read_row import RowReader
from vqa_sft.errors import InputError, safe

Pairs = Callable[[], Iterator[tuple[str, list[str]]]]  # the answer's cell and the choices, from the start at every call
_CONSTANT = 10  # rows of which one and the same answer is none, where rows need no answers


def settle_answers(reader: RowReader, pairs: Pairs, answer_format: str | None, are_all: bool = True) -> None:
    """Fix how the source writes its answers: as given, else as those of the training if that fits, else as most of its
    rows do. Where answers are optional, placeholders are no answers; one answer in all rows is none where these
    `are_all`."""
    name, is_optional, trained = reader.source.name, reader.options.answers == "optional", reader.options.trained
    if is_optional:
        _find_placeholders(reader, pairs(), may_be_constant=are_all and answer_format is None)

    def known() -> Iterator[tuple[str, list[str]]]:
        return ((cell, choices) for cell, choices in pairs() if cell in choices or not reader.is_no_answer(cell))

    # Nothing is known of a source without answers.
    is_upper = isinstance(reader.columns.choices, tuple) and reader.columns.choices[:1] == ("A",)
    if next(known(), None) is not None:
        if answer_format and is_optional and not _read_some(known(), answer_format):
            found = _find_formats(reader, known)[0]
            reader.notes.append(f"{name}: no answer is written as {answer_format}; they are read as {found}")
            answer_format = found
        answer_format, *others = [answer_format] if answer_format else _find_formats(reader, known)
        reader.columns = replace(reader.columns, other_formats=tuple(others))
        is_upper = answer_format == "letter" and is_upper_case(cell for cell, _ in known())
        _note_how_read(reader, known(), answer_format)
    reader.columns = replace(reader.columns, answer_format=answer_format, answers_are_upper=is_upper)
    if reader.first_split is not None:
        reader.notes.append(safe(f"{name}: choices are read from the question: {reader.first_split}"))
    if trained is not None and (unlike := reader.columns.unlike(trained)):
        reader.notes.append(safe(f"{name}: unlike the training data: {unlike}"))


def _note_how_read(reader: RowReader, known: Iterator[tuple[str, list[str]]], answer_format: str) -> None:
    """Note the first answer that is not a plain letter, number or text."""
    for cell, choices in known:
        index = read_answer(cell, choices, answer_format)
        if index is not None and not is_plain(cell, choices, answer_format):
            said = f"an answer such as {cell!r:.60} means choice {index + 1} of {choices!r:.100}"
            reader.notes.append(safe(f"{reader.source.name}: {said}"))
            return


def _find_placeholders(reader: RowReader, pairs: Iterator[tuple[str, list[str]]], may_be_constant: bool) -> None:
    """Find what test sets write in place of answers: usual words, and one cell in each of many rows."""
    cells, words, num_rows = Counter(), Counter(), 0
    for cell, choices in pairs:
        num_rows += 1
        if cell.casefold() in PLACEHOLDERS and cell not in choices:
            words[cell] += 1
        elif cell.casefold() not in UNKNOWN:
            cells[cell] += 1
    if may_be_constant and len(cells) == 1 and cells.total() == num_rows >= _CONSTANT:
        reader.constant = next(iter(cells))
        words |= cells
    if words:
        shown = ", ".join(repr(cell) for cell in [*words][:5])
        said = f"{words.total():,} rows have {shown:.100} for an answer, which counts as none"
        said += f"; answer_format reads {reader.constant!r}" if reader.constant is not None else ""
        reader.notes.append(safe(f"{reader.source.name}: {said}"))


def _find_formats(reader: RowReader, known: Pairs) -> list[str]:
    """As `infer_formats`; those of the training come first, where they read all answers. Raises InputError where
    training could not tell two of them apart, and these rows could."""
    trained = reader.options.trained
    formats = [trained.answer_format, *trained.other_formats] if trained and trained.answer_format else []
    fit = [name for name in formats if all(read_answer(*pair, name) is not None for pair in known())]
    for cell, choices in known() if len(fit) > 1 else ():
        if len({read_answer(cell, choices, name) for name in fit}) > 1:
            raise InputError(
                f"{reader.source.name}: the answers can be read as {' or '.join(fit)}, as those of the training "
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


def _read_some(pairs: Iterator[tuple[str, list[str]]], answer_format: str) -> bool:
    """Whether half of the cells or more are answers in this format."""
    readable = [read_answer(cell, choices, answer_format) is not None for cell, choices in pairs]
    return sum(readable) * 2 >= len(readable)
