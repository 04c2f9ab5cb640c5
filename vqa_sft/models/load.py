"""Loads processor, model and adapter."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import deepspeed, sdpa_attention
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from trl import ModelConfig

from vqa_sft.batch.image_size import limit_pixels
from vqa_sft.console import note
from vqa_sft.errors import InputError, explains
from vqa_sft.models import fp8, quantized, rounded
from vqa_sft.models.parts import decoder_name

# What transformers, peft and safetensors raise for a folder that is wrong, damaged or of another model.
LOADING_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, SafetensorError)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(values: dict[str, Any], trained: str | None = None) -> str:
    """The precision that a run was `trained` in, else that the recipe `values` ask for, else that suits the device:
    "bf16" from capability 8.0 on (`torch.cuda.is_bf16_supported()` accepts a T4's slow emulation), "fp16" on older
    GPUs, "fp32" without one."""
    on_gpu = torch.cuda.is_available() and not values.get("use_cpu")
    old_gpu = on_gpu and torch.cuda.get_device_capability() < (8, 0)
    able = ("fp16", "fp32") if old_gpu else ("bf16", "fp16", "fp32") if on_gpu else ("fp32", "bf16")
    best = "fp16" if old_gpu else "bf16" if on_gpu else "fp32"
    asked = next((name for name in ("bf16", "fp16") if values.get(name)), None)
    if values.get("bf16") is False and values.get("fp16") is False:
        asked = "fp32"
    if trained is None and asked is not None and asked not in able:
        raise InputError(f"{asked} is set, and this device computes in {' or '.join(able)}. Remove {asked}.")
    wanted = trained or asked or best
    if wanted not in able:
        print(f"The run was trained in {wanted}, which this device does not compute in; it is scored in {best}.")
    return wanted if wanted in able else best


def load_processor(
    name: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> ProcessorMixin:
    """The model's processor, with limits on the pixels (width x height) of one image; padding on the right, so that a
    prompt has the same positions alone and in a batch."""
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from error
    if not isinstance(processor, ProcessorMixin):
        raise InputError(
            f"{name} has no processor for images and text, as models that read text alone have none; got "
            f"{type(processor).__name__}. Take a vision-language model."
        )
    limit_pixels(processor, name, min_pixels, max_pixels)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if processor.chat_template is None:
        raise InputError(f"{name} has no chat template. Use an instruction-tuned model.")
    return processor


def follow_processor(model: torch.nn.Module, processor: ProcessorMixin) -> None:
    """LLaVA-NeXT's and OneVision's models hold the list of sizes that their processor cuts images by, which
    `limit_pixels` shortens. Without the same list they would put an image together wrongly."""
    sizes = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if sizes is not None and hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = sizes


def read_config(
    model_args: ModelConfig, *, trust_remote_code: bool = False, device_map: dict | None = None
) -> PreTrainedConfig:
    """The base's configuration. Raises InputError where it cannot be had, is of no model that we can train, or the
    checkpoint is quantised in a way that cannot be loaded here."""
    name = model_args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from error
    if config.is_encoder_decoder:
        raise InputError(
            f"{name} is an encoder-decoder ({config.model_type}); the letter is read after the prompt, which only a "
            "model with one sequence has. Take another model."
        )
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
        raise InputError(
            f"{name} ({config.model_type}) is no model of images and text that transformers knows. Take a "
            "vision-language model, in the format of transformers."
        )
    quantized.check(name, config, device_map=device_map, is_asked=model_args.load_in_4bit or model_args.load_in_8bit)
    return config


def build_skeleton(
    model_args: ModelConfig, *, trust_remote_code: bool = False, device_map: dict | None = None
) -> PreTrainedModel:
    """The base without weights (on the meta device): the names of its modules, and what `read_config` raises."""
    config = read_config(model_args, trust_remote_code=trust_remote_code, device_map=device_map)
    what = f"the model {model_args.model_name_or_path!r} cannot be built"
    with explains(LOADING_ERRORS, what), _without_zero3(), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def _without_zero3() -> Iterator[None]:
    """ZeRO-3 would deal out the weights of a model that has none."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    if config is None or not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    kept = config()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(kept)


def load_model(
    model_args: ModelConfig,
    precision: str,
    *,
    trust_remote_code: bool = False,
    device_map: dict | None = None,
    unpacks_fp8: bool = False,
) -> PreTrainedModel:
    """The base model in the precision it trains in; `dtype` and the 4-bit fields of `model_args` may say otherwise.
    `unpacks_fp8`: an FP8 checkpoint's weights are whole, on any GPU."""
    name = model_args.model_name_or_path
    if precision == "fp16" and not model_args.use_peft:
        precision = "fp32"  # the gradient scaler refuses fp16 weights
    dtype = getattr(torch, model_args.dtype, model_args.dtype) if model_args.dtype else DTYPES[precision]
    avoid_math_attention()
    config = read_config(model_args, trust_remote_code=trust_remote_code, device_map=device_map)
    quantization = rounded.settings(model_args, dtype, config)
    # The keyword only where it is asked for: None would erase a quantised checkpoint's own settings.
    asked = {} if quantization is None else {"quantization_config": quantization}
    try:
        with fp8.reading(config, device_map=device_map, unpacks=unpacks_fp8) as told:
            model, loaded = AutoModelForImageTextToText.from_pretrained(
                name,
                revision=model_args.model_revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                attn_implementation=model_args.attn_implementation,
                device_map=rounded.place(config, quantization, dtype, device_map),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **asked,
                **told,
            )
    except LOADING_ERRORS as error:
        raise cannot_load(name, error) from error
    _check_weights(name, model, loaded)
    quantized.unpack(model)
    if told:
        fp8.finish(model, dtype)
    if quantization is not None:
        rounded.finish(model, quantization, device_map)
    for module in model.modules():
        # On some processors bitsandbytes 0.50 packs 4-bit weights when it evaluates, and unpacks them wrongly when a
        # checkpoint is saved: every evaluation would change the base.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _check_weights(name: str, model: PreTrainedModel, loaded: dict[str, Any]) -> None:
    """Raises InputError where a checkpoint does not fit its model: transformers would continue with random weights.

    Unused weights of a whole part outside the language model (another head) change nothing and are named in a line.
    Others are refused: a scale, a bias or a norm that the model does not know would make it compute something else.
    """
    unexpected = sorted(loaded["unexpected_keys"])
    apart = [weight for weight in unexpected if _is_apart(weight, model)]
    shapes = {weight: f"{weight} {tuple(got)} for {tuple(wanted)}" for weight, got, wanted in loaded["mismatched_keys"]}
    found = {
        "missing, which would be random": sorted(loaded["missing_keys"] - shapes.keys()),
        "of another shape": sorted(shapes.values()),
        "unexpected, which would be left out": [weight for weight in unexpected if weight not in apart],
    }
    said = [f"{len(names):,} {what} ({_first(names)})" for what, names in found.items() if names]
    if said:
        raise InputError(
            f"the checkpoint {name!r} does not hold the weights of {type(model).__name__}: {'; '.join(said)}. Copy or "
            "download it again, with the config.json that belongs to it."
        )
    if apart:
        note(f"{name} holds {len(apart):,} weights of parts that {type(model).__name__} does not use: {_first(apart)}.")


def _is_apart(weight: str, model: PreTrainedModel) -> bool:
    """Whether a weight belongs to a module that the model does not have, beside the decoder and outside of it."""
    modules = {name for name, _ in model.named_modules()}
    owner = weight.rpartition(".")[0]
    if owner in modules:
        return False
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner == "" or decoder_name(model).startswith(f"{owner}.")


def _first(names: list[str], num: int = 3) -> str:
    return ", ".join(names[:num]) + (", ..." if len(names) > num else "")


def load_trained(
    run: str,
    model_args: ModelConfig,
    precision: str,
    *,
    trust_remote_code: bool = False,
    device_map: dict | None = None,
) -> torch.nn.Module:
    """The model of a run folder for prediction: base and adapter, or the weights themselves; "none": the base alone.
    Raises InputError, before any weight is loaded, when the folder holds neither."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "device_map": device_map}
    if run == "none":
        return load_model(model_args, precision, **options)
    if (Path(run) / "adapter_config.json").is_file() and (Path(run) / "adapter_model.safetensors").is_file():
        try:
            base = load_model(model_args, precision, **options)
        except InputError as error:
            if Path(model_args.model_name_or_path).exists():
                raise
            raise InputError(f"{error} If the base of {run} is elsewhere now, give its place as model.") from error
        return add_adapter(base, run)
    if (Path(run) / "config.json").is_file():
        return load_model(replace(model_args, model_name_or_path=run), precision, **options)
    raise InputError(
        f"{run} holds no adapter (adapter_config.json, adapter_model.safetensors). Give the folder of a finished run."
    )


def add_adapter(base: PreTrainedModel, folder: str, *, is_trainable: bool = False) -> PeftModel:
    """The base with the adapter of a folder. Raises InputError where it is none, or another base's."""
    try:
        with warnings.catch_warnings():  # an adapter that is not all there would be random where it is not
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
            # Once more, for what is left out: PEFT says it only here.
            left_out = model.load_adapter(folder, "default", is_trainable=is_trainable).unexpected_keys
    except (*LOADING_ERRORS, UserWarning) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the adapter in {folder} does not load on {base.name_or_path}: {said[0]}") from error
    if left_out:
        raise InputError(
            f"the adapter in {folder} is of another base than {base.name_or_path}: {len(left_out):,} of its weights "
            f"have no place in it ({_first(left_out)}). Give the base that it was trained on."
        )
    return model


def avoid_math_attention() -> None:
    """Below compute capability 8.0, keep grouped-query attention out of torch's MATH kernel.

    transformers gives grouped heads to sdpa whatever the GPU; older ones have only the unfused kernel for them, several
    times slower and larger. Goes when `use_gqa_in_sdpa` (transformers 5.23) looks at the GPU.
    """
    old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    if old_gpu and "TRANSFORMERS_SDPA_FORCE_GQA" not in os.environ:
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def cannot_load(name: str, error: Exception) -> InputError:
    """What to say of a model that the libraries could not load."""
    if "custom code" in str(error):
        return InputError(
            f"the model {name!r} brings code of its own. Set trust_remote_code: true if you trust it, or take the same "
            "model in the format of transformers (some end in -hf)."
        )
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1  # which no name on the Hub is
    if is_path and not Path(name).exists():
        return InputError(f"the model {name!r} cannot be loaded: there is no such folder. Check the path.")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    is_found = Path(name).exists() or isinstance(error, ImportError)  # a package is missing (SmolVLM's num2words)
    where = "" if is_found else " Check the name or path, and the network."
    said = " ".join(map(str.strip, lines[: 2 if lines[0].endswith(":") else 1]))  # "Error(s) in loading state_dict:"
    return InputError(f"the model {name!r} cannot be loaded: {said}{where}")
