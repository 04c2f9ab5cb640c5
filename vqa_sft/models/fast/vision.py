"""What makes a vision tower fast, exact to the library's own; applied at run time, nothing of it is saved.

| what | why |
|---|---|
| patches through a matrix product | each patch is seen once; the 3-D convolution is slow on some GPUs |
| MLP width a multiple of 64, padded with zeros | Qwen2.5-VL's 3,420 is none of 8: a third of the speed on an H200 |
| no gradients where nothing is trained | PEFT's hook on the embeddings would make the whole tower run backward |

For Qwen2.5-VL and Qwen3-VL; each step looks at what it changes and leaves alone what it does not know. Windows of equal
length in one call: attention.py. Positions and windows computed in the workers: packing.py.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLE = 64
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def is_frozen(tower: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in tower.parameters())


def speed_up_tower(tower: nn.Module) -> list[str]:
    """Change a frozen `tower` in place; what was done, in words.

    A tower that is trained keeps its shapes, for its weights will be saved.
    """
    done = []
    if embed_patches_by_product(tower):
        done.append("patches by a matrix product")
    if not is_frozen(tower):
        return done
    on_gpu = next(tower.parameters()).device.type == "cuda"  # elsewhere a multiple of 64 is only more work
    widths = {pad_mlp(module) for module in tower.modules()} - {None} if on_gpu else set()
    if widths:
        done.append("MLP padded from " + ", ".join(f"{old:,} to {new:,}" for old, new in sorted(widths)))
    tower.forward = types.MethodType(without_gradients, tower)
    done.append("no gradients")
    return done


def embed_patches_by_product(tower: nn.Module) -> bool:
    """Whether the patch embedding is a convolution that sees every patch once, and now is a matrix product."""
    embed = getattr(tower, "patch_embed", None)
    conv = getattr(embed, "proj", None)
    if not isinstance(conv, nn.Conv3d) or conv.kernel_size != conv.stride or any(conv.padding) or conv.groups != 1:
        return False

    embed.forward = types.MethodType(_embed_by_product, embed)
    return True


def _embed_by_product(embed: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """(patches, channels x frames x height x width) -> (patches, dim)"""
    weight = embed.proj.weight
    return F.linear(hidden_states.to(weight.dtype), weight.view(weight.shape[0], -1), embed.proj.bias)


def pad_mlp(module: nn.Module) -> tuple[int, int] | None:
    """Widen an MLP with zeros; its old and new width, or None where it stays.

    The new columns give act(0) * 0 or act(0) = 0, and meet rows of zeros: the result is the same sum with zeros in it.
    """
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if gate is None:  # Qwen3-VL: act(fc1(x)) -> fc2
        up, down = (getattr(module, name, None) for name in ("linear_fc1", "linear_fc2"))
    ins = [layer for layer in (gate, up) if layer is not None]
    if down is None or not ins or not all(map(is_plain, [*ins, down])):
        return None
    old = down.in_features
    new = -(-old // MULTIPLE) * MULTIPLE
    if old == new or any(layer.out_features != old for layer in ins) or not _is_zero_at_zero(module):
        return None
    for layer in ins:
        layer.weight = _padded(layer.weight, (0, 0, 0, new - old))
        if layer.bias is not None:
            layer.bias = _padded(layer.bias, (0, new - old))
        layer.out_features = new
    down.weight = _padded(down.weight, (0, new - old))
    down.in_features = new
    return old, new


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is W x + b and no more. By type and not by instance: a 4-bit layer or an adapter's wrapper holds
    other things, and one of a quantised checkpoint may have scales, or numbers of 8 bit that they belong to."""
    if type(layer) is not nn.Linear or {name for name, _ in layer.named_parameters()} - {"weight", "bias"}:
        return False
    return type(layer.weight.data) is torch.Tensor and layer.weight.dtype in FLOATS


def _padded(parameter: nn.Parameter, pad: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(F.pad(parameter.data, pad), requires_grad=False)


def _is_zero_at_zero(module: nn.Module) -> bool:
    activation = getattr(module, "act_fn", None) or getattr(module, "act", None)
    return activation is not None and float(activation(torch.zeros(1))) == 0


def without_gradients(
    tower: nn.Module, *args: Any, keep_positions: Any = None, shared_prefix: Any = None, **kwargs: Any
) -> Any:
    """The tower's own forward; two arguments are meant for the language model and reach every module."""
    with torch.no_grad():
        return type(tower).forward(tower, *args, **kwargs)
