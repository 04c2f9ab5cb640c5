"""Where a source keeps what we need: columns found by their usual names, or as the recipe says. No torch."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqa_sft.data.answers import FORMATS, read_answer
from vqa_sft.data.cells import EMPTY_WORDS
from vqa_sft.errors import InputError, printable
from vqa_sft.letters import LETTERS

# Compared without case, spaces, "_" and "-"; the first that a source has is taken.
USUAL_NAMES = {
    "id": ("id", "question_id", "qid", "sample_id", "example_id", "row_id", "uid", "index", "idx", "번호"),
    "image": (
        *("path", "image", "image_path", "img", "img_path", "images", "file_name", "file", "image_file", "picture"),
        *("photo", "image_name", "img_name", "image_filename", "img_file", "file_path", "local_path", "figure"),
        *("figure_path", "figure_file", "figure_name", "fig", "photo_path", "decoded_image", "이미지", "사진", "그림"),
    ),
    "question": (
        *("question", "query", "question_text", "q", "prompt", "ques", "question_stem", "stem", "problem", "질문"),
        "문제",
    ),
    "choices": (
        *("choices", "options", "candidates", "answer_choices", "multiple_choices", "multiple_choice", "mc_choices"),
        *("choice_list", "option_list", "options_list", "choices_list", "answer_options", "answer_candidates"),
        *("possible_answers", "보기", "선택지"),
    ),
    "answer": (
        *("answer", "label", "gt", "ground_truth", "target", "correct_answer", "correct_choice", "correct_option"),
        *(
            "correct",
            "answer_idx",
            "answer_index",
            "correct_idx",
            "correct_index",
            "correct_choice_idx",
            "answer_label",
        ),
        *("answer_key", "answer_letter", "answer_option", "answer_choice", "correct_label", "gt_answer"),
        *("correct_letter", "correct_option_idx", "correct_option_index", "correct_choice_index", "gt_index"),
        *("multiple_choice_answer", "right_answer", "gold", "gold_label", "ans", "정답"),
    ),
    "context": ("context", "hint", "passage", "지문"),
    "targets": (),  # only where it is named: nobody should learn from a column by accident
}
# What stands before the letter or the number in choice_a, option1, ...
CHOICE_PREFIXES = ("option", "opt", "choice", "candidate", "alternative", "answer", "보기", "선택지")
IN_QUESTION = "in_question"  # in place of columns for choices: they are written in the question's text
_FIELD = re.compile(r"\{([^{}:]+)(?::0?([0-9]{1,2})d?)?\}")  # {id}, or {id:06} with zeros before it


@dataclass(frozen=True)
class Columns:
    """The columns of one source. `choices` is the name of a list column, or one name a choice.

    `id` None: rows are named by their number. `image` (): no images; a name with braces is a template of a path,
    "images/{id}.png". `choices` may be IN_QUESTION. `targets` is a list column with a number for each choice: votes, or
    a teacher's probabilities. `answer_format` and `answers_are_upper` say how the source writes its answers, so that a
    submission can write them the same. `fixed_question` and `fixed_choices` are those of every row; `question` is then
    None, and `choices` (). `has_labels`: every choice began with the label of its place, which was taken off.
    `other_formats` read all answers as well, and mean the same choices.
    """

    id: str | None
    image: tuple[str, ...]
    question: str | None
    choices: str | tuple[str, ...]
    answer: str | None
    context: str | None = None
    answer_format: str | None = None
    answers_are_upper: bool = False
    targets: str | None = None
    fixed_question: str | None = None
    fixed_choices: tuple[str, ...] | None = None
    has_labels: bool = False
    other_formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("image", "choices", "fixed_choices", "other_formats"):  # JSON knows lists only
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def names(self) -> list[str]:
        """Every column that is read."""
        choices = [self.choices] if isinstance(self.choices, str) else [*self.choices]
        images = [name for image in self.image for name in fields_of(image, self.id) or [image]]
        named = [self.id, *images, self.question, *choices, self.answer, self.context, self.targets]
        return [name for name in named if name not in (None, IN_QUESTION)]

    def describe(self) -> str:
        """One line for the user: which column was taken for what."""
        parts = {
            "id": self.id or "(row number)",
            "images": ", ".join(self.image) or "(none)",
            "question": self.question or f"{self.fixed_question!r:.80} (every row)",
            "choices": self.describe_choices(),
            "answer": f"{self.answer} ({self.answer_format})" if self.answer and self.answer_format else self.answer,
            "context": self.context,
            "targets": self.targets,
        }
        return ", ".join(f"{key}: {value}" for key, value in parts.items() if value)

    def describe_choices(self) -> str:
        """Where the choices stand, for the user."""
        if self.fixed_choices:
            return f"{printable(', '.join(self.fixed_choices))} (every row)"
        if self.choices == IN_QUESTION:
            return "in the question's text"
        return self.choices if isinstance(self.choices, str) else f"{self.choices[0]} to {self.choices[-1]}"

    def unlike(self, trained: "Columns") -> str:
        """How these data differ from those of the training, for the user; "" where they do not."""
        parts = []
        if self.describe_choices() != trained.describe_choices():
            parts.append(f"choices: {self.describe_choices()}, not {trained.describe_choices()}")
        for what, own, other in (("question", self.question, trained.question), ("image", self.image, trained.image)):
            if own != other:
                shown = [", ".join(names) if isinstance(names, tuple) else str(names) for names in (own, other)]
                parts.append(f"{what}: {shown[0] or 'none'}, not {shown[1] or 'none'}")
        if self.has_labels != trained.has_labels:
            parts.append(f"choices {'begin' if self.has_labels else 'do not all begin'} with labels")
        if self.answer_format and trained.answer_format and self.answer_format != trained.answer_format:
            parts.append(f"answers are read as {self.answer_format}, not as {trained.answer_format}")
        if trained.context and not self.context:
            parts.append(f"no column {trained.context}, so every context is empty")
        return "; ".join(parts)


def fields_of(template: str, id_column: str | None) -> list[str]:
    """The columns that a template of an image's path names; `{id}` stands for the ids, whatever their column."""
    names = [match[1] for match in _FIELD.finditer(template)]
    return [id_column if name == "id" and id_column else name for name in names]


def fill(template: str, row: Mapping[str, str]) -> str:
    """The path that a template gives for a row; "" where one of its cells is empty."""
    if not all(row[match[1]] for match in _FIELD.finditer(template)):
        return ""
    return _FIELD.sub(lambda match: row[match[1]].zfill(int(match[2] or 0)), template)


def check_columns(given: Mapping[str, Any]) -> None:
    """Raises InputError for what cannot stand under `columns` in a recipe."""
    unknown = [str(key) for key in given if key not in USUAL_NAMES]
    if unknown:
        raise InputError(f"columns knows {', '.join(USUAL_NAMES)}; got {', '.join(unknown)}.")
    for key, value in given.items():
        names = value if key in ("image", "choices") and isinstance(value, list) else [value]
        may_be_none = key in ("id", "context", "answer", "targets")
        if not all(isinstance(name, str) and name or (name is None and may_be_none) for name in names):
            raise InputError(f"columns: `{key}` must name a column of the data; got {value!r}.")


def check_fixed(question: str | None, choices: Sequence[str] | None) -> None:
    """Raises InputError for what cannot be the question or the choices of every row."""
    if question is not None and not question.strip():
        raise InputError("fixed_question is empty. Write the question, or leave it out.")
    if choices is None:
        return
    texts = [choice.strip() for choice in choices]
    if not 2 <= len(texts) <= len(LETTERS) or "" in texts or len({*texts}) < len(texts):
        raise InputError(f"fixed_choices must be 2 to {len(LETTERS)} different texts; got {choices!r:.300}.")


def find_columns(
    names: Sequence[str],
    given: Mapping[str, Any],
    answers: str,
    images: Sequence[str] = (),
    *,
    fixed_question: str | None = None,
    fixed_choices: Sequence[str] | None = None,
) -> Columns:
    """The columns of a source with these names: as `given`, the rest found by their usual names.

    `answers` is "required" or "optional"; `images` are the columns that hold images themselves, which come before
    those with paths. `fixed_question` and `fixed_choices` stand for columns. Raises InputError when a column is missing
    or there are too many choices.
    """
    found: dict[str, Any] = {key: find_usual(names, usual) for key, usual in USUAL_NAMES.items()}
    found["image"] = find_usual(images, USUAL_NAMES["image"]) or found["image"]
    if fixed_question is not None:
        found["question"] = None
    if fixed_choices is not None:
        found["choices"] = ()
    elif "choices" not in given:
        found["choices"] = find_choice_columns(names) or found["choices"]
    found["image"] = (found["image"],) if found["image"] else _numbered(names, ("image", "img", "picture"))
    found |= given | {"fixed_question": fixed_question}
    found["fixed_choices"] = None if fixed_choices is None else tuple(fixed_choices)
    for key in ("image", "choices"):
        if isinstance(found[key], list):
            found[key] = tuple(found[key])
    if isinstance(found["image"], str):
        found["image"] = (found["image"],)
    _check_found(names, found, given, answers)
    return Columns(**found)


def are_here(known: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    """Of the columns of other data those that a source with these columns has too."""

    def is_here(name: str | None) -> bool:
        if name is None or name == IN_QUESTION or name in names:
            return True
        parts = fields_of(name, None)
        return bool(parts) and all(part in names or part == "id" for part in parts)

    here = {}
    for key, value in (known or {}).items():
        if all(map(is_here, value if isinstance(value, list | tuple) else [value])):
            here[key] = value
        elif key == "context":  # another column would be another context
            here[key] = None
    return here


def find_others(names: Sequence[str], columns: Columns, given: Mapping[str, Any]) -> dict[str, list[str]]:
    """What else has a usual name of each thing that is not `given`, and stands for nothing: columns that may mean the
    same, or something else."""
    used = {*columns.names, *(name for value in given.values() for name in ([value] if isinstance(value, str) else ()))}
    plain = {_plain(name): name for name in reversed(names)}
    others = {
        key: [plain[_plain(name)] for name in usual if _plain(name) in plain and plain[_plain(name)] not in used]
        for key, usual in USUAL_NAMES.items()
        if key not in given and key != "id"
    }
    return {key: list(dict.fromkeys(found)) for key, found in others.items() if found}


def is_stray(rows: Callable[[], Iterator[tuple[str, Sequence[str]]]], is_other_case: bool) -> bool:
    """Whether the last column of the choices is none; `rows` gives the answer's cell and a text for each column.

    It is none where it is never the answer and holds numbers in three rows or more, beside words in nine of ten, or
    where `is_other_case`: its name is written in another case than the others.
    """
    numbers = words = beside_words = 0
    for _, texts in rows():
        if not texts[-1] or texts[-1].casefold() in EMPTY_WORDS:
            continue
        is_number = _NUMBER.fullmatch(texts[-1]) is not None
        if not is_number and not is_other_case:
            return False
        numbers, words = numbers + is_number, words + (not is_number)
        beside_words += any(text and not _NUMBER.fullmatch(text) for text in texts[:-1])
    is_numeric = not words and numbers >= 3 and beside_words >= 0.9 * numbers
    if not is_numeric and not (is_other_case and any(cell for cell, _ in rows())):  # without answers, who knows
        return False
    return _is_never_right(rows())


def is_sparse(rows: Callable[[], Iterator[tuple[str, Sequence[str]]]]) -> bool:
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


_NUMBER = re.compile(r"[-+]?[0-9]+([.,][0-9]+)*([eE][-+]?[0-9]+)?%?")


def _check_found(names: Sequence[str], found: dict[str, Any], given: Mapping[str, Any], answers: str) -> None:
    for role in ("question", "choices"):
        if found[f"fixed_{role}"] is not None and found[role]:
            raise InputError(f"fixed_{role} stands for a column, and columns names {found[role]}. Keep one of the two.")
    missing = []
    if not found["question"] and found["fixed_question"] is None:
        missing.append(f"question (usual names: {', '.join(USUAL_NAMES['question'][:4])}; one for all: fixed_question)")
    if not found["image"] and "image" not in given:
        missing.append(f"image (usual names: {', '.join(USUAL_NAMES['image'][:4])}; for none: image: [])")
    if not found["choices"] and found["fixed_choices"] is None:
        usual = "usual names: a, b, c, ...; option1, ...; choices"
        missing.append(
            f"choices ({usual}; in the question's text: choices: in_question; the same for all: fixed_choices)"
        )
    if not found["answer"] and answers == "required":
        missing.append(f"answer (usual names: {', '.join(USUAL_NAMES['answer'][:4])})")
    roles = {key: value for key, value in found.items() if key in USUAL_NAMES}
    wanted = [value for value in roles.values() if isinstance(value, str) and value != IN_QUESTION]
    for image in found["image"]:
        parts = fields_of(image, found["id"])
        # Without a column for ids, `{id}` is the row's number.
        wanted += [part for part in parts if part != "id"] if parts else [image]
    wanted += [] if isinstance(found["choices"], str | None) else found["choices"]
    optional = () if answers == "required" else (found["answer"],)
    missing += [name for name in wanted if name not in names and name not in optional]
    if missing:
        has = printable(", ".join(names), limit=1_000) or "none"
        raise InputError(
            f"missing columns: {'; '.join(missing)}. The data has: {has}. Rename them, or name "
            "yours in the recipe: `columns: {question: ..., choices: [...]}`."
        )
    if found["fixed_choices"] is None and not isinstance(found["choices"], str):
        if len(found["choices"]) > len(LETTERS):
            raise InputError(f"at most {len(LETTERS)} choices have letters; got {len(found['choices'])} columns.")
        if len(found["choices"]) < 2:
            raise InputError(f"a question needs at least two choices; got the column {found['choices'][0]} alone.")
    read = {key: value for key, value in roles.items() if key != "id"}  # a file's name may well be the id
    named = [name for value in read.values() for name in ([value] if isinstance(value, str) else value or ())]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise InputError(f"columns: {', '.join(twice)} stands for two things. Name another column for one.")
    if found["answer"] not in names:  # a test set without answers; the submission still names the column
        found["answer"] = given.get("answer")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def find_usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    plain = {_plain(name): name for name in reversed(names)}
    return next((plain[_plain(name)] for name in usual if _plain(name) in plain), None)


def find_choice_columns(names: Sequence[str]) -> tuple[str, ...] | None:
    """The columns a, b, c, ... or A, B, ..., or option1, option2, ..., choice_a, ..., in their order.

    Raises InputError for a run that leaves one out: its answers would count other letters than ours.
    """
    for prefix in ("", *CHOICE_PREFIXES):
        starts = [string.ascii_lowercase, string.ascii_uppercase] if not prefix else [string.ascii_lowercase]
        for letters in starts:
            ends = [*letters] if prefix else [*letters[:26]]
            columns = _run(names, prefix, ends)
            if columns:
                return columns
        if prefix:
            for first in (0, 1):
                columns = _run(names, prefix, [str(number) for number in range(first, first + 40)])
                if columns:
                    return columns
    return None


def _run(names: Sequence[str], prefix: str, ends: Sequence[str]) -> tuple[str, ...]:
    """The longest run of columns that starts with the first end: prefix + "a", prefix + "b", ..."""
    here = {name if not prefix else _plain(name): name for name in reversed(names)}
    found = []
    for end in ends:
        if prefix + end not in here:
            break
        found.append(here[prefix + end])
    if not found or (prefix and len(found) < 2):
        return ()
    # An "E" after "a" to "d"; whether it is a choice, its cells tell.
    after = "" if prefix or len(found) == len(ends) else ends[len(found)].swapcase()
    if len(found) > 1 and after in here and ends[0].swapcase() not in here:
        return (*found, here[after])
    # "x" or "y" may be anything; "d" after "a, b" is a choice.
    beyond = [here[prefix + end] for end in ends[len(found) : len(found) + 3] if prefix + end in here]
    if beyond:
        raise InputError(
            f"the choice columns {', '.join([*found, *beyond])} leave one out. Rename them, or name yours in the "
            "recipe: `columns: {choices: [...]}`."
        )
    return tuple(found)


def _numbered(names: Sequence[str], prefixes: Sequence[str]) -> tuple[str, ...]:
    """The columns image_1, image_2, ..."""
    plain = {_plain(name): name for name in names}
    for prefix in prefixes:
        for first in (0, 1):
            found = []
            while f"{prefix}{first + len(found)}" in plain:
                found.append(plain[f"{prefix}{first + len(found)}"])
            if found:
                return tuple(found)
    return ()


def known_columns(trained: Columns | None, named: Mapping[str, Any] | None) -> dict[str, Any]:
    """What other data of a run take over of its training, for `find_columns`: the columns that the recipe `named`, and
    the context. That is part of the prompt, so it is read where training had one and nowhere else. Targets are for
    training alone."""
    known = {} if trained is None else {"context": trained.context}
    return known | {key: name for key, name in (named or {}).items() if key != "targets"}
