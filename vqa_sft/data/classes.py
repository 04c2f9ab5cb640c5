"""The classes of a classification: their list, where it comes from, and names that nearly say the same. No torch.

    read_classes("classes.csv")             name, description, other names; one class a row
    read_classes("classes.txt")             a name a line
    read_classes("sample_submission.csv")   its columns beside the id

A name stands for itself in Unicode's composed form (NFC), without spaces around it. Classes are matched by name, never
by their place in a file.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vqa_sft.data.cells import is_number, read_list, text_of
from vqa_sft.data.columns import USUAL_NAMES, find_usual
from vqa_sft.data.find_encoding import find_encoding
from vqa_sft.data.read_text import open_text
from vqa_sft.data.sources import open_source
from vqa_sft.errors import InputError, printable

NAME_COLUMNS = ("name", "class_name", "class", "label_name", "label", "category", "클래스", "이름")
_DESCRIPTIONS = ("description", "desc", "definition", "설명")
_OTHER_NAMES = ("other_names", "other_name", "aliases", "alias", "synonyms", "synonym", "다른이름", "별칭")
_LIST_SUFFIXES = (".txt", ".csv", ".tsv")
_TYPO_LETTERS = 5  # a word of fewer may well be another one: "Model S" and "Model X"


def class_name(text: str) -> str:
    """A name as it is compared: composed (NFC), without spaces around it."""
    return unicodedata.normalize("NFC", text).strip()


@dataclass(frozen=True)
class Classes:
    """Class i is `names[i]`; `descriptions` and `other_names` have one entry a class, or none at all.

    `source` says where the list comes from, for the user. Raises InputError for fewer than two classes, an empty name,
    and a name that stands for two classes.
    """

    names: tuple[str, ...]
    source: str
    descriptions: tuple[str, ...] = ()
    other_names: tuple[tuple[str, ...], ...] = ()
    _places: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places: dict[str, int] = {}
        twice: dict[str, None] = {}
        for place, name in enumerate(self.names):
            if name in places:
                twice[name] = None
            places[name] = place
        for place, names in enumerate(self.other_names):
            for name in names:
                if places.setdefault(name, place) != place:
                    twice[name] = None
        if twice:
            raise InputError(f"{self.source}: {_shown(list(twice))} stands for two classes. Keep one of each.")
        if "" in places:
            raise InputError(f"{self.source}: the name of class {places[''] + 1} is empty. Name it, or remove it.")
        if len(self.names) < 2:
            found = f"the class {printable(self.names[0])!r} alone" if self.names else "no class"
            raise InputError(f"{self.source}: a classification needs two classes or more; got {found}.")
        object.__setattr__(self, "_places", places)

    def __len__(self) -> int:
        return len(self.names)

    def find(self, label: str) -> int | None:
        """The class that a label names, by its name or another name of it."""
        return self._places.get(class_name(label))

    def likely(self, label: str) -> str | None:
        """The name that is probably meant by a label that names no class."""
        wanted = "".join(_words(label))
        same = (name for name in self._places if "".join(_words(name)) == wanted)
        return next(same, None) or next(iter(difflib.get_close_matches(label, self._places, 1, 0.8)), None)


def read_classes(path: str) -> Classes:
    """The list of classes in a file: a name a line (.txt), a class a row, or a submission's columns (.csv, .tsv)."""
    file = Path(path)
    if file.suffix.lower() not in _LIST_SUFFIXES or not file.is_file():
        what = "is no file" if not file.is_file() else "is no list of classes"
        raise InputError(
            f"classes: {path} {what}. Give a .txt with a name a line, a .csv with the columns name, description and "
            "other_names, or a sample submission with one column a class."
        )
    if file.suffix.lower() == ".txt":
        with open_text(file, find_encoding(file)) as lines:
            names = [class_name(line) for line in lines]
        return Classes(tuple(name for name in names if name), path)
    opened = open_source(path)
    rows = [{key: text_of(cell) for key, cell in row.items()} for _, row in opened.rows()]
    by_row = find_usual(opened.columns, NAME_COLUMNS)
    by_column = _columns_of_submission(opened.columns, rows)
    if by_row and by_column:
        raise InputError(
            f"classes: {path} may be a list of classes (column {by_row}) or a sample submission. Save the names as a "
            ".txt, one a line."
        )
    if by_column:
        return Classes(tuple(map(class_name, by_column)), f"{path} (its columns)")
    if not by_row:
        raise InputError(
            f"classes: {path} has no column for names ({', '.join(NAME_COLUMNS[:4])}, ...), nor columns of numbers, "
            f"one a class, as a sample submission has. It has: {printable(', '.join(opened.columns), 300)}."
        )
    return _of_rows(path, opened.columns, by_row, rows)


def _of_rows(path: str, columns: Sequence[str], name: str, rows: Sequence[dict[str, str]]) -> Classes:
    description, others = find_usual(columns, _DESCRIPTIONS), find_usual(columns, _OTHER_NAMES)
    unread = [column for column in columns if column not in (name, description, others)]
    return Classes(
        tuple(class_name(row[name]) for row in rows),
        f"{path} (column {name}{'; not read: ' if unread else ''}{printable(', '.join(unread))})",
        tuple(row[description] for row in rows) if description else (),
        tuple(_split_names(row[others]) for row in rows) if others else (),
    )


def _split_names(cell: str) -> tuple[str, ...]:
    """Other names of a class: a list, or texts between `;` or `|`."""
    listed = read_list(cell)
    parts = re.split(r"[;|]", cell) if listed is None else map(text_of, listed)
    return tuple(dict.fromkeys(name for name in map(class_name, parts) if name))


def _columns_of_submission(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns beside the id, where there are two or more and all hold numbers alone; else none."""
    row_id = find_usual(columns, USUAL_NAMES["id"]) or columns[0]
    others = [name for name in columns if name != row_id]
    if find_usual([row_id], NAME_COLUMNS):  # names, and numbers about them
        return []
    are_numbers = all(is_number(row[name]) for row in rows for name in others)
    return others if len(others) > 1 and rows and are_numbers else []


# --- Names that nearly say the same -----------------------------------------------------------------------------------

SPELLING, WORD_ORDER, LETTER = "case, spaces and marks", "the order of words", "one letter"


def find_near_names(names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(in what they differ, names) of every group of names that differ only in SPELLING, WORD_ORDER or LETTER.

    LETTER: one letter of a word without digits is another, missing or elsewhere, and the word has at least
    five letters (parts of syllables in Hangul); "320i" and "330i" are two cars.
    """
    words = {name: _words(name) for name in names}
    groups: dict[tuple[str, object], dict[str, None]] = defaultdict(dict)
    for name, own in words.items():
        groups[SPELLING, "".join(own)][name] = None
        groups[WORD_ORDER, tuple(sorted(own))][name] = None
        for key in _with_a_letter_less(own):
            groups[LETTER, key][name] = None
    found: list[tuple[str, tuple[str, ...]]] = []
    for how in (SPELLING, WORD_ORDER, LETTER):
        for (kind, _), group in groups.items():
            if kind == how and len(group) > 1 and not any({*group} <= {*seen} for _, seen in found):
                found.append((how, tuple(group)))
    return found


def _words(name: str) -> tuple[str, ...]:
    """The words of a name without case, marks between them and ways to write a letter."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    # Vowel signs of Indic scripts are marks to Unicode, and part of a word.
    return tuple("".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in plain).split())


def _with_a_letter_less(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The words, and the words with a letter less in one that is long enough."""
    for place, word in enumerate(words):
        parts = unicodedata.normalize("NFD", word)
        if len(parts) >= _TYPO_LETTERS and not any(char.isdigit() for char in word):
            for shorter in (parts, *(parts[:i] + parts[i + 1 :] for i in range(len(parts)))):
                yield (*words[:place], "\0" + shorter, *words[place + 1 :])


def _shown(names: Iterable[str]) -> str:
    shown = [repr(printable(name)) for name in names]
    return ", ".join(shown[:5]) + (f", ... ({len(shown):,})" if len(shown) > 5 else "")
