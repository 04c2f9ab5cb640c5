"""Raw rows of any source: text files, Parquet, what `datasets` saved, the Hub. No torch.

Every cell of a CSV or TSV file stays text: "1" is no number, and a choice "None" or "NA" is no missing value. Text
files are read as streams, whatever their size; Parquet and Hub datasets are held on disk by `datasets`, in Arrow.
"""

import codecs
import contextlib
import csv
import glob
import io
import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import charset_normalizer
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from vqa_sft.data.columns import USUAL_NAMES, find_usual
from vqa_sft.errors import InputError, explains, name_rows, printable

FORMATS = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".parquet": "Parquet"}
# What people give in place of data, and the command that makes data of it.
PACKED = {".gz": "gunzip -k", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zst": "unzstd", ".zip": "unzip", ".7z": "7z x"}
PACKED |= dict.fromkeys((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"), "tar -xf")
SHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
# What one cell and one row may take: an image in base64 fits, a quote that never closes ends soon.
MAX_CELL = 16 * 2**20
MAX_ROW = 64 * 2**20
MAX_JSON_LIST = 256 * 2**20  # bytes of a file that has to be read as a whole
_CHUNK = 2**20
_BATCH = 1_000
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class Source:
    """An opened source. `notes` are facts to tell the user once.

    `table` holds the rows of Parquet, saved and Hub datasets, in the order of `rows()`, images undecoded; it is None
    for text files. `num_rows` is None where it is not known before the rows are read: text files, streams.
    """

    name: str
    columns: list[str]
    notes: list[str]
    num_rows: int | None
    table: datasets.Dataset | datasets.IterableDataset | None
    read: Callable[[], Iterator[tuple[str | None, dict]]]

    def rows(self) -> Iterator[tuple[str | None, dict]]:
        """(folder of its file, row) of every row, from the start at every call; None for what is no file.

        Rows of a `table` come without their images. Raises InputError at the first row that cannot be read, once it
        has found the others of its file.
        """
        return self.read()

    @property
    def features(self) -> datasets.Features | None:
        """Types of the columns, with the names of class labels; None for text files."""
        return None if self.table is None else self.table.features


def open_source(
    source: str | Sequence[str],
    *,
    split: str = "train",
    config: str | Sequence[str] | None = None,
    encoding: str | None = None,
    streaming: bool = False,
) -> Source:
    """A file, several of one format (a list, a glob), a folder of `datasets`, or a Hub dataset.

    `split` and `config` are for the last two; the rows of several configs come one after the other. `encoding` is
    detected when it is None. With `streaming` nothing is downloaded or copied as a whole.
    """
    names = [source] if isinstance(source, str) else list(source)
    if not names or not all(names):
        raise InputError("no data is named. Give a file, a folder or a Hub dataset.")
    files = find_files(names)
    name = names[0] if len(names) == 1 else _name_files(files)
    if not files:
        return _open_dataset(name, split, config, streaming)
    if files[0].suffix.lower() == ".parquet":
        return _open_parquet(name, files, streaming)
    opened = _open_texts(name, files, encoding)
    if len(names) == 1 and Path(name).is_dir():
        opened.notes.insert(0, f"{name}: the one file of data in it is {files[0].name}")
    return opened


def find_files(names: Sequence[str]) -> list[Path]:
    """The files that paths and globs name, those of a glob sorted; empty for a folder or a Hub dataset."""
    files = []
    for name in names:
        if "\0" in str(name):
            raise InputError(f"the name {str(name)!r} holds a null byte. Check the recipe.")
        path = Path(name)
        if path.is_dir() and len(names) == 1:
            files += _find_in_folder(path)
        elif any(mark in name for mark in "*?[") and not path.exists():
            found = sorted(found for found in map(Path, glob.glob(name, recursive=True)) if found.is_file())
            if not found:
                raise InputError(f"no file matches {name}. Check the path; it is relative to where you launched.")
            files += found
        elif path.is_file():
            files.append(path)
        elif path.suffix.lower() in FORMATS and not path.is_dir():
            raise InputError(f"no such file: {name}. {_name_likely(path)}")
        elif len(names) > 1:
            raise InputError(f"{name} is no file. A list of sources may hold files and globs only.")
    for path in files:
        if path.suffix.lower() not in FORMATS:
            raise InputError(
                _describe_packed(path)
                or f"{path} is not a CSV file, nor TSV, JSONL, JSON or Parquet. Give such a file, a folder saved by "
                "`datasets`, or a Hub dataset."
            )
        if path.stat().st_size == 0:
            raise InputError(f"{path} cannot be read as {FORMATS[path.suffix.lower()]}: it is empty.")
        with path.open("rb") as file:
            head = file.read(200).lstrip().lower()
        if head.startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a pointer of Git LFS, not the data. Fetch them: git lfs pull.")
        if head.startswith((b"<!doctype", b"<html")):
            raise InputError(f"{path} is a page of the web, not the data. Download the file itself.")
    suffixes = sorted({path.suffix.lower() for path in files})
    if len(suffixes) > 1:
        raise InputError(f"the files must have one format; got {', '.join(suffixes)}. Convert some of them.")
    return files


def _find_in_folder(folder: Path) -> list[Path]:
    """The one text file of data in a folder; empty for a folder that `datasets` reads itself."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in FORMATS and path.is_file())
    card = folder / "README.md"  # of a local copy of a Hub dataset, which knows its files
    is_dataset = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    is_dataset = is_dataset or card.is_file() and card.read_bytes().startswith(b"---")
    if is_dataset or {path.suffix.lower() for path in found} == {".parquet"}:
        return []
    if len(found) > 1:
        named = ", ".join(printable(path.name) for path in found[:10]) + (", ..." if len(found) > 10 else "")
        raise InputError(f"{folder} is a folder with {len(found)} files of data: {named}. Name the one that you mean.")
    return found


def _describe_packed(path: Path) -> str | None:
    """Of an archive and of a spreadsheet, what makes data of it; None for other files."""
    ends = [end for end in sorted(PACKED, key=len, reverse=True) if path.name.lower().endswith(end)]
    if ends:
        return f"{path} is packed. Unpack it and name the file inside: {PACKED[ends[0]]} {shlex.quote(str(path))}"
    if path.suffix.lower() in SHEETS:
        return f"{path} is a spreadsheet. Save it as CSV (UTF-8) and name that."
    return None


def _name_likely(path: Path) -> str:
    """What may be meant by a file that is not there: its name in another case, format or archive."""
    try:
        others = sorted(path.parent.iterdir())
    except OSError:
        others = []
    for other in others:
        is_alike = other.name.casefold().startswith(f"{path.stem.casefold()}.")
        if is_alike and other.suffix.lower() in (*FORMATS, *PACKED, *SHEETS):
            return _describe_packed(other) or f"There is {other}."
    return "Check the path; it is relative to where you launched."


def _name_files(files: Sequence[Path]) -> str:
    return f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])


def _check_columns(files: Sequence[Path], columns: Sequence[Sequence[str]]) -> None:
    """Raises InputError for columns that stand twice in a file, and for files that differ."""
    for path, names in zip(files, columns, strict=True):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError(f"{path} has more than one column {_quote(twice)}. Keep one of each.")
        differences = {"has": sorted({*names} - {*columns[0]}), "lacks": sorted({*columns[0]} - {*names})}
        said = [f"{word} {_quote(found)}" for word, found in differences.items() if found]
        if said:
            raise InputError(f"{path} {' and '.join(said)}, unlike {files[0]}. Files read together need one header.")


def _quote(names: Sequence[str]) -> str:
    return printable(", ".join(map(repr, names[:50])), 500)


# --- Text files -------------------------------------------------------------------------------------------------------


def _open_texts(name: str, files: list[Path], encoding: str | None) -> Source:
    facts: dict[str, list[Path]] = {}
    readers, columns = [], []
    for path in files:
        found = find_encoding(path, encoding)
        if found not in ("utf-8", encoding):
            facts.setdefault(f"{found.upper()} text", []).append(path)
        if path.suffix.lower() in (".csv", ".tsv"):
            usual = "," if path.suffix.lower() == ".csv" else "\t"
            separator = _find_separator(path, found, usual)
            if separator != usual:
                facts.setdefault(f"separated by {_SEPARATORS[separator]}", []).append(path)
            readers.append(partial(_read_csv, path, found, separator))
            columns.append(_read_header(path, found, separator))
        else:
            read, assumed = _open_json(path, found)
            if assumed:
                facts.setdefault(assumed, []).append(path)
            readers.append(partial(_read_json, path, read))
            # Keys may first come in the last row, so all rows are read; the check of every line comes with it.
            columns.append(list(dict.fromkeys(key for row in readers[-1]() for key in row)))
            if not columns[-1]:
                raise InputError(f"{path} has no rows.")
    _check_columns(files, columns)
    notes = [f"{_name_files(paths)}: {fact}" for fact, paths in facts.items()]
    folders = [str(path.parent) for path in files]
    return Source(name, columns[0], notes, None, None, partial(_read_files, folders, readers, columns[0]))


def _read_files(
    folders: list[str], readers: list[Callable[[], Iterator[dict]]], columns: list[str]
) -> Iterator[tuple[str, dict]]:
    """Every row with all columns in the order of the first file; a key that a JSON object lacks gives None."""
    empty = dict.fromkeys(columns)
    for folder, read in zip(folders, readers, strict=True):
        for row in read():
            yield folder, empty | row


class _Lines:
    """The lines of a text file. `held` counts the characters of the row at hand: its reader sets it back to 0."""

    def __init__(self, path: Path, encoding: str) -> None:
        self.path, self.encoding = path, encoding
        self.held = 0

    def __iter__(self) -> Iterator[str]:
        with _open_text(self.path, self.encoding) as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_ROW), ""), 1):
                self.held += len(line)
                if self.held >= MAX_ROW:
                    raise InputError(
                        f"{self.path}: the row that ends on line {number} or later is larger than {MAX_ROW // 2**20} "
                        "MiB. Is it a text file, with line breaks and closed quotes?"
                    )
                yield line


def _open_text(path: Path, encoding: str) -> TextIO:
    """The file, without a byte order mark and with its own line ends, as `csv` wants it."""
    file = path.open(encoding=encoding, newline="")
    if file.read(1) != "\ufeff":
        file.seek(0)
    return file


def _find_separator(path: Path, encoding: str, usual: str) -> str:
    """The mark that separates most names of the header; spreadsheets in Europe write semicolons into a .csv."""
    header = next((line for line in _Lines(path, encoding) if line.strip()), "")
    return max([usual, *_SEPARATORS], key=header.count)  # the first of equals


def _read_header(path: Path, encoding: str, separator: str) -> list[str]:
    line, header = next(_read_cells(path, encoding, separator), (0, []))
    if not header:
        raise InputError(f"{path} cannot be read as {FORMATS[path.suffix.lower()]}: it is empty.")
    names = [cell.strip() for cell in header]
    if "" in names:
        raise InputError(
            f"{path}: column {names.index('') + 1} has no name (line {line}). Name it or remove it; pandas writes such "
            "a column for its index unless told index=False."
        )
    return names


def _read_csv(path: Path, encoding: str, separator: str) -> Iterator[dict]:
    names = _read_header(path, encoding, separator)
    bad, sizes, total = [], set(), 0
    for line, cells in itertools.islice(_read_cells(path, encoding, separator), 1, None):
        total += 1
        if len(cells) != len(names):
            bad.append(f"on line {line} ({len(cells)} cells)")
            sizes.add("longer" if len(cells) > len(names) else "shorter")
        elif not bad:
            yield dict(zip(names, cells, strict=True))
    if bad:
        raise InputError(
            f"{path} has rows {' and '.join(sorted(sizes))} than its header ({len(names)} cells): "
            f"{name_rows(bad, total)}. Is a comma or a line break in a text that needs quotes?"
        )


def _read_cells(path: Path, encoding: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of the header and every row; blank lines are none."""
    csv.field_size_limit(MAX_CELL)  # of the whole process
    lines = _Lines(path, encoding)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    line = 1
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield line, cells
            line = reader.line_num + 1
            lines.held = 0
    except csv.Error as error:
        raise InputError(
            f"{path} cannot be read as {FORMATS[path.suffix.lower()]}: {error}, in the row that begins on line {line}. "
            "Is a quote never closed, or one inside a text not doubled?"
        ) from error


def _open_json(path: Path, encoding: str) -> tuple[Callable[[], Iterator[tuple[str, object]]], str | None]:
    """What reads (place, value) of the rows of a file with one JSON object a line, or with one JSON value, whatever its
    suffix says; and what had to be assumed."""
    is_list = path.suffix.lower() == ".json"
    if _is_json_lines(path, encoding):
        return partial(_json_lines, path, encoding), "one JSON object a line" if is_list else None
    _, assumed = _parse_rows(path, encoding)
    return partial(_json_rows, path, encoding), assumed


def _is_json_lines(path: Path, encoding: str) -> bool:
    """Whether the first line is a JSON value and others follow, or where it is damaged, the second is an object. One
    line alone is a row in a file of JSON lines, and may be more in another."""
    with _open_text(path, encoding) as file:
        lines = (line for line in iter(partial(file.readline, MAX_ROW), "") if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if not second:
        return path.suffix.lower() != ".json" and not first.lstrip().startswith("[")
    if first.lstrip().startswith("["):
        return _is_json(first)
    return _is_json(first) or (second.startswith("{") and _is_json(second))


def _is_json(text: str) -> bool:
    try:
        _parse_json(text)
    except ValueError:
        return False
    return True


def _read_json(path: Path, read: Callable[[], Iterator[tuple[str, object]]]) -> Iterator[dict]:
    bad, total = [], 0
    for label, value in read():
        total += 1
        if not isinstance(value, dict):
            bad.append(f"{label} ({value if isinstance(value, ValueError) else type(value).__name__})")
        elif not bad:
            yield value
    if bad:
        raise InputError(
            f"{path} has rows that are no JSON objects: {name_rows(bad, total)}. "
            'Write one object a line, as {"id": "1", ...}.'
        )


def _json_lines(path: Path, encoding: str) -> Iterator[tuple[str, object]]:
    """(place, value or what is wrong with it) of every line that is not blank."""
    lines = _Lines(path, encoding)
    for number, line in enumerate(lines, 1):
        lines.held = 0
        if not line.strip():
            continue
        try:
            value = _parse_json(line)
        except json.JSONDecodeError as error:
            value = ValueError(f"{error.msg} at character {error.pos + 1}")
        except ValueError as error:
            value = error
        yield f"on line {number}", value


def _json_rows(path: Path, encoding: str) -> Iterator[tuple[str, object]]:
    """(place, value) of every row of a file that is one JSON value."""
    yield from _parse_rows(path, encoding)[0]


def _parse_rows(path: Path, encoding: str) -> tuple[list[tuple[str, object]], str | None]:
    """(place, value) of every row of a file that is one JSON value, and what was assumed of its shape. Raises
    InputError when it is no JSON, and where its shape says not which are the rows."""
    if path.stat().st_size > MAX_JSON_LIST:
        raise InputError(
            f"{path} is one JSON value of more than {MAX_JSON_LIST // 2**20} MiB, which is too large to be read as a "
            "whole. Write it as JSONL: one object a line."
        )
    with _open_text(path, encoding) as file, explains(ValueError, f"{path} cannot be read as JSON"):
        value = _parse_json(file.read())
    said = []
    columns = _find_columns(value) if isinstance(value, dict) else None
    key = _find_container(path, value) if isinstance(value, dict) and columns is None else None
    if key is not None:
        others = [name for name in value if name != key]
        said.append(f"rows are those under {key!r}" + (f", without {_quote(others)}" if others else ""))
        value = value[key]
    elif isinstance(value, list) and path.suffix.lower() != ".json":
        said.append("one JSON list")
    if not isinstance(value, dict):
        rows = [(f"number {i}", row) for i, row in enumerate(value if isinstance(value, list) else [value])]
    elif columns is not None:
        said.append("one JSON object of columns")
        rows = [(f"number {i}", dict(zip(value, cells, strict=True))) for i, cells in enumerate(columns)]
    elif _is_keyed(value):
        ids, how = _choose_ids(value)
        said.append(how)
        rows = [(f"under {printable(key)!r}", row) for key, row in ids]
    else:
        said.append("one JSON object, read as one row")
        rows = [("number 0", value)] if value else []
    return rows, "; ".join(said) or None


def _find_container(path: Path, value: dict) -> str | None:
    """The key of an object under which its rows are: a list of objects, or an object of nothing but objects. Raises
    InputError where there are several, and where the object may as well be a row."""
    found = [
        key
        for key, held in value.items()
        if held and not _is_usual(key, "choices") and isinstance(held, list | dict) and _are_objects(held)
    ]
    if found and _is_row(value):
        raise InputError(
            f"{path} is one JSON object that may be one row, or hold its rows under {_quote(found)}. Save what you "
            "mean as a list of objects."
        )
    if len(found) > 1:
        raise InputError(
            f"{path} is one JSON object that may hold its rows under each of {_quote(found)}. Save those that you mean "
            "in a file of their own."
        )
    return found[0] if found else None


def _are_objects(held: list | dict) -> bool:
    return all(isinstance(item, dict) for item in (held.values() if isinstance(held, dict) else held))


def _find_columns(value: dict) -> list[tuple] | None:
    """The rows of an object of columns, each a list or an object of as many cells, as pandas writes it; None for any
    other."""
    columns = [list(held.values()) if isinstance(held, dict) else held for held in value.values()]
    if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
        return None
    texts = [column for key, column in zip(value, columns, strict=True) if _is_usual(key, "question")]
    keys = {tuple(held) for held in value.values() if isinstance(held, dict)}
    is_text = any(column and isinstance(column[0], str) for column in texts)
    return list(zip(*columns, strict=True)) if is_text and len(keys) <= 1 else None


def _is_keyed(value: dict) -> bool:
    """Whether an object looks like rows under their ids: most of its values are objects, and it is no row itself."""
    return 2 * sum(isinstance(row, dict) for row in value.values()) > len(value) and not _is_row(value)


def _is_row(value: dict) -> bool:
    return any(isinstance(held, str) and _is_usual(key, "question") for key, held in value.items())


def _is_usual(name: str, role: str) -> bool:
    return find_usual([name], USUAL_NAMES[role]) is not None


def _choose_ids(value: dict) -> tuple[list[tuple[str, object]], str]:
    """(key, row) of an object of rows, each with an id: its own where each has another, else the key."""
    rows = [row for row in value.values() if isinstance(row, dict)]
    name = find_usual(list(dict.fromkeys(itertools.chain.from_iterable(rows))), USUAL_NAMES["id"])
    own = [str(row[name]) for row in rows if row.get(name) is not None]
    how = "one JSON object with a row under each key"
    if len({*own}) == len(rows):
        differ = own != [key for key, row in value.items() if isinstance(row, dict)]
        return list(value.items()), f"{how}, which is not its {name!r}: ids are the latter" if differ else how
    named = [(key, row | {"id": key} if isinstance(row, dict) else row) for key, row in value.items()]
    return named, f"{how}, which is its id" + (f", as not every row has a {name!r} of its own" if name else "")


def _parse_json(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write null")


# --- Encodings --------------------------------------------------------------------------------------------------------

# What a text may be that is neither UTF-8 nor surely Korean. Of several that read it alike the first is named.
ENCODINGS = (
    *("cp949", "gb18030", "cp950", "cp932", "euc_jp", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255"),
    *("cp1256", "cp1257", "cp1258", "cp874", "koi8_r", "iso8859_2", "iso8859_5", "cp866", "cp850", "mac_roman"),
)
# Those of which charset-normalizer can be believed where it is sure. The alphabets of one byte a letter differ in few
# letters (a Polish text reads well as Turkish), so that they are always asked for.
_BELIEVED = ("gb18030", "cp950", "cp932", "euc_jp")
_MIN_KINDS = 50  # different letters in a text that charset-normalizer is believed of
# Common syllables of Korean: about 0.7 of those of any text, and under 0.2 of what other encodings read as in CP949.
_COMMON = (
    "이다는의에을가고기지하은로서한를시도사자리어정인대나해아그라과수보주부들있전장일제것구동으성상원신만조마"
    "여유우게스비안니선면연물거오중소경미무영공적발세모생화양진학용방개위년문분교계관러실음내국요없말때당행까"
    "터두너람와반색슨엇몇명왼쪽른강산차집호저회재입단간트달본외심민김박남북운건노빨파란초록검흰갈큰작더많높낮"
    "길알답각식품목습합할션않옵값함드력름치형되데버업바프표설출령크패변된야블번디료환열키테렉메필십했려"
)
_COMMON_SYLLABLES = [ord(syllable) for syllable in _COMMON]
_SYLLABLES = [ord(bytes((first, last)).decode("cp949")) for first in range(0xB0, 0xC9) for last in range(0xA1, 0xFF)]
_SAMPLE = 2**16  # bytes that are shown to charset-normalizer


def find_encoding(path: Path, encoding: str | None = None) -> str:
    """The encoding in which the whole file is text: the given one, else UTF-8, UTF-16, or what it surely is in another
    encoding of Korean, Chinese or Japanese. Raises InputError where that is not sure, with what it may be, and for a
    text that holds a null byte."""
    if encoding is not None:
        with explains((LookupError, ValueError), f"encoding {encoding!r} is not known"):
            io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        found = _first_undecodable(path, encoding)
        if found is not None:
            raise InputError(
                f"{path} is not {encoding} text (byte {found:,}). Set another `encoding`, or save it as UTF-8."
            )
        return encoding
    with path.open("rb") as file:
        expected, is_marked = _find_unicode(file.read(2**16))
    offset = _first_undecodable(path, expected)
    if offset is None:
        return expected
    problem = f"{path} is not {expected.upper()} text (byte {offset:,})"
    lines = [] if is_marked else _sample_lines(path)
    sample = b"\n".join(lines)
    damaged = sample.decode("utf-8", "replace")
    if is_marked or 2 * damaged.count("\ufffd") < sum(char > "\x7f" for char in damaged):  # mostly UTF-8
        raise InputError(f"{problem}: the file is damaged there. Save it as UTF-8, or set `encoding`.")
    if _first_undecodable(path, "cp949") is None and _is_korean(_count_file(path, "cp949")):
        return "cp949"
    candidates, sure = _rank_encodings(sample)
    # Files in two encodings that were put together are neither.
    some_korean = any(_is_korean(_count_letters(line.decode("cp949", "ignore"))) for line in lines)
    if sure is not None and not some_korean and _first_undecodable(path, sure) is None:
        return sure
    readings: dict[str, str] = {}
    for candidate in [*candidates[:4], "cp949", *_BELIEVED, "cp1252"]:  # the commonest in any case
        with contextlib.suppress(UnicodeDecodeError):
            readings.setdefault(sample.decode(candidate), candidate)
    shown = "; ".join(f"{name} reads {_show_letters(text)!r}" for text, name in readings.items())
    hint = f" to the one that reads right: {shown}. Or save it as UTF-8." if shown else ", or save it as UTF-8."
    raise InputError(f"{problem}, and what it is instead is not sure. Set `encoding`{hint}")


def _find_unicode(head: bytes) -> tuple[str, bool]:
    """UTF-8, or the UTF-16 that a file begins as; and whether it is certain to be that."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16", True
    # Without a mark: a line break and some ASCII, which without their null bytes no other encoding reads as such.
    for encoding in ("utf-16-le", "utf-16-be"):
        text = head.decode(encoding, "ignore")
        if re.search("[\r\n]", text) and len(re.findall("[ -~]", text)) > len(text) / 20:
            return encoding, True
    return "utf-8", head.startswith(codecs.BOM_UTF8)


def _first_undecodable(path: Path, encoding: str) -> int | None:
    """The offset of the first byte that is no text; None when all are. Raises InputError for a null byte."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, offset = 1, 0
    with path.open("rb") as file:
        for chunk in itertools.chain(iter(partial(file.read, _CHUNK), b""), [b""]):
            offset += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:  # its object begins with what was left of the chunk before
                return offset - len(error.object) + error.start
            except UnicodeError:  # UTF-16 without a mark
                return 0
            if "\0" in text:
                line += text[: text.index("\0")].count("\n")
                raise InputError(
                    f"{path} holds a null byte on line {line}. The file is damaged, or UTF-16: then set its `encoding`."
                )
            if any(mark in text for mark in ("\x1b$", "\x1b(")):
                raise InputError(
                    f"{path} holds the shifts of ISO-2022 (Japanese or Korean mail). Set `encoding: iso2022_jp` (or "
                    "iso2022_kr), or save it as UTF-8."
                )
            line += text.count("\n")
    return None


def _count_file(path: Path, encoding: str) -> np.ndarray:
    with path.open(encoding=encoding, newline="") as file:
        return sum(map(_count_letters, iter(partial(file.read, _CHUNK), "")))


def _count_letters(text: str) -> np.ndarray:
    """How often each character of a text without rare ones comes, by its number."""
    return np.bincount(np.frombuffer(text.encode("utf-16-le"), "<u2"), minlength=2**16)


def _is_korean(counts: np.ndarray) -> bool:
    """Whether what could be decoded as CP949 is Korean: made of the 2,350 syllables that have a block of their own,
    many of them common ones. Others decode as rare syllables, Chinese characters and signs."""
    letters, common = counts[0x3400:0xD7A4].sum(), counts[_COMMON_SYLLABLES]
    return bool(
        counts[_SYLLABLES].sum() >= 0.95 * letters
        and np.count_nonzero(common) >= 6
        and common.sum() >= 0.4 * counts[0x80:].sum()
    )


def _sample_lines(path: Path) -> list[bytes]:
    """Lines of all parts of the file that are not ASCII, each once, cut where they are long."""
    room = max(1_000, _SAMPLE * _CHUNK // path.stat().st_size)  # of each part
    sample: dict[bytes, None] = {}
    with path.open("rb") as file:
        for i, chunk in enumerate(iter(partial(file.read, _CHUNK), b"")):
            lines = re.split(b"[\r\n]+", chunk)
            # A line that two parts share is cut anywhere.
            lines = lines[int(i > 0) : len(lines) - int(len(lines) > 1 and len(chunk) == _CHUNK)]
            held = 0
            for line in lines:
                if not line.isascii() and held < room:
                    sample[_cut(line)] = None
                    held += min(len(line), 2_000)
    return list(sample)


def _show_letters(text: str) -> str:
    """The first characters that are not ASCII, with what stands around them."""
    start = re.search("[^\0-\x7f]", text).start()
    return text[max(0, start - 10) :].splitlines()[0][:30].strip() if start < 10 else text[start - 10 : start + 20]


def _cut(line: bytes) -> bytes:
    """A line of at most 2,000 bytes; of a longer one those from the first that is not ASCII, cut where no letter is."""
    if len(line) <= 2_000:
        return line
    start = re.search(rb"[\x80-\xff]", line).start()
    piece = line[start : start + 2_000]
    return piece[: max(map(piece.rfind, (b" ", b",", b'"')))] if len(piece) == 2_000 else piece


def _rank_encodings(sample: bytes) -> tuple[list[str], str | None]:
    """What charset-normalizer finds that the text may be, likeliest first; and what it surely is, if anything."""
    found = list(charset_normalizer.from_bytes(sample, steps=20, cp_isolation=list(ENCODINGS)))
    candidates = []
    for match in found:
        candidates += sorted({*match.could_be_from_charset} & {*ENCODINGS}, key=ENCODINGS.index)
    if not found or found[0].encoding not in _BELIEVED or len({*str(found[0])} - {*map(chr, range(128))}) < _MIN_KINDS:
        return candidates, None
    is_sure = found[0].chaos < 0.02 and all(match.chaos >= found[0].chaos + 0.1 for match in found[1:])
    return candidates, found[0].encoding if is_sure else None


# --- Arrow ------------------------------------------------------------------------------------------------------------


def _open_parquet(name: str, files: list[Path], streaming: bool) -> Source:
    columns, folders = [], []
    for path in files:
        with explains((pa.ArrowException, OSError), f"{path} cannot be read as Parquet"):
            metadata = pa.parquet.read_metadata(path)
        columns.append(metadata.schema.to_arrow_schema().names)
        folders.append((str(path.parent), metadata.num_rows))
    _check_columns(files, columns)
    # `datasets` takes names for globs.
    options = {"data_files": [glob.escape(str(path)) for path in files], "split": "train", "streaming": streaming}
    try:
        table = datasets.load_dataset("parquet", **options)
    except Exception as error:  # what is wrong with the pages of a file comes wrapped
        raise InputError(f"{name} cannot be read as Parquet: {_describe(error)}") from error
    return _open_table(name, table, [], folders)


def _open_dataset(name: str, split: str, config: str | Sequence[str] | None, streaming: bool) -> Source:
    """A dataset saved by `datasets`, or one of the Hub: its name or the folder of a local copy."""
    path = Path(name)
    configs = [config] if config is None or isinstance(config, str) else list(config)
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            table = _load_saved(path, split)
            table = table.to_iterable_dataset() if streaming else table
        else:
            parts = [datasets.load_dataset(name, part, split=split, streaming=streaming) for part in configs]
            table = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except Exception as error:  # the library raises many kinds here: offline, no such dataset, no such split, ...
        raise InputError(
            f"{name!r} is neither a file, nor a folder with a saved dataset, nor a dataset that could be loaded "
            f"from the Hub (config {config!r}, split {split!r}): {_describe(error)}"
        ) from error
    notes = []
    if table.info.builder_name == "csv":
        guesses = "`datasets`, which guesses the types of cells (007 is 7, NA is empty); name the files instead"
        notes.append(f"{name}: CSV files read by {guesses}")
    return _open_table(name, table, notes, [])


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    table = datasets.load_from_disk(str(path))
    if isinstance(table, datasets.Dataset):
        return table
    missing = [part for part in split.split("+") if part not in table]
    if missing:
        raise ValueError(f"it has no split {', '.join(missing)}, but {', '.join(table)}")
    return datasets.concatenate_datasets([table[part] for part in split.split("+")])


def _open_table(
    name: str,
    table: datasets.Dataset | datasets.IterableDataset,
    notes: list[str],
    folders: list[tuple[str, int]],
) -> Source:
    """`folders` says of how many rows each is the folder; empty for what are no files."""
    features = datasets.Features({column: _undecoded(feature) for column, feature in table.features.items()})
    if isinstance(table, datasets.Dataset):
        # As `cast` would, which copies lists of images to the cache; also without the format that it was saved with.
        info = table.info.copy()
        info.features = features
        table = datasets.Dataset(table.data, info=info, split=table.split)
    elif features != table.features:
        table = table.cast(features)
    num_rows = len(table) if isinstance(table, datasets.Dataset) else None
    read = partial(_read_table, name, table, folders)
    return Source(name, list(table.features), notes, num_rows, table, read)


def _undecoded(feature: object) -> object:
    """The same type, with images as {bytes, path}."""
    if isinstance(feature, datasets.Image):
        return replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return feature


def holds_images(feature: object) -> bool:
    """Whether a column holds images themselves, one or a list of them, and not paths."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return holds_images(feature.feature)
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _read_table(
    name: str, table: datasets.Dataset | datasets.IterableDataset, folders: list[tuple[str, int]]
) -> Iterator[tuple[str | None, dict]]:
    of_rows = itertools.chain(*itertools.starmap(itertools.repeat, folders), itertools.repeat(None))
    texts = [column for column, feature in table.features.items() if not holds_images(feature)]
    with explains((pa.ArrowException, OSError, ValueError), f"{name} cannot be read"):
        for batch in table.select_columns(texts).iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield next(of_rows), dict(zip(texts, values, strict=True))


def _describe(error: Exception) -> str:
    """The library's message in one line; where it only says that something failed, that of the cause."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        error = error.__cause__ or error
    return " ".join(str(error).split())[:500] or type(error).__name__
