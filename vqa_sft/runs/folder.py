"""A run folder describes itself: predict.py needs the folder and the data, nothing else.

runs/demo/
  recipe.yaml           what the user asked for; micro-batches as they are when a GPU's memory ran out
  prompts.json          the prompts as the chat template takes them, for whoever resumes the run
  run.json              what it became: precision, micro-batch, letters, prompts, columns, versions, commit
  adapter_model.safetensors, adapter_config.json, processor files
  metrics.json          validation metrics of the weights that were kept
  validation.parquet    predictions for the validation rows
  report.html           a page about its validation rows
  blind.json            whether it looks at the images, once `vqa-sft blind` was asked
  log.csv, log.png      loss, accuracy and the rest of what was logged, step by step
  checkpoint-*/         to resume from
  .vqa-sft              says that the folder is ours
"""

import importlib.metadata
import json
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

import yaml

from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.classes import Classes
from vqa_sft.data.columns import Columns
from vqa_sft.errors import InputError
from vqa_sft.files import lying_in, remove_unfinished, write_whole
from vqa_sft.runs.checkpoints import check_whole, last_whole_checkpoint, remove_broken_checkpoints

RECIPE, RUN, METRICS, VALIDATION = "recipe.yaml", "run.json", "metrics.json", "validation.parquet"
LOG, PLOT = "log.csv", "log.png"
MARKER = ".vqa-sft"  # only we write it, so only such a folder is ever resumed, changed or deleted
# Fields that change where a run lies, how it is launched or shown, not what it computes.
_FREE = {
    "output_dir", "overwrite", "push_to_hub", "hub_model_id", "hub_private_repo", "report_to", "logging_steps",
    "dataloader_num_workers", "disable_tqdm", "run_name", "check_images",
    "auto_batch", "gradient_checkpointing", "activation_checkpointing", "per_device_eval_batch_size",
    "on_bad_row", "on_bad_image",  # the latter of runs before 0.1.0; rows.csv keeps what was left out
    "fast", "compile_layers", "activation_memory_budget", "cache_image_features", "time_budget_h", "folds_at_once",
}  # fmt: skip
# The model's processor and whatever code a base brings along, under the names that transformers gives them.
PROCESSOR_FILES = (
    "*processor*.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.spm", "*.tiktoken", "*chat_template*", "*.py",
)  # fmt: skip
# What the weights are, and what is known of them: for whoever loads the run elsewhere. Not its rows and their answers,
# its log, its checkpoints, or what was predicted into its folder.
SHARED_FILES = (
    *PROCESSOR_FILES, "adapter_config.json", "adapter_model*.safetensors", "config.json", "generation_config.json",
    "model*.safetensors", "model.safetensors.index.json", RUN, RECIPE, METRICS, "calibration.json", "README.md",
    "decision.json", "decision_template.jinja",
)  # fmt: skip
_MICRO_BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "vqa-sft")


@dataclass(frozen=True)
class Run:
    """A finished run as run.json describes it, or a base model that nobody fine-tuned, which has no folder."""

    folder: str | None
    recipe: dict[str, Any]  # what the user asked for
    prompts: Prompts
    num_letters: int | None = None
    columns: Columns | None = None  # of the training data
    precision: str | None = None
    classes: Classes | None = None  # of a classification
    content: dict[str, Any] = field(default_factory=dict, repr=False)  # all of run.json

    @property
    def base_model(self) -> str:
        return self.recipe["model_name_or_path"]

    @property
    def has_images(self) -> bool:
        """Whether rows of training could have images."""
        return bool(self.columns and self.columns.image)

    @property
    def has_context(self) -> bool:
        """Whether rows of training could have a context."""
        return bool(self.columns and self.columns.context)


def is_finished(folder: str | Path) -> bool:
    """Whether a run in this folder has saved everything; run.json is written last."""
    return (Path(folder) / RUN).is_file()


def check(folder: str | Path, values: dict[str, Any], overwrite: bool, inputs: Iterable[str | Path]) -> None:
    """Raises InputError when a run of the recipe `values` cannot be in this folder; changes nothing.

    That is when the folder holds a run of another recipe or files that are no run of ours, cannot be written, or when
    one of the `inputs` (data, recipe, base) lies in it, where `overwrite` would move it away.
    """
    folder = Path(folder).resolve()
    try:
        _probe(folder)
        is_used = folder.is_dir() and any(folder.iterdir())
    except (OSError, ValueError) as error:
        raise InputError(f"output_dir {folder} cannot be written: {error}. Choose another.") from error
    if is_used and not (folder / MARKER).is_file():
        raise InputError(f"output_dir {folder} is not empty and holds no run of ours. Choose another.")
    if overwrite:
        inside = lying_in(folder, inputs)
        if inside:
            raise InputError(f"output_dir {folder} holds what the run reads: {', '.join(inside)}. Choose another.")
        if _aside(folder).exists() and not (_aside(folder) / MARKER).is_file():
            raise InputError(
                f"{_aside(folder)}, where the earlier run would go, is no run of ours. Choose another name."
            )
    # A run that saved nothing yet, because of a mistake in its recipe perhaps, holds nothing to lose.
    checkpoint = last_whole_checkpoint(folder)
    if not overwrite and (is_finished(folder) or checkpoint):
        _check_same(folder, without_secrets(values))
    if checkpoint and not overwrite and not is_finished(folder):  # that is where it resumes
        check_whole(checkpoint)


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _probe(folder: Path) -> None:
    """Raises OSError when the folder can neither be made nor written; leaves nothing behind."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file")
    with tempfile.TemporaryFile(dir=existing):
        pass


def start(folder: str | Path, values: dict[str, Any], overwrite: bool) -> None:
    """Make the checked folder ready, new or to be resumed; with `overwrite`, the run in it moves aside."""
    folder = Path(folder).resolve()
    if overwrite:
        put_aside(folder)
    for name in remove_broken_checkpoints(folder):
        print(f"{folder / name} was not finished when the run stopped; it is removed.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    remove_unfinished(folder)
    write_whole(folder / RECIPE, yaml.safe_dump(without_secrets(values), allow_unicode=True, sort_keys=False))


def put_aside(folder: str | Path) -> None:
    """Move a run, if there is one, to the same name with .old, and delete what was there."""
    folder = Path(folder).resolve()
    if not (is_finished(folder) or last_whole_checkpoint(folder)):
        return
    # Moved, not deleted: the new run may fail yet, and other things may lie in the folder by now.
    old = _aside(folder)
    if old.exists():
        if not (old / MARKER).is_file():
            raise InputError(f"{old}, where the earlier run would go, is no run of ours. Choose another name.")
        shutil.rmtree(old)
    folder.rename(old)
    print(f"The earlier run in {folder} is now {old}.")


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A run folder is pushed and passed on; a token must not travel in it."""
    return {key: value for key, value in values.items() if key != "hub_token"}


def _check_same(folder: Path, now: dict[str, Any]) -> None:
    try:
        before = dict(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / RECIPE} cannot be read. Choose another output_dir.") from error
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if key not in _FREE]
    if _rows_a_step(before) == _rows_a_step(now):
        changed = [key for key in changed if key not in _MICRO_BATCH]
    if changed:
        lines = [f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]
        raise InputError(
            f"{folder} holds a run of another recipe:\n" + "\n".join(lines) + "\nChoose another output_dir, or give "
            "--overwrite to move that run aside."
        )


def _rows_a_step(values: dict[str, Any]) -> tuple[int | None, int]:
    """What the global batch is made of, whatever the micro-batches are."""
    if (stated := values.get("global_batch_size")) is not None:
        return stated, 0
    return None, values.get("per_device_train_batch_size", 8) * values.get("gradient_accumulation_steps", 1)


def describe(
    run: Run, *, num_rows: dict[str, int | None], num_processes: int, micro_batch: int, accumulation: int
) -> None:
    """Write run.json."""
    content = {
        "recipe": without_secrets(run.recipe),
        "precision": run.precision,
        "num_letters": run.num_letters,
        "prompts": vars(run.prompts),
        "prompts_digest": run.prompts.digest,
        "columns": vars(run.columns),
        "classes": run.classes and {"names": run.classes.names, "other_names": run.classes.other_names},
        "num_rows": num_rows,
        "num_processes": num_processes,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
    }
    write_json(Path(run.folder) / RUN, content)


def write_metrics(folder: str | Path, metrics: dict[str, float | str]) -> None:
    """Write metrics.json."""
    write_json(Path(folder) / METRICS, metrics)


def copy_files(folder: Path, target: Path, patterns: Collection[str]) -> None:
    """Copy the files of a run with such names: PROCESSOR_FILES, or SHARED_FILES."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            shutil.copy(path, target)


def read_run(folder: str | Path) -> Run:
    """The finished run in this folder. Raises InputError when there is none."""
    path = Path(folder) / RUN
    if not Path(folder).is_dir():
        raise InputError(f"no such run folder: {folder}.")
    if not path.is_file():
        inside = sorted(Path(folder).glob(f"*/{RUN}"))  # folds, or the adapter of an export
        which = f"the run in it: {inside[0].parent}" if inside else "the output_dir of a run that has ended"
        raise InputError(f"{folder} holds no finished run (no {RUN}). Give {which}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts, columns = Prompts(**content["prompts"]), Columns(**content["columns"])
        _check_types(content["recipe"], columns, content["num_letters"])
        of_training = {"columns": columns, "precision": content.get("precision"), "content": content}
        if known := content.get("classes"):  # runs of earlier versions have none
            others = tuple(tuple(of_class) for of_class in known["other_names"])
            of_training["classes"] = Classes(tuple(known["names"]), "the run", other_names=others)
        return Run(str(folder), content["recipe"], prompts, content["num_letters"], **of_training)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}). Train the run again.") from error


def _check_types(recipe: dict[str, Any], columns: Columns, num_letters: Any) -> None:
    """Raises ValueError for what the code after it cannot take."""
    one = (columns.id, columns.question, columns.answer, columns.context, columns.targets, columns.answer_format)
    are_right = {
        "columns": all(isinstance(name, str | None) for name in (*one, *columns.image, *columns.choices)),
        "num_letters": type(num_letters) is int and 2 <= num_letters <= 26,
        "model_name_or_path": isinstance(recipe["model_name_or_path"], str),
        "columns or keep_rows": all(isinstance(recipe.get(name) or {}, dict) for name in ("columns", "keep_rows")),
        "empty_cells": isinstance(recipe.get("empty_cells"), list | None),
        "dtype": recipe.get("dtype") in (None, "auto", "bfloat16", "float16", "float32"),
    }
    for name, is_right in are_right.items():
        if not is_right:
            raise ValueError(name)


def read_runs(folders: Sequence[str], model: str | None = None) -> list[Run]:
    """Finished runs; `model` says where their base is now, if not where it was in training.

    Raises InputError where one of them is not finished, or `model` cannot be the base of all.
    """
    runs = [read_run(folder) for folder in folders]
    if model is None:
        return runs
    bases = sorted({run.base_model for run in runs})
    if len({PurePath(base).name for base in bases}) > 1:
        raise InputError(f"model names one base, and the runs have several: {', '.join(bases)}. Give them apart.")
    for folder in folders:
        if not (Path(folder) / "adapter_config.json").is_file():
            raise InputError(f"{folder} has no adapter and needs no base. Leave model out.")
    return [replace(run, recipe=run.recipe | {"model_name_or_path": model}) for run in runs]


def runs_in(folders: Sequence[str]) -> list[str]:
    """The folders; in place of one that `fold: all` made, those of its folds. Raises InputError for one given twice."""
    found = []
    for folder in folders:
        folds = sorted(Path(folder).glob("fold*"), key=lambda path: (len(path.name), path.name))
        # And not fold0.old, which a later training put aside.
        folds = [str(path) for path in folds if path.name[4:].isdecimal() and (path / MARKER).is_file()]
        found += folds if folds and not is_finished(folder) else [folder]
    places = [Path(folder).resolve() for folder in found]
    twice = [folder for number, folder in enumerate(found) if places[number] in places[:number]]
    if twice:
        raise InputError(f"the run {twice[0]} is given twice. Give it once.")
    return found


def write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git on this machine
        return None
    return run.stdout.strip() or None
