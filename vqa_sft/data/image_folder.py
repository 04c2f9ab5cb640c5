"""An image folder: one folder a class, whose name is the class. No torch.

cars/Audi A4/1.jpg     ->  {"id": "Audi A4/1.jpg", "path": "Audi A4/1.jpg", "label": "Audi A4"}
cars/2.jpg             ->  {"id": "2.jpg", "path": "2.jpg", "label": ""}      rows to predict, perhaps
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from vqa_sft.data.classes import class_name
from vqa_sft.data.find_files import FORMATS, quote
from vqa_sft.data.read_images import SUFFIXES
from vqa_sft.data.sources import Source
from vqa_sft.errors import InputError

# Folders of these names beside one another hold parts of a data set, and are no classes.
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def find_image_folder(source: str | Sequence[str]) -> Path | None:
    """The folder that a source names, where it holds no file of data and no card of a Hub dataset; else None."""
    names = [source] if isinstance(source, str) else list(source)
    if len(names) != 1 or "\0" in names[0] or not Path(names[0]).is_dir():
        return None
    files = [path for path in Path(names[0]).iterdir() if path.is_file()]
    is_data = any(path.suffix.lower() in FORMATS for path in files)
    is_card = any(path.name == "README.md" and path.read_bytes().startswith(b"---") for path in files)
    return None if is_data or is_card else Path(names[0])


def open_image_folder(folder: Path) -> Source:
    """The images of the class folders, at any depth, and those beside these, which have no class."""
    by_class, loose, others = _list_folder(folder)
    parts = [name for name in by_class if name.casefold() in _PARTS]
    if parts and len(parts) == len(by_class):
        raise InputError(
            f"{folder} holds the folders {quote(parts)}, which are no classes. Name one: {folder / parts[0]}."
        )
    paths = [(path, name) for name, found in by_class.items() for path in found] + [(path, "") for path in loose]
    if not paths:
        raise InputError(f"{folder} holds no images, neither in class folders (one folder a class) nor beside them.")
    said = [f"an image folder with {len(by_class):,} class folders"]
    if empty := [name for name, found in by_class.items() if not found]:
        said.append(f"class folders without images ({len(empty):,}): {quote(empty)}")
    if loose and by_class:
        said.append(f"images beside the class folders, which have no class ({len(loose):,}): {quote(loose)}")
    if others:
        said.append(f"left out, as they are no images by their suffix ({len(others):,}): {quote(others)}")
    notes = [f"{folder}: {note}" for note in said]
    names = tuple(dict.fromkeys(map(class_name, by_class)))
    return Source(str(folder), ["id", "path", "label"], notes, None, partial(_read, str(folder), paths), names)


def _list_folder(folder: Path) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Paths of images by class folder, those beside the class folders, and files that are no images."""
    by_class: dict[str, list[str]] = {}
    loose, others = [], []
    for name in sorted(os.listdir(folder)):
        if name.startswith("."):
            continue
        if os.path.isdir(folder / name):
            files = [
                os.path.relpath(os.path.join(place, file), folder).replace(os.sep, "/")
                for place, _, found in os.walk(folder / name)
                for file in found
                if not file.startswith(".")
            ]
            by_class[name] = sorted(file for file in files if _is_image(file))
            others += [file for file in files if not _is_image(file)]
        elif _is_image(name):
            loose.append(name)
        else:
            others.append(name)
    return by_class, loose, others


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _read(folder: str, paths: Sequence[tuple[str, str]]) -> Iterator[tuple[str, dict]]:
    for path, label in paths:
        yield folder, {"id": path, "path": path, "label": label}
