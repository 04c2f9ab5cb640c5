"""Which speed-ups a model gets, each exact to the library's own path, with a line for each that it cannot have.

    packer = pack_rows(model, precision)      before the trainer is built: rows without padding
    speed_up(model, compile_layers=...)       after it: tower, last layer, compiled layers

Nothing here changes what is saved. `fast: false` in a recipe leaves the libraries' paths as they are.
"""

import functools
import types
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from vqa_sft.console import note
from vqa_sft.models import processes
from vqa_sft.models.families import PACKED, head_dim, num_deepstack, tower_of
from vqa_sft.models.fast import attention, fused_lora, graphs, linear_attention, packing, vision
from vqa_sft.models.fast.masked_attention import MASKED
from vqa_sft.models.load import DTYPES

# Graphs of one layer: with and without gradients, first layer (its input has none) and others, training and scoring.
MAX_GRAPHS = 32
# Compilation takes about a minute; a run of fewer rows is over sooner without it.
MIN_ROWS_TO_COMPILE = 3000


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


def speed_up(model: nn.Module, *, compile_layers: bool = False, memory_budget: float = 1.0) -> None:
    """Speed up the vision tower, and compile its blocks and the decoder's layers if asked and able. Of what a compiled
    layer would keep for its backward pass, it keeps the share `memory_budget` and computes again what is cheapest."""
    base = base_of(model)
    family = PACKED.get(base.config.model_type)
    decoder = base.get_decoder()
    layers = [*getattr(decoder, "layers", ())]  # Llama 4 has none here
    if layers and getattr(layers[-1].forward, "__func__", None) is _forward_keeping:
        layers.pop()  # of little work and a graph of its own, a third of the compilation
    if family is not None:
        tower = tower_of(base)
        if done := vision.speed_up_tower(tower, family.tower_mlp):
            say("vision tower: " + ", ".join(done))
        layers += tower.blocks if vision.is_frozen(tower) else ()
    # On a CPU the wide tensors are not what takes the time.
    if base.device.type == "cuda" and (num_mlps := fused_lora.fuse(decoder)):
        say(f"{num_mlps} MLPs have their adapters inside the base's products")
    if base.device.type == "cuda" and (num_linear := linear_attention.speed_up_linear_attention(decoder)):
        say(f"{num_linear} layers with linear attention are one graph each")
    if not compile_layers:
        return
    if getattr(base, "is_quantized", False):
        say("layers are not compiled: the base is quantised")
    elif not _can_be_compiled(base):
        say("layers are not compiled: that needs a GPU of compute capability 8.0 or newer, and half precision")
    elif can_compile():
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        # A shape that does not compile runs uncompiled.
        torch._dynamo.config.suppress_errors = True
        torch._functorch.config.activation_memory_budget = memory_budget
        # Else DDP has each layer cut in two at the size of its first bucket, though its own gradients are sent while
        # the layer before it computes anyway.
        torch._dynamo.config.optimize_ddp = False
        if decoder.config._attn_implementation == "sdpa":
            decoder.config._attn_implementation = MASKED
        decoder.register_forward_pre_hook(_ask_for_gradients, with_kwargs=True)
        for layer in layers:
            layer.compile(dynamic=True)  # in place: names stay, and a copy of the model is not compiled
        say(f"{len(layers)} layers are compiled; the first steps are slow")


def _ask_for_gradients(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """The first layer's input gets gradients as those of the others do: its graph is theirs, and compiled once. A graph
    of its own took 19 of 52 s of compilation for Qwen3-VL-8B; the price is one more gradient of its projections."""
    embeddings = kwargs.get("inputs_embeds")
    if embeddings is not None and torch.is_grad_enabled() and embeddings.is_leaf:
        embeddings.requires_grad_()


def use_graphs(model: nn.Module) -> bool:
    """Let few rows at a time go by CUDA graphs, where packed rows have a kernel; whether they do. For scoring alone."""
    base = base_of(model)
    return _has_kernel(base) and graphs.use_graphs(base, graphs.CudaCapture())


def _has_kernel(base: nn.Module) -> bool:
    return any(getattr(module, "use_varlen", False) for module in base.modules())


def _can_be_compiled(base: PreTrainedModel) -> bool:
    # Packed rows one by one would be compiled again for every mixture of lengths.
    is_packed = base.get_decoder().config._attn_implementation == attention.DECODER
    return attention.can_use_varlen(base.device, base.dtype) and (_has_kernel(base) or not is_packed)


def speed_up_training(
    trainer: Trainer, num_rows: float, *, compile_layers: bool | None, memory_budget: float = 1.0
) -> None:
    """`speed_up` of a trainer's model, where every process has all of its weights; else what leaves them alone."""
    if processes.shards_weights():
        say("layers and the weights of the vision tower stay the library's: they are spread over processes")
        base = base_of(trainer.model)
        if base.config.model_type in PACKED and vision.is_frozen(tower := tower_of(base)):
            vision.skip_gradients(tower)
            say("vision tower: no gradients")
        stay_in_training(trainer.model)
        return
    compiles = pays_compilation(base_of(trainer.model).config, num_rows, compile_layers)
    if compiles and trainer.is_deepspeed_enabled:
        say("layers are not compiled: DeepSpeed moves their weights")
    stay_in_training(trainer.model)
    compiles = compiles and not trainer.is_deepspeed_enabled
    speed_up(trainer.model, compile_layers=compiles, memory_budget=memory_budget)


def stay_in_training(model: nn.Module) -> None:
    """Let `model.train()` do nothing where it is training already: the Trainer calls it for every micro-batch, and
    its walk over the 2,700 modules of a 7B model takes 5 ms, in which a GPU that has few rows waits."""
    model.train()  # an adapter is in training from the start, and the base under it is not
    model.train = types.MethodType(_train, model)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    return model if model.training == mode else type(model).train(model, mode)


def pays_compilation(config: PreTrainedConfig, num_rows: float, asked: bool | None) -> bool:
    """Whether layers are compiled: as asked, else for many packed rows. With padded ones that was compared with the
    library's layers on a CPU alone."""
    if asked is not None:
        return asked
    return num_rows >= MIN_ROWS_TO_COMPILE and packing.why_not(config) is None


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model itself, or the one under its adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@functools.cache
def can_compile() -> bool:
    """Whether something small compiles on the GPU: a C compiler and Triton are needed. Says why not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device="cuda"))
    except Exception as error:  # whatever the tool chain raises
        say(f"layers are not compiled: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return False
    return True


def num_compilations() -> int:
    """Graphs compiled so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def say(line: str) -> None:
    note(f"Speed: {line}.")
