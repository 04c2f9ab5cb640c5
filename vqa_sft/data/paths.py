"""The file that an image path of the data means, spelled as on the disk, and hints where it is missing. No torch.

A table made on another system writes `img\\1.JPG`, `/img/1.jpg`, or `강아지.png` with its letters apart (NFD). Where
exactly one file fits such a name, it is taken, with a note; a folder is listed once, however many rows name its files.
"""

import itertools
import os
import shlex
import tarfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from vqa_sft.errors import printable

# Suffixes of one format stand for one another, and each for a name that has none.
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".png": "PNG", ".gif": "GIF", ".webp": "WebP", ".bmp": "BMP", ".avif": "AVIF"},
}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MAX_MEMBERS = {".zip": 1_000_000, ".tar": 100_000}  # that are read; of a compressed tar 200


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


def describe_missing(paths: Sequence[str]) -> str:
    """What may be done about images that are not there: several files that one may mean, an archive that holds them."""
    said, lists = [], ImagePaths()
    unclear = ((path, lists.candidates(path)) for path in paths)
    for path, names in itertools.islice(((path, names) for path, names in unclear if len(names) > 1), 3):
        said.append(f"{printable(PurePath(path).name)} may be {' or '.join(map(printable, names[:5]))}: write which.")
    for archive in _archives_near(paths):
        held = _find_in_archive(archive, paths)
        if held:
            said.append(held)
            break
    return " ".join(said)


def _archives_near(paths: Sequence[str]) -> Iterator[Path]:
    """Archives in the first three folders above each path that are there."""
    folders = {}
    for parent in dict.fromkeys(map(os.path.dirname, paths)):
        above = [folder for folder in (Path(parent), *Path(parent).parents) if os.path.isdir(folder)]
        folders |= dict.fromkeys(above[:3])
    for folder in itertools.islice(folders, 20):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        yield from itertools.islice((folder / name for name in names if name.lower().endswith(ARCHIVES)), 20)


def _find_in_archive(archive: Path, paths: Sequence[str]) -> str | None:
    """How many of the images an archive holds, and the command that unpacks it so that they are found."""
    wanted = {os.path.basename(path): path for path in paths}
    members = _list_members(archive)
    held = {name: member for member in members if (name := os.path.basename(member)) in wanted}
    in_place = [(name, member) for name, member in held.items() if wanted[name].endswith(f"/{member}")]
    if not in_place and 2 * len(held) < len(wanted):  # images of other data may be called 1.png too
        return None
    name, member = (in_place or list(held.items()))[0]
    is_in_place = bool(in_place)
    folder = wanted[name][: -len(member) - 1] if is_in_place else str(archive.parent)
    source, target = shlex.quote(str(archive)), shlex.quote(folder)
    command = f"mkdir -p {target} && tar -xf {source} -C {target}"
    if archive.suffix.lower() == ".zip":
        command = f"unzip {source} -d {target}"
    then = "" if is_in_place else f", then set image_root to where {printable(member)} fits the paths"
    least = "at least " if len(members) in (*_MAX_MEMBERS.values(), 200) else ""
    return f"{archive} holds {least}{len(held):,} of {len(wanted):,}: {command}{then}."


def _list_members(archive: Path) -> list[str]:
    most = _MAX_MEMBERS.get(archive.suffix.lower(), 200)
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as file:
                return file.namelist()[:most]
        with tarfile.open(archive) as file:
            return [member.name.removeprefix("./") for member in itertools.islice(file, most)]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError):
        return []  # not an archive that could be unpacked
