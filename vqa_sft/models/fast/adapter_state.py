"""Whether PEFT still asks for what a fast path was made for: nothing was disabled, merged, unloaded, scaled or set."""

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
