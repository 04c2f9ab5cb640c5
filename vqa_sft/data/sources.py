"""Raw rows of any source: text files, Parquet, what `datasets` saved, the Hub. No torch.

    names -> find_files -> find_encoding, read_text or read_json (text files) | read_arrow (the rest) -> Source

Text files are read as streams; Parquet and Hub datasets are held on disk by `datasets`, in Arrow.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets

from vqa_sft.data.find_encoding import find_encoding
from vqa_sft.data.find_files import check_headers, find_files, name_files
from vqa_sft.data.read_arrow import Folders, Table, load_dataset, load_parquet, read_table
from vqa_sft.data.read_json import open_json, read_json
from vqa_sft.data.read_text import SEPARATORS, find_separator, read_csv, read_files, read_header
from vqa_sft.errors import InputError


@dataclass(frozen=True)
class Source:
    """An opened source. `notes` are facts to tell the user once.

    `table` holds the rows of Parquet, saved and Hub datasets, in the order of `rows()`, images undecoded; it is None
    for text files. `class_names` are those of an image folder, with those of empty ones. `rows()` gives (folder of its
    file, row) of every row, from the start at every call; the folder is None for what is no file, and rows of a `table`
    come without their images. It raises InputError at the first row that cannot be read, once it has found the others
    of its file.
    """

    name: str
    columns: list[str]
    notes: list[str]
    table: Table | None
    rows: Callable[[], Iterator[tuple[str | None, dict]]]
    class_names: tuple[str, ...] = ()

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
    name = names[0] if len(names) == 1 else name_files(files)
    if not files:
        table = load_dataset(name, split, config, streaming)
        notes = []
        if table.info.builder_name == "csv":
            guesses = "`datasets`, which guesses the types of cells (007 is 7, NA is empty); name the files instead"
            notes.append(f"{name}: CSV files read by {guesses}")
        return _of_table(name, table, notes, [])
    if files[0].suffix.lower() == ".parquet":
        table, folders = load_parquet(name, files, streaming)
        return _of_table(name, table, [], folders)
    opened = _open_texts(name, files, encoding)
    if len(names) == 1 and Path(name).is_dir():
        opened.notes.insert(0, f"{name}: the one file of data in it is {files[0].name}")
    return opened


def _of_table(name: str, table: Table, notes: list[str], folders: Folders) -> Source:
    return Source(name, list(table.features), notes, table, partial(read_table, name, table, folders))


def _open_texts(name: str, files: list[Path], encoding: str | None) -> Source:
    facts: dict[str, list[Path]] = {}
    readers: list[Callable[[], Iterator[dict]]] = []
    columns: list[list[str]] = []
    for path in files:
        found = find_encoding(path, encoding)
        if found not in ("utf-8", encoding):
            facts.setdefault(f"{found.upper()} text", []).append(path)
        if path.suffix.lower() in (".csv", ".tsv"):
            usual = "," if path.suffix.lower() == ".csv" else "\t"
            separator = find_separator(path, found, usual)
            if separator != usual:
                facts.setdefault(f"separated by {SEPARATORS[separator]}", []).append(path)
            readers.append(partial(read_csv, path, found, separator))
            columns.append(read_header(path, found, separator))
        else:
            read, assumed = open_json(path, found)
            if assumed:
                facts.setdefault(assumed, []).append(path)
            readers.append(partial(read_json, path, read))
            # The last row may have a new key, so all rows are read, which also checks every line.
            columns.append(list(dict.fromkeys(key for row in readers[-1]() for key in row)))
            if not columns[-1]:
                raise InputError(f"{path} has no rows.")
    check_headers(files, columns)
    notes = [f"{name_files(paths)}: {fact}" for fact, paths in facts.items()]
    folders = [str(path.parent) for path in files]
    return Source(name, columns[0], notes, None, partial(read_files, folders, readers, columns[0]))
