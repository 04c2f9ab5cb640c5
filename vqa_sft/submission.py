"""The submission file: whose columns, which rows, how an answer is written. No torch.

id,answer        id,A,B,C             Style() writes the first, Style.plain("probabilities", 3) the second;
t_1,B            t_1,0.1,0.7,0.2      Style.from_template writes as a contest's sample does
"""

import csv
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqa_sft.answers import FORMATS, UNKNOWN, infer_format, is_upper_case, read_answer, write_answer
from vqa_sft.columns import Columns
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.mcq import LETTERS
from vqa_sft.predictions import Predictions, read_predictions, whole
from vqa_sft.sources import open_source

PROBABILITIES = "probabilities"
STYLES = (*FORMATS, PROBABILITIES)
DIGITS = 6  # of a probability


@dataclass(frozen=True)
class Style:
    """How a submission is written.

    `answers` names one column, or with the format "probabilities" one for each choice; `header` holds all names in
    their order. `ids` is the order of the rows; empty: that of the predictions.
    """

    id: str = "id"
    answers: tuple[str, ...] = ("answer",)
    answer_format: str = "letter"
    is_upper: bool = True
    header: tuple[str, ...] = ("id", "answer")
    ids: tuple[str, ...] = ()

    @classmethod
    def plain(cls, answer_format: str, num_choices: int) -> "Style":
        """id and answer, or id and the letters of so many choices."""
        answers = tuple(LETTERS[:num_choices]) if answer_format == PROBABILITIES else ("answer",)
        return cls(answers=answers, answer_format=answer_format, header=("id", *answers))

    @classmethod
    def from_columns(cls, columns: Columns) -> "Style":
        """The names and the answer format of data."""
        id_name, answer = columns.id or "id", columns.answer or "answer"
        how = {"answer_format": columns.answer_format or "letter", "is_upper": columns.answers_are_upper}
        return cls(id_name, (answer,), header=(id_name, answer), **how)

    @classmethod
    def from_template(
        cls,
        path: str | Path,
        ids: Sequence[str],
        num_choices: Sequence[int],
        answer_format: str | None = None,
        choices: Sequence[Sequence[str]] | None = None,
    ) -> "Style":
        """As a contest's sample submission writes it, for rows with these ids and numbers of choices.

        One column holds the ids; one other is the answer, or as many as there are choices are their probabilities. The
        cells of an answer column tell its format, unless `answer_format` does. `choices` are needed for texts.
        Raises InputError where the template does not fit the rows, or can be read in two ways.
        """
        columns, rows = read_table(path)
        id_name = _find_id_column(path, columns, rows, ids)
        answers = tuple(name for name in columns if name != id_name)
        order = tuple(row[id_name] for row in rows)
        most = max(num_choices)
        if len(answers) not in (1, most):
            raise InputError(
                f"{path} has {len(answers)} columns beside {id_name}: {printable(', '.join(answers)) or 'none'}. One "
                f"is an answer, {most} are the probabilities of the choices; remove or add columns."
            )
        if len(answers) > 1:
            if answer_format not in (None, PROBABILITIES):
                raise InputError(
                    f"{path} has {most} columns for probabilities; --answer-format {answer_format} has one."
                )
            _check_numbers(path, answers, rows)
            return cls(id_name, by_letter(answers), PROBABILITIES, header=tuple(columns), ids=order)
        if answer_format == PROBABILITIES:
            raise InputError(f"{path} has one column beside {id_name}; --answer-format {PROBABILITIES} needs {most}.")
        row_of = {row_id: i for i, row_id in enumerate(ids)}
        # Without texts, no cell is one.
        texts = choices or [[f"<choice {letter}>" for letter in LETTERS[:number]] for number in num_choices]
        cells = [(row[answers[0]], texts[row_of[row[id_name]]]) for row in rows]
        known = [(cell, texts) for cell, texts in cells if cell.casefold() not in UNKNOWN]
        answer_format = answer_format or _find_format(path, answers[0], known)
        letters = [cell for cell, _ in known if _is_letter(cell)]
        is_upper = is_upper_case(letters) if letters else True
        return cls(id_name, answers, answer_format, is_upper, tuple(columns), order)


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


def by_letter(names: Sequence[str]) -> tuple[str, ...]:
    """Columns of probabilities in the order of the choices: by their names where these are the letters, or count from 0
    or 1, perhaps with the same text around them ("option_a", "p1"); else as they stand."""
    own = [name.strip().upper() for name in names]
    before = len(os.path.commonprefix(own))
    own = [name[before:] for name in own]
    after = len(os.path.commonprefix([name[::-1] for name in own]))
    own = [name[: len(name) - after] for name in own]
    counted = [[*LETTERS[: len(names)]], *([str(first + i) for i in range(len(names))] for first in (0, 1))]
    for order in counted:
        if sorted(own) == sorted(order):
            return tuple(name for _, name in sorted(zip(map(order.index, own), names, strict=True)))
    return tuple(names)


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


def _find_format(path: str | Path, name: str, known: Sequence[tuple[str, Sequence[str]]]) -> str:
    """How the cells of the answer column are written, if that can be told from them."""
    hint = f"Give --answer-format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}."
    values = {cell for cell, _ in known}
    if not known:
        raise InputError(f"{path}: every `{name}` is empty, which does not say how answers are written. {hint}")
    if len(values) == 1 and not any(map(_is_letter, values)):
        raise InputError(
            f"{path}: every `{name}` is {printable(repr(*values))}, which may be a number that counts from 0 or from "
            f"1, or stand for any answer. {hint}"
        )
    try:
        found = infer_format(known, may_be_odd=False)
    except InputError as error:
        raise InputError(f"{path}: {error} Here that is --answer-format.") from error
    bad = [cell for cell, texts in known if read_answer(cell, texts, found) is None]
    if bad:
        raise InputError(
            f"{path}: {len(bad):,} of {len(known):,} cells of `{name}` are no answer as the others are ({found}), such "
            f"as {printable(repr(bad[0]))}. {hint} Texts need --data as well."
        )
    return found


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
        raise InputError("answers are written as texts, and a prediction file holds none. Give --data.")
    rows = []
    for row_id in ids:
        probs = all_probs[row_of[row_id]]
        if style.answer_format == PROBABILITIES:
            cells = _written(probs, len(style.answers))
        else:
            texts = choices[row_of[row_id]] if choices is not None else LETTERS
            cells = [write_answer(int(probs.argmax()), texts, style.answer_format, style.is_upper)]
        rows.append({style.id: row_id} | dict(zip(style.answers, cells, strict=True)))
    return rows


def _written(probs: np.ndarray, num_columns: int) -> list[str]:
    """Probabilities that still sum to 1 once they are rounded; choices that the row does not have get 0."""
    rounded = np.zeros(num_columns)
    rounded[: len(probs)] = np.round(probs, DIGITS)
    rounded[probs.argmax()] += 1 - rounded.sum()
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
        writer = csv.DictWriter(file, style.header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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


def read_choices(data: str | Path, predictions: Predictions) -> tuple[list[str], list[list[str]]]:
    """Questions and choices of the predictions' rows, from their data; rows beyond them do not count."""
    from vqa_sft.data import read_examples

    examples = read_examples(str(data), split="test", answers="optional").examples
    row_of = {row_id: i for i, row_id in enumerate(examples["id"])}
    missing = [row_id for row_id in predictions.ids if row_id not in row_of]
    if missing:
        raise InputError(f"{data} lacks {name_rows(missing, len(predictions.ids))}. Give the data of the predictions.")
    rows = examples.select([row_of[row_id] for row_id in predictions.ids])
    questions, choices = rows["question"][:], rows["choices"][:]
    pairs = zip(predictions.ids, choices, predictions.choice_logits, strict=True)
    differ = [row_id for row_id, texts, logits in pairs if len(texts) != len(logits)]
    if differ:
        raise InputError(
            f"{data} has other numbers of choices in {name_rows(differ, len(predictions.ids))}. Give the data of the "
            "predictions."
        )
    return questions, choices


def submit(
    file: str | Path,
    output: str | Path,
    *,
    template: str | Path | None = None,
    answer_format: str | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
) -> str:
    """`vqa-sft submit`: write a prediction file's submission, and say how. Raises InputError before it writes."""
    predictions = read_predictions(file)
    choices = read_choices(data, predictions)[1] if data else None
    num_choices = [len(row) for row in predictions.choice_logits]
    if template is None:
        style = Style.plain(answer_format or "letter", max(num_choices))
    else:
        style = Style.from_template(template, predictions.ids, num_choices, answer_format, choices)
    check_output(output, style.header, [file, template, data], overwrite)
    write(output, predictions, style, choices)
    like = f", as {template} has them" if template else ""
    return f"Wrote {len(predictions.ids):,} rows to {output}: {', '.join(style.header)} ({style.answer_format}){like}."
