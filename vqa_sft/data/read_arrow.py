"""Rows of Parquet files, of what `datasets` saved, and of the Hub: held on disk by `datasets`, in Arrow. No torch."""

import glob
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet

from vqa_sft.data.find_files import check_headers
from vqa_sft.errors import InputError, explains

_BATCH = 1_000
Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
Folders: TypeAlias = list[tuple[str, int]]  # and of how many rows each is the folder; empty for what are no files


def load_parquet(name: str, files: list[Path], streaming: bool) -> tuple[Table, Folders]:
    columns, folders = [], []
    for path in files:
        with explains((pa.ArrowException, OSError), f"{path} cannot be read as Parquet"):
            metadata = pa.parquet.read_metadata(path)
        columns.append(metadata.schema.to_arrow_schema().names)
        folders.append((str(path.parent), metadata.num_rows))
    check_headers(files, columns)
    # `datasets` takes names for globs.
    options = {"data_files": [glob.escape(str(path)) for path in files], "split": "train", "streaming": streaming}
    try:
        table = datasets.load_dataset("parquet", **options)
    except Exception as error:  # errors of the pages of a file are wrapped
        raise InputError(f"{name} cannot be read as Parquet: {_describe(error)}") from error
    return undecoded(table), folders


def load_dataset(name: str, split: str, config: str | Sequence[str] | None, streaming: bool) -> Table:
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
    return undecoded(table)


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    table = datasets.load_from_disk(str(path))
    if isinstance(table, datasets.Dataset):
        return table
    missing = [part for part in split.split("+") if part not in table]
    if missing:
        raise ValueError(f"it has no split {', '.join(missing)}, but {', '.join(table)}")
    return datasets.concatenate_datasets([table[part] for part in split.split("+")])


def undecoded(table: Table) -> Table:
    """The same rows, with images as {bytes, path}."""
    features = datasets.Features({name: with_images(kind, decode=False) for name, kind in table.features.items()})
    if isinstance(table, datasets.Dataset):
        # As `cast` would, which copies lists of images to the cache; also without the format that it was saved with.
        info = table.info.copy()
        info.features = features
        return datasets.Dataset(table.data, info=info, split=table.split)
    return table if features == table.features else table.cast(features)


def with_images(feature: Any, decode: bool) -> Any:
    """The same type, with images that `datasets` decodes, or leaves as {bytes, path}."""
    if isinstance(feature, datasets.Image):
        return replace(feature, decode=decode)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=with_images(feature.feature, decode))
    return feature


def holds_images(feature: object) -> bool:
    """Whether a column holds images themselves, one or a list of them, and not paths."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return holds_images(feature.feature)
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def read_table(name: str, table: Table, folders: Folders) -> Iterator[tuple[str | None, dict]]:
    """(folder, row without its images) of every row."""
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
