"""The images that the cells of a row name: paths, templates of paths, base64. No torch.

An image is {bytes, path}, as `datasets.Image(decode=False)` holds it. Nothing is opened here.

A table made on another system writes `img\\1.JPG`, `/img/1.jpg`, or `강아지.png` with its letters apart (NFD). Where
exactly one file fits such a name, it is taken, with a note; a folder is listed once, however many rows name its files.
"""

import base64
import itertools
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from vqa_sft.data.cells import is_writable, read_list
from vqa_sft.data.columns import Columns, fields_of, fill
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError, printable

# How JPEG, PNG, GIF and WebP begin in base64: benchmark files in TSV hold their images so.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
# Suffixes of one format stand for one another, and each for a name that has none.
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".png": "PNG", ".gif": "GIF", ".webp": "WebP", ".bmp": "BMP", ".avif": "AVIF"},
}


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
        self._root = options.image_root
        self._templates = {name: fields for name in self.named if (fields := fields_of(name, columns.id))}
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
        if name in self._templates:
            parts = {part: text_of(row.get(part)) for part in self._templates[name]}
            return [fill(name, parts | {"id": row_id})]
        listed = None if isinstance(row[name], dict) else read_list(row[name])
        cells = [row[name]] if listed is None else listed
        # As `datasets` writes an image into JSON.
        return [cell.get("path") if isinstance(cell, dict) and "path" in cell else cell for cell in cells]


def _decode_base64(text: str) -> bytes:
    """The bytes of an image in base64; empty when it is none, which is found when the image is opened."""
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        return b""


class ImagePaths:
    """Finds images in the folder that they must stay in, and counts those whose names are spelled otherwise there."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}
        self._alike: dict[str, dict[tuple[str, str], list[str]]] = {}
        self._folders: dict[str, str | None] = {}
        self._real: dict[str, str] = {}
        self._respelled: dict[str, str] = {}  # as written -> the path that was found

    def __getstate__(self) -> dict:
        return ImagePaths().__dict__  # a worker lists the folders itself

    def find(self, root: Path, text: str) -> str | None:
        """The absolute path of an image, whether there is one or not; None for one outside of `root`, a real path."""
        top = str(root)
        written = os.path.abspath(os.path.join(top, text))
        path, found = written, None
        if "\0" in text:
            pass
        elif _is_inside(path, top):
            found = self._look(top, path)
            within = os.path.relpath(path, top)
            if found is None and "\\" in within:
                path = os.path.abspath(os.path.join(top, within.replace("\\", "/").lstrip("/")))
                found = self._look(top, path) if _is_inside(path, top) else None
        elif text.startswith("/"):
            path = self._real_path(path)  # a root that is written through a link to it
            if not _is_inside(path, top) and not os.path.lexists(written):
                path = os.path.abspath(os.path.join(top, text.lstrip("/")))
            found = self._look(top, path) if _is_inside(path, top) else None
            if found is None and not _is_inside(self._real_path(written), top):
                return None
        if not _is_inside(path, top):
            return None
        if found is not None and found != written:
            self._respelled[text] = found
        return found or path

    def notes(self) -> list[str]:
        """How many images were found under another spelling, with an example."""
        if not self._respelled:
            return []
        text, found = next(iter(self._respelled.items()))
        parts = PurePath(found).parts[-len(PurePath(text.replace("\\", "/").lstrip("/")).parts) :]
        count = len(self._respelled)
        images = f"{count:,} images are" if count > 1 else "1 image is"
        shown, same = "/".join(parts), unicodedata.normalize("NFC", text)
        example = printable(f"{shown!r} for {text!r}")
        if unicodedata.normalize("NFC", shown) == same:  # which look alike
            example = f"{printable(same)!r} with its letters apart in one of the two (NFD)"
        return [f"{images} found under another spelling of the name, such as {example}"]

    def candidates(self, path: str) -> list[str]:
        """Names in the folder of a path that may be meant by its own, which is not there."""
        folder, name = os.path.split(path)
        stem, suffix = os.path.splitext(name)
        alike = self._list_alike(folder)
        found = dict.fromkeys(alike["name", _fold(name)])
        if suffix.lower() in SUFFIXES:
            found |= dict.fromkeys(alike[SUFFIXES[suffix.lower()], _fold(stem)])
        else:
            found |= dict.fromkeys(alike["any", _fold(name)])
        return list(found)

    def _look(self, top: str, path: str) -> str | None:
        """The path of the one file that a path inside the folder `top` means; None where none or several fit."""
        folder, name = os.path.split(path)
        if path == top:
            return path
        if folder not in self._folders:
            self._folders[folder] = self._look_for_folder(top, folder)
        folder = self._folders[folder]
        if folder is None:
            return None
        if name in self._list(folder):
            return os.path.join(folder, name)
        found = self.candidates(os.path.join(folder, name))
        return os.path.join(folder, found[0]) if len(found) == 1 else None

    def _look_for_folder(self, top: str, folder: str) -> str | None:
        if os.path.isdir(folder):
            return folder
        found = top
        for part in PurePath(folder).relative_to(top).parts:
            names = [part] if part in self._list(found) else self._list_alike(found)["name", _fold(part)]
            folders = [name for name in names if os.path.isdir(os.path.join(found, name))]
            if len(folders) != 1:
                return None
            found = os.path.join(found, folders[0])
        return found

    def _list(self, folder: str) -> set[str]:
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder))
            except OSError:  # reported when the image is opened
                self._names[folder] = set()
        return self._names[folder]

    def _list_alike(self, folder: str) -> dict[tuple[str, str], list[str]]:
        """The names in a folder by what is the same in all spellings: of the name, and of what is before a suffix."""
        if folder not in self._alike:
            alike = self._alike[folder] = defaultdict(list)
            for name in sorted(self._list(folder)):
                stem, suffix = os.path.splitext(name)
                alike["name", _fold(name)].append(name)
                if suffix.lower() in SUFFIXES:
                    alike["any", _fold(stem)].append(name)
                    alike[SUFFIXES[suffix.lower()], _fold(stem)].append(name)
        return self._alike[folder]

    def _real_path(self, path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)


def _is_inside(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
