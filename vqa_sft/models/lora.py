"""Which layers LoRA adapts, and what of the recipe's names the model does not have."""

import difflib
import re

import torch
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

from vqa_sft.errors import InputError, explains
from vqa_sft.models import quantized
from vqa_sft.models.families import FAMILIES
from vqa_sft.models.parts import decoder_name, fused_experts, vision_layers

# Modules of the language model whose linear layers get no adapter: what chooses experts, the gate of a shared expert,
# and what chooses the tokens that attention sees (Qwen4-Exp), for a choice passes no gradient on.
LEFT_OUT = {"lm_head", "router", "gate", "shared_expert_gate", "indexer"}

# They are no layers, but called as such: a recipe's down_proj would be them as well.
EXPERTS_IN_4_BIT = r".*\.parametrizations\..*"


def lora_config(
    model_args: ModelConfig,
    model: PreTrainedModel,
    *,
    adapt_tower: bool = False,
    adapt_merger: bool = False,
    adapt_experts: bool = False,
) -> LoraConfig | None:
    """TRL's LoRA settings; by default every linear layer in the language model's layers is adapted but those of
    LEFT_OUT, and if asked for those of the vision tower's blocks, of its merger, and the routed experts, which are no
    linear layers but one parameter for all of them.

    The usual bare names (q_proj, ..., down_proj) would also hit the vision tower's MLP in Qwen2.5-VL.
    """
    config = get_peft_config(model_args)
    if config is None:
        if own := quantized.quantization_of(model.config):
            raise InputError(
                f"the base is quantised ({quantized.describe(own)}) and can only be trained through an adapter; set "
                "use_peft: true."
            )
        return None
    _check_names(config, model)
    family = FAMILIES.get(model.config.model_type)
    no_lora = family.no_lora if family else ()
    is_rounded = model_args.load_in_4bit and bool(fused_experts(model))
    if config.target_modules is not None and is_rounded:
        config.exclude_modules = EXPERTS_IN_4_BIT
    if config.target_modules is None:
        config.target_modules = _decoder_layers(model, no_lora)
        asked = {"adapt_tower": adapt_tower, "adapt_merger": adapt_merger}
        for (field, is_asked), names in zip(asked.items(), vision_layers(model), strict=True):
            if not is_asked:
                continue
            if not names:
                raise InputError(f"{field}: no such linear layers are found in {type(model).__name__}. Remove it.")
            if any(name.endswith(no_lora) for name in names):
                raise InputError(f"{field}: PEFT would adapt the experts of {family.label} in their place. Remove it.")
            config.target_modules = "|".join([config.target_modules, *map(re.escape, names)])
    if adapt_experts:
        config.target_parameters = _expert_names(model)
    if config.target_parameters and is_rounded:
        raise InputError("load_in_4bit rounds the experts, and an adapter of their own needs whole ones. Remove one.")
    return config


def _decoder_layers(model: PreTrainedModel, no_lora: tuple[str, ...]) -> str:
    """A regular expression of the names of the linear layers in the language model's layers that get an adapter."""
    left_out = LEFT_OUT.union(no_lora)
    layers = [name for name, module in model.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {name.rpartition(".")[2] for name in layers if "." in name and left_out.isdisjoint(name.split("."))}
    # A router may have a layer that is called as others are; so has a part of experts that are rounded to 4 bit.
    apart = [name for name in sorted(left_out) if any(f".{name}." in layer for layer in layers)]
    if fused_experts(model):
        apart.append("experts")
    but = "".join(rf"(?!.*\b{name}\.)" for name in apart)
    return rf"{re.escape(decoder_name(model))}\.{but}.*\.({'|'.join(sorted(kept))})"


def _expert_names(model: PreTrainedModel) -> list[str]:
    """The ends of the names of fused experts' weights: "experts.gate_up_proj". Raises InputError where there are none,
    or they are quantised."""
    if own := quantized.quantization_of(model.config):
        raise InputError(
            f"adapt_experts needs whole experts, and this checkpoint is quantised itself ({quantized.describe(own)}). "
            "Remove it, or take the checkpoint that it was made from."
        )
    names = sorted({".".join(name.split(".")[-2:]) for name in fused_experts(model)})
    if not names:
        raise InputError(f"adapt_experts: {type(model).__name__} has no routed experts in one parameter. Remove it.")
    return names


def describe_experts(model: PreTrainedModel, config: LoraConfig | None, *, is_kept: bool = False) -> str:
    """What the adapter is to the routed experts, and what it costs there or would cost; empty for a model without them.
    `is_kept`: whether the sum of base and adapter is kept for the backward pass."""
    experts = fused_experts(model)
    if not experts or config is None:
        return ""
    num_all, num_routed = (sum(weight.numel() for weight in of) for of in (model.parameters(), experts.values()))
    # Every expert has an A and a B of its own.
    num_trained = sum(config.r * weight.shape[0] * sum(weight.shape[1:]) for weight in experts.values())
    routed = f"the routed experts ({num_routed:,} parameters, {num_routed / num_all:.0%} of the model)"
    if config.target_parameters:
        kept = " Without gradient_checkpointing the training keeps a second copy of the experts." if is_kept else ""
        return f"Adapters of {routed} have {num_trained:,} parameters.{kept}"
    return f"No adapter for {routed}; adapt_experts: true would train {num_trained:,} parameters for them."


def _check_names(config: LoraConfig, model: PreTrainedModel) -> None:
    """Raises InputError, with the nearest names, for a name of the recipe that no module or parameter of the model
    has: PEFT leaves out what it does not find, as long as it finds another. A name is a module's whole name or the end
    of one (q_proj, self_attn.q_proj); a single one may be a regular expression of whole names."""
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        # TRL makes a text of a list of one.
        if re.fullmatch(r"\w+(\.\w+)*", config.target_modules):
            config.target_modules = {config.target_modules}
        else:
            with explains(re.error, f"lora_target_modules: {config.target_modules!r} is no regular expression"):
                pattern = re.compile(config.target_modules)
            if not any(map(pattern.fullmatch, modules)):
                raise InputError(f"lora_target_modules: no module of the model matches {config.target_modules!r}.")
    asked = {
        "lora_target_modules": (config.target_modules, modules),
        "lora_modules_to_save": (config.modules_to_save, modules),
        "lora_target_parameters": (config.target_parameters, [name for name, _ in model.named_parameters()]),
    }
    for field, (names, known) in asked.items():
        if not names or isinstance(names, str):
            continue
        unknown = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in known)]
        if unknown:
            said = "; ".join(f"{name!r} (nearest: {', '.join(_nearest(name, known))})" for name in sorted(unknown))
            raise InputError(f"{field}: {type(model).__name__} has no {said}.")


def _nearest(name: str, known: list[str], num: int = 3) -> list[str]:
    """The ends of the `known` names, as long as `name` is in dots, that are most like it."""
    length = name.count(".") + 1
    ends = {".".join(path.split(".")[-length:]) for path in known}
    return difflib.get_close_matches(name, sorted(end for end in ends if not end.isdecimal()), num, cutoff=0)
