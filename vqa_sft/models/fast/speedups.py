"""Which speed-ups a model gets, each exact to the library's own path, with a line for each that it cannot have.

    packer = pack_rows(model, precision)      before the trainer is built: rows without padding
    speed_up(model, compile_layers=...)       after it: tower, last layer, compiled layers

Nothing here changes what is saved. `fast: false` in a recipe leaves the libraries' paths as they are.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from vqa_sft.models import processes
from vqa_sft.models.families import PACKED, head_dim, num_deepstack, tower_of
from vqa_sft.models.fast import (
    attention,
    compilation,
    expert_lora,
    fused_lora,
    graphs,
    linear_attention,
    packing,
    vision,
)
from vqa_sft.models.fast.compilation import say
from vqa_sft.models.fast.training_graphs import use_training_graphs
from vqa_sft.models.load import DTYPES

# Of a prediction: its steps are not measured. A training compiles from its first step with so many rows where
# uncompiled layers do not fit the memory (training/build.py).
MIN_ROWS_TO_COMPILE = 3000
# Settings of a trainer by which a forward does not keep all that its backward needs.
KEEP_LESS = ("gradient_checkpointing", "activation_checkpointing", "activation_offloading")


def pack_rows(model: nn.Module, precision: str, *, answers_only: bool = True) -> packing.Packer | None:
    """Let `model` take packed rows; what packs a batch for it, or None where the family or its attention cannot."""
    model = base_of(model)
    config = model.config
    own = getattr(config, "text_config", config)._attn_implementation
    reason = packing.why_not(config)
    if own not in ("sdpa", attention.DECODER):
        say(f"rows are padded: attn_implementation is {own}, and packing needs sdpa")
        return None
    if reason:
        say(f"rows are padded: {reason}")
    head_dims = []
    if config.model_type in PACKED:
        config.vision_config._attn_implementation = attention.TOWER
        head_dims.append(config.vision_config.hidden_size // config.vision_config.num_heads)
    elif reason:
        return None
    if not reason:
        config.text_config._attn_implementation = attention.DECODER
        head_dims.append(head_dim(config.text_config))
    device = PartialState().device  # where the model will be, if it is not there yet
    use_varlen = attention.can_use_varlen(device, DTYPES[precision], head_dims)
    if device.type == "cuda" and not use_varlen:
        say("attention goes row by row: this GPU or precision has no kernel for rows of different lengths")
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.use_varlen = use_varlen
    if getattr(config.text_config, "output_router_logits", False):
        config.text_config.output_router_logits = (
            False  # for a loss over all tokens, which the last layer no longer has
        )
    layers = model.get_decoder().layers
    # Qwen3-VL adds image features after its first layers, at every place.
    keeps = answers_only and num_deepstack(config) < len(layers) and keep_only_answers(layers[-1])
    dtype = tower_of(model).dtype if config.model_type in PACKED else model.dtype
    return packing.Packer(config, dtype, packs_rows=not reason, keeps_answers=keeps)


def keep_only_answers(layer: nn.Module) -> bool:
    """Let the last decoder `layer` do the rest of its work only at `keep_positions`, once attention is done: what comes
    after it looks at no other place. (N,) of a packed row, (B, N) of padded ones. Whether the layer is of the kind that
    is known."""
    parts = {name for name, _ in layer.named_children()}
    if parts != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    layer.forward = types.MethodType(_forward_keeping, layer)
    return True


def keeps_answers(forward: Callable[..., Any]) -> bool:
    """Whether it is that of a layer which `keep_only_answers` has changed."""
    return getattr(forward, "__func__", None) is _forward_keeping


def _forward_keeping(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    *args: Any,
    keep_positions: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    if keep_positions is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    rows = torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
    hidden_states = (hidden_states + attended)[rows, keep_positions]
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def speed_up(model: nn.Module, *, compile_layers: bool = False, memory_budget: float = 1.0) -> bool:
    """Speed up the vision tower, and compile its blocks and the decoder's layers if asked and able: whether they are.
    Of what a compiled layer would keep for its backward pass, it keeps the share `memory_budget` and computes again
    what is cheapest."""
    base = base_of(model)
    family = PACKED.get(base.config.model_type)
    decoder = base.get_decoder()
    if family is not None and (done := vision.speed_up_tower(tower_of(base), family.tower_mlp)):
        say("vision tower: " + ", ".join(done))
    if family is not None and base.config.vision_config._attn_implementation == attention.TOWER:
        vision.never_wait(base.model)
    # On a CPU the wide tensors are not what takes the time.
    if base.device.type == "cuda" and any(fused := fused_lora.fuse(decoder)):
        say("{} MLPs and the attention of {} layers have their adapters inside the base's products".format(*fused))
    if base.device.type == "cuda" and (num_experts := expert_lora.speed_up_experts(decoder)):
        say(f"the experts of {num_experts} layers have their adapters beside the base's products")
    if base.device.type == "cuda" and (num_linear := linear_attention.speed_up_linear_attention(decoder)):
        say(f"{num_linear} layers with linear attention are one graph each")
    if compile_layers and (reason := compilation.why_not(base)):
        say(f"layers are not compiled: {reason}")
        return False
    if not (compile_layers and compilation.can_compile()):
        return False
    layers = layers_to_compile(base)
    compilation.compile_layers(base, layers, memory_budget)
    say(f"{len(layers)} layers are compiled; the first steps are slow")
    return True


def layers_to_compile(base: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers and, of a frozen vision tower, its blocks."""
    layers = [*getattr(base.get_decoder(), "layers", ())]  # Llama 4 has none here
    if layers and keeps_answers(layers[-1].forward):
        layers.pop()  # of little work and a graph of its own, a third of the compilation
    if base.config.model_type in PACKED and vision.is_frozen(tower_of(base)):
        layers += tower_of(base).blocks
    return layers


def use_graphs(model: nn.Module) -> bool:
    """Let few rows at a time go by CUDA graphs, where packed rows have a kernel; whether they do. For scoring alone."""
    base = base_of(model)
    return _can_capture(base) and graphs.use_graphs(base, graphs.CudaCapture())


def _can_capture(base: PreTrainedModel) -> bool:
    """Whether packed rows have a kernel, and nothing waits for the GPU."""
    has_kernel = attention.uses_varlen(base)
    if has_kernel and getattr(base, "is_loaded_in_8bit", False):
        say("no CUDA graphs: products of an 8-bit base wait for the GPU, which none can hold")
        return False
    return has_kernel


def prepare_graphs(trainer: Trainer) -> Callable[[], None]:
    """Prepare a trainer's model to go by CUDA graphs where a micro-batch has few packed rows. They begin when the
    function that is returned is called, after which no layer may be compiled. It does nothing where there are none."""
    base = base_of(trainer.model)
    decoder = base.get_decoder()
    is_packed = decoder.config._attn_implementation == attention.DECODER
    # Several processes exchange gradients beside the backward; all weights would have their gradients twice.
    is_alone = trainer.accelerator.num_processes == 1 and not processes.is_sharded()
    keeps_less = any(getattr(trainer.args, name, False) for name in KEEP_LESS)
    has_trained_tower = base.config.model_type in PACKED and not vision.is_frozen(tower_of(base))
    if not (is_packed and is_alone and isinstance(trainer.model, PeftModel)) or keeps_less or has_trained_tower:
        return _nothing
    if not _can_capture(base):
        return _nothing
    if any(isinstance(module, nn.Dropout) and module.p for module in decoder.modules()):
        say("no CUDA graphs: every step draws another dropout; lora_dropout: 0 allows them")
        return _nothing
    return use_training_graphs(base, graphs.CudaCapture)


def _nothing() -> None:
    pass


def speed_up_training(trainer: Trainer, *, compile_layers: bool, memory_budget: float = 1.0) -> bool:
    """`speed_up` of a trainer's model, where every process has all of its weights, else what leaves them alone; whether
    layers are compiled."""
    if processes.shards_weights():
        say("layers and the weights of the vision tower stay the library's: they are spread over processes")
        base = base_of(trainer.model)
        if base.config.model_type in PACKED and vision.is_frozen(tower := tower_of(base)):
            vision.skip_gradients(tower)
            say("vision tower: no gradients")
        stay_in_training(trainer.model)
        return False
    if compile_layers and trainer.is_deepspeed_enabled:
        say("layers are not compiled: DeepSpeed moves their weights")
    stay_in_training(trainer.model)
    compile_layers = compile_layers and not trainer.is_deepspeed_enabled
    return speed_up(trainer.model, compile_layers=compile_layers, memory_budget=memory_budget)


def may_compile_later(trainer: Trainer) -> bool:
    """Whether the layers of a trainer's model can be compiled while it trains; every process comes to the same. Says on
    a GPU why not."""
    base = base_of(trainer.model)
    if processes.shards_weights() or packing.why_not(base.config) is not None:
        return False
    reason = "DeepSpeed moves their weights" if trainer.is_deepspeed_enabled else compilation.why_not(base)
    reasons = [reason for reason in gather_object([reason]) if reason]
    if reasons and base.device.type == "cuda":
        say(f"layers are not compiled: {reasons[0]}")
    return not reasons


def stay_in_training(model: nn.Module) -> None:
    """Let `model.train()` do nothing where it is training already: the Trainer calls it for every micro-batch, and
    its walk over the 2,700 modules of a 7B model takes 5 ms, in which a GPU that has few rows waits."""
    model.train()  # an adapter is in training from the start, and the base under it is not
    model.train = types.MethodType(_train, model)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    return model if model.training == mode else type(model).train(model, mode)


def pays_compilation(config: PreTrainedConfig, num_rows: float, asked: bool | None) -> bool:
    """Whether layers are compiled without a measurement: as asked, else for many packed rows. With padded ones that was
    compared with the library's layers on a CPU alone."""
    if asked is not None:
        return asked
    return num_rows >= MIN_ROWS_TO_COMPILE and packing.why_not(config) is None


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model itself, or the one under its adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
