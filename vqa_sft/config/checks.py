"""What a recipe cannot ask for: fields that we refuse, values out of bounds, fields that exclude each other."""

import os
from collections.abc import Iterator
from typing import Any

from vqa_sft.config.fields import bounds_of, check_bounds, check_required
from vqa_sft.config.training import RecipeArguments, as_list
from vqa_sft.config.trl_arguments import (
    CHOOSING,
    accelerator_config,
    chooses_by,
    micro_batch_of,
    num_processes,
    reaches_vision,
)
from vqa_sft.errors import InputError

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
    "train_sampling_strategy": "padded rows of like length share a batch as it is, and packed ones have no padding",
    "router_aux_loss_coef": "the loss that balances experts is left out: their routers are frozen",
    "chat_template_path": "the prompt would no longer be the model's own",
    "eos_token": "nothing is generated",
    "pad_token": "the tokenizer has one",
    "do_train": "recipes/sft.py trains, recipes/predict.py predicts",
    "resume_from_checkpoint": "a run resumes from its last complete checkpoint by itself",
}
# Smallest value, largest value; values outside end in a traceback or in an untrained adapter.
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


def check_values(values: dict[str, Any]) -> None:
    """Raises InputError for a field that is refused, out of bounds or missing."""
    for name in values.keys() & REFUSED.keys():
        raise InputError(f"`{name}` cannot be set: {REFUSED[name]}.")
    check_bounds(values, BOUNDS | bounds_of(RecipeArguments))
    check_required(values, ("model_name_or_path", "train_data", "output_dir"))


def check_combinations(values: dict[str, Any], own: RecipeArguments) -> None:
    """Raises InputError for fields that exclude each other."""
    for problems in (_of_weights, _of_rows, _of_choice, _of_speed, _of_batch):
        for problem in problems(values, own):
            raise InputError(problem)
    _check_trackers(values.get("report_to") or "none")
    accelerator_config(values)


def _of_weights(values: dict[str, Any], own: RecipeArguments) -> Iterator[str]:
    """What is trained, and in which precision."""
    is_full, quantised = values.get("use_peft") is False, _is_quantised(values)
    adapts = [name for name, is_adapted in own.adapted_parts.items() if is_adapted]
    if values.get("bf16") and values.get("fp16"):
        yield "bf16 and fp16 are both set. Keep one, or none to let the GPU decide."
    if values.get("fp16") and values.get("use_cpu"):
        yield "fp16 needs a GPU; remove it or use_cpu."
    if quantised and is_full:
        yield "a 4- or 8-bit base can only be trained through an adapter; set use_peft: true."
    yield from _of_base_precision(is_full, quantised, values, own)
    if adapts and is_full:
        yield f"{' and '.join(adapts)}: full fine-tuning trains all weights; remove that, or use_peft: false."
    if adapts and values.get("lora_target_modules"):
        yield f"{' and '.join(adapts)}: lora_target_modules names all layers itself; keep one of the two."
    if own.adapt_experts or values.get("lora_target_parameters"):
        yield from _of_experts(values, own)
    if own.vision_learning_rate is not None and not reaches_vision(values, own):
        yield "vision_learning_rate: nothing outside the language model is trained; set adapt_tower or adapt_merger."
    if own.loss == "vocabulary" and own.vocabulary_weight != 1:
        yield "loss: vocabulary is vocabulary_weight: 1. Keep one of the two."
    if own.averaging and is_full:
        yield "averaging is of adapters; remove use_peft: false."
    if own.init_adapter:
        yield from _of_init_adapter(own.init_adapter, is_full, values, adapts)


def _of_base_precision(is_full: bool, quantised: bool, values: dict[str, Any], own: RecipeArguments) -> Iterator[str]:
    if own.base_precision is None:
        return
    if is_full:
        yield "base_precision: fp8 is of a base that is frozen; remove it, or use_peft: false."
    if quantised:
        yield "base_precision: fp8 and a 4- or 8-bit base round the same weights. Keep one of the two."
    if values.get("use_dora"):
        yield "base_precision: fp8: use_dora needs the base's whole weights. Remove one of the two."
    if values.get("fp16") or values.get("bf16") is False:
        yield "base_precision: fp8 computes all else in bf16; remove fp16 and bf16: false."


def _of_experts(values: dict[str, Any], own: RecipeArguments) -> Iterator[str]:
    if own.adapt_experts and values.get("lora_target_parameters"):
        yield "adapt_experts is lora_target_parameters with the experts' names. Keep one of the two."
    for name in ("lora_dropout", "use_dora"):
        if values.get(name):
            yield f"{name}: PEFT has none for the parameters of experts. Remove it."


def _of_init_adapter(folder: str, is_full: bool, values: dict[str, Any], adapts: list[str]) -> Iterator[str]:
    settings = [name for name in values if name.startswith(("lora_", "use_rslora", "use_dora"))] + adapts
    if is_full:
        yield "init_adapter is an adapter; remove use_peft: false."
    if settings:
        yield f"{', '.join(settings)} cannot be set beside init_adapter: the adapter has its own."
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        yield f"init_adapter: there is no adapter_config.json in {folder}."


def _of_rows(values: dict[str, Any], own: RecipeArguments) -> Iterator[str]:
    """Which rows are trained and validated on."""
    needs_validation = [
        name for name in ("early_stopping_patience", "load_best_model_at_end", "eval_on_start") if values.get(name)
    ]
    if values.get("eval_strategy", "no") != "no":
        needs_validation.append("eval_strategy")
    if needs_validation and not own.validates:
        yield f"{', '.join(needs_validation)} needs validation rows; set validation_data or validation_fraction."
    if sum(map(bool, (own.validation_data, own.validation_fraction, own.folds_file))) > 1:
        yield (
            "only one of validation_data, validation_fraction and folds_file can be set (--validation_fraction 0 or "
            "--validation_data null takes it back)."
        )
    if (own.folds_file is None) != (own.fold is None):
        yield "folds_file and fold go together; set both."
    if own.folds_at_once > 1 and own.fold != "all":
        yield "folds_at_once needs fold: all."
    if _same_rows(own):
        yield "validation_data is train_data; the best checkpoint would be chosen on rows that it was trained on."
    if own.on_bad_row == "skip" and not own.check_images:
        yield "on_bad_row: skip needs check_images."
    if own.streaming and values.get("max_steps", -1) <= 0:
        yield "streaming needs max_steps: the number of rows is not known."
    if own.streaming and (own.validation_fraction or own.folds_file):
        yield "streaming cannot hold rows out; validate on validation_data."
    if own.streaming and own.on_bad_row == "skip":
        yield "on_bad_row: skip does not work with streaming. Remove one of the two."


def _of_choice(values: dict[str, Any], own: RecipeArguments) -> Iterator[str]:
    """How long a run trains, and which of its weights it keeps."""
    if values.get("num_train_epochs", 1) <= 0 and values.get("max_steps", -1) <= 0:
        yield "the run has no steps: num_train_epochs must be above 0, or max_steps."
    if own.averaging and chooses_by(values) != CHOOSING:
        yield f"averaging chooses between raw and averaged weights by {CHOOSING}; remove metric_for_best_model."
    if chooses_by(values) not in CHOSEN_BY:
        yield f"metric_for_best_model must be one of {', '.join(CHOSEN_BY)}."
    if own.early_stopping_patience and values.get("load_best_model_at_end") is False:
        yield "early_stopping_patience needs load_best_model_at_end; remove that key."
    if own.time_budget_h and values.get("save_strategy") == "best":
        yield "save_strategy: best saves nothing when time is up; remove one of save_strategy and time_budget_h."


def _of_speed(values: dict[str, Any], own: RecipeArguments) -> Iterator[str]:
    """The feature cache and compiled layers."""
    reasons = {
        "compile_layers: false": own.compile_layers is False,
        "fast: false": not own.fast,
        "a quantised base": _is_quantised(values),
    }
    uncompiled = [reason for reason, applies in reasons.items() if applies]
    if own.compile_layers and not own.fast:
        yield "compile_layers needs fast; remove fast: false."
    if "activation_memory_budget" in values and uncompiled:
        yield (
            "activation_memory_budget is of compiled layers, and there are none with "
            f"{', '.join(uncompiled)}. Remove one of the two."
        )
    if not own.cache_image_features:
        return
    if own.streaming:
        yield "cache_image_features needs rows that are known before they are trained on; remove streaming."
    if values.get("use_peft") is False:
        yield "cache_image_features needs a frozen vision tower; remove use_peft: false."
    if adapts := [name for name, is_adapted in own.adapted_vision.items() if is_adapted]:
        yield f"cache_image_features stores what tower and merger compute of an image; remove {' and '.join(adapts)}."
    if own.image_augmentation or own.flip_images:
        yield "cache_image_features keeps one set of features for an image; remove image_augmentation and flip_images."
    if not own.fast:
        yield "cache_image_features needs rows without padding; remove fast: false."


def _of_batch(values: dict[str, Any], own: RecipeArguments) -> Iterator[str]:
    if own.global_batch_size is None:
        return
    if "gradient_accumulation_steps" in values:
        yield "global_batch_size and gradient_accumulation_steps are both set. Keep global_batch_size."
    micro_batch = micro_batch_of(values, own.global_batch_size)
    step = micro_batch * num_processes()
    if own.global_batch_size % step:
        yield (
            f"global_batch_size {own.global_batch_size} is no multiple of per_device_train_batch_size "
            f"{micro_batch} x {num_processes()} processes = {step}. Change one of them."
        )


def _is_quantised(values: dict[str, Any]) -> bool:
    return bool(values.get("load_in_4bit") or values.get("load_in_8bit"))


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
