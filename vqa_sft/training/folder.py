"""What a training writes into its run folder, before it begins and once it has ended."""

import json
import sys
from pathlib import Path
from typing import Any

from trl import SFTConfig

from vqa_sft.batch.prompts import Prompts
from vqa_sft.config.recipe import Recipe
from vqa_sft.data.split import write_parts
from vqa_sft.errors import InputError, explains
from vqa_sft.predictions.check_file import ANSWERS
from vqa_sft.predictions.file import Predictions, answers_as, classes_as, write_predictions
from vqa_sft.runs import folder as run_folder, hub
from vqa_sft.runs.checkpoints import last_whole_checkpoint
from vqa_sft.training.rows import Rows

PROMPTS = "prompts.json"


def kept_prompts(recipe: Recipe) -> Prompts | None:
    """The prompts that a run began with, where this one resumes it: the model's chat template may have changed. One
    that began before they were written has those of the recipe, and nothing went to the template. Raises InputError."""
    output_dir = recipe.values["output_dir"]
    if recipe.arguments.overwrite or last_whole_checkpoint(output_dir) is None:
        return None
    path = Path(output_dir) / PROMPTS
    if not path.is_file():
        return recipe.arguments.prompts
    with explains((OSError, ValueError, TypeError), f"{path} is damaged; give --overwrite to train the run again"):
        return Prompts(**json.loads(path.read_text(encoding="utf-8")))


def open_folder(recipe: Recipe, rows: Rows, prompts: Prompts) -> None:
    """Make the run folder ready, new or to be resumed. An overwriting run moves the earlier ones aside, those of all
    folds. Called by the main process."""
    output_dir, overwrite = recipe.values["output_dir"], recipe.arguments.overwrite
    if overwrite:
        for folder in recipe.folders:
            run_folder.put_aside(folder)
    is_resumed = last_whole_checkpoint(output_dir) is not None and not overwrite
    run_folder.start(output_dir, recipe.values, overwrite)
    if not is_resumed:  # a resumed run keeps what it wrote of its rows when it began
        write_parts(output_dir, rows.loaded, rows.parts)
        run_folder.write_json(Path(output_dir) / PROMPTS, vars(prompts))


def write_results(
    recipe: Recipe,
    rows: Rows,
    training_args: SFTConfig,
    prompts: Prompts,
    predictions: Predictions | None,
    metrics: dict[str, Any],
) -> str:
    """Write everything but the weights, run.json last but for the card; what was saved, in words. `predictions` are
    those of the validation rows. Called by the main process."""
    output_dir, columns = recipe.values["output_dir"], rows.loaded[0].columns
    metrics = {name: round(value, 6) if isinstance(value, float) else value for name, value in metrics.items()}
    if predictions is not None:
        predictions.metadata |= {"run": output_dir, "prompts_digest": prompts.digest, "split": "validation"}
        of_validation = rows.loaded[-1]  # validation_data, where there are such
        predictions.metadata |= {ANSWERS: answers_as(columns)} | classes_as(of_validation)
        write_predictions(f"{output_dir}/{run_folder.VALIDATION}", predictions)
    run_folder.write_metrics(output_dir, metrics)
    known = rows.num_letters, columns, str(metrics["precision"])
    run_folder.describe(
        run_folder.Run(output_dir, recipe.values, prompts, *known, classes=rows.loaded[0].classes),
        num_rows={"train": rows.num_train, "validation": len(rows.validation or [])},
        num_processes=training_args.world_size,
        micro_batch=training_args.per_device_train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
    )
    hub.write_card(output_dir)
    return f"Saved to {output_dir}: " + ", ".join(f"{name} {value}" for name, value in metrics.items())


def push(recipe: Recipe) -> None:
    """Push the finished run; when that fails, say how to do it later."""
    values = recipe.values
    try:
        print(hub.push_run(values["output_dir"], private=values.get("hub_private_repo"), token=values.get("hub_token")))
    except InputError as error:  # the run is whole; that it was not pushed is no failure of it
        print(f"warning: {error}", file=sys.stderr)
