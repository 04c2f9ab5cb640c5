"""`vqa-sft merge`: a run's base with the adapter merged into its weights, for plain transformers and vLLM.

runs/merged/
  model*.safetensors, config.json, generation_config.json     full weights: s B A is added to each layer's own
  processor files     of the run: chat template, pixel limits
  run.json            of the run, so that predict.py takes the folder as it takes the run; merged_from names the run
  recipe.yaml, metrics.json, rows.csv, README.md              of the run, as far as it has them
  calibration.json    of the run, or of all folds where it is one of them

Each weight is rounded once, to `dtype`; in fp32 the letters' logits are those of base and adapter within 1e-4.
"""

import functools
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter
from trl import ModelConfig

from vqa_sft.data.split import ROWS
from vqa_sft.errors import InputError, explains
from vqa_sft.files import held, lying_in, whole_folder
from vqa_sft.models import fp8, quantized
from vqa_sft.models.load import DTYPES, LOADING_ERRORS, add_adapter, follow_processor, load_model, load_processor
from vqa_sft.predictions.calibration import CALIBRATION, known_entries
from vqa_sft.runs import folder as run_folder, hub

KEPT = (run_folder.RECIPE, run_folder.METRICS, ROWS)
MERGED_FROM = "merged_from"  # the key of run.json by which an earlier merge is known
# Keys of the recipe that are not true of full weights in a folder of their own.
DROPPED = ("load_in_4bit", "load_in_8bit", "push_to_hub", "hub_model_id")
SHARD = "5GB"  # largest file of weights


def merge_run(
    folder: str, output: str, *, dtype: str | None = None, overwrite: bool = False, model: str | None = None
) -> str:
    """Write the base of a finished run with its adapter merged in to `output`; a summary, as text.

    `dtype` is "bf16", "fp16" or "fp32", by default that of the base's checkpoint. `output` is new or empty, or with
    `overwrite` an earlier merge, which is replaced once the new one is complete. `model` says where the base is now, if
    not where it was in training. Raises InputError.
    """
    with held(output, "OUTPUT"):
        return _merge_run(folder, output, dtype, overwrite, model)


def _merge_run(folder: str, output: str, dtype: str | None, overwrite: bool, model: str | None) -> str:
    [run] = run_folder.read_runs([folder], model)
    recipe = run.recipe
    name, trust = run.base_model, bool(recipe.get("trust_remote_code"))
    _check_adapter(folder)
    entries = known_entries(folder)
    _check_output(Path(output), overwrite, reads=(folder, name))
    config = _base_config(name, recipe.get("model_revision") or "main", trust)
    dtype = dtype or _own_dtype(config) or run.precision or "bf16"
    size = _count_weights(config, trust) * DTYPES[dtype].itemsize
    _check_room(Path(output).resolve(), size, dtype)
    processor = load_processor(folder, trust_remote_code=trust)
    if recipe.get("load_in_4bit") or recipe.get("load_in_8bit"):
        bits = 4 if recipe.get("load_in_4bit") else 8
        line = f"The adapter was trained on {name} in {bits} bit and is merged into its unquantised weights: "
        print(line + "probabilities may differ slightly from those of the run.")
    if own := quantized.quantization_of(config):
        print(f"{name} is quantised itself ({quantized.describe(own)}): its weights are unpacked, and merged whole.")
    with whole_folder(output) as part:
        (part / run_folder.MARKER).touch()
        merged = _merged(_load_base(name, recipe, dtype, trust), folder, dtype)
        follow_processor(merged, processor)
        _turn_experts(merged)
        with explains(ValueError, f"{name} cannot be saved"):  # a generation config that contradicts itself
            merged.save_pretrained(part, max_shard_size=SHARD)
        processor.save_pretrained(part)
        _describe(part, Path(folder), run, output, entries)
    return f"Wrote {output}: {name} with the adapter of {folder} merged in, {dtype}, {size / 2**30:,.2f} GiB."


def _check_adapter(folder: str) -> None:
    if (Path(folder) / "adapter_config.json").is_file():
        return
    if (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} already holds full weights and no adapter: load or serve that folder directly.")
    raise InputError(f"{folder} holds no adapter (adapter_config.json). Give the folder of a finished run.")


def _check_output(output: Path, overwrite: bool, reads: tuple[str, ...]) -> None:
    """Raises InputError where anything but an earlier merge would be lost."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file. Name another folder.")
    if output.exists() and any(output.iterdir()):
        if not _is_merge(output):
            raise InputError(f"{output} is not empty and holds no earlier merge. Name another folder.")
        if not overwrite:
            raise InputError(f"{output} holds an earlier merge. Name another folder, or give --overwrite.")
    if inside := lying_in(output, reads):
        raise InputError(f"{output} holds what is read: {', '.join(inside)}. Name another folder.")


def _is_merge(folder: Path) -> bool:
    try:
        return MERGED_FROM in run_folder.read_run(folder).content
    except InputError:
        return False


def _base_config(name: str, revision: str, trust: bool) -> PreTrainedConfig:
    """Raises InputError where it cannot be loaded, or the checkpoint is quantised, but for FP8."""
    with explains(LOADING_ERRORS, f"the base {name!r} cannot be loaded; check the network, or give --model NAME"):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    own = quantized.quantization_of(config)
    if own is not None and quantized.method_of(own) != "fp8":
        raise InputError(
            f"the checkpoint of {name} is quantised itself ({quantized.describe(own)}), and nothing can be added to "
            "its weights. Serve base and adapter, or give --model with the checkpoint that it was made from: the "
            "adapter is merged into that, and probabilities may differ slightly from those of the run."
        )
    return config


def _own_dtype(config: PreTrainedConfig) -> str | None:
    """That of the checkpoint, if it is one of DTYPES."""
    own = config.dtype or config.get_text_config().dtype
    return next((name for name, dtype in DTYPES.items() if dtype == own), None)


def _count_weights(config: PreTrainedConfig, trust: bool) -> int:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)
    return sum(weight.numel() for weight in model.parameters())


def _check_room(target: Path, needed: int, dtype: str) -> None:
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        smaller = "" if dtype != "fp32" else ", or give --dtype bf16"
        raise InputError(
            f"the merged weights take {needed / 2**30:,.2f} GiB in {dtype}, and {free / 2**30:,.2f} GiB are free for "
            f"{target}. Make room, name a folder on another disk{smaller}."
        )


def _load_base(name: str, recipe: dict[str, Any], dtype: str, trust: bool) -> PreTrainedModel:
    """On the CPU, never quantised. Raises InputError where weights stay in FP8."""
    revision = recipe.get("model_revision") or "main"
    dtype = str(DTYPES[dtype]).removeprefix("torch.")
    args = ModelConfig(model_name_or_path=name, model_revision=revision, dtype=dtype)
    base = load_model(args, "fp32", trust_remote_code=trust, unpacks_fp8=True)
    kept = next((name for name, weight in base.named_parameters() if weight.dtype.itemsize == 1), None)
    if kept is not None:
        raise InputError(f"{kept} of {name} stays in FP8, and cannot be merged whole. Serve base and adapter.")
    return base


def _merged(base: PreTrainedModel, folder: str, dtype: str) -> PreTrainedModel:
    """The base with the adapter in its weights. Raises InputError where they are not finite."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    is_tied = head.weight is embeddings.weight
    if is_tied:  # an adapter of one of them would change both
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    dtypes = {name: weight.dtype for name, weight in base.named_parameters()}
    adapted = add_adapter(base, folder)
    try:
        with warnings.catch_warnings(action="ignore"):  # of tied weights, which this function handles
            model = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise _cannot_merge(folder, dtype, str(error)) from error
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])  # layers of modules_to_save are fp32
        if not weight.isfinite().all():
            raise _cannot_merge(folder, dtype, f"{name} is not finite")
    if is_tied:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        is_tied = torch.equal(head.weight, embeddings.weight)
        if is_tied:
            head.weight = embeddings.weight
        # vLLM reads the flag of the language model, transformers the outer one.
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = is_tied
    return model


def _turn_experts(model: PreTrainedModel) -> None:
    """Let Qwen3-VL's experts be saved as (E, in, out), as the Hub and vLLM have them. transformers 5.23 reads that and
    writes (E, out, in)."""
    if model.config.model_type == fp8.TURNED:
        turn = functools.partial(Transpose, 1, 2)
        model._weight_conversions = [WeightConverter(name, name, [turn()]) for name in fp8.EXPERTS]


def _cannot_merge(folder: str, dtype: str, reason: str) -> InputError:
    return InputError(
        f"the adapter in {folder} cannot be merged in {dtype}: {reason.rstrip('.')}. Where numbers are not finite, "
        "that run has diverged, or fp16 is too small for its base: give --dtype bf16."
    )


def _describe(part: Path, folder: Path, run: run_folder.Run, output: str, entries: dict[str, Any]) -> None:
    """Write what makes it a run folder: the files of the run, without what is no longer true."""
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copy(folder / name, part)
    if entries:  # of a fold, those of the folder above too
        run_folder.write_json(part / CALIBRATION, entries)
    recipe = {name: value for name, value in run.recipe.items() if name not in DROPPED}
    content = run.content | {"recipe": recipe | {"output_dir": str(output)}, MERGED_FROM: str(folder)}
    run_folder.write_json(part / run_folder.RUN, content)
    if (part / run_folder.RECIPE).is_file():  # a soup has none
        hub.write_card(part)
