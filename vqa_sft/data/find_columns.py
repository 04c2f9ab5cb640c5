"""How the columns of a source are found: by their usual names, or as the recipe says. No torch."""

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vqa_sft.data.classes import NAME_COLUMNS
from vqa_sft.data.columns import IN_QUESTION, USUAL_NAMES, Columns, fields_of, find_usual, plain_name
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError, printable
from vqa_sft.questions.letters import LETTERS

# What precedes the letter or the number in choice_a, option1, ...
CHOICE_PREFIXES = ("option", "opt", "choice", "candidate", "alternative", "answer", "보기", "선택지")
CLASS_COLUMNS = [*NAME_COLUMNS[1:-1], *USUAL_NAMES["answer"]]  # a row's own `name` is hardly its class


def find_columns(
    names: Sequence[str],
    given: Mapping[str, Any],
    options: ReadOptions = ReadOptions(),
    images: Sequence[str] = (),
) -> Columns:
    """The columns of a source with these names: as `given`, the rest found by their usual names.

    Of the options, `answers`, `task`, `fixed_question` and `fixed_choices` count. `images` are the columns that hold
    images themselves, which come before those with paths. Raises InputError when a column is missing or there are too
    many choices.
    """
    fixed_choices = options.fixed_choices
    found: dict[str, Any] = {key: find_usual(names, usual) for key, usual in usual_names(options).items()}
    found["image"] = find_usual(images, USUAL_NAMES["image"]) or found["image"]
    if options.fixed_question is not None:
        found["question"] = None
    if fixed_choices is not None or options.is_classification:
        found["choices"] = ()
    elif "choices" not in given:
        found["choices"] = find_choice_columns(names) or found["choices"]
    if options.is_classification:
        _check_no_choices(names, given)
    found["image"] = (found["image"],) if found["image"] else _numbered(names, ("image", "img", "picture"))
    found |= {**given, "fixed_question": options.fixed_question}
    found["fixed_choices"] = None if fixed_choices is None else tuple(fixed_choices)
    for key in ("image", "choices"):
        if isinstance(found[key], list):
            found[key] = tuple(found[key])
    if isinstance(found["image"], str):
        found["image"] = (found["image"],)
    _check_found(names, found, given, options)
    if found["answer"] not in names:  # a test set without answers; the submission still names the column
        found["answer"] = given.get("answer")
    return Columns(**found)


def _check_no_choices(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises InputError for rows of a classification that have choices: their answers may be letters."""
    listed = find_usual(names, USUAL_NAMES["choices"])
    choices = [listed] if listed else find_choice_columns(names) or ()
    if given.get("choices") or len(choices) > 1 or listed:
        named = given.get("choices") or ", ".join(choices)
        raise InputError(
            f"task: classification has rows without choices, and these have them in {printable(str(named))}. Leave the "
            "task out, or take these columns out."
        )


def _check_found(names: Sequence[str], found: dict[str, Any], given: Mapping[str, Any], options: ReadOptions) -> None:
    """Raises InputError for columns that are missing or stand for two things."""
    for role in ("question", "choices"):
        if found[f"fixed_{role}"] is not None and found[role]:
            raise InputError(f"fixed_{role} stands for a column, and columns names {found[role]}. Keep one of the two.")
    missing = [*_missing_roles(found, given, options)]
    optional = () if options.answers == "required" else (found["answer"],)
    missing += [name for name in _named(found) if name not in names and name not in optional]
    if missing:
        has = printable(", ".join(names), limit=1_000) or "none"
        example = "{image: ..., answer: ...}" if options.is_classification else "{question: ..., choices: [...]}"
        raise InputError(
            f"missing columns: {'; '.join(missing)}. The data has: {has}. Rename them, or name "
            f"yours in the recipe: `columns: {example}`."
        )
    if found["choices"] and not isinstance(found["choices"], str):
        if len(found["choices"]) > len(LETTERS):
            raise InputError(f"at most {len(LETTERS)} choices have letters; got {len(found['choices'])} columns.")
        if len(found["choices"]) < 2:
            raise InputError(f"a question needs at least two choices; got the column {found['choices'][0]} alone.")
    read = [found[key] for key in USUAL_NAMES if key != "id"]  # a file's name may well be the id
    named = [name for value in read for name in ([value] if isinstance(value, str) else value or ())]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise InputError(f"columns: {', '.join(twice)} stands for two things. Name another column for one.")


def _missing_roles(found: Mapping[str, Any], given: Mapping[str, Any], options: ReadOptions) -> Iterator[str]:
    """What has neither a usual name nor is named, for the user."""
    names = usual_names(options)
    usual = {role: f"usual names: {', '.join(names[role][:4])}" for role in ("question", "image", "answer")}
    if not found["question"] and found["fixed_question"] is None:
        yield f"question ({usual['question']}; one for all: fixed_question)"
    if not found["image"] and "image" not in given:
        yield f"image ({usual['image']}; for none: image: [])"
    if not found["choices"] and found["fixed_choices"] is None and not options.is_classification:
        names = "usual names: a, b, c, ...; option1, ...; choices"
        yield f"choices ({names}; in the question's text: choices: in_question; the same for all: fixed_choices)"
    if not found["answer"] and options.answers == "required":
        yield f"{'class' if options.is_classification else 'answer'} ({usual['answer']})"


def _named(found: Mapping[str, Any]) -> list[str]:
    """The columns that must be there."""
    named = [found[key] for key in USUAL_NAMES if isinstance(found[key], str) and found[key] != IN_QUESTION]
    for image in found["image"]:
        parts = fields_of(image, found["id"])
        # Without a column for ids, `{id}` is the row's number.
        named += [part for part in parts if part != "id"] if parts else [image]
    return named + ([] if isinstance(found["choices"], str | None) else [*found["choices"]])


def usual_names(options: ReadOptions) -> dict[str, list[str]]:
    """USUAL_NAMES; the answer of a classification is a class."""
    return USUAL_NAMES | ({"answer": CLASS_COLUMNS} if options.is_classification else {})


def find_others(
    names: Sequence[str], columns: Columns, given: Mapping[str, Any], options: ReadOptions = ReadOptions()
) -> dict[str, list[str]]:
    """What else has a usual name of each thing that is not `given`, and stands for nothing: columns that may mean the
    same, or something else."""
    used = {*columns.names, *(name for value in given.values() for name in ([value] if isinstance(value, str) else ()))}
    plain = {plain_name(name): name for name in reversed(names)}
    others = {}
    for key, usual in usual_names(options).items():
        if key not in given and key != "id":
            here = [plain[plain_name(name)] for name in usual if plain_name(name) in plain]
            others[key] = list(dict.fromkeys(name for name in here if name not in used))
    return {key: found for key, found in others.items() if found}


def find_choice_columns(names: Sequence[str]) -> tuple[str, ...] | None:
    """The columns a, b, c, ... or A, B, ..., or option1, option2, ..., choice_a, ..., in their order.

    Raises InputError for a run that leaves one out: its answers would count other letters than ours.
    """
    numbers = [[str(number) for number in range(first, first + 40)] for first in (0, 1)]
    for prefix in ("", *CHOICE_PREFIXES):
        for ends in [string.ascii_lowercase, *(numbers if prefix else [string.ascii_uppercase])]:
            columns = _run(names, prefix, ends)
            if columns:
                return columns
    return None


def _run(names: Sequence[str], prefix: str, ends: Sequence[str]) -> tuple[str, ...]:
    """The longest run of columns that starts with the first end: prefix + "a", prefix + "b", ..."""
    here = {name if not prefix else plain_name(name): name for name in reversed(names)}
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
    plain = {plain_name(name): name for name in names}
    for prefix in prefixes:
        for first in (0, 1):
            numbered = (f"{prefix}{number}" for number in itertools.count(first))
            found = [plain[name] for name in itertools.takewhile(plain.__contains__, numbered)]
            if found:
                return tuple(found)
    return ()
