"""`vqa-sft export`: a run as a folder that transformers, its decision models and vLLM load without us.

out/                                              with --adapter
  model*.safetensors, config.json, ...            full weights: s B A is added to each layer's own; or the base's own
  processor files                                 of the run: chat template, pixel limits
  decision.json, decision_template.jinja          labels, temperature and prompt of the run (runs/decision.py)
  adapter/                                        the adapter, with the files of the run below
  run.json            of the run, so that predict.py takes the folder as it takes the run; merged_from names the run
  recipe.yaml, metrics.json, rows.csv, README.md  of the run, as far as it has them
  calibration.json    of the run, or of all folds where it is one of them

Each weight is rounded once, to `dtype`; in fp32 the letters' logits are those of base and adapter within 1e-4.
"""

import contextlib
import functools
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DecisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.decision.configuration_utils import DECISION_CONFIG_NAME, DECISION_TEMPLATE_NAME
from trl import ModelConfig

from vqa_sft.data.split import ROWS
from vqa_sft.errors import InputError, explains
from vqa_sft.files import held, lying_in, whole_folder
from vqa_sft.models import fp8, quantized
from vqa_sft.models.load import DTYPES, LOADING_ERRORS, add_adapter, follow_processor, load_model, load_processor
from vqa_sft.predictions.calibration import CALIBRATION, known_entries
from vqa_sft.runs import folder as run_folder, hub
from vqa_sft.runs.decision import decision_config

KEPT = (run_folder.RECIPE, run_folder.METRICS, run_folder.VALIDATION, ROWS)
ADAPTER = "adapter"  # the folder of the adapter, beside whole weights
MERGED_FROM = "merged_from"  # the key of run.json by which an earlier export is known
# Keys of the recipe that are not true of full weights in a folder of their own.
DROPPED = ("load_in_4bit", "load_in_8bit", "base_precision", "push_to_hub", "hub_model_id")
SHARD = "5GB"  # largest file of weights


def export_run(
    folder: str,
    output: str,
    *,
    adapter: bool = False,
    plain: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    model: str | None = None,
) -> str:
    """Write a finished run to `output`, its adapter merged into the base, or with `adapter` beside it; a summary, as
    text. With `plain` weights and processor alone, without what makes them a decision model.

    `dtype` is "bf16", "fp16" or "fp32", by default that of the base's checkpoint. `output` is new or empty, or with
    `overwrite` an earlier export, which is replaced once the new one is complete. `model` says where the base is now,
    if not where it was in training. Raises InputError.
    """
    with held(output, "OUTPUT"):
        [run] = run_folder.read_runs([folder], model)
        return _export_run(run, Path(folder), output, dtype, overwrite=overwrite, adapter=adapter, plain=plain)


def _export_run(
    run: run_folder.Run, folder: Path, output: str, dtype: str | None, *, overwrite: bool, adapter: bool, plain: bool
) -> str:
    recipe, trust = run.recipe, bool(run.recipe.get("trust_remote_code"))
    is_whole = _is_whole(folder, adapter)
    name = str(folder) if is_whole else run.base_model
    revision = "main" if is_whole else recipe.get("model_revision") or "main"
    entries = known_entries(folder)
    _check_output(Path(output), overwrite, reads=(str(folder), name))
    config = _base_config(name, revision, trust)
    dtype = dtype or _own_dtype(config) or run.precision or "bf16"
    size = _count_weights(config, trust) * DTYPES[dtype].itemsize
    _check_room(Path(output).resolve(), size, dtype)
    # Of a processor of its own: transformers adds tokens to the one that it asks.
    own = load_processor(str(folder), trust_remote_code=trust)
    decision = None if plain else _decide(run, own, ADAPTER if adapter else None)
    processor = load_processor(str(folder), trust_remote_code=trust)
    _tell_quantised(run, config)
    with whole_folder(output) as part:
        (part / run_folder.MARKER).touch()
        written = _load_base(name, revision, dtype, trust)
        if not is_whole and not adapter:
            written = _merged(written, str(folder), dtype)
        follow_processor(written, processor)
        _turn_experts(written)
        with explains(ValueError, f"{name} cannot be saved"):  # a generation config that contradicts itself
            written.save_pretrained(part, max_shard_size=SHARD)
        processor.save_pretrained(part)
        if decision is not None:
            decision.save_pretrained(part)
        if adapter:
            (part / ADAPTER).mkdir()
            # Without the decision files of a push, which say the temperature of their day.
            patterns = {*run_folder.SHARED_FILES} - {DECISION_CONFIG_NAME, DECISION_TEMPLATE_NAME}
            run_folder.copy_files(folder, part / ADAPTER, patterns)
        lies = ADAPTER if adapter else ""
        _describe(part / lies, folder, run, str(Path(output) / lies), entries)
    what = name if is_whole else f"{name} with the adapter of {folder} {'beside it' if adapter else 'merged in'}"
    asks = "" if plain else f' pipeline("decision", model="{output}") answers as the run does.'
    return f"Wrote {output}: {what}, {dtype}, {size / 2**30:,.2f} GiB.{asks}"


def _decide(run: run_folder.Run, processor: ProcessorMixin, adapter: str | None) -> DecisionConfig:
    try:
        return decision_config(run, processor, adapter)
    except InputError as error:
        raise InputError(f"{error} --plain writes the weights without a decision model.") from error


def _tell_quantised(run: run_folder.Run, config: PreTrainedConfig) -> None:
    name, recipe = run.base_model, run.recipe
    bits = "4 bit" if recipe.get("load_in_4bit") else "8 bit" if recipe.get("load_in_8bit") else None
    if trained_in := bits or ("FP8" if recipe.get("base_precision") == "fp8" else None):
        line = f"The adapter was trained on {name} in {trained_in} and goes with its unquantised weights now: "
        print(line + "probabilities may differ slightly from those of the run.")
    if own := quantized.quantization_of(config):
        print(f"{name} is quantised itself ({quantized.describe(own)}): its weights are unpacked, and written whole.")


def _is_whole(folder: Path, adapter: bool) -> bool:
    """Whether the run was fine-tuned whole, and has no adapter. Raises InputError where it has neither."""
    if (folder / "adapter_config.json").is_file():
        return False
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no adapter (adapter_config.json). Give the folder of a finished run.")
    if adapter:
        raise InputError(f"{folder} already holds full weights and no adapter. Leave --adapter out.")
    return True


def _check_output(output: Path, overwrite: bool, reads: tuple[str, ...]) -> None:
    """Raises InputError where anything but an earlier export would be lost."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file. Name another folder.")
    if output.exists() and any(output.iterdir()):
        if not _is_export(output):
            raise InputError(f"{output} is not empty and holds no earlier export. Name another folder.")
        if not overwrite:
            raise InputError(f"{output} holds an earlier export. Name another folder, or give --overwrite.")
    if inside := lying_in(output, reads):
        raise InputError(f"{output} holds what is read: {', '.join(inside)}. Name another folder.")


def _is_export(folder: Path) -> bool:
    for of_run in (folder, folder / ADAPTER):
        with contextlib.suppress(InputError):
            return MERGED_FROM in run_folder.read_run(of_run).content
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
            f"the weights take {needed / 2**30:,.2f} GiB in {dtype}, and {free / 2**30:,.2f} GiB are free for "
            f"{target}. Make room, name a folder on another disk{smaller}."
        )


def _load_base(name: str, revision: str, dtype: str, trust: bool) -> PreTrainedModel:
    """On the CPU, never quantised. Raises InputError where weights stay in FP8."""
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
    content = run.content | {"recipe": recipe | {"output_dir": output}, MERGED_FROM: str(folder)}
    run_folder.write_json(part / run_folder.RUN, content)
    if (part / run_folder.RECIPE).is_file():  # a soup has none
        hub.write_card(part)
