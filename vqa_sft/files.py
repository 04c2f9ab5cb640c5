"""Outputs: whole or not at all, written by one process at a time, and never over what is not ours. No torch.

whole("out.csv")                  gives out.csv.1f09a2b4.part to write to, and renames it
whole_folder("merged")            gives merged.part to write to, and renames it
held("runs/mine", "output_dir")   locks runs/mine.lock, which says who; InputError where another process holds it
check_output("out.csv", ...)      InputError where out.csv would replace an input or a file that we did not write
"""

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from vqa_sft.errors import InputError, printable

if TYPE_CHECKING:
    from filelock import FileLock

PART = ".part"
UNFINISHED = ".vqa_sft_unfinished"  # marks a folder of `whole_folder`
_OURS = re.compile(r".+\.[0-9a-f]{8}" + re.escape(PART))
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # what network disks say that have none
WAIT_S = 0.5  # for a holder that is about to write its name, or has just let go


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path next to `path` to write to, which replaces it at the end: a file is complete or absent, even when others
    write it at the same time. Raises InputError where none can be written there."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PART}")
    if path.is_dir():
        raise InputError(f"{path} is a folder. Name a file.")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.touch()
        except OSError as error:
            if error.errno in _FULL:  # another name would not help
                raise
            raise InputError(f"{path} cannot be written: {error}. Name another file.") from error
        yield unfinished
        unfinished.replace(path)
    finally:
        with suppress(OSError):  # a folder that cannot be written holds none
            unfinished.unlink()


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder next to `folder` to write to, which replaces it at the end; what was there is deleted after that.
    Raises InputError where none can be written there. Only who holds the folder (`held`) may write it."""
    target = Path(folder).resolve()
    part = target.with_name(target.name + PART)
    if part.exists() and not (part / UNFINISHED).is_file():
        raise InputError(f"{part}, where the new folder is made, is none of ours. Move it, or name another folder.")
    try:
        try:
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir(parents=True)
            (part / UNFINISHED).touch()
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise InputError(f"{folder} cannot be written: {error}. Name another folder.") from error
        yield part
        _replace(part, target)
        (target / UNFINISHED).unlink()  # now, so that a kill before leaves nothing that the next start refuses
    except BaseException:  # an interruption too
        shutil.rmtree(part, ignore_errors=True)
        raise


def _replace(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    target.rename(aside / "earlier")
    try:
        part.rename(target)
    except BaseException:
        (aside / "earlier").rename(target)
        raise
    finally:
        shutil.rmtree(aside)


def check_output(
    path: str | Path,
    *,
    suffix: str,
    option: str = "--output",
    reads: Iterable[str | Path | None] = (),
    is_ours: Callable[[Path], bool] = lambda _: True,
    kind: str = "",
) -> None:
    """Raises InputError where `path`, which `option` names, has another suffix, is a folder, is one of the files that
    are read, or holds what is not `is_ours`; `kind` says in the message what we would replace."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise InputError(f"{option} must end in {suffix}; got {path if path.name else 'nothing'}.")
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder. Name a file.")
    if any(path.resolve() == Path(name).resolve() for name in reads if name is not None):
        raise InputError(f"{option} is one of the files that are read: {path}. Name another.")
    if path.exists() and not is_ours(path):
        raise InputError(f"{path} exists and is no {kind}. Name another file with {option}.")


def begins_with(start: str | bytes) -> Callable[[Path], bool]:
    """For `check_output`: whether a file begins so, as those do that we write."""
    start = start.encode() if isinstance(start, str) else start
    return lambda path: path.read_bytes().startswith(start)


def lying_in(folder: str | Path, paths: Iterable[str | Path]) -> list[str]:
    """Those of the files and folders that are the folder or lie in it, and would be lost with it."""
    folder = Path(folder).resolve()
    return [str(path) for path in paths if Path(path).exists() and Path(path).resolve().is_relative_to(folder)]


def remove_unfinished(folder: str | Path) -> None:
    """Remove what `whole` left in a folder that nobody writes, where a process was killed in the middle."""
    for path in Path(folder).glob(f"*{PART}"):
        if _OURS.fullmatch(path.name):
            path.unlink()


@contextmanager
def held(paths: str | Path | Sequence[str | Path], what: str) -> Iterator[None]:
    """While this lasts, no other process may hold one of the files or folders; `what` names the option that says where
    they are. Raises InputError with who holds one.

    The lock is the operating system's, on a file next to it (`x.lock`): it ends with the process, however that ends. On
    a disk without locks a line is printed instead.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    with ExitStack() as stack:
        for path in dict.fromkeys(Path(path).resolve() for path in paths):
            stack.enter_context(_held(path, what))
        yield


@contextmanager
def _held(path: Path, what: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    file = path.with_name(path.name + ".lock")
    lock = FileLock(file, timeout=WAIT_S, fallback_to_soft=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        file.write_text(json.dumps(about), encoding="utf-8")
    except Timeout as error:
        raise InputError(
            f"{path} is being written by {_holder(file)}. Wait until that ends, or choose another {what}."
        ) from error
    except OSError as error:
        _let_go(lock, file)
        if error.errno in _FULL:
            raise
        if error.errno not in _NO_LOCKS:
            raise InputError(f"{what} {path} cannot be written: {error}. Choose another.") from error
        print(f"The disk of {path} has no locks: nothing stops a second process from writing there too.")
    try:
        yield
    finally:
        _let_go(lock, file)


def _let_go(lock: "FileLock", file: Path) -> None:
    if lock.is_locked:
        with suppress(OSError):  # Windows removes no open file
            file.unlink()  # while it is held: who has opened it meanwhile finds it gone, and opens a new one
    lock.release()


def _holder(file: Path) -> str:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        holder = f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        holder = "another process"
    return printable(holder)
