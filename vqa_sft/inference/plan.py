"""Which runs score which rows, in which passes, and what their numbers depend on."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from vqa_sft.batch.control import ORIGINAL
from vqa_sft.config.prediction import BASE, PredictionArguments
from vqa_sft.config.training import RecipeArguments
from vqa_sft.data.find_files import find_files
from vqa_sft.data.options import CANDIDATES, CLASS
from vqa_sft.inference.results import BLOCK_COLUMNS
from vqa_sft.inference.rows import Rows
from vqa_sft.runs.folder import Run, read_runs, runs_in

if TYPE_CHECKING:  # it loads torch
    from vqa_sft.inference.scorer import Group

# What a run's or a base's numbers depend on, and not what is made of them later.
MODEL_FILES = ("*.safetensors", "run.json", "*config.json", "chat_template*", "tokenizer*")
# The same of a prediction.
_FIELDS = ("model", "part", "data", "orders", "scales", "average", "batch_size", "on_bad_row", "streaming")
_FIELDS += ("min_pixels", "max_pixels", "limit", "use_cpu", "columns", "keep_rows", "image_root", "split")
_FIELDS += ("task", "candidates", "num_candidates", "absent")
_FIELDS += ("images", "data_config", "encoding", "answer_format", "fixed_question", "fixed_choices")


@dataclass
class Pass:
    """Rows that runs of one group score, those of these numbers, with their images shown in one way (control.py)."""

    group: "Group"
    numbers: Sequence[int]
    examples: Dataset | IterableDataset
    images: str = ORIGINAL


def find_runs(args: PredictionArguments) -> list[Run]:
    """The runs that score, or the base model as it is, with our built-in prompts. Raises InputError."""
    if args.run != [BASE]:
        return read_runs(runs_in(args.run), args.model)
    prompts = RecipeArguments(train_data="none", **args.of_base).prompts
    return [Run(None, {"model_name_or_path": args.model} | args.of_base, prompts)]


def plan_passes(groups: Sequence["Group"], runs: Sequence[Run], rows: Rows, images: Sequence[str]) -> list[Pass]:
    """One pass for the runs of a group; where each run has rows of its own, one for each run. All of it for each of the
    ways in which images are shown, with the model that is loaded."""
    rows_of = {run.folder: of_run for run, of_run in zip(runs, rows.of_run, strict=True)}
    passes = []
    for group in groups:
        own = [rows_of[run.folder] for run in group.runs]
        if all(examples is own[0] for examples in own):
            of_group = [Pass(group, range(len(own)), own[0])]
        else:
            of_group = [Pass(group, [number], examples) for number, examples in enumerate(own)]
        passes += [replace(each, images=kind) for kind in images for each in of_group]
    return passes


def describe_plan(args: PredictionArguments, groups: Sequence["Group"], rows: Rows) -> dict[str, Any]:
    """What the numbers depend on: with another plan nothing that was scored is taken over."""
    plan: dict[str, Any] = {name: getattr(args, name) for name in _FIELDS}
    runs = [run for group in groups for run in group.runs]
    names = [run.folder or BASE for run in runs]
    for folder in [*names, *sorted({run.base_model for run in runs})]:  # a base may be a folder
        files = [path for pattern in MODEL_FILES for path in sorted(Path(folder).glob(pattern))]
        plan.setdefault("models", []).append([folder, [_describe_file(path) for path in files]])
    if args.run == [BASE]:  # a run's are in its run.json
        plan["prompts"] = runs[0].prompts.digest
    digest = hashlib.sha256()
    for source in rows.sources:
        digest.update(f"{source.name} {source.columns}".encode())
        if isinstance(source.examples, Dataset):
            digest.update(digest_rows(source.examples).encode())
        else:  # its rows are not known: the files that they come from
            files = find_files([args.data]) or sorted(Path(args.data).rglob("*"))
            digest.update(json.dumps([_describe_file(path) for path in files]).encode())
    plan |= {"rows": digest.hexdigest(), "columns of rows": [*BLOCK_COLUMNS]}
    return plan | {"precision": {group.runs[0].folder or BASE: group.precision for group in groups}}


def digest_rows(examples: Dataset) -> str:
    """What tells rows from others: their texts and answers, and what `_describe_image` says."""
    digest = hashlib.sha256()
    names = ["id", "question", "context", "choices", "answer", "images"]
    names += [name for name in (CLASS, CANDIDATES) if name in examples.column_names]
    for row in examples.select_columns(names):
        images = [_describe_image(image) for image in row.pop("images")]
        digest.update(json.dumps([row, images]).encode())
    return digest.hexdigest()


def _describe_image(image: dict) -> list:
    """What tells one {bytes, path} from another: its content, or the path, size and time of its file."""
    if image["bytes"] is not None:
        return [hashlib.sha256(image["bytes"]).hexdigest()]
    return _describe_file(image["path"])


def _describe_file(path: str | Path) -> list:
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return [str(path)]
    return [str(path), facts.st_size, facts.st_mtime_ns]
