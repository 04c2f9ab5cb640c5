"""Which checkpoints are complete, and where a run resumes. No torch."""

import json
import shutil
from pathlib import Path

MARKER = "complete"  # of a checkpoint: `training.saving` writes it last


def resumes_from(output_dir: str | Path) -> str:
    """The end of a message: what the same command does."""
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is None:
        return "starts again from the base model: no checkpoint is complete yet."
    return f"resumes from {checkpoint} (without --overwrite)."


def stopped_early(checkpoint: str | Path, patience: int) -> int | None:
    """The step after which early stopping ended the run that saved this checkpoint, if it did. The Trainer restores the
    count of evaluations without improvement, but checks it only after the next evaluation."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    saved = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    if isinstance(saved, list):
        saved = saved[0]
    count = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state["global_step"] if count >= patience else None


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint with a marker, or None."""
    whole = [path for path in _checkpoints(output_dir) if (path / MARKER).exists()]
    return str(whole[-1]) if whole else None


def remove_broken_checkpoints(output_dir: str | Path) -> list[str]:
    """Delete checkpoints without a marker, so that rotation does not keep one in place of a complete one."""
    broken = [path for path in _checkpoints(output_dir) if not (path / MARKER).exists()]
    for path in broken:
        shutil.rmtree(path)
    return [path.name for path in broken]


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named checkpoint-<steps>, fewest steps first."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in named if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
