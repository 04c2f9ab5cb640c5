"""How the images of a row are found: paths, templates and base64 in its cells, or images inside a table. No torch.

An image is {bytes, path}, as `datasets.Image(decode=False)` holds it. Nothing is opened here.
"""

import base64
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqa_sft.data.cells import is_writable, read_list
from vqa_sft.data.columns import Columns, fields_of, fill
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.paths import ImagePaths
from vqa_sft.errors import InputError

IMAGES = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
# How JPEG, PNG, GIF and WebP begin in base64: benchmark files in TSV hold their images so.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")


class ImageReader:
    """Finds the images of a row. `report(kind, detail)` is called for what is wrong with one."""

    def __init__(self, columns: Columns, in_arrow: Sequence[str], options: ReadOptions) -> None:
        """`in_arrow` are the columns of the source that hold images themselves."""
        self.inside = [name for name in columns.image if name in in_arrow]
        self.named = [name for name in columns.image if name not in self.inside]
        if self.inside and self.named:
            raise InputError(f"the columns {', '.join(columns.image)} hold both paths and images. Name one kind.")
        self.paths = ImagePaths()
        # In place of an image that is not opened, where its row is answered all the same.
        self.unopened = [{"bytes": b"", "path": None}] if options.on_bad_row == "guess" else []
        self._id_column, self._root = columns.id, options.image_root
        self._roots: dict[str | None, Path] = {}

    def root_of(self, folder: str | None) -> Path:
        """The folder that the paths of a file in `folder` are relative to."""
        if self._root is not None and not os.path.isdir(self._root):
            raise InputError(f"image_root is no folder: {self._root}. It is relative to where you launched.")
        if folder not in self._roots:
            self._roots[folder] = Path(self._root or folder or ".").resolve()
        return self._roots[folder]

    def read(
        self, row: dict, folder: str | None, row_id: str, text_of: Callable[[object], str], report: Callable[..., None]
    ) -> list[dict]:
        """Every image that the row names; a path that leads out of the root is a problem."""
        images, num_named = [], 0
        for cell in itertools.chain.from_iterable(self._cells(row, name, row_id, text_of) for name in self.named):
            text = text_of(cell)
            if not text:
                continue
            num_named += 1
            if text.startswith(_BASE64) and len(text) > 200 or text.startswith("data:image/"):
                images.append({"bytes": _decode_base64(text), "path": None})
                continue
            path, problem = None, None
            if "://" in text[:10]:
                problem = ("image_address", text[:60])
            elif "\0" in text or not is_writable(text):
                problem = ("missing_image", repr(text)[:60])
            elif (path := self.paths.find(self.root_of(folder), text)) is None:
                problem = ("path_outside", text[:60])
            if problem is not None:  # nobody opens it
                report(*problem)
            images += self.unopened if path is None else [{"bytes": None, "path": path}]
        if not num_named and self.named:
            report("no_image")
        return images

    def _cells(self, row: dict, name: str, row_id: str, text_of: Callable[[object], str]) -> list:
        """The paths in a column, or the one that a template gives."""
        parts = fields_of(name, self._id_column)
        if parts:
            return [fill(name, {part: text_of(row.get(part)) for part in parts} | {"id": row_id})]
        listed = None if isinstance(row[name], dict) else read_list(row[name])
        cells = [row[name]] if listed is None else listed
        # As `datasets` writes an image into JSON.
        return [cell.get("path") if isinstance(cell, dict) and "path" in cell else cell for cell in cells]

    def read_inside(self, row: dict, folder: str | None, report: Callable[..., None]) -> list[dict]:
        """Every image that a streamed row holds itself."""
        root = self.root_of(folder)
        images = _collect_images(row, self.inside, str(root))["images"]
        for image in images:
            if image["bytes"] is None:
                path = self.paths.find(root, image["path"])
                if path is None:
                    report("path_outside", image["path"][:60])
                    image["bytes"] = b""
                image["path"] = path
        return images

    def add_column(
        self, examples: datasets.Dataset, table: datasets.Dataset, folder: str | None, report: Callable[..., None]
    ) -> datasets.Dataset:
        """The examples with the images that the rows of `table` hold themselves; `report(row, kind, detail)`."""
        root = self.root_of(folder)
        images = _images_inside(table, self.inside, root)
        names = examples.column_names
        examples = datasets.concatenate_datasets([examples.remove_columns("images"), images], axis=1)
        other = {}  # paths that are spelled otherwise, or lead outside: None
        for row, paths in enumerate(_paths_only(images)):
            if paths is None:
                report(row, "no_image")
            for path in paths or ():
                found = self.paths.find(root, path)
                if found is None:
                    report(row, "path_outside", path[:60])
                if found != path:
                    other[path] = found
        examples = examples.select_columns(names)
        if other:  # nobody opens those outside
            replace_paths = partial(_replace_paths, other=other, unopened=self.unopened)
            examples = examples.map(replace_paths, desc="Naming images")
        return examples


def _decode_base64(text: str) -> bytes:
    """The bytes of an image in base64; empty when it is none, which is found when the image is opened."""
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        return b""


def _images_inside(table: datasets.Dataset, names: Sequence[str], root: Path) -> datasets.Dataset:
    """The column `images` from columns that hold images themselves. Bytes are not copied where every row has one
    image; else `datasets` writes the lists to its cache, so that they are not held in memory either."""
    features = datasets.Features({"images": IMAGES})
    column = table.data.column(names[0])
    if len(names) == 1 and table._indices is None and _is_one_image_a_row(column):
        storage = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        chunks = [
            pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk.cast(storage))
            for chunk in column.chunks
        ]
        lists = pa.table({"images": pa.chunked_array(chunks, type=pa.list_(storage))})
        return datasets.Dataset(datasets.table.InMemoryTable(lists.cast(features.arrow_schema)))
    # Not beside a saved dataset, which may lie on a disk that cannot be written.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "vqa_sft"
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((table._fingerprint, names, str(root))).encode()).hexdigest()[:24]
    return table.select_columns(list(names)).map(
        partial(_collect_images, names=list(names), root=str(root)),
        remove_columns=list(names),
        features=features,
        cache_file_name=str(cache / f"images-{key}.arrow"),
        desc="Collecting images",
    )


def _collect_images(row: dict, names: Sequence[str], root: str) -> dict:
    images = [image for name in names for image in _images_of(row[name])]
    for image in images:
        if image["bytes"] is None:
            image["path"] = os.path.abspath(os.path.join(root, image["path"]))
    return {"images": images}


def _replace_paths(row: dict, other: Mapping[str, str | None], unopened: Sequence[dict]) -> dict:
    """The images of a row with their other paths; `unopened` in place of those whose other path is None."""
    images = []
    for image in row["images"]:
        path = other.get(image["path"], image["path"])
        images += [image | {"path": path}] if image["bytes"] is not None or path is not None else unopened
    return {"images": images}


def _paths_only(images: datasets.Dataset) -> Iterator[list[str] | None]:
    """Of every row, the paths of the images whose bytes it does not hold; None for a row without images."""
    for chunk in images.data.column("images").chunks:
        paths = pc.if_else(chunk.flatten().field("bytes").is_valid(), None, chunk.flatten().field("path")).to_pylist()
        lengths = pc.list_value_length(chunk).to_pylist()
        start = 0
        for length in lengths:
            yield [path for path in paths[start : start + length] if path is not None] if length else None
            start += length or 0


def _is_one_image_a_row(column: pa.ChunkedArray) -> bool:
    """Whether every row holds the bytes of one image."""
    is_struct = pa.types.is_struct(column.type) and {field.name for field in column.type} == {"bytes", "path"}
    if not is_struct or column.null_count:
        return False
    return all(chunk.field("bytes").null_count == 0 for chunk in column.chunks)  # looks at validity, not at bytes


def _images_of(cell: Any) -> list[dict]:
    """{bytes, path} of what one cell of an image column holds."""
    if isinstance(cell, list):
        return [image for item in cell for image in _images_of(item)]
    if isinstance(cell, bytes):
        return [{"bytes": cell, "path": None}]
    if cell is None or (cell.get("bytes") is None and cell.get("path") is None):
        return []
    return [{"bytes": cell["bytes"], "path": cell["path"]}]
