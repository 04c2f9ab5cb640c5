"""Any source -> canonical `datasets.Dataset`; every bad row named at once. No torch.

    CSV or Hub row                                    canonical example
    id    path       question  a    b    answer      id    images              question  choices       answer
    t_1   img/1.png  What?     cat  dog  b      ->   t_1   [{path, bytes}]     What?     [cat, dog]    1

`images` holds what `datasets.Image(decode=False)` holds, so that nothing is decoded before a worker needs it.
"""

import os
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pandas
from tqdm import tqdm

from vqa_sft.errors import InputError, name_rows
from vqa_sft.images import image_problem
from vqa_sft.mcq import LETTERS

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int64"),
    }
)
IMAGE_COLUMNS = ("path", "image")


@dataclass(frozen=True)
class Columns:
    """Where a source keeps what we need. `image` and `choices` are found by name when they are None.

    `answers_are_upper` says how the source writes its answer letters, so that a submission can write them the same;
    a source without answers leaves it as it was given.
    """

    id: str = "id"
    image: str | None = None
    question: str = "question"
    choices: tuple[str, ...] | None = None
    answer: str = "answer"
    answers_are_upper: bool | None = None

    def found_in(self, names: Sequence[str], answers: str) -> "Columns":
        """These columns with `image` and `choices` filled in from the column names of a source.

        Raises InputError for columns that are missing; `answers` is "required" or "optional".
        """
        image = self.image or next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])
        choices = self.choices or find_choice_columns(names)
        needed = [self.id, image, self.question, *choices] + ([self.answer] if answers == "required" else [])
        missing = [name for name in needed if name not in names]
        if len(choices) > len(LETTERS):
            raise InputError(f"at most {len(LETTERS)} choices have letters; got {len(choices)} choice columns.")
        if len(choices) < 2:
            missing.append("at least two choices (a, b, ...)")
        if missing:
            raise InputError(
                f"missing columns: {', '.join(missing)}; found: {', '.join(names) or 'none'}. Rename them, or name "
                "yours in the recipe (id_column, image_column, question_column, choice_columns, answer_column)."
            )
        return replace(self, image=image, choices=tuple(choices))


def find_choice_columns(names: Sequence[str]) -> list[str]:
    """The longest run of columns a, b, c, ... (or A, B, C, ...) that starts at the first letter."""
    for letters in (string.ascii_lowercase, string.ascii_uppercase):
        found = []
        for letter in letters:
            if letter not in names:
                break
            found.append(letter)
        if found:
            # "x" or "y" may be anything; "d" after "a, b" is a choice.
            beyond = [name for name in names if name in letters[len(found) : len(found) + 3]]
            if beyond:
                raise InputError(
                    f"the choice columns {', '.join([*found, *beyond])} leave letters out. Rename them, or name yours "
                    "in choice_columns."
                )
            return found
    return []


def read_rows(source: str, split: str = "train", config: str | None = None) -> datasets.Dataset:
    """Raw rows of a CSV file, of a dataset saved by `datasets`, or of a Hub dataset (a name or a local copy)."""
    path = Path(source)
    if path.suffix.lower() == ".csv":
        if not path.is_file():
            raise InputError(f"no such file: {source}. Check the path; it is relative to where you launched.")
        return datasets.Dataset.from_pandas(read_csv(path), preserve_index=False)
    if path.is_file():
        raise InputError(f"{source} is not a CSV file. Give a .csv file, a saved dataset or a Hub dataset.")
    try:
        if (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, config, split=split)
    except Exception as error:  # the library raises many kinds here: offline, no such dataset, no such split, ...
        raise InputError(
            f"{source!r} is neither a file, nor a folder with a saved dataset, nor a dataset that could be loaded "
            f"from the Hub (config {config!r}, split {split!r}): {_first_line(error)}"
        ) from error


def read_csv(path: Path) -> pandas.DataFrame:
    """A CSV file, every cell as text. Raises InputError when it is none."""
    try:
        # Everything stays text: "1" is no number, and a choice "None" or "NA" is no missing value.
        options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        header = pandas.read_csv(path, header=None, nrows=1, **options).iloc[0].tolist()
        rows = pandas.read_csv(path, on_bad_lines="error", **options)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except (ValueError, pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise InputError(f"{path} cannot be read as CSV: {_first_line(error)}") from error
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has more than one column {', '.join(map(repr, twice))}. Keep one of each.")
    if not isinstance(rows.index, pandas.RangeIndex):  # pandas then takes the first columns for names of rows
        raise InputError(f"{path} has rows longer than its header. Is a comma in a text that needs quotes?")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise InputError(f"{path} seems to be separated by {';' if ';' in header[0] else 'tabs'}. Save it with commas.")
    return rows


def load_examples(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Columns = Columns(),
    image_root: str | None = None,
    answers: str = "required",
    limit: int | None = None,
    check_images: bool = True,
) -> tuple[datasets.Dataset, Columns]:
    """Canonical examples of a source, checked, and the columns that they came from.

    `answers` is "required" (training) or "optional" (prediction). Picture paths are relative to `image_root` and must
    stay in it; by default it is the folder of the CSV file.

    Raises InputError with every bad row at once: missing columns, answers that are no letter, duplicate ids, pictures
    that are missing or cannot be decoded.
    """
    rows = read_rows(source, split, config)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        raise InputError(f"{source} has no rows.")
    columns = columns.found_in(rows.column_names, answers)
    problems = Problems(total=len(rows))
    texts = _read_texts(rows, columns, answers, problems)
    columns = replace(columns, answers_are_upper=_answers_are_upper(rows, columns))
    root = Path(image_root or (Path(source).parent if Path(source).is_file() else ".")).resolve()
    images = _read_images(rows, columns.image, root, texts["id"], problems)
    features = datasets.Features({name: FEATURES[name] for name in texts})
    examples = datasets.concatenate_datasets([datasets.Dataset.from_dict(texts, features=features), images], axis=1)
    if check_images:
        find_bad_images(examples, problems)
    problems.raise_if_any(source)
    return examples, columns


class Problems:
    """What is wrong with which rows; collected first, raised together."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.rows: dict[str, list[str]] = {}

    def add(self, kind: str, row_id: str) -> None:
        self.rows.setdefault(kind, []).append(row_id)

    def raise_if_any(self, source: str) -> None:
        if not self.rows:
            return
        lines = [f"{kind}: {name_rows(ids, self.total)}" for kind, ids in self.rows.items()]
        raise InputError("\n  ".join([f"{source} has rows that cannot be used:", *lines, "Mend or remove them."]))


def _read_texts(rows: datasets.Dataset, columns: Columns, answers: str, problems: Problems) -> dict[str, list]:
    names = [columns.id, columns.question, *columns.choices]
    has_answers = columns.answer in rows.column_names
    texts: dict[str, list] = {"id": [], "question": [], "choices": [], "answer": []}
    for row in rows.select_columns(names + [columns.answer] * has_answers):
        row_id = _text(row[columns.id])
        cells = [_text(row[name]) for name in columns.choices]
        choices = [cell for cell in cells if cell]
        if cells[: len(choices)] != choices:
            problems.add("an empty choice before a filled one", row_id)
        if len(choices) < 2:
            problems.add("fewer than two choices", row_id)
        elif len(set(choices)) == 1:
            problems.add("all choices are equal", row_id)
        if not row_id:
            problems.add(f"`{columns.id}` is empty", "(empty)")
        if not _text(row[columns.question]):
            problems.add(f"`{columns.question}` is empty", row_id)
        answer, problem = _read_answer(row.get(columns.answer), columns, len(choices), answers)
        if problem:
            problems.add(problem, f"{row_id} ({_text(row.get(columns.answer))!r})")
        texts["id"].append(row_id)
        texts["question"].append(_text(row[columns.question]))
        texts["choices"].append(choices)
        texts["answer"].append(answer)
    for row_id, count in Counter(texts["id"]).items():
        if count > 1:
            problems.add(f"duplicate `{columns.id}`", row_id or "(empty)")
    return texts


def _read_answer(cell: object, columns: Columns, num_choices: int, answers: str) -> tuple[int | None, str | None]:
    """The index of the right choice, or what is wrong with the cell. Letters count in either case."""
    letters = list(LETTERS[:num_choices].lower())
    answer = _text(cell).lower()
    if answer in letters:
        return letters.index(answer), None
    if not answer and answers == "optional":
        return None, None
    return None, f"`{columns.answer}` must be one of {', '.join(letters)}; got another"


def _answers_are_upper(rows: datasets.Dataset, columns: Columns) -> bool:
    """As in the answers, where there are some; else as given; else as in the names of the choice columns."""
    cells = [_text(cell) for cell in rows[columns.answer]] if columns.answer in rows.column_names else []
    if any(cells):
        return any(cell.isupper() for cell in cells)
    return columns.choices[0].isupper() if columns.answers_are_upper is None else columns.answers_are_upper


def _text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_images(
    rows: datasets.Dataset, column: str, root: Path, ids: Sequence[str], problems: Problems
) -> datasets.Dataset:
    """The column `images`: one {bytes, path} a picture, whatever the source holds (paths, bytes, the Image feature)."""
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    cells = rows.select_columns([column])
    if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        if not isinstance(rows.features[column], datasets.Image):
            raise InputError(
                f"the column {column!r} must hold paths or pictures (the Image feature); got {rows.features[column]}."
            )
        features = datasets.Features({"images": FEATURES["images"]})
        missing = [row_id for row_id, row in zip(ids, cells, strict=True) if row[column] is None]
        for row_id in missing:
            problems.add("picture is missing", row_id)
        empty = {"bytes": None, "path": None}
        return cells.map(lambda row: {"images": [row[column] or empty]}, remove_columns=[column], features=features)
    images = []
    for row_id, cell in zip(ids, cells[column], strict=True):
        path = Path(os.path.abspath(root / _text(cell)))
        if not path.is_relative_to(root):
            problems.add(f"`{column}` leads out of the picture folder (set image_root to allow another)", row_id)
        images.append([{"bytes": None, "path": str(path)}])
    return datasets.Dataset.from_dict({"images": images}, features=datasets.Features({"images": FEATURES["images"]}))


def find_bad_images(examples: datasets.Dataset, problems: Problems) -> None:
    """Decode every picture once, on all cores, so that the first bad one does not stop a run hours later."""
    # Pillow releases the GIL while it decodes, so threads are enough; a bounded window keeps memory flat.
    with ThreadPoolExecutor() as pool:
        checks = pool.map(_check_example, _in_chunks(examples, 256))
        with tqdm(total=len(examples), desc="Checking pictures", disable=None) as bar:
            for found in checks:
                for kind, row_id in found:
                    problems.add(kind, row_id)
                bar.update(min(256, bar.total - bar.n))


def _in_chunks(examples: datasets.Dataset, size: int) -> Iterator[tuple[datasets.Dataset, int, int]]:
    for start in range(0, len(examples), size):
        yield examples, start, min(start + size, len(examples))


def _check_example(chunk: tuple[datasets.Dataset, int, int]) -> list[tuple[str, str]]:
    examples, start, stop = chunk
    found = []
    for i in range(start, stop):
        row = examples[i]
        for image in row["images"]:
            problem = image_problem(image)
            if problem:
                found.append((problem, row["id"]))
    return found
