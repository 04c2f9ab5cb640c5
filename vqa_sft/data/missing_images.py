"""What may be done about images that are not there: another spelling, an archive that holds them. No torch."""

import itertools
import os
import shlex
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from vqa_sft.data.read_images import ImagePaths
from vqa_sft.errors import printable

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MAX_MEMBERS = {".zip": 1_000_000, ".tar": 100_000}  # that are read; of a compressed tar 200


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
