"""Folds that train at the same time, each in a process and on a GPU of its own (`folds_at_once`).

    ended = train_at_once(recipe.runs(), devices, started_s)    starts this script again for each fold
    run, started_s = own_fold(recipe.runs())                    in such a process; None in any other

A fold trains as it does one after another: one process, one GPU, no exchange of gradients. The first one checks the
data and opens its folder, or says what is wrong, before the others start. Where one fails no other begins, and those
that train already end as they would.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vqa_sft.config.recipe import Recipe
from vqa_sft.console import note
from vqa_sft.data.scan import count_cores
from vqa_sft.errors import InputError
from vqa_sft.runs import folder as run_folder
from vqa_sft.training.survive import Finished, Interrupted

VARIABLE = "VQA_SFT_FOLD"  # of such a process: [number of its run, when the script began]
POLL_S = 0.2
GRACE_S = 60.0  # where this script breaks off: for a step of the others, and its checkpoint
# By which a launcher tells processes of each other.
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def own_fold(runs: Sequence[Recipe]) -> tuple[Recipe, float] | None:
    """The run that this process was started for, and when the script began; None where it was started for all."""
    if VARIABLE not in os.environ:
        return None
    number, started_s = json.loads(os.environ[VARIABLE])
    return runs[number], started_s


def choose_devices(num: int, use_cpu: bool) -> list[str | None]:
    """A GPU for each of `num` processes, as CUDA_VISIBLE_DEVICES names it, or None on a CPU. Raises InputError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "folds_at_once starts a process for each fold, and several were launched already. Launch one: "
            "python recipes/sft.py --config ..."
        )
    if use_cpu:
        return [None] * num
    visible, num_gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = [str(number) for number in range(num_gpus)] if visible is None else visible.split(",")[:num_gpus]
    if len(names) < num:
        raise InputError(
            f"folds_at_once is {num}, and {len(names)} GPUs are visible. Set it to at most that, or --use_cpu true."
        )
    return [*names[:num]]


@dataclass
class Process:
    """Of one fold."""

    of_system: "subprocess.Popen[str]"
    device: str | None
    reader: threading.Thread  # passes on what it prints


def train_at_once(runs: Sequence[Recipe], devices: Sequence[str | None], started_s: float) -> Finished | Interrupted:
    """Train each of the runs in a process, as many at a time as there are `devices`. The time budget of all of them
    begins at the `time.monotonic()` of `started_s`. Raises InputError where one fails."""
    folds = Folds([run.values["output_dir"] for run in runs], devices, started_s)
    with _ending(folds.running) as sigterms:
        while folds.running or folds.waiting:
            folds.start_next()
            time.sleep(POLL_S)
            if sigterms:
                folds.stop()
            folds.collect()
    if folds.failed and not sigterms:
        raise InputError(f"{', '.join(folds.failed)} failed, as was said above. The same command resumes the rest.")
    left = [folder for folder in folds.folders if not run_folder.is_finished(folder)]
    if not (left or sigterms):
        return Finished()
    overwritten = " without --overwrite" if runs[0].arguments.overwrite else ""
    reason = "SIGTERM" if sigterms else "Time is up"
    does = f"resumes {', '.join(left)}" if left else "writes what is out of fold"
    note(f"{reason}. The same command{overwritten} {does}.")
    return Interrupted(bool(sigterms))


class Folds:
    """Which of them wait, train and have failed, by their numbers and folders."""

    def __init__(self, folders: Sequence[str], devices: Sequence[str | None], started_s: float) -> None:
        self.folders, self.started_s, self.num_at_once = folders, started_s, len(devices)
        self.waiting, self.free = [*range(len(folders))], [*devices]
        self.running: dict[int, Process] = {}
        self.failed: list[str] = []
        self.before_ns, self.is_stopping = _written_ns(folders[0]), False

    def start_next(self) -> None:
        """One more, where a device is free, and the first one has opened its folder."""
        is_first = len(self.waiting) == len(self.folders)
        is_checked = 0 not in self.running or _written_ns(self.folders[0]) != self.before_ns
        if self.waiting and self.free and (is_first or is_checked):
            number, device = self.waiting.pop(0), self.free.pop(0)
            self.running[number] = _start(number, self.folders[number], device, self.num_at_once, self.started_s)

    def stop(self) -> None:
        """Ask those that train to save and stop, once; no other starts."""
        self.waiting.clear()
        if not self.is_stopping:
            self.is_stopping = True
            for process in self.running.values():
                process.of_system.terminate()

    def collect(self) -> None:
        """Those that have ended. After one that is not finished, because it failed or time is up, no other starts."""
        for number in [number for number, process in self.running.items() if process.of_system.poll() is not None]:
            process = self.running.pop(number)
            process.reader.join(1)
            self.free.append(process.device)
            # A run that is refused, of another recipe perhaps, may lie in a folder that was finished before.
            self.failed += [self.folders[number]] if process.of_system.returncode else []
            if self.failed or not run_folder.is_finished(self.folders[number]):
                self.waiting.clear()


def _written_ns(folder: str) -> int:
    """When the run in it began or was resumed last."""
    with suppress(OSError):
        return (Path(folder) / run_folder.RECIPE).stat().st_mtime_ns
    return 0


def _start(number: int, folder: str, device: str | None, num_at_once: int, started_s: float) -> Process:
    """This script for one fold. What it prints is printed here, with the name of its folder before each line."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment |= {VARIABLE: json.dumps([number, started_s]), "TQDM_DISABLE": "1"}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if device is None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // num_at_once)))
    else:
        environment["CUDA_VISIBLE_DEVICES"] = device
    of_system = subprocess.Popen(
        [sys.executable, *sys.argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    reader = threading.Thread(target=_pass_on, args=(of_system, Path(folder).name), daemon=True)
    reader.start()
    return Process(of_system, device, reader)


def _pass_on(of_system: "subprocess.Popen[str]", name: str) -> None:
    assert of_system.stdout is not None
    for line in of_system.stdout:
        print(f"{name}: {line}", end="", flush=True)


@contextmanager
def _ending(running: dict[int, Process]) -> Iterator[list[int]]:
    """The SIGTERMs that come within this context. When it ends, so do the processes that are left."""
    sigterms: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: sigterms.append(number))
    try:
        yield sigterms
    finally:
        for process in running.values():
            process.of_system.terminate()
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.of_system.wait(GRACE_S)
            process.of_system.kill()
        signal.signal(signal.SIGTERM, before)
