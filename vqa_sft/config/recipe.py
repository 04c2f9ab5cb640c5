"""The fields of a recipe and their checks. Reading and checking loads no torch until a training field is named.

A recipe is one yaml: our fields (`RecipeArguments`), TRL's model fields (`ModelConfig`) and its training fields
(`SFTConfig`), in one flat mapping; any of them can be given again on the command line.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vqa_sft.batch.prompts import Prompts, builtin_prompts
from vqa_sft.config.fields import bounds_of, build, check_bounds, check_required, option, read_values
from vqa_sft.data.columns import Columns, check_columns, check_fixed, known_columns
from vqa_sft.data.duplicates import DISTANCE, MAX_DISTANCE
from vqa_sft.data.folds import fold_numbers
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError


@dataclass
class RecipeArguments:
    """Our own fields; model and data have no default."""

    train_data: str | list[str] = option(
        "File (CSV, TSV, JSONL, Parquet), several, a glob, a saved dataset, or a Hub dataset to train on."
    )
    train_split: str = option("Split of a Hub dataset to train on.", default="train")
    validation_data: str | list[str] | None = option("Like train_data, for validation.", default=None)
    validation_split: str = option("Split of a Hub dataset to validate on.", default="validation")
    validation_fraction: float = option(
        "Share of the training rows held out for validation when there is no validation_data; 0: none.",
        default=0.0,
        bounds=(0, 0.5),
    )
    folds_file: str | None = option("CSV of id and fold, as `vqa-sft folds` writes it.", default=None)
    fold: int | Literal["all"] | None = option(
        "The fold of folds_file to validate on; the others are trained on. all: each in turn.",
        default=None,
        bounds=(0, None),
    )
    time_budget_h: float | None = option(
        "Hours after which to save and stop; the same command goes on later.", default=None, bounds=(0.001, None)
    )
    duplicate_distance: int | None = option(
        "Images whose hashes differ in at most so many bits count as one when rows are held out; null: exact only.",
        default=DISTANCE,
        bounds=(0, MAX_DISTANCE),
    )
    data_config: str | list[str] | None = option("Configuration (subset) of a Hub dataset, or several.", default=None)
    encoding: str | None = option("Encoding of text files; default: detected.", default=None)
    streaming: bool = option("Read the training rows as they are needed; needs max_steps.", default=False)
    image_root: str | None = option(
        "Folder that image paths are relative to and stay in; default: the folder of the file.", default=None
    )
    columns: dict | None = option(
        "Columns that are not found by their names: {id, image, question, choices, answer, context, targets}. choices: "
        "in_question reads them from the question's text; image: 'img/{id}.png' is a path with cells of the row.",
        default=None,
    )
    fixed_question: str | None = option(
        "The question of every row, where the data have no column for it.", default=None
    )
    fixed_choices: list[str] | None = option("The choices of every row: [yes, no].", default=None)
    answer_format: Literal["letter", "index_from_0", "index_from_1", "text"] | None = option(
        "How the answers are written; default: inferred.", default=None
    )
    keep_rows: dict | None = option("Keep only rows whose columns hold these values: {column: value}.", default=None)
    empty_cells: list[str] | None = option(
        "Texts that mean an empty cell; pandas writes nan, which may also be a choice.", default=None
    )
    max_choices: int | None = option(
        "Most choices of a row; default: as the data has. A stream whose later rows have more needs it.",
        default=None,
        bounds=(2, 26),
    )
    limit: int | None = option("Use only the first rows, to try a recipe out.", default=None, bounds=(1, None))
    check_images: bool = option("Decode every image before the model is loaded.", default=True)
    on_bad_row: Literal["error", "skip"] = option(
        "What to do with rows that cannot be used, or whose images cannot: stop, or leave them out.", default="error"
    )

    min_pixels: int | None = option(
        "Smallest width x height of an image, for models that keep its shape.", default=None, bounds=(1, 10**8)
    )
    max_pixels: int | None = option(
        "Largest width x height of an image, for models that keep its shape.", default=None, bounds=(1, 10**8)
    )
    prompt_language: Literal["en", "ko", "both"] = option("Language of the built-in prompts.", default="en")
    type_prompts: dict | Literal["builtin"] | None = option(
        "User texts per question type: {counting: ...}, or builtin; default: one text for all.", default=None
    )
    system_prompt: str | None = option("System text; empty: the model's own; default: built in.", default=None)
    user_prompt: str | None = option("User text with {question} and {choices}; default: built in.", default=None)
    choice_prompt: str = option("One line of {choices}, with {letter} and {text}.", default=Prompts.choice)

    loss: Literal["letters", "vocabulary"] = option(
        "Cross-entropy over the row's own letters, or over the whole vocabulary.", default="letters"
    )
    vocabulary_weight: float | None = option(
        "Between the two: weight of the letters' share in the whole vocabulary; 0 is `letters`, 1 is `vocabulary`.",
        default=None,
        bounds=(0, 1),
    )
    letter_smoothing: float = option(
        "So much of the target is spread over the row's own letters.", default=0.0, bounds=(0, 0.5)
    )
    supervise_end_of_turn: bool = option(
        "Train the token that ends the turn after the letter too, for those who will `generate`.", default=False
    )
    init_adapter: str | None = option(
        "Folder of an adapter, of an earlier run perhaps, to train on from; its rank and layers are kept.", default=None
    )
    adapt_tower: bool = option("Adapt the linear layers of the vision tower's blocks too.", default=False)
    adapt_merger: bool = option(
        "Adapt the linear layers of the merger or projector too, from the tower to the language model.", default=False
    )
    vision_learning_rate: float | None = option(
        "Learning rate of all that is trained outside the language model; default: learning_rate.",
        default=None,
        bounds=(0, 1e3),
    )
    averaging: Literal["ema", "swa"] | None = option(
        "Average the adapter over steps, and end with the average where validation NLL says so.", default=None
    )
    ema_decay: float = option(
        "How much of the average a step of ema keeps, once it is warm.", default=0.99, bounds=(0, 0.99999)
    )
    swa_start: float = option("Steps before swa begins; below 1: a share of all.", default=0.5, bounds=(0, None))
    shuffle_choices: bool = option("Draw a new order of the choices for every row and epoch.", default=True)
    image_augmentation: float = option(
        "In training, each side, brightness, contrast and colour of an image times a factor, at most so far from 1.",
        default=0.0,
        bounds=(0, 0.5),
    )
    flip_images: bool = option(
        "In training, mirror half of the images; not where left and right matter, or text is read.", default=False
    )
    global_batch_size: int | None = option(
        "Rows per optimiser step over all processes; accumulation follows from it.", default=None, bounds=(1, None)
    )
    fast: bool = option(
        "Rows without padding and a faster vision tower, where the model allows it; false: the libraries' own paths.",
        default=True,
    )
    cache_image_features: bool = option(
        "Keep what the frozen vision tower makes of each image on disk, for all epochs, folds and runs.",
        default=False,
    )
    compile_layers: bool | None = option(
        "Compile the layers: about a minute at the start; default: for runs that are long enough, on newer GPUs.",
        default=None,
    )
    # Compiled layers keep less at the same speed (docs/speed.md); torch's own default is 1.
    activation_memory_budget: float = option(
        "How much of what compiled layers would keep for the backward pass they may keep; the rest is computed again.",
        default=0.7,
        bounds=(0, 1),
    )
    auto_batch: bool = option(
        "Choose micro-batch, accumulation and gradient_checkpointing for the GPU's memory; rows per step stay.",
        default=False,
    )
    early_stopping_patience: int | None = option(
        "Stop after so many evaluations without a better one.", default=None, bounds=(1, None)
    )
    overwrite: bool = option("Move an earlier run in output_dir to output_dir.old first.", default=False)

    def __post_init__(self) -> None:
        check_bounds(vars(self), bounds_of(RecipeArguments))
        if self.vocabulary_weight is None:
            self.vocabulary_weight = 1.0 if self.loss == "vocabulary" else 0.0
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise InputError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}.")
        check_columns(self.columns or {})
        check_fixed(self.fixed_question, self.fixed_choices)
        self.prompts  # noqa: B018  raises for a template without its placeholders

    @classmethod
    def of_run(cls, values: dict[str, Any]) -> "RecipeArguments":
        """From the values of a recipe that a run folder holds."""
        return build(cls, values)

    @property
    def data_options(self) -> ReadOptions:
        """How the training rows are read."""
        names = ("encoding", "image_root", "columns", "answer_format", "keep_rows", "empty_cells", "limit")
        names += ("fixed_question", "fixed_choices")
        values = {name: getattr(self, name) for name in names}
        values["max_choices"] = self.max_choices if self.streaming else None
        return ReadOptions(split=self.train_split, config=self.data_config, **values)

    def options_for_other_data(self, trained: Columns) -> ReadOptions:
        """The same for validation or test rows, which may be written in another way than the training rows."""
        values = {"known_columns": known_columns(trained, self.columns), "trained": trained}
        values |= {"columns": None, "answer_format": None, "max_choices": None}
        return replace(self.data_options, split=self.validation_split, **values)

    @property
    def adapted_parts(self) -> dict[str, bool]:
        """What `model.lora_config` takes beside the libraries' fields."""
        return {"adapt_tower": self.adapt_tower, "adapt_merger": self.adapt_merger}

    @property
    def prompts(self) -> Prompts:
        prompts = builtin_prompts(self.prompt_language, by_type=self.type_prompts == "builtin")
        given = {"system": self.system_prompt, "user": self.user_prompt, "choice": self.choice_prompt}
        if isinstance(self.type_prompts, dict):
            given["types"] = self.type_prompts
        return replace(prompts, **{name: text for name, text in given.items() if text is not None})


# Where we differ from TRL's and transformers' defaults.
DEFAULTS = {
    "use_peft": True,
    "lora_dropout": 0.0,  # a third of the activations' memory for nothing that was measured
    "dtype": None,  # follows the precision, see model.choose_precision
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
    # Every weight of an adapter takes part in every row, so DDP need not search; TRL turns the search on for images.
    "ddp_find_unused_parameters": False,
    # A loss that is no number is shown, and no step waits for the GPU to look whether it is one.
    "logging_nan_inf_filter": False,
    "restore_callback_states_from_checkpoint": True,  # else early stopping forgets its patience on resume
}
# Not the plain NLL: where answers are noisy or few it is lowest for weights that are not sure of anything, and a
# temperature mends that better than an early epoch does (docs/ladder.md).
CHOOSING = "nll_calibrated"
VALIDATION_DEFAULTS = {
    "eval_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": CHOOSING,
}
# What the collator and the trainer rely on.
FIXED = {"remove_unused_columns": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
REFUSED = {
    "label_smoothing_factor": "it trains the wrong token on vision models; use `letter_smoothing`",
    "neftune_noise_alpha": "its noise depends on the length of a row, and rows are packed",
    "packing": "images cannot be packed here yet",
    "padding_free": "images cannot be packed here yet",
    "assistant_only_loss": "only the answer is supervised, always",
    "completion_only_loss": "only the answer is supervised, always",
    "loss_type": "use `loss: letters` or `loss: vocabulary`",
    "use_liger_kernel": "it replaces the forward that keeps only the answer position",
    "lora_task_type": "it is always CAUSAL_LM",
    "model_init_kwargs": "use the model fields themselves (dtype, attn_implementation, load_in_4bit, ...)",
    "max_length": "a prompt is never cut; limit images with max_pixels",
    "remove_unused_columns": "the collator needs all columns",
    "dataset_kwargs": "prompts are rendered in the collator",
    "auto_find_batch_size": "it would change the global batch in silence",
    "prediction_loss_only": "it drops the metrics that choose the best checkpoint",
    "batch_eval_metrics": "metrics are computed over all validation rows at once",
    "enable_jit_checkpoint": "a SIGTERM saves and stops by itself, and these checkpoints would not count",
    "train_sampling_strategy": "rows have no length before the collator",
    "chat_template_path": "the prompt would no longer be the model's own",
    "eos_token": "nothing is generated",
    "pad_token": "the tokenizer has one",
    "do_train": "recipes/sft.py trains, recipes/predict.py predicts",
    "resume_from_checkpoint": "a run goes on from its last whole checkpoint by itself",
}
# Smallest value, largest value; what lies outside ends in a traceback or in an untrained adapter.
BOUNDS = {
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "eval_accumulation_steps": (1, None),
    "save_total_limit": (2, None),  # with 1, a run killed while it saves keeps no checkpoint
    "learning_rate": (0, 1e3),
    "weight_decay": (0, 1e3),
    "max_grad_norm": (0, None),
    "logging_steps": (0, 10**9),
    "eval_steps": (0, 10**9),
    "save_steps": (0, 10**9),
    "warmup_steps": (0, None),
    "adam_beta1": (0, 0.999999999),
    "adam_beta2": (0, 0.999999999),
    "adam_epsilon": (0, 1),
    "lora_r": (1, None),
    "lora_alpha": (1, None),
    "lora_dropout": (0, 0.99),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, None),
}
CHOSEN_BY = ("nll_calibrated", "nll", "accuracy", "ece", "loss")


@dataclass
class Recipe:
    """A checked recipe: what the user gave (`values`), and what is built from it."""

    values: dict[str, Any]
    arguments: RecipeArguments
    path: str | None = None

    def runs(self) -> "list[Recipe]":
        """This recipe; with `fold: all`, one for each fold, in folders of their own. Raises InputError."""
        if self.arguments.fold != "all":
            return [self]
        own, runs = self.arguments, []
        name = self.values.get("hub_model_id") or os.path.basename(os.path.abspath(self.values["output_dir"]))
        for fold in fold_numbers(own.folds_file):
            given = {"fold": fold, "output_dir": f"{self.values['output_dir']}/fold{fold}"}
            if self.values.get("push_to_hub"):
                given["hub_model_id"] = f"{name}-fold{fold}"
            # The first run moves the earlier ones of all folds aside.
            arguments = replace(own, fold=fold, overwrite=own.overwrite and not runs)
            runs.append(replace(self, values=self.values | given, arguments=arguments))
        if not runs:
            raise InputError(f"{own.folds_file} has no fold but -1, whose rows are always trained on.")
        return runs

    def going_on(self, settings: dict[str, Any]) -> "Recipe":
        """The same run with other `settings`, to go on in its folder."""
        arguments = replace(self.arguments, overwrite=False, auto_batch=False)
        return replace(self, values=self.values | settings, arguments=arguments)

    def inputs(self) -> list[str]:
        """What a run reads from disk, as far as it is on disk."""
        own = self.arguments
        named = [self.path, own.image_root, own.folds_file, own.init_adapter, self.values["model_name_or_path"], "."]
        return [name for name in named if name] + as_list(own.train_data) + as_list(own.validation_data)

    def model_args(self) -> Any:
        """TRL's ModelConfig."""
        from trl import ModelConfig

        return build(ModelConfig, DEFAULTS | self.values)

    def training_args(self, precision: str) -> Any:
        """TRL's SFTConfig for "bf16", "fp16" or "fp32"; initialises the device and the process group."""
        import torch
        from trl import SFTConfig

        metric = self.values.get("metric_for_best_model") or CHOOSING
        on_gpu = torch.cuda.is_available() and not self.values.get("use_cpu")
        values = {"dataloader_pin_memory": on_gpu}  # without a GPU torch warns once an epoch
        values |= DEFAULTS | (VALIDATION_DEFAULTS if self.validates else {}) | self.values | FIXED
        if self.validates and "greater_is_better" not in self.values:
            values["greater_is_better"] = metric.removeprefix("eval_") == "accuracy"
        values |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
        # Else every step waits until its batch is copied, and the GPU then waits for the next kernels.
        values["accelerator_config"] = {"non_blocking": on_gpu} | _accelerator_config(values)
        if self.arguments.streaming:
            # Else accelerate collates in one process and cuts batches by rows; pixels of mixed sizes are no rows.
            values["accelerator_config"] |= {"dispatch_batches": False, "split_batches": False}
        # Pushing is ours, after the run is saved: a failed push must not lose it. The token would be saved as well.
        values |= {"push_to_hub": False, "hub_token": None}
        if _reaches_vision(values, self.arguments) and "ddp_find_unused_parameters" not in self.values:
            # A whole tower may hold weights that no row reaches (LLaVA's last layer), and an adapter on it is reached
            # by no row without an image; DDP must search for such weights, or it waits for their gradients for ever.
            values.pop("ddp_find_unused_parameters")
        if self.arguments.global_batch_size is not None:
            micro_batch = values["per_device_train_batch_size"] = _micro_batch(values, self.arguments.global_batch_size)
            values["gradient_accumulation_steps"] = self.arguments.global_batch_size // (micro_batch * _num_processes())
        return build(SFTConfig, values)

    @property
    def validates(self) -> bool:
        own = self.arguments
        return own.validation_data is not None or own.validation_fraction > 0 or own.folds_file is not None


def read_recipe(argv: list[str]) -> Recipe:
    """The recipe named by `--config FILE`, overridden by `--key value`, checked. Raises InputError."""
    from trl import ModelConfig, SFTConfig

    values, path = read_values(argv, SFTConfig, ModelConfig, RecipeArguments)
    for name in values.keys() & REFUSED.keys():
        raise InputError(f"`{name}` cannot be set: {REFUSED[name]}.")
    check_bounds(values, BOUNDS | bounds_of(RecipeArguments))
    check_required(values, ("model_name_or_path", "train_data", "output_dir"))
    recipe = Recipe(values, build(RecipeArguments, values), path)
    _check_combinations(recipe)
    return recipe


def _accelerator_config(values: dict[str, Any]) -> dict[str, Any]:
    """What is given for accelerate, there or in a JSON file. Raises InputError."""
    own = values.get("accelerator_config") or {}
    if isinstance(own, str):
        try:
            own = json.loads(Path(own).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"accelerator_config: {own} cannot be read: {error}") from error
    if not isinstance(own, dict):
        raise InputError(f"accelerator_config must be a mapping, or a JSON file with one; got {own!r}.")
    if own.get("dispatch_batches"):
        raise InputError("accelerator_config: dispatch_batches cuts batches by rows; images are no rows. Remove it.")
    return own


def _reaches_vision(values: dict[str, Any], own: RecipeArguments) -> bool:
    """Whether something outside the language model may be trained."""
    named = any(values.get(name) for name in ("lora_target_modules", "lora_modules_to_save"))
    return named or values.get("use_peft") is False or any(own.adapted_parts.values()) or bool(own.init_adapter)


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_combinations(recipe: Recipe) -> None:
    values, own = recipe.values, recipe.arguments
    for problem, applies in _impossible(values, own, recipe.validates):
        if applies:
            raise InputError(problem)
    _check_trackers(values.get("report_to") or "none")
    _accelerator_config(values)
    if own.global_batch_size is not None:
        micro_batch = _micro_batch(values, own.global_batch_size)
        step = micro_batch * _num_processes()
        if own.global_batch_size % step:
            raise InputError(
                f"global_batch_size {own.global_batch_size} is no multiple of per_device_train_batch_size "
                f"{micro_batch} x {_num_processes()} processes = {step}. Change one of them."
            )


def _micro_batch(values: dict[str, Any], global_batch_size: int) -> int:
    """Rows of a process at a time; on several processes no more than its share of the global batch, so that a recipe
    for one GPU runs on more."""
    micro_batch, num_processes = values.get("per_device_train_batch_size", 8), _num_processes()
    share = global_batch_size // num_processes
    return min(micro_batch, share) if num_processes > 1 and share * num_processes == global_batch_size else micro_batch


def as_list(source: str | list[str] | None) -> list[str]:
    """The names of a source that may be one, several or none."""
    return source if isinstance(source, list) else [source] if source else []


def _same_rows(own: RecipeArguments) -> bool:
    """Whether a file, or a split of a dataset, is both trained and validated on."""
    train, validation = ({os.path.realpath(name) for name in as_list(s)} for s in (own.train_data, own.validation_data))
    have_splits = not any(os.path.isfile(name) for name in train)
    return bool(train & validation) and not (have_splits and own.validation_split != own.train_split)


def _check_trackers(report_to: str | list[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    names = [report_to] if isinstance(report_to, str) else report_to
    missing = [name for name in names if name not in ("none", "all", *get_available_reporting_integrations())]
    if missing:
        raise InputError(
            f"report_to: {', '.join(missing)} is not installed or no tracker. pip install it, or remove it."
        )


def _impossible(values: dict[str, Any], own: RecipeArguments, validates: bool) -> Iterable[tuple[str, bool]]:
    quantised = values.get("load_in_4bit") or values.get("load_in_8bit")
    adapts = [name for name, is_adapted in own.adapted_parts.items() if is_adapted]
    uncompiled = ["compile_layers: false"] * (own.compile_layers is False) + ["fast: false"] * (not own.fast)
    uncompiled += ["a quantised base"] * bool(quantised)
    own_adapter = [name for name in values if name.startswith(("lora_", "use_rslora", "use_dora"))] + adapts
    needs_validation = [
        name for name in ("early_stopping_patience", "load_best_model_at_end", "eval_on_start") if values.get(name)
    ] + ["eval_strategy"] * (values.get("eval_strategy", "no") != "no")
    return [
        (
            "bf16 and fp16 are both set. Keep one, or none to let the GPU decide.",
            values.get("bf16") and values.get("fp16"),
        ),
        ("fp16 needs a GPU; remove it or use_cpu.", values.get("fp16") and values.get("use_cpu")),
        (
            "a 4- or 8-bit base can only be trained through an adapter; set use_peft: true.",
            quantised and values.get("use_peft") is False,
        ),
        (
            f"{', '.join(needs_validation)} needs validation rows; set validation_data or validation_fraction.",
            needs_validation and not validates,
        ),
        (
            "only one of validation_data, validation_fraction and folds_file can be set (--validation_fraction 0 takes "
            "it back).",
            sum(map(bool, (own.validation_data, own.validation_fraction, own.folds_file))) > 1,
        ),
        ("folds_file and fold go together; set both.", (own.folds_file is None) != (own.fold is None)),
        (
            "streaming needs max_steps: the number of rows is not known.",
            own.streaming and values.get("max_steps", -1) <= 0,
        ),
        (
            "streaming cannot hold rows out; validate on validation_data.",
            own.streaming and (own.validation_fraction or own.folds_file),
        ),
        ("on_bad_row: skip cannot be had with streaming.", own.streaming and own.on_bad_row == "skip"),
        (
            "cache_image_features needs rows that are known before they are trained on; remove streaming.",
            own.cache_image_features and own.streaming,
        ),
        (
            "cache_image_features needs a vision tower that stays as it is; remove use_peft: false.",
            own.cache_image_features and values.get("use_peft") is False,
        ),
        (
            f"cache_image_features stores what tower and merger make of an image; remove {' and '.join(adapts)}.",
            own.cache_image_features and adapts,
        ),
        (
            f"{' and '.join(adapts)}: full fine-tuning trains all weights; remove that, or use_peft: false.",
            adapts and values.get("use_peft") is False,
        ),
        (
            f"{' and '.join(adapts)}: lora_target_modules names all layers itself; keep one of the two.",
            adapts and values.get("lora_target_modules"),
        ),
        (
            "vision_learning_rate: nothing outside the language model is trained; set adapt_tower or adapt_merger.",
            own.vision_learning_rate is not None and not _reaches_vision(values, own),
        ),
        (
            "cache_image_features keeps one set of features for an image; remove image_augmentation and flip_images.",
            own.cache_image_features and (own.image_augmentation or own.flip_images),
        ),
        (
            "cache_image_features needs rows without padding; remove fast: false.",
            own.cache_image_features and not own.fast,
        ),
        (
            "loss: vocabulary is vocabulary_weight: 1. Keep one of the two.",
            own.loss == "vocabulary" and own.vocabulary_weight != 1,
        ),
        ("init_adapter is an adapter; remove use_peft: false.", own.init_adapter and values.get("use_peft") is False),
        (
            f"{', '.join(own_adapter)} cannot be set beside init_adapter: the adapter has its own.",
            own.init_adapter and own_adapter,
        ),
        (
            f"init_adapter: there is no adapter_config.json in {own.init_adapter}.",
            own.init_adapter and not os.path.isfile(os.path.join(own.init_adapter, "adapter_config.json")),
        ),
        (
            f"averaging chooses between raw and averaged weights by {CHOOSING}; remove metric_for_best_model.",
            own.averaging and (values.get("metric_for_best_model") or CHOOSING).removeprefix("eval_") != CHOOSING,
        ),
        (
            "save_strategy: best saves nothing when time is up; remove one of save_strategy and time_budget_h.",
            own.time_budget_h and values.get("save_strategy") == "best",
        ),
        ("averaging is of adapters; remove use_peft: false.", own.averaging and values.get("use_peft") is False),
        ("compile_layers needs fast; remove fast: false.", own.compile_layers and not own.fast),
        (
            "activation_memory_budget is of compiled layers, and there are none with "
            f"{', '.join(uncompiled)}. Remove one of the two.",
            "activation_memory_budget" in values and uncompiled,
        ),
        (
            "on_bad_row: skip needs check_images.",
            own.on_bad_row == "skip" and not own.check_images,
        ),
        (
            "global_batch_size and gradient_accumulation_steps are both set. Keep global_batch_size.",
            own.global_batch_size and "gradient_accumulation_steps" in values,
        ),
        (
            "the run has no steps: num_train_epochs must be above 0, or max_steps.",
            values.get("num_train_epochs", 1) <= 0 and values.get("max_steps", -1) <= 0,
        ),
        (
            f"metric_for_best_model must be one of {', '.join(CHOSEN_BY)}.",
            (values.get("metric_for_best_model") or CHOOSING).removeprefix("eval_") not in CHOSEN_BY,
        ),
        (
            "validation_data is train_data; the best checkpoint would be chosen on rows that it was trained on.",
            _same_rows(own),
        ),
        (
            "early_stopping_patience needs load_best_model_at_end; remove that key.",
            own.early_stopping_patience and values.get("load_best_model_at_end") is False,
        ),
    ]
