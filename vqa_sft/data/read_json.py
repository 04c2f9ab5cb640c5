"""Rows of JSONL files, and of a file with one JSON value: a list, columns, or rows under their ids. No torch."""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vqa_sft.data.columns import USUAL_NAMES, find_usual
from vqa_sft.data.find_files import quote
from vqa_sft.data.read_text import MAX_ROW, Lines, open_text
from vqa_sft.errors import InputError, explains, name_rows, printable

MAX_JSON_LIST = 256 * 2**20  # bytes of a file that has to be read as a whole


def open_json(path: Path, encoding: str) -> tuple[Callable[[], Iterator[tuple[str, object]]], str | None]:
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
    with open_text(path, encoding) as file:
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


def read_json(path: Path, read: Callable[[], Iterator[tuple[str, object]]]) -> Iterator[dict]:
    """Every row of what `open_json` gave. Raises InputError at the first that is no object, with all others."""
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
    lines = Lines(path, encoding)
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
    with open_text(path, encoding) as file, explains(ValueError, f"{path} cannot be read as JSON"):
        value: Any = _parse_json(file.read())
    said: list[str] = []
    rows: list[tuple[str, Any]]
    columns = _find_columns(value) if isinstance(value, dict) else None
    key = _find_container(path, value) if isinstance(value, dict) and columns is None else None
    if key is not None:
        others = [name for name in value if name != key]
        said.append(f"rows are those under {key!r}" + (f", without {quote(others)}" if others else ""))
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
            f"{path} is one JSON object that may be one row, or hold its rows under {quote(found)}. Save what you "
            "mean as a list of objects."
        )
    if len(found) > 1:
        raise InputError(
            f"{path} is one JSON object that may hold its rows under each of {quote(found)}. Save those that you mean "
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
