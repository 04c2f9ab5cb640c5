"""How a submission is written: whose columns, which rows, letters, indices, texts or probabilities. No torch.

id,answer        id,A,B,C             Style() writes the first, Style.plain("probabilities", 3) the second;
t_1,B            t_1,0.1,0.7,0.2      Style.from_template writes as a contest's sample submission does
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from vqa_sft.data.answers import FORMATS, UNKNOWN, infer_format
from vqa_sft.data.cells import is_upper_case, read_answer
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.predictions.matched import HINT
from vqa_sft.predictions.read_submission import describe_columns, order_columns, read_table
from vqa_sft.questions.letters import LETTERS

PROBABILITIES = "probabilities"
STYLES = (*FORMATS, PROBABILITIES)


@dataclass(frozen=True)
class Style:
    """How a submission is written.

    `answers` names one column, or with the format "probabilities" one for each choice: of the place in a row, or where
    `texts` are given of the choice with this text. A letter stands between the two texts `around`. `header` holds all
    names in their order. `ids` is the order of the rows; empty: that of the predictions. `notes` are for the user: how
    a template was understood.
    """

    id: str = "id"
    answers: tuple[str, ...] = ("answer",)
    answer_format: str = "letter"
    is_upper: bool = True
    header: tuple[str, ...] = ("id", "answer")
    ids: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    around: tuple[str, str] = ("", "")
    notes: tuple[str, ...] = ()

    @classmethod
    def plain(cls, answer_format: str | None, num_choices: int, own: Mapping[str, Any] | None = None) -> "Style":
        """id and answer, or id and the letters of so many choices; named and written as the run's `own` data are, as
        far as that is known."""
        own = own or {"id": "id", "column": "answer", "format": None, "is_upper": True}
        answer_format = answer_format or own["format"] or "letter"
        answers = tuple(LETTERS[:num_choices]) if answer_format == PROBABILITIES else (own["column"],)
        return cls(own["id"], answers, answer_format, own["is_upper"], (own["id"], *answers))

    @classmethod
    def from_template(
        cls,
        path: str | Path,
        ids: Sequence[str],
        num_choices: Sequence[int],
        answer_format: str | None = None,
        choices: Sequence[Sequence[str]] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> "Style":
        """As a contest's sample submission writes it, for rows with these ids and numbers of choices.

        One column holds the ids; one other is the answer, or as many as there are choices are their probabilities, each
        named after its choice (`order_columns`). The cells of an answer column tell its format, unless `answer_format`
        does; where they leave it open, that of the run's `own` data is taken. `choices` are needed for texts.
        Raises InputError where the template does not fit the rows, or can be read in two ways.
        """
        columns, rows = read_table(path)
        id_name = find_id_column(path, columns, rows, ids)
        answers = tuple(name for name in columns if name != id_name)
        how: dict[str, Any] = {"header": tuple(columns), "ids": tuple(row[id_name] for row in rows)}
        most = max(num_choices)
        if len(answers) > 1:
            names, texts = _find_probabilities(path, answers, rows, choices, most, id_name)
            if answer_format not in (None, PROBABILITIES):
                raise InputError(
                    f"{path} has {len(answers)} columns for probabilities; --answer-format {answer_format} has one."
                )
            note = f"{path}: {describe_columns(names, texts)}."
            return cls(id_name, names, PROBABILITIES, texts=texts, notes=(note,), **how)
        if not answers:
            raise _wrong_number(path, answers, most, id_name)
        if answer_format == PROBABILITIES:
            raise InputError(f"{path} has one column beside {id_name}; --answer-format {PROBABILITIES} needs {most}.")
        # Without texts, no cell is one.
        texts = choices or [[f"<choice {letter}>" for letter in LETTERS[:number]] for number in num_choices]
        texts_of = dict(zip(ids, texts, strict=True))
        cells = [(row[answers[0]], texts_of[row[id_name]]) for row in rows]
        known = [(cell, texts) for cell, texts in cells if cell.casefold() not in UNKNOWN]
        is_own = False
        if answer_format is None:
            answer_format, is_own = _find_format(path, answers[0], known, (own or {}).get("format"))
        letters = [cell for cell, _ in known if _is_letter(cell)]
        is_upper = is_upper_case(letters) if letters else own is None or own["is_upper"]
        notes = ()
        if is_own:
            case = ""
            if answer_format == "letter":
                case = ", upper case" if is_upper else ", lower case"
            own_way = f"written as in the run's data ({answer_format}{case})"
            notes = (f"{path} does not say how answers are written: {own_way}.",)
        return cls(id_name, answers, answer_format, is_upper, around=_around(letters), notes=notes, **how)


def _find_probabilities(
    path: str | Path,
    names: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    choices: Sequence[Sequence[str]] | None,
    most: int,
    id_name: str,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`order_columns` of a template. Raises InputError where its columns are none of probabilities."""
    ordered = order_columns(path, names, choices, most)
    if ordered is None and len(names) != most:
        raise _wrong_number(path, names, most, id_name)
    check_numbers(path, names, rows)
    if ordered is None:
        raise _unnamed(path, names, choices)
    return ordered


def _wrong_number(path: str | Path, names: Sequence[str], most: int, id_name: str) -> InputError:
    return InputError(
        f"{path} has {len(names)} columns beside {id_name}: {printable(', '.join(names)) or 'none'}. One is an answer, "
        f"{most} are the probabilities of the choices; remove or add columns."
    )


def _around(letters: Sequence[str]) -> tuple[str, str]:
    """The text before and after the letter in all of the cells: "(b)" has ("(", ")")."""
    found = set()
    for cell in letters:
        place = cell.upper().rfind(LETTERS[read_answer(cell, LETTERS, "letter")])
        found.add((cell[:place], cell[place + 1 :]) if place >= 0 else ("", ""))
    return found.pop() if len(found) == 1 else ("", "")


def _unnamed(path: str | Path, names: Sequence[str], choices: Iterable[Sequence[str]] | None) -> InputError:
    shown = printable(", ".join(dict.fromkeys(text for row in choices or () for text in row)), 200)
    data = f" ({shown})" if shown else ", whose texts only --data tells,"
    return InputError(
        f"{path}: the columns {printable(', '.join(names))} are named after neither the choices{data} nor their "
        "letters or numbers, so it cannot be said which holds whose probability. Name them after the choices; a file "
        "with one answer has one column beside the ids."
    )


def _is_letter(cell: str) -> bool:
    return read_answer(cell, LETTERS, "letter") is not None


def check_numbers(path: str | Path, names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Raises InputError where a column that would get probabilities holds something else."""
    for name in names:
        if texts := [row[name] for row in rows if row[name].casefold() not in UNKNOWN and not _is_number(row[name])]:
            raise InputError(
                f"{path}: {printable(name)} holds {printable(repr(texts[0]), 60)} and is no column of probabilities, "
                "which as many columns as there are choices are taken for. Remove it."
            )


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def find_id_column(
    path: str | Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]], ids: Sequence[str]
) -> str:
    """The column that holds exactly the ids; else an InputError that says what the nearest lacks."""
    wanted = set(ids)
    best = max(columns, key=lambda name: len({row[name] for row in rows} & wanted))  # the first of equals
    found = [row[best] for row in rows]
    there = set(found)
    missing, foreign = [i for i in ids if i not in there], [i for i in found if i not in wanted]
    twice = [i for i, count in Counter(found).items() if i in wanted and count > 1]
    faults = [
        f"{what} {name_rows(rows, total)}"
        for what, rows, total in (
            ("it lacks", missing, len(ids)),
            ("the predictions lack", foreign, len(found)),
            ("it has more than once", twice, len(found)),
        )
        if rows
    ]
    if faults:
        hint = "Give the template of these rows."
        if foreign and {*foreign} <= {PurePath(row_id).stem for row_id in missing}:
            hint = "These are names of images without suffix: predict from a table of such ids and the images' paths."
        raise InputError(
            f"no column of {path} holds the ids of the predictions. Nearest is {printable(best)}: {'; '.join(faults)}. "
            + hint
        )
    return best


def _find_format(
    path: str | Path, name: str, known: Sequence[tuple[str, Sequence[str]]], own: str | None
) -> tuple[str, bool]:
    """How the cells of the answer column are written, and whether that is the run's `own` format, because the cells do
    not tell: empty, all the same number or filler, or such that two formats fit."""
    values = {cell for cell, _ in known}
    readable = {how: all(read_answer(cell, texts, how) is not None for cell, texts in known) for how in FORMATS}
    if not known:
        if own:
            return own, True
        raise InputError(f"{path}: every `{name}` is empty, which does not say how answers are written. {HINT}.")
    is_text = readable["text"] and not (readable["index_from_0"] or readable["index_from_1"])
    if len(values) == 1 and not any(map(_is_letter, values)) and not is_text:
        if own:
            return own, True
        raise InputError(
            f"{path}: every `{name}` is {printable(repr(*values))}, which may be a number that counts from 0 or from "
            f"1, or stand for any answer. {HINT}."
        )
    try:
        found = infer_format(known, may_be_odd=False)
    except InputError as error:
        if own and readable[own]:
            return own, True
        raise InputError(f"{path}: {error} Here that is --answer-format.") from error
    if bad := [cell for cell, texts in known if read_answer(cell, texts, found) is None]:
        raise InputError(
            f"{path}: {len(bad):,} of {len(known):,} cells of `{name}` are no answer as the others are ({found}), such "
            f"as {printable(repr(bad[0]))}. {HINT}. Texts need --data as well."
        )
    return found, False
