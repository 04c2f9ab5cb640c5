"""What makes a vision tower fast, exact to the library's own; nothing of it is saved.

    patches by a matrix product     each patch is seen once; the 3-D convolution is slow on some GPUs
    MLP width padded to 64 k        Qwen2.5-VL's 3,420 is no multiple of 8: a third of the speed on an H200
    no gradients                    PEFT's hook on the embeddings would make a frozen tower run backward
    no waiting                      between tower and decoder the library asks the GPU for numbers, and Python waits

Each step looks at what it changes and leaves alone what it does not know. Windows of equal length in one call:
attention.py. Positions and windows computed in the workers: families.py.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.utils.generic import accepts_precomputed_kwargs

from vqa_sft.models.load import DTYPES

MULTIPLE = 64
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def is_frozen(tower: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in tower.parameters())


def speed_up_tower(tower: nn.Module, mlp: Sequence[str]) -> list[str]:
    """Change a frozen `tower` in place; what was done, in words. The linear layers of its MLPs are named `mlp`. A tower
    that is trained keeps its shapes, for its weights will be saved."""
    done = []
    if embed_patches_by_product(tower):
        done.append("patches by a matrix product")
    if not is_frozen(tower):
        return done
    on_gpu = next(tower.parameters()).device.type == "cuda"  # elsewhere a multiple of 64 is only more work
    widths = {pad_mlp(module, mlp) for module in tower.modules()} - {None} if on_gpu else set()
    if widths:
        done.append("MLP padded from " + ", ".join(f"{old:,} to {new:,}" for old, new in sorted(widths)))
    skip_gradients(tower)
    done.append("no gradients")
    return done


def skip_gradients(tower: nn.Module) -> None:
    """Of a frozen tower, whose weights may be spread over processes."""
    tower.forward = types.MethodType(without_gradients, tower)


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


def pad_mlp(module: nn.Module, names: Sequence[str]) -> tuple[int, int] | None:
    """Widen an MLP with zeros; its old and new width, or None where it stays. The last of its layers `names` takes what
    the others give: down(act(gate(x)) * up(x)), or fc2(act(fc1(x))).

    The new columns give act(0) * 0 or act(0) = 0, and meet rows of zeros: the result is the same sum with zeros in it.
    """
    *ins, down = (getattr(module, name, None) for name in names)
    if not all(map(is_plain, [*ins, down])):
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


def never_wait(model: PreTrainedModel) -> None:
    """Let the forward between tower and decoder wait for no number from the GPU, where packing.py makes the batches: it
    has compared image tokens and features. The library splits the features by image to join them again, and compares
    (three waits in transformers 5.23), and Qwen3-VL adds features by indexing with a mask (one a layer that does)."""
    model.get_image_features = types.MethodType(_image_features, model)
    model.get_placeholder_mask = types.MethodType(_placeholder_mask, model)
    take_masks_without_waiting(model.language_model)


def take_masks_without_waiting(decoder: nn.Module) -> None:
    """Of Qwen3-VL, whose decoder adds features to hidden states."""
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = add_deepstack


@accepts_precomputed_kwargs(modality="image")
def _image_features(
    model: PreTrainedModel, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any
) -> BaseModelOutputWithPooling:
    """The tower's outputs with the features of all images in one piece."""
    kwargs |= {"return_dict": True}
    outputs = model.visual(pixel_values.type(model.visual.dtype), grid_thw=image_grid_thw, **kwargs)
    outputs.pooler_output = (outputs.pooler_output,)
    if "deepstack_features" in outputs:
        outputs.deepstack_features = [(level,) for level in outputs.deepstack_features]
    return outputs


def _placeholder_mask(
    model: PreTrainedModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, **features: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where image tokens stand, (B, T, 1); the second mask is for videos."""
    if input_ids is None or features.get("image_features") is None:
        return type(model).get_placeholder_mask(model, input_ids, inputs_embeds, **features)
    return (input_ids == model.config.image_token_id)[..., None], None


def add_deepstack(hidden_states: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, D) with the features (image tokens, D) added where images stand (B, T)."""
    added = torch.zeros_like(hidden_states).masked_scatter(is_image[..., None], features.to(hidden_states.dtype))
    return hidden_states + added


def vision_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a packed batch goes to the vision tower."""
    return {name: value for name, value in batch.items() if name == "pixel_values" or name.startswith("image_")}


@torch.no_grad()
def run_tower(base: PreTrainedModel, inputs: dict[str, Any], precision: str) -> torch.Tensor:
    """Features (tokens of all images, D) or (1 + deepstack layers, tokens, D), as a forward of the model computes
    them."""
    with torch.autocast(inputs["pixel_values"].device.type, DTYPES[precision], enabled=precision != "fp32"):
        outputs = base.model.get_image_features(**inputs, return_dict=True)
    features = torch.cat(outputs.pooler_output)
    if "deepstack_features" in outputs:
        features = torch.stack([features, *map(torch.cat, outputs.deepstack_features)])
    return features


def encoder_outputs(features: torch.Tensor) -> BaseModelOutputWithPooling:
    """What the model's own `get_image_features` would have returned for all images of a batch.

    `features` (tokens, D) for Qwen2.5-VL, (1 + deepstack layers, tokens, D) for Qwen3-VL.
    """
    if features.ndim == 2:
        return BaseModelOutputWithPooling(pooler_output=(features,))
    pooled, *deepstack = features
    return BaseModelOutputWithDeepstackFeatures(
        pooler_output=(pooled,), deepstack_features=[(level,) for level in deepstack]
    )
