"""The files of data that a recipe names: paths, globs, folders; and what to do with what is no data. No torch."""

import glob
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vqa_sft.errors import InputError, printable

FORMATS = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".parquet": "Parquet"}
# What people give in place of data, and the command that makes data of it.
PACKED = {".gz": "gunzip -k", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zst": "unzstd", ".zip": "unzip", ".7z": "7z x"}
PACKED |= dict.fromkeys((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"), "tar -xf")
SHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")
# What one cell and one row may take: an image in base64 fits, a quote that never closes ends soon.


def find_files(names: Sequence[str]) -> list[Path]:
    """The files that paths and globs name, those of a glob sorted; empty for a folder or a Hub dataset."""
    files = [path for name in names for path in _resolve(name, is_alone=len(names) == 1)]
    for path in files:
        _check_file(path)
    suffixes = sorted({path.suffix.lower() for path in files})
    if len(suffixes) > 1:
        raise InputError(f"the files must have one format; got {', '.join(suffixes)}. Convert some of them.")
    return files


def _resolve(name: str, is_alone: bool) -> list[Path]:
    """The files that one path or glob names. Raises InputError for one that is not there."""
    if "\0" in str(name):
        raise InputError(f"the name {str(name)!r} holds a null byte. Check the recipe.")
    path = Path(name)
    if path.is_dir() and is_alone:
        return _find_in_folder(path)
    if any(mark in name for mark in "*?[") and not path.exists():
        found = sorted(found for found in map(Path, glob.glob(name, recursive=True)) if found.is_file())
        if not found:
            raise InputError(f"no file matches {name}. Check the path; it is relative to where you launched.")
        return found
    if path.is_file():
        return [path]
    if path.suffix.lower() in FORMATS and not path.is_dir():
        raise InputError(f"no such file: {name}. {_name_likely(path)}")
    if not is_alone:
        raise InputError(f"{name} is no file. A list of sources may hold files and globs only.")
    if not path.is_dir():
        _check_hub_name(name, path)
    return []


def _check_hub_name(name: str, path: Path) -> None:
    """Raises InputError for what is not there and is meant as a path: without a network the Hub takes half a minute to
    refuse it."""
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)
    is_in_folder = "/" in name and path.parent.is_dir()
    if is_hub_name and not is_in_folder and not path.name.lower().endswith((*PACKED, *SHEETS)):
        return
    is_both = is_hub_name and is_in_folder
    hint = f" For the dataset of the Hub launch where no folder is called {path.parent}." if is_both else ""
    raise InputError(f"no such file or folder: {name}. {_name_likely(path)}{hint}")


def _check_file(path: Path) -> None:
    """Raises InputError for a file that is no data."""
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


def name_files(files: Sequence[Path]) -> str:
    return f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])


def check_headers(files: Sequence[Path], columns: Sequence[Sequence[str]]) -> None:
    """Raises InputError for columns that are twice in a file, and for files that differ."""
    for path, names in zip(files, columns, strict=True):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError(f"{path} has more than one column {quote(twice)}. Keep one of each.")
        differences = {"has": sorted({*names} - {*columns[0]}), "lacks": sorted({*columns[0]} - {*names})}
        said = [f"{word} {quote(found)}" for word, found in differences.items() if found]
        if said:
            raise InputError(f"{path} {' and '.join(said)}, unlike {files[0]}. Files read together need one header.")


def quote(names: Sequence[str]) -> str:
    return printable(", ".join(map(repr, names[:50])), 500)
