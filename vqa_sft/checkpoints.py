"""Which checkpoints are whole, and where a run goes on."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from vqa_sft.launch import from_main

MARKER = "complete"


class MarkWholeCheckpoints(TrainerCallback):
    """Writes our marker when every process has finished saving.

    The Trainer writes checkpoints in place, `trainer_state.json` among the first files, so that a folder killed half
    way looks whole. Ours counts only with the marker.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            with (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARKER).open("w") as file:
                os.fsync(file.fileno())


class TimeBudget(TrainerCallback):
    """Saves and stops in time. `started_s` is the `time.monotonic()` from which `budget_s` counts.

    The main process's clock decides for all, every `INTERVAL` steps where there are others to tell.
    """

    INTERVAL = 10

    def __init__(self, budget_s: float, started_s: float) -> None:
        self.ends_s = started_s + budget_s
        self.reserved_s = min(60.0, 0.1 * budget_s)  # to load the best weights, and for what ends a process
        self.longest_pause_s = 0.0  # from a step to its checkpoint, evaluation included
        self.longest_gap_s = 0.0  # between two looks at the clock
        self.has_stopped = False
        self._step_s = started_s
        self._looked_s: float | None = None

    def is_over(self) -> bool:
        """Whether there is no time to go on until the next look at the clock and to save then."""
        needed_s = self.reserved_s + self.longest_gap_s + 2 * self.longest_pause_s
        return time.monotonic() + needed_s > self.ends_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._looked_s = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_s = time.monotonic()
        if args.world_size > 1 and state.global_step % self.INTERVAL:
            return
        if self._looked_s is not None:
            self.longest_gap_s = max(self.longest_gap_s, self._step_s - self._looked_s)
        self._looked_s = self._step_s
        if state.global_step < state.max_steps and from_main(self.is_over()):
            self.has_stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.longest_pause_s = max(self.longest_pause_s, time.monotonic() - self._step_s)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint with a marker, or None."""
    whole = [path for path in _checkpoints(output_dir) if (path / MARKER).exists()]
    return str(whole[-1]) if whole else None


def remove_broken_checkpoints(output_dir: str | Path) -> list[str]:
    """Delete checkpoints without a marker, so that rotation does not keep one in place of a whole one."""
    broken = [path for path in _checkpoints(output_dir) if not (path / MARKER).exists()]
    for path in broken:
        shutil.rmtree(path)
    return [path.name for path in broken]


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named checkpoint-<steps>, fewest steps first."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in named if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
