"""Images that the rows of a Parquet file, a saved or a Hub dataset hold themselves. No torch."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vqa_sft.data.read_images import ImageReader

IMAGES = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})


def read_inside(reader: ImageReader, row: dict, folder: str | None, report: Callable[..., None]) -> list[dict]:
    """Every image that a streamed row holds itself."""
    root = reader.root_of(folder)
    images = _collect_images(row, reader.inside, str(root))["images"]
    for image in images:
        if image["bytes"] is None:
            path = reader.paths.find(root, image["path"])
            if path is None:
                report("path_outside", image["path"][:60])
                image["bytes"] = b""
            image["path"] = path
    return images


def add_images(
    examples: datasets.Dataset,
    table: datasets.Dataset,
    reader: ImageReader,
    folder: str | None,
    report: Callable[..., None],
) -> datasets.Dataset:
    """The examples with the images that the rows of `table` hold themselves; `report(row, kind, detail)`."""
    root = reader.root_of(folder)
    images = _images_inside(table, reader.inside, root)
    names = examples.column_names
    examples = datasets.concatenate_datasets([examples.remove_columns("images"), images], axis=1)
    other = {}  # paths that are spelled otherwise, or lead outside: None
    for row, paths in enumerate(_paths_only(images)):
        if paths is None:
            report(row, "no_image")
        for path in paths or ():
            found = reader.paths.find(root, path)
            if found is None:
                report(row, "path_outside", path[:60])
            if found != path:
                other[path] = found
    examples = examples.select_columns(names)
    if other:  # nobody opens those outside
        replace_paths = partial(_replace_paths, other=other, unopened=reader.unopened)
        examples = examples.map(replace_paths, desc="Naming images")
    return examples


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
    """{"images": every image that the columns of a row hold}; paths in them are relative to `root`."""
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
