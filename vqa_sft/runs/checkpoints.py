"""Which checkpoints are complete, and where a run resumes. No torch."""

import json
import os
import shutil
from pathlib import Path

from vqa_sft.errors import InputError

MARKER = "complete"  # of a checkpoint: `training.saving` writes it last, with the bytes of each file


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


def mark_whole(checkpoint: str | Path) -> None:
    """Write the marker: all files are there, and how long each of them is."""
    files = [path for path in sorted(Path(checkpoint).rglob("*")) if path.is_file() and path.name != MARKER]
    with (Path(checkpoint) / MARKER).open("w", encoding="utf-8") as marker:
        json.dump({path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}, marker)
        marker.flush()
        os.fsync(marker.fileno())


def check_whole(checkpoint: str | Path) -> None:
    """Raises InputError where a file of a marked checkpoint is not there, or cut: it was copied in part, or power
    failed. transformers (5.23) would resume without an optimiser that it does not find."""
    marked = (Path(checkpoint) / MARKER).read_text(encoding="utf-8")
    sizes = json.loads(marked or "{}")  # runs of earlier versions have an empty one
    paths = {name: Path(checkpoint) / name for name in sizes}
    broken = [name for name, path in paths.items() if not path.is_file() or path.stat().st_size < sizes[name]]
    if broken:
        raise InputError(
            f"{checkpoint} is not as it was saved: {', '.join(broken)} cut or not there. Copy it again, or delete it: "
            "the same command then resumes from an earlier checkpoint, or starts again where there is none."
        )


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
