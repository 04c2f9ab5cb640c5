"""Data and answers beside a prediction file: their rows, matched by id and by digest. No torch.

answers.csv  id,label  ->  {"t_1": 1, ...}     read as the run's own data are (`answers` in the file's metadata),
             t_1,2                             unless --columns or --answer-format say otherwise
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqa_sft.data.answers import FORMATS, infer_format
from vqa_sft.data.cells import read_answer, text_of
from vqa_sft.data.columns import USUAL_NAMES, are_here, find_usual
from vqa_sft.data.digests import digests_of
from vqa_sft.data.examples import Loaded, read_examples
from vqa_sft.data.find_columns import find_columns
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.sources import Source, open_source
from vqa_sft.errors import InputError, name_rows, printable
from vqa_sft.predictions.check_file import ANSWERS
from vqa_sft.predictions.file import Predictions, check_same_rows
from vqa_sft.questions.letters import LETTERS

FIXED = ("fixed_question", "fixed_choices")
HINT = f"Give --answer-format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


@dataclass(frozen=True)
class Rows:
    """Rows of a data file by id; `digests` is empty where the file does not say which images they have. `loaded` is
    what they were read from."""

    questions: dict[str, str]
    choices: dict[str, list[str]]
    answers: dict[str, int | None]
    digests: dict[str, str] = field(default_factory=dict)
    loaded: Loaded | None = None

    def check(self, path: str | Path, ids: Sequence[str], digests: Mapping[str, str], name: str | Path) -> None:
        """Raises InputError where `path`, the file of these rows, lacks some of the ids, or has other rows under them;
        `name` is that of the file with the ids and digests."""
        if missing := [row_id for row_id in ids if row_id not in self.choices]:
            raise InputError(f"{path} lacks {name_rows(missing, len(ids))}. Give the data of {name}.")
        check_same_rows(ids, digests, self.digests, [name, path])


def read_rows(path: str | Path, own: Mapping[str, Any] | None, **options: Any) -> Rows:
    """All rows of a data file. `own` says how the run's data write their answers; `options` as in `ReadOptions`."""
    opened = _open(path, options)
    fixed = _fixed(own, options)
    given = _own_columns(opened, own) | (options.pop("columns", None) or {})
    options |= fixed
    given = {key: name for key, name in given.items() if fixed.get(f"fixed_{key}") is None}
    answer_format = options.pop("answer_format", None) or (own or {}).get("format")
    options = {"split": "test"} | options | {"answers": "optional"}
    knows_images = _has_columns(opened, given, fixed)
    given = given if knows_images else {"image": []} | given
    loaded = read_examples(str(path), ReadOptions(columns=given, answer_format=answer_format, **options))
    if twice := loaded.problems.found("duplicate_id"):
        labels = [label for label, _ in twice]
        raise InputError(f"{path} has ids more than once: {name_rows(labels, len(loaded.examples))}.")
    examples = loaded.examples
    ids = examples["id"][:]
    digests = dict(zip(ids, digests_of(examples), strict=True)) if knows_images else {}
    columns = (dict(zip(ids, examples[name][:], strict=True)) for name in ("question", "choices", "answer"))
    questions, choices, answers = columns
    return Rows(questions, choices, answers, digests, loaded)


def read_rows_of(path: str | Path, predictions: Predictions, name: str | Path, **options: Any) -> Rows:
    """As `read_rows`. Raises InputError where the file lacks rows of the predictions, or holds others under their ids;
    `name` is that of the prediction file."""
    rows, ids = read_rows(path, predictions.metadata.get(ANSWERS), **options), predictions.ids
    rows.check(path, ids, predictions.digest_of, name)
    pairs = zip(ids, predictions.choice_logits, strict=True)
    if differ := [row_id for row_id, logits in pairs if max(1, len(rows.choices[row_id])) != len(logits)]:
        raise InputError(
            f"{path} has other numbers of choices in {name_rows(differ, len(ids))}. Give the data of the predictions."
        )
    return rows


def read_answers(
    path: str | Path, predictions: Predictions, name: str | Path, data: str | Path | None = None, **options: Any
) -> dict[str, int]:
    """Answers of the predictions' rows, by id: of a data file, or of one with ids and answers alone.

    The format is that of the run's data, unless `answer_format` is given; `data` holds the choices where answers are
    texts. `name` is that of the prediction file. Raises InputError for answers that are none.
    """
    own, given = predictions.metadata.get(ANSWERS), options.get("columns") or {}
    opened = _open(path, options)
    columns = _own_columns(opened, own) | given
    if _has_columns(opened, {"image": []} | columns, _fixed(own, options)) or {"question", "choices"} & given.keys():
        # Rows that are not predicted do not count.
        found = read_rows_of(path, predictions, name, **options).answers
        if unknown := [row_id for row_id in predictions.ids if found[row_id] is None]:
            raise InputError(
                f"{path}: the answer is none of the row's choices in {name_rows(unknown, len(found))}. {HINT}."
            )
        return {row_id: found[row_id] for row_id in predictions.ids}
    id_name, answer = (columns.get(key) or find_usual(opened.columns, USUAL_NAMES[key]) for key in ("id", "answer"))
    if id_name not in opened.columns or answer not in opened.columns:
        raise InputError(
            f"{path} must have the columns id and answer; found: {printable(', '.join(opened.columns), 400)}. Name "
            "them: --columns '{id: ..., answer: ...}'."
        )
    rows = [(text_of(row[id_name]), text_of(row[answer])) for _, row in opened.rows()]
    cells = dict(rows)
    if len(cells) < len(rows):
        raise InputError(f"{path} has ids more than once: {len(rows)} rows, {len(cells)} ids.")
    choices = read_rows_of(data, predictions, name, **without_columns(options)).choices if data else None
    numbers = dict(zip(predictions.ids, map(len, predictions.choice_logits), strict=True))
    cells = {row_id: cells[row_id] for row_id in predictions.ids if row_id in cells}
    answer_format = options.get("answer_format") or (own or {}).get("format")
    return as_indices(cells, str(path), answer, answer_format, choices, numbers)


def as_indices(
    cells: Mapping[str, str],
    name: str,
    column: str,
    answer_format: str | None,
    choices: Mapping[str, Sequence[str]] | None,
    numbers: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Answers of a file, by id, as indices of their rows' choices; `numbers` says how many these are, where only that
    is known. Without a format, what the cells say. Raises InputError for cells that are no answer."""
    if answer_format == "text" and choices is None:
        raise InputError(
            f"{name}: answers are written as texts in the run's data, and a prediction file holds no choices. Give "
            "--data, the data that were predicted; if these are no texts: --answer-format."
        )
    # Without texts, no cell is one.
    texts = choices or {i: [f"<choice {letter}>" for letter in LETTERS[: (numbers or {}).get(i)]] for i in cells}
    if answer_format is None:
        try:
            answer_format = infer_format((cell, texts[row_id]) for row_id, cell in cells.items())
        except InputError as error:
            raise InputError(f"{name}: {error} Here that is --answer-format.") from error
    found = {row_id: read_answer(cell, texts[row_id], answer_format) for row_id, cell in cells.items()}
    bad = [row_id for row_id, index in found.items() if index is None]
    if bad and answer_format != "text":  # beyond the row's own choices, or none at all?
        beyond = [row_id for row_id in bad if read_answer(cells[row_id], LETTERS, answer_format) is not None]
        if len(beyond) == len(bad):
            raise InputError(
                f"{name}: the answer is none of the row's choices ({answer_format}) in {name_rows(bad, len(found))}."
            )
    if bad:
        raise InputError(
            f"{name}: `{column}` is no {answer_format} in {name_rows(bad, len(found))}, such as "
            f"{printable(repr(cells[bad[0]]), 60)}. {HINT}" + ("." if choices else "; texts need --data as well.")
        )
    return {row_id: index for row_id, index in found.items() if index is not None}


def _open(path: str | Path, options: Mapping[str, Any]) -> Source:
    how = {name: options[name] for name in ("encoding", "config") if options.get(name) is not None}
    return open_source(str(path), split=options.get("split") or "test", **how)


def _own_columns(opened: Source, own: Mapping[str, Any] | None) -> dict[str, str]:
    """The columns of the run's data that this file has too."""
    own = own or {}
    named = {"id": own.get("id"), "answer": own.get("column")} | {key: own.get(key) for key in ("question", "choices")}
    return are_here({key: name for key, name in named.items() if name}, opened.columns)


def _fixed(own: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The question and the choices of every row: as given, else those of the run where no column is given."""
    given = options.get("columns") or {}
    known = {name: (own or {}).get(name) for name in FIXED if name.removeprefix("fixed_") not in given}
    return known | {name: options[name] for name in FIXED if options.get(name) is not None}


def _has_columns(opened: Source, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    try:
        find_columns(opened.columns, given, ReadOptions(answers="optional", **fixed))
    except InputError:
        return False
    return True


def without_columns(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those for the data beside a file that the columns were given for."""
    return {key: value for key, value in options.items() if key not in ("columns", "keep_rows")}
