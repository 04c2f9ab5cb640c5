"""A training recipe: one yaml in one flat mapping, any of whose keys can be given again on the command line.

training.py         our own fields, `RecipeArguments`
trl_arguments.py    TRL's `SFTConfig`, with our defaults
checks.py           what a recipe cannot ask for
fields.py           the parser, which knows nothing of recipes
"""

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vqa_sft.config.checks import check_combinations, check_values
from vqa_sft.config.fields import build, read_values
from vqa_sft.config.packaged import find_base
from vqa_sft.config.training import RecipeArguments, as_list
from vqa_sft.config.trl_arguments import build_model_args, build_training_args
from vqa_sft.data.folds import fold_numbers
from vqa_sft.errors import InputError

if TYPE_CHECKING:  # trl takes seconds to import
    from trl import ModelConfig, SFTConfig


@dataclass
class Recipe:
    """A checked recipe: what the user gave (`values`), and what is built from it."""

    values: dict[str, Any]
    arguments: RecipeArguments
    path: str | None = None
    folders: list[str] = field(default_factory=list)  # of all folds, else the only one

    def runs(self) -> "list[Recipe]":
        """This recipe; with `fold: all`, one for each fold, in folders of their own. Raises InputError."""
        if self.arguments.fold != "all":
            return [replace(self, folders=[self.values["output_dir"]])]
        own, runs = self.arguments, []
        name = self.values.get("hub_model_id") or os.path.basename(os.path.abspath(self.values["output_dir"]))
        values = {key: value for key, value in self.values.items() if key != "folds_at_once"}  # of all, not of one
        for fold in fold_numbers(own.folds_file):
            given = {"fold": fold, "output_dir": f"{self.values['output_dir']}/fold{fold}"}
            if self.values.get("push_to_hub"):
                given["hub_model_id"] = f"{name}-fold{fold}"
            # The first run moves the earlier ones of all folds aside.
            arguments = replace(own, fold=fold, folds_at_once=1, overwrite=own.overwrite and not runs)
            runs.append(replace(self, values=values | given, arguments=arguments))
        if not runs:
            raise InputError(f"{own.folds_file} has no fold but -1, whose rows are always trained on.")
        folders = [run.values["output_dir"] for run in runs]
        return [replace(run, folders=folders) for run in runs]

    def retried(self, settings: dict[str, Any]) -> "Recipe":
        """The same run with other `settings`, to be resumed in its folder."""
        arguments = replace(self.arguments, overwrite=False, auto_batch=False)
        return replace(self, values=self.values | settings, arguments=arguments)

    def inputs(self) -> list[str]:
        """What a run reads from disk, as far as it is on disk."""
        own = self.arguments
        named = [
            self.path,
            own.image_root,
            own.folds_file,
            own.init_adapter,
            own.classes,
            own.candidates,
            own.validation_candidates,
            self.values["model_name_or_path"],
            ".",
        ]
        return [name for name in named if name] + as_list(own.train_data) + as_list(own.validation_data)

    def model_args(self) -> "ModelConfig":
        """TRL's ModelConfig."""
        return build_model_args(self.values)

    def training_args(self, precision: str) -> "SFTConfig":
        """TRL's SFTConfig for "bf16", "fp16" or "fp32"; initialises the device and the process group."""
        return build_training_args(self.values, self.arguments, precision)


def read_recipe(argv: list[str]) -> Recipe:
    """The recipe named by `--config FILE`, overridden by `--key value`, checked. Raises InputError."""
    from trl import ModelConfig, SFTConfig

    values, path = read_values(argv, SFTConfig, ModelConfig, RecipeArguments)
    check_values(values)
    values["model_name_or_path"] = find_base(values["model_name_or_path"])
    arguments = build(RecipeArguments, values)
    check_combinations(values, arguments)
    return Recipe(values, arguments, path)
