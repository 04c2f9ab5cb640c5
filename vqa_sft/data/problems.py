"""What can be wrong with a row or its image: one table, used by training, prediction and `vqa-sft check`.

Standard library only. An error stops a run, because the row cannot be used as it is; a warning is a likely mistake
that `vqa-sft check` shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from vqa_sft.errors import InputError, name_rows


@dataclass(frozen=True)
class Kind:
    """One kind of problem: how bad it is, what it is in words, and how to fix it."""

    severity: Literal["error", "warning"]
    what: str
    fix: str


_error, _warning = partial(Kind, "error"), partial(Kind, "warning")
KINDS = {
    # The row
    "empty_id": _error("the id is empty", "Give every row an id."),
    "duplicate_id": _error("duplicate id", "Give every row its own id; `columns: {id: null}` numbers the rows."),
    "empty_question": _error("the question is empty", "Write the question or remove the row."),
    "bad_choices": _error("the choices are no list", "Write them as a JSON list or in columns a, b, c, ..."),
    "no_choices_in_question": _error(
        "no choices are written in the question", "Write them as lines `A. ...`, `B. ...`, or remove the row."
    ),
    "few_choices": _error("fewer than two choices", "Give the row two choices or remove it."),
    "many_choices": _error("more than 26 choices", "A row can have 26, one a letter."),
    "more_choices": _error("more choices than the rows before", "Set max_choices, or do not stream."),
    "same_choices": _error("all choices are equal", "Nothing can be learned from such a row; remove it."),
    "no_answer": _error("the answer is empty", "Give the answer or remove the row."),
    "bad_answer": _error("the answer is none of the choices", "Correct it, or set answer_format."),
    "no_candidates": _error("no candidates are known of the row", "`vqa-sft candidates` makes them for all rows."),
    "unknown_class": _error("the label is no class of the list", "Correct it, or add it to the list."),
    "bad_targets": _error(
        "the targets are not a number for each choice", "Give votes or probabilities, 0 or more, in a list."
    ),
    "bad_text": _error("a text holds null bytes, half a character or a list", "Write it as plain text."),
    "long_text": _warning("more than 20,000 characters", "The prompt may not fit the GPU's memory."),
    "equal_choices": _warning("two choices are equal", "Two letters then stand for one answer."),
    "keeps_order": _warning("the choices refer to letters or places", "They are never shuffled."),
    "keeps_last": _warning("the last choice means all others", "It stays last where others are shuffled."),
    "empty_choice": _warning("an empty choice before a filled one", "It is shown as an empty choice."),
    "nan_choice": _warning(
        "a choice or the context reads as tools write empty cells (NaN, N/A, None)",
        "If it means an empty cell, name it as it is written: `empty_cells: [NaN]`.",
    ),
    "stray_column": _warning(
        "a column after the choices is taken for none and left out",
        "Name the choices: `columns: {choices: [a, b, c, d]}`.",
    ),
    "sparse_column": _warning(
        "a choice in a column that few rows fill and that is never the answer",
        "If it is none, name the choices: `columns: {choices: [a, b, c, d]}`.",
    ),
    "control_token": _error("a text holds a control token of the model", "Take it out."),
    # Its images
    "image_address": _error("the image is an address on the web", "Download it; nothing is fetched."),
    "path_outside": _error(
        "the image lies outside the image folder",
        "Paths are relative to image_root (by default the folder of the file) and stay in it: set it to a folder that "
        "holds them all, and take `..` out of the paths.",
    ),
    "missing_image": _error("the image is missing", "Check the path; it is relative to image_root."),
    "unreadable_image": _error("the image file cannot be opened", "Check its permissions and the disk."),
    "empty_image": _error("the image file is empty", "Copy or download it again."),
    "not_an_image": _error("the file is no image that can be read", "It may be an error page, SVG or HEIC."),
    "truncated_image": _error("the image is cut off", "Copy or download it again."),
    "broken_image": _error("the image cannot be decoded", "Download it again, or save it again as PNG."),
    "large_file": _error("the image file is larger than 512 MiB", "Save it smaller."),
    "image_bomb": _error("the image has too many pixels", "Make it smaller; Pillow refuses such sizes."),
    "long_image": _error("the image is more than 200 times as long as wide", "Crop it; models refuse it."),
    "no_image": _warning("the row has no image", "Right for sets that mix; else fill in the path."),
    "wrong_extension": _warning("the image's format is not what its name says", "It is read all the same."),
    "animated": _warning("the image is animated", "Only its first frame is shown to the model."),
    "cmyk": _warning("the image is CMYK", "It is converted to RGB."),
    "sixteen_bit": _warning("the image has 16 bits a channel", "It is scaled down to 8 bits."),
    "rotated": _warning("the image is turned by its EXIF entry", "It is shown as the entry says."),
    "huge_image": _warning("the image has over 89 million pixels", "Make it smaller; it is slow to read."),
    "tiny_image": _warning("the image is smaller than 28 pixels", "The model may see nothing on it."),
    # Between rows
    "answers_differ": _warning("the same image and question with another answer", "One of them is wrong."),
    "classes_differ": _warning("the same image under another class", "One of them is wrong, or the classes are one."),
    "near_classes_differ": _warning("nearly the same image under another class", "Look at the pair."),
    "only_of_class": _warning("the only row of its class", "Add images: it cannot be both trained and validated on."),
    "class_not_trained": _warning("no training row has its class", "Nothing is learned of it; add training rows."),
    "in_training": _warning("the image is also in the training set", "Its score will be too good."),
    "near_training": _warning("nearly the same image is in the training set", "Look at the pair."),
}


# Where the rows are trained on, and where they are predicted.
STREAM_HINT = "`vqa-sft check ... --fix FILE` writes a copy without such rows."
TRAINING_HINT = "`on_bad_row: skip` trains without such rows. " + STREAM_HINT
PREDICTION_HINT = "`--on_bad_row guess` answers such rows all the same, and marks those that are guessed."
IDS = ("empty_id", "duplicate_id")  # that identify rows in folds, submissions, ensembles
# Errors with which a row of a test set can be answered all the same.
IMAGES = ("image_address", "path_outside", "missing_image", "unreadable_image", "empty_image", "not_an_image")
IMAGES += ("truncated_image", "broken_image", "large_file", "image_bomb", "long_image")
GUESSED = ("empty_question", "bad_choices", "no_choices_in_question", "few_choices", "same_choices", *IMAGES)
ANSWERABLE = (*GUESSED, "bad_answer", "bad_text")  # the last two are no guess: nothing is missing from the prompt


class Problems:
    """What is wrong with which rows, in the order of finding; collected first, reported together."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.hints: dict[str, str] = {}  # by kind, how to fix it in these data
        self._found: dict[str, list[tuple[str, int]]] = {}

    def add(self, row_id: str, row: int, kind: str, detail: str = "") -> None:
        """`row` is the number of the row in the source, from 0; `kind` a key of KINDS; `detail` shows the evidence."""
        assert kind in KINDS, kind
        label = row_id or f"number {row}"
        self._found.setdefault(kind, []).append((f"{label} ({detail})" if detail else label, row))

    def __iter__(self) -> Iterator[tuple[str, Kind, list[str]]]:
        """(key, kind, labels of the rows): errors first, then warnings."""
        for severity in ("error", "warning"):
            for key, found in self._found.items():
                if KINDS[key].severity == severity:
                    yield key, KINDS[key], [label for label, _ in found]

    def errors(self) -> list[tuple[str, Kind, list[str]]]:
        return [item for item in self if item[1].severity == "error"]

    def bad_rows(self, *keys: str) -> list[int]:
        """Numbers of the rows with an error (or with one of the given problems), sorted, each once."""
        rows = {
            row
            for key, found in self._found.items()
            if (key in keys if keys else KINDS[key].severity == "error")
            for _, row in found
        }
        return sorted(rows)

    def found(self, key: str) -> list[tuple[str, int]]:
        """(label, number) of the rows with one kind of problem, in the order of finding."""
        return self._found.get(key, [])

    def fix(self, key: str) -> str:
        """How to fix one kind of problem in these data."""
        return f"{KINDS[key].fix} {self.hints.get(key, '')}".rstrip()

    def raise_if_any(self, source: str, on_bad_row: str = "error", hint: str = TRAINING_HINT) -> None:
        """Raises InputError with every error, five rows of each kind; warnings do not raise.

        With `on_bad_row` "skip" only errors of ids do, with "guess" all but those of ANSWERABLE. `hint`: what helps.
        """
        errors = self.errors()
        if on_bad_row == "skip":
            errors = [error for error in errors if error[0] in IDS]
        if on_bad_row == "guess":
            errors = [error for error in errors if error[0] not in ANSWERABLE]
        if not errors:
            return
        lines = [f"{kind.what}: {name_rows(labels, self.total)}. {self.fix(key)}" for key, kind, labels in errors]
        helped = {PREDICTION_HINT: {*ANSWERABLE}, TRAINING_HINT: KINDS.keys() - {*IDS}}
        if any(key in helped.get(hint, KINDS) for key, _, _ in errors):
            lines.append(hint)
        elif hint == TRAINING_HINT:
            lines.append(STREAM_HINT)
        raise InputError("\n  ".join([f"{source} has rows that cannot be used:", *lines]))
