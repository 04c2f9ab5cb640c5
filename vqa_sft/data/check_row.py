"""What is wrong with the texts of one row; every finding goes to `report(kind, detail)`. No torch.

`kind` is a key of `problems.KINDS`, `detail` shows the evidence.
"""

import math
from collections.abc import Callable, Sequence

from vqa_sft.data.cells import EMPTY_WORDS, is_writable, read_list
from vqa_sft.data.references import find_references
from vqa_sft.letters import LETTERS

_LONG_TEXT = 20_000  # characters, some five thousand tokens


def clean_text(cell: object, text: str, report: Callable[..., None]) -> str:
    """The text of a cell as every later stage can hold it."""
    if isinstance(cell, list | dict | bytes):
        report("bad_text", f"{text[:40]!r} is a {type(cell).__name__}")
    elif "\0" in text or not is_writable(text):
        report("bad_text", repr(text[:40]))
        return without_odd_characters(text)
    return text


def without_odd_characters(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def check_texts(question: str, context: str, choices: Sequence[str] | None, report: Callable[..., None]) -> None:
    """`choices` None: the row's cell was no list, which is reported already."""
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


def read_targets(cell: object, is_empty: bool, num_choices: int, report: Callable[..., None]) -> list[float] | None:
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
