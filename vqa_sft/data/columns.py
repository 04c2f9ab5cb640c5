"""Which column of a source holds what: `Columns`, the usual names, and what a recipe may name. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqa_sft.errors import InputError, printable
from vqa_sft.questions.letters import LETTERS

# Compared without case, spaces, "_" and "-"; the first that a source has is taken.
# fmt: off
USUAL_NAMES = {
    "id": ["id", "question_id", "qid", "sample_id", "example_id", "row_id", "uid", "index", "idx", "번호"],
    "image": [
        "path", "image", "image_path", "img", "img_path", "images", "file_name", "file", "image_file", "picture",
        "photo", "image_name", "img_name", "image_filename", "img_file", "file_path", "local_path", "figure",
        "figure_path", "figure_file", "figure_name", "fig", "photo_path", "decoded_image", "이미지", "사진", "그림",
    ],
    "question": [
        "question", "query", "question_text", "q", "prompt", "ques", "question_stem", "stem", "problem", "질문", "문제",
    ],
    "choices": [
        "choices", "options", "candidates", "answer_choices", "multiple_choices", "multiple_choice", "mc_choices",
        "choice_list", "option_list", "options_list", "choices_list", "answer_options", "answer_candidates",
        "possible_answers", "보기", "선택지",
    ],
    "answer": [
        "answer", "label", "gt", "ground_truth", "target", "correct_answer", "correct_choice", "correct_option",
        "correct", "answer_idx", "answer_index", "correct_idx", "correct_index", "correct_choice_idx", "answer_label",
        "answer_key", "answer_letter", "answer_option", "answer_choice", "correct_label", "gt_answer", "correct_letter",
        "correct_option_idx", "correct_option_index", "correct_choice_index", "gt_index", "multiple_choice_answer",
        "right_answer", "gold", "gold_label", "ans", "정답",
    ],
    "context": ["context", "hint", "passage", "지문"],
    "targets": [],  # only where it is named: nobody should learn from a column by accident
}
# fmt: on
IN_QUESTION = "in_question"  # in place of columns for choices: they are written in the question's text
_FIELD = re.compile(r"\{([^{}:]+)(?::0?([0-9]{1,2})d?)?\}")  # {id}, or {id:06} with zeros before it


@dataclass(frozen=True)
class Columns:
    """The columns of one source. `choices` is the name of a list column, or one name a choice.

    `id` None: rows are named by their number. `image` (): no images; a name with braces is a template of a path,
    "images/{id}.png". `choices` may be IN_QUESTION. `targets` is a list column with a number for each choice: votes, or
    a teacher's probabilities. `answer_format` and `answers_are_upper` say how the source writes its answers, so that a
    submission can write them the same. `fixed_question` and `fixed_choices` are those of every row; `question` is then
    None, and `choices` (), as in a classification, whose `answer` is a class. `has_labels`: every choice began with the
    label of its place, which was taken off.
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
        """Where the choices are, for the user."""
        if self.fixed_choices:
            return f"{printable(', '.join(self.fixed_choices))} (every row)"
        if self.choices == IN_QUESTION:
            return "in the question's text"
        if not self.choices:  # of a classification
            return ""
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
    """Raises InputError for `columns` of a recipe that name no columns."""
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


def plain_name(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def find_usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """The column with the first of the usual names."""
    plain = {plain_name(name): name for name in reversed(names)}
    return next((plain[plain_name(name)] for name in usual if plain_name(name) in plain), None)


def are_here(known: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    """The columns of other data that a source with these columns has too."""

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


def known_columns(trained: Columns | None, named: Mapping[str, Any] | None) -> dict[str, Any]:
    """The columns that other data of a run share with its training data: those that the recipe `named`, and the
    context. It is part of the prompt, so it is read where training had one and nowhere else. Targets are for training
    alone."""
    known = {} if trained is None else {"context": trained.context}
    return known | {key: name for key, name in (named or {}).items() if key != "targets"}
