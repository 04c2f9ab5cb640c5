"""Which layers LoRA adapts, and what of the recipe's names the model does not have."""

import difflib
import re

import torch
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

from vqa_sft.errors import InputError, explains
from vqa_sft.models import quantized
from vqa_sft.models.parts import decoder_name, vision_layers


def lora_config(
    model_args: ModelConfig, model: PreTrainedModel, *, adapt_tower: bool = False, adapt_merger: bool = False
) -> LoraConfig | None:
    """TRL's LoRA settings; by default every linear layer of the language model is adapted but routers of experts (fused
    experts, as in Qwen3-VL-MoE, are none), and if asked for those of the vision tower's blocks and of its merger.

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
    if config.target_modules is None:
        layers = {
            name.rpartition(".")[2]
            for name, module in model.get_decoder().named_modules()
            if isinstance(module, torch.nn.Linear)
        } - {"lm_head", "router", "gate", "shared_expert_gate"}
        config.target_modules = re.escape(decoder_name(model)) + rf"\..*\.({'|'.join(sorted(layers))})"
        asked = {"adapt_tower": adapt_tower, "adapt_merger": adapt_merger}
        for (field, is_asked), names in zip(asked.items(), vision_layers(model), strict=True):
            if not is_asked:
                continue
            if not names:
                raise InputError(f"{field}: no such linear layers are found in {type(model).__name__}. Remove it.")
            config.target_modules = "|".join([config.target_modules, *map(re.escape, names)])
    return config


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
