"""`columns: {choices: in_question}`: choices that a question's text holds, or only names. Standard library only."""

import re

from vqa_sft.data.cells import split_labelled
from vqa_sft.questions.letters import LETTERS

_END = r"([A-Z]|[1-9]|1[0-9]|2[0-6])\b"
_RANGE = re.compile(rf"\b([A1])\s?(?:-|–|~|to|through)\s?{_END}")
_LIST = re.compile(rf"\b([A1](?:,? ?(?:and |or |/ ?)?{_END.replace('(', '(?:', 1)}){{1,25}})")
# "from 1 to 5" may mean anything else.
_SELECT = re.compile(r"\b(?:select|choose|pick|options?|choices?|answers?)\b[^.?!]*$", re.IGNORECASE)


def split_choices(question: str) -> tuple[str, list[str] | None]:
    """A question's text without its choices, and these; None where it holds none.

    "Which?\\nA. cat\\nB. dog" is ("Which?", ["cat", "dog"]). "Which fits? Select from A-D" stays as it is: its choices
    stand in the image, and ["A", "B", "C", "D"] are their names.
    """
    found = split_labelled(question)
    return found if found is not None else (question, _named(question))


def _named(question: str) -> list[str] | None:
    """The letters or numbers that a text offers: all from A or from 1. None for no such run, or two of them."""
    runs = set()
    for match in _RANGE.finditer(question):
        if _is_offer(question, match):
            runs.add(_run(match[1], match[2]))
    for match in _LIST.finditer(question):
        labels = tuple(re.findall(r"[A-Z](?![a-z])|[0-9]+", match[1]))
        if _is_offer(question, match) and labels == _run(labels[0], labels[-1]):
            runs.add(labels)
    runs.discard(())
    return [*runs.pop()] if len(runs) == 1 else None


def _is_offer(question: str, match: re.Match) -> bool:
    return match[1][0] == "A" or _SELECT.search(question[: match.start()]) is not None


def _run(first: str, last: str) -> tuple[str, ...]:
    """A to D, 1 to 5; () for what is no run of two or more."""
    if first == "A" and last.isalpha():
        return tuple(LETTERS[: LETTERS.index(last) + 1]) if last > "A" else ()
    if first == "1" and last.isdecimal():
        return tuple(str(number) for number in range(1, int(last) + 1)) if int(last) > 1 else ()
    return ()
