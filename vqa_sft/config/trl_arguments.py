"""TRL's training arguments from a recipe: our defaults, what is fixed, and what follows from the processes."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqa_sft.config.fields import build
from vqa_sft.config.training import RecipeArguments
from vqa_sft.errors import InputError

if TYPE_CHECKING:  # trl takes seconds to import
    from trl import ModelConfig, SFTConfig

# Where we differ from TRL's and transformers' defaults.
DEFAULTS = {
    "use_peft": True,
    "lora_dropout": 0.0,  # a third of the activations' memory for nothing that was measured
    "dtype": None,  # follows the precision, see models.load.choose_precision
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
    # Every weight of an adapter takes part in every row, so DDP need not search; TRL turns the search on for images.
    "ddp_find_unused_parameters": False,
    # A loss of nan is shown, and no step waits for the GPU to look for one.
    "logging_nan_inf_filter": False,
    "restore_callback_states_from_checkpoint": True,  # else early stopping forgets its patience on resume
}
# Not the plain NLL: where answers are noisy or few it is lowest for weights that are not sure of anything, and a
# temperature corrects that better than an early epoch does.
CHOOSING = "nll_calibrated"
VALIDATION_DEFAULTS = {
    "eval_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": CHOOSING,
}
# What the collator and the trainer rely on.
FIXED = {"remove_unused_columns": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
# Else TRL lets mixtures compute a load-balancing loss, of which `compute_loss` takes nothing.
FIXED |= {"router_aux_loss_coef": 0.0}


def build_model_args(values: dict[str, Any]) -> "ModelConfig":
    from trl import ModelConfig

    return build(ModelConfig, DEFAULTS | values)


def build_training_args(given: dict[str, Any], own: RecipeArguments, precision: str) -> "SFTConfig":
    """For "bf16", "fp16" or "fp32"; initialises the device and the process group."""
    import torch
    from trl import SFTConfig

    on_gpu = torch.cuda.is_available() and not given.get("use_cpu")
    values: dict[str, Any] = {"dataloader_pin_memory": on_gpu}  # without a GPU torch warns once an epoch
    values |= DEFAULTS | (VALIDATION_DEFAULTS if own.validates else {}) | given | FIXED
    if own.validates and "greater_is_better" not in given:
        values["greater_is_better"] = chooses_by(given) == "accuracy"
    values |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    # Else every step waits until its batch is copied, and the GPU then waits for the next kernels.
    values["accelerator_config"] = {"non_blocking": on_gpu} | accelerator_config(values)
    if own.streaming:
        # Else accelerate collates in one process and cuts batches by rows; pixels of mixed sizes are no rows.
        values["accelerator_config"] |= {"dispatch_batches": False, "split_batches": False}
    # Pushing is ours, after the run is saved: a failed push must not lose it. The token would be saved as well.
    values |= {"push_to_hub": False, "hub_token": None}
    if reaches_vision(values, own) and "ddp_find_unused_parameters" not in given:
        # A whole tower may hold weights that no row reaches (LLaVA's last layer), and an adapter on it is reached
        # by no row without an image; DDP must search for such weights, or it waits for their gradients for ever.
        values.pop("ddp_find_unused_parameters")
    if own.global_batch_size is not None:
        micro_batch = values["per_device_train_batch_size"] = micro_batch_of(values, own.global_batch_size)
        values["gradient_accumulation_steps"] = own.global_batch_size // (micro_batch * num_processes())
    return build(SFTConfig, values)


def chooses_by(values: dict[str, Any]) -> str:
    """The metric that chooses the best checkpoint."""
    return (values.get("metric_for_best_model") or CHOOSING).removeprefix("eval_")


def accelerator_config(values: dict[str, Any]) -> dict[str, Any]:
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


def reaches_vision(values: dict[str, Any], own: RecipeArguments) -> bool:
    """Whether something outside the language model may be trained."""
    named = any(values.get(name) for name in ("lora_target_modules", "lora_modules_to_save"))
    return named or values.get("use_peft") is False or any(own.adapted_vision.values()) or bool(own.init_adapter)


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def micro_batch_of(values: dict[str, Any], global_batch_size: int) -> int:
    """Rows of a process at a time; on several processes no more than its share of the global batch, so that a recipe
    for one GPU runs on more."""
    micro_batch, count = values.get("per_device_train_batch_size", 8), num_processes()
    share = global_batch_size // count
    return min(micro_batch, share) if count > 1 and share * count == global_batch_size else micro_batch
