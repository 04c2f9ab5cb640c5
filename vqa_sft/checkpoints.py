"""Which checkpoints are whole, and where a run goes on."""

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

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
