"""Choices and answers as people write them into cells: lists of many spellings, texts with labels or separators;
letters, indices and texts of choices. Standard library only."""

import ast
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import partial

from vqa_sft.questions.letters import LETTERS

# What tools write into empty cells.
EMPTY_WORDS = ("nan", "n/a", "na", "null", "none", "<na>", "nat", "#n/a")
SEPARATORS = {";": ";", "|": "|", "lines": "\n"}
# How texts that are no list may be split: "(a) Open (b) Closed", "Open; Closed", ...
SPLITS = ("labels", *SEPARATORS)

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

# "Option A", "option_a", "Answer: (B)", "The answer is C."
_BEFORE = re.compile(
    r"(the\s+)?(correct\s+|right\s+)?(answer|option|choice|정답|답|보기|선택지)[\s_:.#-]*((is|은|는)[\s:]+)?",
    re.IGNORECASE | re.ASCII,
)
_LETTER = re.compile(r"[(\[]?([A-Za-zⓐ-ⓩ가나다라마바사아자차카타파하ㄱ-ㅎ㉠-㉭])[)\].:]*")
_LABELLED = re.compile(r"[(\[]?([A-Za-z])[)\].:]\s")
_INDEX = re.compile(r"[(\[]?([0-9]{1,3})(?:\.0)?[)\].:]*")
_FROM_1 = re.compile(r"([1-9][0-9]?)\s*번\.?|([①-⑳❶-❿])")
# Choices that a truth value can answer.
_TRUTHS = (("true", "false"), ("yes", "no"), ("correct", "incorrect"), ("예", "아니오"), ("예", "아니요"))
_TRUTHS += (("네", "아니오"), ("네", "아니요"), ("참", "거짓"), ("o", "x"))
_TRUE, _FALSE = {"1", "t", "y"}, {"0", "f", "n"}
_TRUE |= {true for true, _ in _TRUTHS}
_FALSE |= {false for _, false in _TRUTHS}


def read_label(text: str) -> tuple[int, str] | None:
    """The place that the label before a text stands for, from 0, and the text: "(b) dog" is (1, "dog"); else None."""
    match = _LABEL.match(text.translate(NARROW))
    if match is None or not text[match.end() :].strip():
        return None
    return PLACES[match[match.lastgroup]], text[match.end() :].strip()


def split_labelled(text: str) -> tuple[str, list[str]] | None:
    """A text that ends in labelled choices as (the text before them, the choices); None where it is none.

    "Which?\\nA. cat\\nB. dog" is ("Which?", ["cat", "dog"]). Labels count from the first of one of SEQUENCES, all
    written alike, each on a line of its own or all in one; a text in which such a run starts twice is none. What is
    asked after the choices goes to the text before them.
    """
    narrow = text.translate(NARROW)
    for start in (r"(?:^|\n)[ \t]*(?:[-*•][ \t]+)?", r"(?:^|(?<=\s))"):  # lines, in a list perhaps; else anywhere
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
        [(start, end) for _, start, end in labels]
        for labels in found.values()
        if len(labels) > 1 and [place for place, *_ in labels] == list(range(len(labels)))
    ]


def _cut(text: str, spans: list[tuple[int, int]]) -> tuple[str, list[str]] | None:
    ends = [start for start, _ in spans[1:]] + [len(text)]
    choices = [text[end:stop] for (_, end), stop in zip(spans, ends, strict=True)]
    last = choices[-1]
    request = _REQUEST.search(last.rstrip())
    if request is None and not any("\n" in choice.strip() for choice in choices[:-1]):  # all others are single lines
        request = re.search(r"\n(?=\s*\S)", last.rstrip())
    after = last[request.start() :].strip() if request else ""
    choices[-1] = last[: request.start()] if request else last
    choices = _without_ends([choice.strip() for choice in choices])
    before = _HEADING.sub("", text[: spans[0][0]]).strip()
    asked = [choice.endswith("?") for choice in choices]
    if not all(choices) or (asked[-1] and not all(asked)):  # "Which is larger, ① or ②?"
        return None
    return "\n".join(part for part in (before, after) if part), choices


def _without_ends(choices: list[str]) -> list[str]:
    """Without what separates them: "A. cat; B. dog"."""
    for end in ";,|/":
        if all(choice.endswith(end) for choice in choices[:-1]):
            return [choice.removesuffix(end).strip() for choice in choices]
    return choices


def read_list(cell: object) -> list | None:
    """The choices of a cell that is a list, or a text that spells one in JSON, Python or numpy; else None.

    These are lists as well, where what labels them counts as choices do: {"A": ..., "B": ...}, {"option1": ...},
    [{"label": "A", "text": ...}, ...], {"label": [...], "text": [...]}, [["A", ...], ...], {"choices": [...]}.
    """
    cell = _parse(cell.strip()) if isinstance(cell, str) else cell
    if isinstance(cell, dict):
        return _of_dict(cell)
    if not isinstance(cell, list | tuple):
        return None
    if cell and all(isinstance(item, dict) for item in cell):
        return _of_dicts(list(cell))
    pairs = [item for item in cell if isinstance(item, list | tuple) and len(item) == 2]
    if cell and len(pairs) == len(cell):
        return [text for _, text in pairs] if _count([label for label, _ in pairs]) else None
    return list(cell)


_QUOTED = r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\""""
_ITEM = rf"(?:{_QUOTED}|[-+]?[0-9][-+.0-9e]*|True|False|None)"
_ARRAY = re.compile(rf"\[\s*{_ITEM}(?:\s+{_ITEM})+\s*\]")
_JOINED = re.compile(rf"(?:{_QUOTED})\s+(?=['\"])|(?:{_QUOTED})")


def _parse(text: str) -> object:
    text = re.sub(r"^(?:np\.|numpy\.)?array\((\[.*\])(?:, dtype=[^()]*)?\)$", r"\1", text, flags=re.DOTALL)
    if text[:1] not in ("[", "{"):
        return text
    if _ARRAY.fullmatch(text):  # ['cat' 'dog'], which Python reads as one text
        items = re.findall(_ITEM, text)
        return [ast.literal_eval(item) if item[0] in "'\"" else item for item in items]
    # Numbers stay as they are written.
    for read in (partial(json.loads, parse_float=str, parse_int=str), ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        joined = read is ast.literal_eval and any(part[-1].isspace() for part in _JOINED.findall(text))
        return text if joined else value
    return text


def _of_dict(cell: dict) -> list | None:
    lists = [(key, value) for key, value in cell.items() if isinstance(value, list | tuple)]
    if len(lists) == len(cell) == 1 and str(lists[0][0]).casefold().rstrip("s") in _TEXT_KEYS:
        return list(lists[0][1])
    if len(lists) == len(cell) == 2 and len(lists[0][1]) == len(lists[1][1]):
        texts = [(key, value) for key, value in lists if str(key).casefold() in _TEXT_KEYS]
        labels = [(key, value) for key, value in lists if str(key).casefold() in _LABEL_KEYS]
        return list(texts[0][1]) if len(texts) == len(labels) == 1 and _count(labels[0][1]) else None
    return list(cell.values()) if not lists and _count(list(cell)) else None


_TEXT_KEYS = ("text", "value", "content", "choice", "option", "answer", "description")
_LABEL_KEYS = ("label", "key", "id", "letter", "name", "index")


def _of_dicts(cells: list[dict]) -> list | None:
    if all(len(cell) == 1 for cell in cells) and _count([key for cell in cells for key in cell]):
        return [value for cell in cells for value in cell.values()]
    keys = {str(key).casefold(): key for key in cells[0]}
    text = next((keys[name] for name in _TEXT_KEYS if name in keys), None)
    label = next((keys[name] for name in _LABEL_KEYS if name in keys), None)
    if text is None or not all(text in cell for cell in cells):
        return None
    if label is not None and not _count([cell.get(label) for cell in cells]):
        return None
    return [cell[text] for cell in cells]


def _count(labels: Sequence[object]) -> bool:
    """Whether labels count from the first of one of SEQUENCES or from 0, perhaps behind the same text: option_a."""
    texts = [re.sub(r"^\W+|\W+$", "", str(label)).upper() for label in labels]
    before = len(os.path.commonprefix(texts).rstrip("0123456789")) if len(texts) > 1 else 0
    texts = [text[before:] for text in texts]
    counted = [[str(i) for i in range(len(texts))], *SEQUENCES]
    return any(texts == [label.upper() for label in list(labels)[: len(texts)]] for labels in counted)


def split_text(text: str, how: str) -> list[str] | None:
    """The two choices or more of a text, by one of SPLITS; None where that is no way to split it."""
    if how == "labels":
        found = split_labelled(text)
        return found[1] if found and not found[0] else None
    choices = [part.strip() for part in text.strip().split(SEPARATORS[how])]
    while choices and not choices[-1]:
        choices.pop()
    return choices if len(choices) > 1 and all(choices) else None


def strip_labels(choices: Sequence[str]) -> list[str] | None:
    """Choices without the labels of their own places: cat and dog of "A. cat" and "B. dog"; None where one has none.
    Empty choices need none."""
    found = [read_label(choice) if choice else (place, "") for place, choice in enumerate(choices)]
    if any(item is None or item[0] != place for place, item in enumerate(found)):
        return None
    return [text for _, text in found]


def text_of(cell: object) -> str:
    """A cell as text; "" for None and NaN."""
    return "" if cell is None or cell != cell else str(cell).strip()  # NaN is not equal to itself


def is_writable(text: str) -> bool:
    """Whether the text can be written; JSON may hold half a character ("\\ud800")."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_answer(cell: str, choices: Sequence[str], answer_format: str) -> int | None:
    """The index of the right choice, or None when the cell is no answer in this format.

    Letters count in either case and in any dress: "(b)", "b.", "Option B", "나"; so do indices: "(2)", "2.0" as
    spreadsheets write them, and "②" and "2번", which count from 1. A text is compared as it is, then without case; of
    two equal choices it means the first. A letter or index before the text of its choice ("B. dog") is both. True and
    False are texts of choices that say yes and no.
    """
    if answer_format == "text":
        index = _find_text(cell, choices)
    else:
        bare = cell.translate(NARROW).strip()
        before = _BEFORE.match(bare)
        bare = bare[before.end() :] if before else bare
        index = _find_place(bare, answer_format)
    labelled = read_label(cell)
    if index is None and labelled and _fits_format(cell, answer_format):
        place, text = labelled
        index = place if place < len(choices) and _fold(choices[place]) == _fold(text) else None
    if index is None and cell.startswith("[") and (inner := unwrap(cell)) != cell:
        return read_answer(str(inner).strip(), choices, answer_format)
    return index if index is not None and 0 <= index < len(choices) else None


def write_answer(choice: int, choices: Sequence[str], answer_format: str | None, is_upper: bool) -> str:
    """The inverse of `read_answer`, as the source writes its answers."""
    if answer_format == "text":
        return choices[choice]
    if answer_format in ("index_from_0", "index_from_1"):
        return str(choice + 1 if answer_format == "index_from_1" else choice)
    return LETTERS[choice] if is_upper else LETTERS[choice].lower()


def _find_place(text: str, answer_format: str) -> int | None:
    if answer_format == "letter":
        match = _LETTER.fullmatch(text)
        return PLACES.get(match[1]) if match else None
    if match := _INDEX.fullmatch(text):
        return int(match[1]) - (1 if answer_format == "index_from_1" else 0)
    match = _FROM_1.fullmatch(text) if answer_format == "index_from_1" else None
    return PLACES.get(match[1] or match[2]) if match else None


def _fits_format(labelled: str, answer_format: str) -> bool:
    """Whether the label before a text is a letter or an index, as the format says."""
    is_number = re.match(r"[(\[]?[0-9①-⑳❶-❿]", labelled.translate(NARROW)) is not None
    return answer_format == "text" or (answer_format == "index_from_1" if is_number else answer_format == "letter")


def _find_text(cell: str, choices: Sequence[str]) -> int | None:
    """The choice with this text; None where there is none, or where different choices would do."""
    choices = list(choices)
    if not cell:
        return None
    if cell in choices:
        return choices.index(cell)
    wanted, folded = _fold(cell), [_fold(choice) for choice in choices]
    found = [i for i, text in enumerate(folded) if text == wanted]
    if not found and (wanted in _TRUE or wanted in _FALSE):
        pairs = [pair for pair in _TRUTHS if sorted(folded) == sorted(pair)]
        words = {true if wanted in _TRUE else false for true, false in pairs}
        found = [i for i, text in enumerate(folded) if text in words]
    return found[0] if len({choices[i] for i in found}) == 1 else None


def _fold(text: str) -> str:
    """Without case; 3.0 is 3, which a table with an empty cell makes of it."""
    text = unicodedata.normalize("NFC", text).casefold()
    return text[:-2] if re.fullmatch(r"-?[0-9]+\.0", text) else text


def unwrap(cell: object) -> object:
    """The only item of a list, or of a text that spells one: "A" of ["A"] and of "['A']"; else the cell."""
    values = cell
    if isinstance(cell, str) and cell.startswith("["):
        try:
            values = ast.literal_eval(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return cell
    if isinstance(values, list | tuple) and len(values) == 1 and not isinstance(values[0], list | tuple | dict):
        return values[0]
    return cell


def is_upper_case(cells: Iterable[str]) -> bool:
    """Whether most of the letters among the cells, or before their texts, are upper case; where there are none, yes."""
    bare = [_BEFORE.sub("", cell, count=1) for cell in cells]
    labels = [match for cell in bare if (match := _LETTER.fullmatch(cell) or _LABELLED.match(cell))]
    letters = [match[1] for match in labels if match[1].isascii()]
    return sum(letter.isupper() for letter in letters) * 2 > len(letters) if letters else True


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
