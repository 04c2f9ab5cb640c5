"""Where a model of any family has its language model, its vision tower, and what leads from one to the other."""

import re

import torch
from transformers import PreTrainedModel


def decoder_name(model: PreTrainedModel) -> str:
    """Where the language model stands in this family: "model.language_model", "model.text_model", ..."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def decoder_layers(decoder: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of a language model, in their order: the first list of modules that holds no other's."""
    return next(module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList))


def names_beside_decoder(model: PreTrainedModel) -> list[str]:
    """The vision tower and what connects it: everything outside the language model."""
    parent, _, name = decoder_name(model).rpartition(".")
    children = [child for child, _ in model.get_submodule(parent).named_children() if child not in (name, "lm_head")]
    return [f"{parent}.{child}".lstrip(".") for child in children]


def vision_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """All weights outside the language model."""
    return [weight for part in names_beside_decoder(model) for weight in model.get_submodule(part).parameters()]


def vision_layers(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the linear layers of the vision tower's blocks, and of what leads from them to the language model: a
    projector, or the mergers that stand inside the tower (Qwen-VL)."""
    parts = [part for part in names_beside_decoder(model) if not re.search("audio|video", part)]  # rows have images
    beside = {part: dict(model.get_submodule(part).named_modules(prefix=part)) for part in parts}
    modules = {name: module for part in beside.values() for name, module in part.items()}
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    lists = [name for name, module in modules.items() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        return [], linear  # patches go through a projector alone (Gemma 4 12B)
    blocks = max(lists, key=lambda blocks: sum(name.startswith(f"{blocks}.") for name in linear))
    tower = [name for name in linear if name.startswith(f"{blocks}.")]
    # A tower may have a head of its own that nothing reads; where there is a projector it is that.
    home = next(part for part in beside if f"{blocks}.".startswith(f"{part}."))
    projector = [name for name in linear if name not in beside[home]]
    return tower, projector or [name for name in linear if name not in tower and ".head." not in name]


def fused_experts(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The weights of routed experts by name: all experts of a layer in one parameter (E, ., .), no linear layers."""
    named = model.named_parameters()
    return {name: weight for name, weight in named if weight.ndim == 3 and re.search(r"experts\.\w+$", name)}
