"""The one exception for what a user can cause, and how a script ends on it. Standard library only."""

import errno
import functools
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

from vqa_sft.environment import is_main_process

P = ParamSpec("P")
R = TypeVar("R")
# A name that is too long, no right to write, a full disk, a folder for a file: the message says it all.
MACHINE_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR)

# What libraries say of a full disk in place of an OSError: safetensors; torch.save, whose zip archive finds itself
# shorter than it was written; numpy.
FULL_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|inline_container.*unexpected pos|requested and \d+ written"
)
# And of a worker of a data loader that was killed, or found no room for a batch in shared memory.
LOST_WORKER = re.compile(r"DataLoader worker \(pid|Pin memory thread exited|unable to .*</torch_")


class InputError(ValueError):
    """Something in the recipe, the data or the machine that the user can fix: what, got, how to fix it."""


class ProcessError(InputError):
    """What one process met and perhaps no other: that process prints it, and does not wait for the others."""


def name_rows(ids: Sequence[str], total: int) -> str:
    """The first five ids and the count: ``'rows 17, 203 (2 of 7,990)'``."""
    shown = ", ".join(map(printable, ids[:5])) + (", ..." if len(ids) > 5 else "")
    return f"row{'s' if len(ids) > 1 else ''} {shown} ({len(ids):,} of {total:,})"


def safe(text: str) -> str:
    """Text that may hold data, for a terminal: its own lines, and nothing else that a terminal would obey."""
    return "\n".join(printable(line, limit=len(line)) for line in text.split("\n"))


def printable(text: str, limit: int = 120) -> str:
    """Data in a message: one line, not endless, and nothing that a terminal would obey."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@contextmanager
def explains(kinds: type[Exception] | tuple[type[Exception], ...], what: str) -> Iterator[None]:
    """Turn a library's own complaint about a user's setting into an InputError that begins with `what` failed."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error


def breakdown(error: BaseException | None, where: str = "on the disk") -> str | None:
    """What the machine did to a run, and how to fix it: a full disk, a file that may not be so large, a killed worker;
    None for any other error."""
    while error is not None:
        text = printable(" ".join(str(error).split()), limit=400)
        if LOST_WORKER.search(text) or _is_from_worker(error):
            hint = "Most often memory ran out: lower dataloader_num_workers, or make /dev/shm larger."
            return f"a worker of the data loader is lost ({type(error).__name__}: {text}). {hint}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL_DISK.search(text):
            hint = "Make room; what was saved before is whole."
            return f"no room is left {where} ({type(error).__name__}: {text}). {hint}"
        if getattr(error, "errno", None) == errno.EFBIG or f"(os error {errno.EFBIG})" in text:  # safetensors
            hint = "Raise `ulimit -f`, or take a disk that holds larger files; what was saved before is whole."
            return f"a file is too large {where} ({type(error).__name__}: {text}). {hint}"
        error = error.__cause__ or error.__context__
    return None


def _is_from_worker(error: BaseException) -> bool:
    """Whether it was met while a loader waited for a batch: a connection that breaks says no more."""
    return any(frame.f_code.co_name == "_try_get_data" for frame, _ in traceback.walk_tb(error.__traceback__))


@contextmanager
def explains_breakdown(where: str, then: Callable[[], str]) -> Iterator[None]:
    """Turn a `breakdown` into a ProcessError that says `where`, and `then` what the same command does."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = breakdown(error, where)
        if said is None:
            raise
        raise ProcessError(f"{said} The same command {then()}") from error


def exits_with_message(main: Callable[P, R]) -> Callable[P, R]:
    """End with exit code 2 and the message, without a traceback, when `main` raises an InputError.

    So it does for what the machine does (`breakdown`, MACHINE_ERRORS). Under a launcher every process meets the same
    error; only the main one prints it. A ProcessError and a breakdown are the exceptions. Ctrl-C ends with one word and
    130, and a reader that has gone, as `head`, without any.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            if is_main_process():
                print("Interrupted.", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and not _is_read():  # `| head` has what it wanted
                sys.exit(141)  # 128 + SIGPIPE, which Windows does not have
            is_ours = isinstance(error, InputError)
            broke = None if is_ours else breakdown(error)
            if not (is_ours or broke or isinstance(error, OSError) and error.errno in MACHINE_ERRORS):
                raise
            alone = isinstance(error, ProcessError) or broke is not None
            is_only = os.environ.get("WORLD_SIZE", "1") == "1"  # whatever its rank is called
            if is_main_process() or is_only or alone:
                text = broke or str(error)
                if "Original Traceback" in text and not broke:
                    # What a data loader's worker raises comes with the worker's traceback before it.
                    text = text.rpartition("InputError: ")[2]
                print(safe(f"error: {text}"), file=sys.stderr, flush=True)
            if alone and os.environ.get("WORLD_SIZE", "1") != "1":
                # The others wait for this process in a collective, and leaving in good order would wait for them. The
                # launcher ends them when it sees this end.
                os._exit(2)
            # A message is all that there is to say: skip the teardown of process groups, which prints warnings.
            sys.exit(2)
        finally:
            with suppress(BrokenPipeError, AttributeError):  # no output at all: pythonw
                sys.stdout.flush()
            _is_read()

    return run


def _is_read() -> bool:
    """Whether somebody still reads what we print; if nobody does, the rest goes nowhere, without a traceback when
    Python ends."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        is_read = not any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows; an output that is no file
        return True
    if not is_read:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_read
