"""Whether PEFT still asks for what a fast path was made for: nothing was disabled, merged, unloaded, scaled or set."""

from collections.abc import Callable
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

Adapter = tuple[str, nn.Module, float]  # its name, its A and its factor


def adapter_of(layer: LoraLayer) -> Adapter:
    """The one adapter that a layer has."""
    (name,) = layer.active_adapters
    return name, layer.lora_A[name], layer.scaling[name]


def has_only(layer: nn.Module, adapter: Adapter) -> bool:
    """Whether a layer still adds this adapter to its base and nothing else. A compiled layer asks it too."""
    name, a, scale = adapter
    if not isinstance(layer, LoraLayer) or layer.merged or layer.disable_adapters or layer.active_adapters != [name]:
        return False
    # Hooks are PEFT's for `adapter_names`.
    return layer.lora_A[name] is a and layer.scaling[name] == scale and not layer._forward_pre_hooks


def watch(module: nn.Module) -> Callable[[], bool]:
    """What tells later whether all is as it is now. It looks at the first adapted layer alone: PEFT treats all alike,
    and hundreds take a while."""
    for parent in module.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, LoraLayer):
                before = _asked(layer)
                return lambda: parent._modules[name] is layer and _asked(layer) == before
    return lambda: True


def _asked(layer: LoraLayer) -> tuple[Any, ...]:
    factors = {name: layer.scaling.get(name) for name in layer.active_adapters}
    return layer.disable_adapters, [*layer.merged_adapters], factors, len(layer._forward_pre_hooks)
