"""The submission file: whose columns, which rows, how an answer is written. No torch.

id,answer        id,A,B,C             Style() writes the first, Style.plain("probabilities", 3) the second;
t_1,B            t_1,0.1,0.7,0.2      Style.from_template writes as a contest's sample does
"""

import csv
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vqa_sft.data.answers import FORMATS, UNKNOWN, infer_format, is_upper_case, read_answer, write_answer
from vqa_sft.data.sources import open_source
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.letters import LETTERS
from vqa_sft.predictions.file import ANSWERS, Predictions, read_predictions, whole
from vqa_sft.predictions.matched import HINT, read_rows_of

PROBABILITIES = "probabilities"
STYLES = (*FORMATS, PROBABILITIES)
DIGITS = 6  # of a probability


@dataclass(frozen=True)
class Style:
    """How a submission is written.

    `answers` names one column, or with the format "probabilities" one for each choice: of the place in a row, or where
    `texts` are given of the choice with this text. A letter stands between the two texts `around`. `header` holds all
    names in their order. `ids` is the order of the rows; empty: that of the predictions. `notes` say what was taken for
    what.
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
        id_name = _find_id_column(path, columns, rows, ids)
        answers = tuple(name for name in columns if name != id_name)
        order = tuple(row[id_name] for row in rows)
        most = max(num_choices)
        if len(answers) > 1:
            ordered = order_columns(path, answers, choices, most)
            if ordered is None and len(answers) == most:
                _check_numbers(path, answers, rows)
                raise InputError(_unnamed(path, answers, choices))
        if len(answers) == 0 or len(answers) > 1 and ordered is None:
            raise InputError(
                f"{path} has {len(answers)} columns beside {id_name}: {printable(', '.join(answers)) or 'none'}. One "
                f"is an answer, {most} are the probabilities of the choices; remove or add columns."
            )
        if len(answers) > 1:
            if answer_format not in (None, PROBABILITIES):
                raise InputError(
                    f"{path} has {len(answers)} columns for probabilities; --answer-format {answer_format} has one."
                )
            _check_numbers(path, answers, rows)
            names, texts = ordered
            note = f"{path}: {describe_columns(names, texts)}."
            return cls(id_name, names, PROBABILITIES, True, tuple(columns), order, texts, notes=(note,))
        if answer_format == PROBABILITIES:
            raise InputError(f"{path} has one column beside {id_name}; --answer-format {PROBABILITIES} needs {most}.")
        row_of = {row_id: i for i, row_id in enumerate(ids)}
        # Without texts, no cell is one.
        texts = choices or [[f"<choice {letter}>" for letter in LETTERS[:number]] for number in num_choices]
        cells = [(row[answers[0]], texts[row_of[row[id_name]]]) for row in rows]
        known = [(cell, texts) for cell, texts in cells if cell.casefold() not in UNKNOWN]
        notes = []
        if answer_format is None:
            answer_format, is_own = _find_format(path, answers[0], known, (own or {}).get("format"))
            notes += [f"{path} does not say how answers are written"] if is_own else []
        letters = [cell for cell, _ in known if _is_letter(cell)]
        is_upper = is_upper_case(letters) if letters else own is None or own["is_upper"]
        if notes:
            case = f", {'upper' if is_upper else 'lower'} case" if answer_format == "letter" else ""
            notes = [f"{notes[0]}: written as in the run's data ({answer_format}{case})."]
        how = {"around": _around(letters), "notes": tuple(notes)}
        return cls(id_name, answers, answer_format, is_upper, tuple(columns), order, **how)


def _around(letters: Sequence[str]) -> tuple[str, str]:
    """What stands before and after the letter in all of the cells: "(b)" has ("(", ")")."""
    found = set()
    for cell in letters:
        place = cell.upper().rfind(LETTERS[read_answer(cell, LETTERS, "letter")])
        found.add((cell[:place], cell[place + 1 :]) if place >= 0 else ("", ""))
    return found.pop() if len(found) == 1 else ("", "")


def _unnamed(path: str | Path, names: Sequence[str], choices: Iterable[Sequence[str]] | None) -> str:
    """What is wrong with columns that are named after no choices."""
    shown = printable(", ".join(dict.fromkeys(text for row in choices or () for text in row)), 200)
    data = f" ({shown})" if shown else ", whose texts only --data tells,"
    return (
        f"{path}: the columns {printable(', '.join(names))} are named after neither the choices{data} nor their "
        "letters or numbers, so it cannot be said which holds whose probability. Name them after the choices; a file "
        "with one answer has one column beside the ids."
    )


def _is_letter(cell: str) -> bool:
    return read_answer(cell, LETTERS, "letter") is not None


def _check_numbers(path: str | Path, names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Raises InputError where a column that would get probabilities holds something else."""
    for name in names:
        texts = [row[name] for row in rows if row[name].casefold() not in UNKNOWN and not _is_number(row[name])]
        if texts:
            raise InputError(
                f"{path}: {printable(name)} holds {printable(repr(texts[0]), 60)} and is no column of probabilities, "
                "which as many columns as there are choices are taken for. Remove it."
            )


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def order_columns(
    path: str | Path, names: Sequence[str], choices: Sequence[Sequence[str]] | None, most: int
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Columns of probabilities in the order of the choices, by their names; None where these name no choices.

    Names are the letters, or count from 0 or 1: then they are places in a row, of which it has at most `most`. Or they
    are the texts of all choices, which stand beside them then: red, green and blue in any order in any row. The same
    text may stand around all names ("option_a", "p1", "prob_red"). Raises InputError where they can be read as both.
    """
    counted = [[*LETTERS[:most]], *([str(first + i) for i in range(most)] for first in (0, 1))]
    by_place = next((found for words in counted if (found := _named_after(names, words))), None)
    texts = tuple(dict.fromkeys(text for row in choices or () for text in row))
    by_text = _named_after(names, texts)
    if by_place and by_text:
        text_of = dict(zip(by_text, texts, strict=True))
        if any(list(row) != [text_of[name] for name in by_place[: len(row)]] for row in choices):
            raise InputError(
                f"{path}: the columns {printable(', '.join(names))} may be places or the texts of choices, which stand "
                "in another order in some rows. Rename them, such as option_a, option_b for places."
            )
    if by_place:
        return by_place, ()
    return (by_text, texts) if by_text else None


def _named_after(names: Sequence[str], words: Sequence[str]) -> tuple[str, ...] | None:
    """The names in the order of the words that they consist of, with the same text around all; None where they do
    not. Case does not count, nor, if need be, spaces, "_" and "-"."""
    if len(names) != len(words) or not all(words):
        return None
    for plain in (str.casefold, lambda text: re.sub(r"[\s_-]", "", text).casefold()):
        own, wanted = [plain(name.strip()) for name in names], [plain(word.strip()) for word in words]
        if len({*own}) < len(own) or len({*wanted}) < len(wanted):
            continue
        for word in wanted:
            for place in range(len(own[0]) - len(word) + 1):
                if own[0].startswith(word, place):
                    framed = [own[0][:place] + other + own[0][place + len(word) :] for other in wanted]
                    if {*framed} == {*own}:
                        return tuple(names[own.index(name)] for name in framed)
    return None


def describe_columns(names: Sequence[str], texts: Sequence[str]) -> str:
    """Which column was taken for the probability of which choice."""
    of = [repr(text) for text in texts] or [f"choice {letter}" for letter in LETTERS]
    said = [f"{printable(name, 40)} is that of {printable(text, 40)}" for name, text in zip(names, of, strict=False)]
    return "probabilities by column: " + ", ".join(said)


def read_table(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Names and rows of a CSV as a submission is one: separated by commas, every cell text."""
    if Path(path).suffix.lower() != ".csv":
        raise InputError(f"a submission is a .csv file; got {path}.")
    opened = open_source(str(path))
    if any("separated by" in note for note in opened.notes):
        raise InputError(f"{opened.notes[0]}, and submissions are written with commas. Convert it.")
    rows = [{name: str(row[name] or "").strip() for name in opened.columns} for _, row in opened.rows()]
    if not rows:
        raise InputError(f"{path} has no rows.")
    return opened.columns, rows


def _find_id_column(
    path: str | Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]], ids: Sequence[str]
) -> str:
    """The column that holds exactly the ids; else an InputError that says what the nearest lacks."""
    wanted = set(ids)
    best = max(columns, key=lambda name: len({row[name] for row in rows} & wanted))  # the first of equals
    found = [row[best] for row in rows]
    there = set(found)
    missing, foreign = [i for i in ids if i not in there], [i for i in found if i not in wanted]
    twice = [i for i, count in Counter(found).items() if i in wanted and count > 1]
    said = [
        f"{what} {name_rows(rows, total)}"
        for what, rows, total in (
            ("it lacks", missing, len(ids)),
            ("the predictions lack", foreign, len(found)),
            ("it has more than once", twice, len(found)),
        )
        if rows
    ]
    if said:
        raise InputError(
            f"no column of {path} holds the ids of the predictions. Nearest is {printable(best)}: {'; '.join(said)}. "
            "Give the template of these rows."
        )
    return best


def _find_format(
    path: str | Path, name: str, known: Sequence[tuple[str, Sequence[str]]], own: str | None
) -> tuple[str, bool]:
    """How the cells of the answer column are written, and whether that is the run's `own` format, because they leave
    it open: empty, all the same number or filler, or such that two formats fit."""
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
    bad = [cell for cell, texts in known if read_answer(cell, texts, found) is None]
    if bad:
        raise InputError(
            f"{path}: {len(bad):,} of {len(known):,} cells of `{name}` are no answer as the others are ({found}), such "
            f"as {printable(repr(bad[0]))}. {HINT}. Texts need --data as well."
        )
    return found, False


def render(
    predictions: Predictions, style: Style, choices: Sequence[Sequence[str]] | None = None
) -> list[dict[str, str]]:
    """The rows of the submission, each cell as it is written. `choices` are the texts of each row of the predictions.

    Raises InputError where a submission would not hold every row once with probabilities that are some.
    """
    row_of = {row_id: i for i, row_id in enumerate(predictions.ids)}
    ids = style.ids or tuple(predictions.ids)
    if len(row_of) < len(predictions.ids) or sorted(ids) != sorted(predictions.ids):
        raise InputError(f"a submission holds every id once; got {len(ids)} rows for {len(row_of)} ids.")
    all_probs = predictions.probs
    bad = [i for i, row in zip(predictions.ids, all_probs, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise InputError(f"the probabilities are no numbers in {name_rows(bad, len(ids))}. Score the rows again.")
    if style.answer_format == "text" and choices is None:
        raise InputError(
            "answers are written as texts, and a prediction file holds none. Give --data, the data that were "
            "predicted, or another --answer-format."
        )
    if style.texts and choices is None:
        raise InputError("columns are named after the texts of choices, and a prediction file holds none. Give --data.")
    rows = []
    for row_id in ids:
        probs = all_probs[row_of[row_id]]
        if style.answer_format == PROBABILITIES:
            places = range(len(probs))
            if style.texts:
                place_of = {text: place for place, text in enumerate(style.texts)}
                places = [place_of.get(text, 0) for text in choices[row_of[row_id]]]  # a row without choices: the first
            cells = _written(probs, places, len(style.answers))
        else:
            texts = choices[row_of[row_id]] if choices is not None else LETTERS
            cells = [write_answer(int(probs.argmax()), texts, style.answer_format, style.is_upper)]
            if style.answer_format == "letter":
                cells = [cells[0].join(style.around)]
        rows.append({style.id: row_id} | dict(zip(style.answers, cells, strict=True)))
    return rows


def _written(probs: np.ndarray, places: Sequence[int], num_columns: int) -> list[str]:
    """Probabilities, each in the column of its place, that still sum to 1 once they are rounded; columns of choices
    that the row does not have get 0."""
    rounded = np.zeros(num_columns)
    np.add.at(rounded, list(places), np.round(probs, DIGITS))
    rounded[places[int(probs.argmax())]] += 1 - rounded.sum()
    cells = [f"{number:.{DIGITS}f}" for number in rounded]
    assert abs(math.fsum(map(float, cells)) - 1) < 1e-5, cells
    return cells


def write(
    path: str | Path,
    predictions: Predictions,
    style: Style,
    choices: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write the submission whole or not at all, over whatever is there: see `check_output`."""
    rows = render(predictions, style, choices)
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        write_table(file, style.header, ([row[name] for name in style.header] for row in rows))


def write_table(file: TextIO, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV that every reader cuts into these rows: a cell with anything that some reader takes for the end of a line,
    or drops, stands in quotes. Python's csv leaves a lone carriage return bare, which is a new row for pandas."""
    for row in itertools.chain([header], rows):
        file.write(",".join(map(_quoted, row)) + "\n")


def _quoted(cell: str) -> str:
    is_plain = len(cell.splitlines()) == 1 and cell == cell.strip() and not set(cell) & set(',"\r\n\0\ufeff')
    return cell if is_plain or cell == "" else '"' + cell.replace('"', '""') + '"'


def check_output(
    path: str | Path, header: Sequence[str], inputs: Sequence[str | Path | None], overwrite: bool = False
) -> None:
    """Raises InputError where a CSV with this header would replace one of the `inputs`, or a file with another header
    unless that may be overwritten."""
    path = Path(path)
    if path.suffix.lower() != ".csv":
        raise InputError(f"--output must end in .csv; got {path}.")
    if any(path.resolve() == Path(name).resolve() for name in inputs if name is not None):
        raise InputError(f"--output is one of the files that are read: {path}. Name another.")
    if not path.exists() or overwrite:
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        found = next(csv.reader([file.readline(10_000)]), [])
    if found != list(header):
        raise InputError(
            f"{path} exists and has other columns ({printable(', '.join(found))}) than what would be written "
            f"({', '.join(header)}). Name another --output, or give --overwrite."
        )


def submit(
    file: str | Path,
    output: str | Path,
    *,
    template: str | Path | None = None,
    answer_format: str | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> str:
    """`vqa-sft submit`: write a prediction file's submission, and say how. `options` say how the data are read. Raises
    InputError before it writes."""
    predictions = read_predictions(file)
    own, choices = predictions.metadata.get(ANSWERS), None
    if data:
        found = read_rows_of(data, predictions, file, **options).choices
        choices = [found[row_id] for row_id in predictions.ids]
    num_choices = [len(row) for row in predictions.choice_logits]
    if template is None:
        style = Style.plain(answer_format, max(num_choices), own)
    else:
        style = Style.from_template(template, predictions.ids, num_choices, answer_format, choices, own)
    check_output(output, style.header, [file, template, data], overwrite)
    write(output, predictions, style, choices)
    like = f", as {template} has them" if template else ""
    said = f"Wrote {len(predictions.ids):,} rows to {output}: {', '.join(style.header)} ({style.answer_format}){like}."
    return "\n".join([*style.notes, said])
