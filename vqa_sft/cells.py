"""Choices as people write them into texts: labels ("A. cat", "(b) dog", "③ fox"). Standard library only."""

import re

from vqa_sft.mcq import LETTERS

# What choices are counted with, each in its order.
SEQUENCES = (
    LETTERS,
    LETTERS.lower(),
    [str(number) for number in range(1, 27)],
    "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳",
    "❶❷❸❹❺❻❼❽❾❿",
    "ⓐⓑⓒⓓⓔⓕⓖⓗⓘⓙⓚⓛⓜⓝⓞⓟⓠⓡⓢⓣⓤⓥⓦⓧⓨⓩ",
    "가나다라마바사아자차카타파하",
    "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎ",
    "㉠㉡㉢㉣㉤㉥㉦㉧㉨㉩㉪㉫㉬㉭",
)
PLACES = {label: place for labels in SEQUENCES for place, label in enumerate(labels)}
# Forms of ASCII as wide as a syllable: "Ａ", "（１）".
NARROW = {0xFF01 + i: 0x21 + i for i in range(94)}
_CIRCLED = "①-⑳❶-❿ⓐ-ⓩ㉠-㉭"
_PLAIN = r"[A-Za-z가나다라마바사아자차카타파하ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎ]|[1-9]|1[0-9]|2[0-6]"
# "A." and "A:" need a space, or a syllable that no abbreviation has: "A.D.", "1.5" and "1:30" are no labels.
_LABEL = re.compile(
    rf"\((?P<round>{_PLAIN})\)|\[(?P<square>{_PLAIN})\]|(?P<half>{_PLAIN})\)|(?P<point>{_PLAIN})\.(?=\s|[^\x00-\x7f])"
    rf"|(?P<colon>{_PLAIN}):(?=\s|[^\x00-\x7f])|(?P<comma>{_PLAIN})、|(?P<circle>[{_CIRCLED}])[.)]?"
)
_HEADING = re.compile(r"\s*\b(choices|options|answer choices|보기|선택지)\s*:?\s*$", re.IGNORECASE)
_REQUEST = re.compile(r"\n\s*\n|\n(?=\s*(answer|please|choose|select|respond|정답|다음)\b)", re.IGNORECASE)


def read_label(text: str) -> tuple[int, str] | None:
    """The place that the label before a text stands for, from 0, and the text: "(b) dog" is (1, "dog"); else None."""
    match = _LABEL.match(text.translate(NARROW))
    if match is None or not text[match.end() :].strip():
        return None
    return PLACES[match[match.lastgroup]], text[match.end() :].strip()


def split_labelled(text: str) -> tuple[str, list[str]] | None:
    """A text that ends in labelled choices as (what stands before them, the choices); None where it is none.

    "Which?\\nA. cat\\nB. dog" is ("Which?", ["cat", "dog"]). Labels count from the first of one of SEQUENCES, all
    written alike, each on a line of its own or all in one; a text in which such a run starts twice is none. What is
    asked after the choices goes to the text before them.
    """
    narrow = text.translate(NARROW)
    for start in (r"(?:^|\n)[ \t]*", r"(?:^|(?<=\s))"):  # lines; else anywhere
        runs = _runs(narrow, re.compile(start + f"(?:{_LABEL.pattern})"))
        if runs:
            return _cut(text, max(runs))
    return None


def _runs(text: str, label: re.Pattern) -> list[list[tuple[int, int]]]:
    """Where the labels of every way to write them stand, from and to: those that are the first two or more in order."""
    found: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for match in label.finditer(text):
        for i, labels in enumerate(SEQUENCES):
            if match[match.lastgroup] in labels:
                place = PLACES[match[match.lastgroup]]
                found.setdefault((match.lastgroup, i), []).append((place, match.start(), match.end()))
    return [
        [span for _, *span in labels]
        for labels in found.values()
        if len(labels) > 1 and [place for place, *_ in labels] == list(range(len(labels)))
    ]


def _cut(text: str, spans: list[tuple[int, int]]) -> tuple[str, list[str]] | None:
    ends = [start for start, _ in spans[1:]] + [len(text)]
    choices = [text[end:stop] for (_, end), stop in zip(spans, ends, strict=True)]
    last = choices[-1]
    request = _REQUEST.search(last.rstrip())
    after = last[request.start() :].strip() if request else ""
    choices[-1] = last[: request.start()] if request else last
    choices = [choice.strip() for choice in choices]
    before = _HEADING.sub("", text[: spans[0][0]]).strip()
    asked = [choice.endswith("?") for choice in choices]
    if not all(choices) or (asked[-1] and not all(asked)):  # "Which is larger, ① or ②?"
        return None
    return "\n".join(part for part in (before, after) if part), choices
