"""What the layers of a language model keep for their backward pass, and what comes and goes beside it: counted.

One layer of each kind (full or linear attention, sliding window, experts, ...) runs forward and backward as the library
has it, with its adapter and under autocast, on tensors that have shapes and no values (FakeTensorMode). No formula for
a family, no weights, a second or two. Bytes are those of storages that are alive; of compiled layers, of those that
torch.compile saves (`count_compiled`). What GPUs compute by kernels of their own is replaced (kernels.py).
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqa_sft.errors import InputError
from vqa_sft.models.fast import expert_lora, fused_lora, linear_attention, speedups
from vqa_sft.models.memory import kernels
from vqa_sft.models.parts import decoder_layers

LENGTHS = tuple(num * kernels.CHUNK for num in (4, 8, 16))  # tokens that are tried
# With compiled layers these rows, or their tokens in one. Primes, so that a tensor's shape tells what it grows with: no
# width of a model is a multiple of the length, or up to three more, as convolutions pad it.
COMPILED_ROWS, COMPILED_LENGTH, CONVOLVED = 13, 491, 4
COMPILED_TOKENS = COMPILED_ROWS * COMPILED_LENGTH


@dataclass(frozen=True)
class How:
    """What of a plan changes what layers keep."""

    attention: kernels.Attention
    has_kernels: bool  # of flash-linear-attention
    keeps_answers: bool  # speedups.keep_only_answers
    fuses_mlp: bool  # fast/fused_lora.py
    fuses_attention: bool
    converts: bool  # PEFT, the input of every adapter to fp32: not where the base is quantised
    has_dropout: bool
    value_bytes: int  # of an activation; 2: under autocast
    weight_bytes: int  # of a weight that is not an adapter's
    memory_budget: float | None = None  # of compiled layers


@dataclass(frozen=True)
class Bytes:
    """Bytes of `tokens` in rows of `length`: fixed + tokens x (token + pair x length)."""

    fixed: float = 0
    token: float = 0
    pair: float = 0

    def of(self, tokens: float, length: float) -> float:
        return self.fixed + tokens * (self.token + self.pair * length)


@dataclass(frozen=True)
class Kind:
    num_layers: int
    kept: Bytes  # for the backward pass of one layer
    passed: Bytes  # its output
    temporaries: Bytes


@dataclass(frozen=True)
class Counted:
    kinds: tuple[Kind, ...]
    shared: Bytes  # that all layers are given: positions, masks, embeddings of each layer
    copies: float  # bytes of adapters of experts in the order of their products (fast/expert_lora.py)


def count_layers(decoder: nn.Module, how: How) -> Counted:
    """`decoder` is a language model on the meta device, with its adapter if it has one."""
    with _explained(decoder):
        num_layers, runs, copies = _run(decoder, how, [(1, length) for length in LENGTHS])
    kinds = []
    for place, num in enumerate(num_layers):
        kept, passed, temporaries = map(_fit, zip(*(run.layers[place] for run in runs), strict=True))
        kinds.append(Kind(num, kept, passed, temporaries))
    return Counted(tuple(kinds), _fit([sum(run.shared.values()) for run in runs]), copies)


def count_compiled(decoder: nn.Module, how: How) -> tuple[Bytes | None, ...]:
    """What one layer of each kind keeps, compiled with `how.memory_budget`; None: it is not compiled. torch's own
    partitioner chooses what is kept and what is computed again. Its choice depends on the number of tokens; this is the
    one for COMPILED_TOKENS."""
    sizes = [(COMPILED_ROWS, COMPILED_LENGTH) if how.attention in kernels.MASKED else (1, COMPILED_TOKENS)]
    budget = functorch_config.patch(activation_memory_budget=how.memory_budget)
    # The graphs are none of the run's, which counts its own (fast/compilation.py).
    num_graphs = mock.patch.dict(torch._dynamo.utils.counters["stats"])
    with _explained(decoder), budget, torch._dynamo.config.patch(suppress_errors=False), num_graphs:
        _, (run,), _ = _run(decoder, how, sizes)
    return tuple(run.compiled)


def _fit(sizes: Sequence[float]) -> Bytes:
    """The parabola through the bytes at LENGTHS, for one row."""
    a, b, c = LENGTHS
    first, second = (sizes[1] - sizes[0]) / (b - a), (sizes[2] - sizes[1]) / (c - b)
    pair = (second - first) / (c - a)
    token = first - pair * (a + b)
    return Bytes(sizes[0] - token * a - pair * a * a, token, pair)


@contextmanager
def _explained(decoder: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a model raises that cannot do without values
        said = (str(error).splitlines() or [""])[0][:100]
        raise InputError(
            f"the memory of {decoder.config.model_type} cannot be estimated: its layers do not run on tensors without "
            f"values ({type(error).__name__}: {said})."
        ) from error


class _Run:
    """A forward of the decoder."""

    def __init__(self) -> None:
        self.layers: list[tuple[float, float, float]] = []  # kept, passed, temporaries of one of each kind
        self.compiled: list[Bytes | None] = []  # kept by one of each kind
        self.shared: dict[int, int] = {}  # bytes of the storages that layers are given
        self.held: list[torch.UntypedStorage] = []  # so that no others take their places


def _run(decoder: nn.Module, how: How, sizes: Sequence[tuple[int, int]]) -> tuple[list[int], list[_Run], float]:
    """How many layers there are of every kind, a forward for each of the sizes (rows, length), `Counted.copies`."""
    decoder, layers, num_layers = _copy_one_of_each(decoder, how)
    decoder.config._attn_implementation = f"{kernels.NAME}{how.attention}"
    decoder.train()
    keeps_answers = how.keeps_answers and speedups.keep_only_answers(layers[-1])
    for layer in layers:
        if how.fuses_mlp:
            fused_lora.fuse_mlp(layer, fused_lora.Writes())
        if how.fuses_attention:
            fused_lora.fuse_attention(layer, fused_lora.Writes())
    for name, module in decoder.named_modules():
        if name.endswith(".indexer"):  # Qwen4-Exp: it chooses tokens by their values, and keeps nothing
            module.forward = kernels.choose_all
    runs: list[_Run] = []
    with FakeTensorMode(), kernels.kernels_of(decoder, is_installed=how.has_kernels):
        _fill(decoder, how)
        if how.fuses_mlp:  # once weights have their precision, of which it depends
            expert_lora.speed_up_experts(decoder)
        if how.memory_budget is not None and how.has_kernels:
            linear_attention.use_operator(layers)
        forwards = [layer.forward for layer in layers]
        for rows, length in sizes:
            runs.append(_Run())
            for layer, forward in zip(layers, forwards, strict=True):
                count = _count if how.memory_budget is None else partial(_count_compiled, how, length)
                layer.forward = partial(count, runs[-1], layer, forward)
            given = {"input_ids": torch.zeros(rows, length, dtype=torch.int64)}
            if keeps_answers:
                given["keep_positions"] = torch.zeros(1, dtype=torch.int64)
            if how.attention in kernels.MASKED:
                given["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, enabled=how.value_bytes == 2):
                decoder(**given, use_cache=False)
    copies = [sum(expert_lora.copied_bytes(module) for module in layer.modules()) for layer in layers]
    return num_layers, runs, sum(num * size for num, size in zip(num_layers, copies, strict=True))


def _copy_one_of_each(decoder: nn.Module, how: How) -> tuple[nn.Module, list[nn.Module], list[int]]:
    """A copy of the decoder, its first layer of every kind, and how many there are of each; other layers of the copy
    pass on what they are given."""
    layers = decoder_layers(decoder)
    groups: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        is_last = how.keeps_answers and place == len(layers) - 1  # its MLP may see the answers alone
        groups.setdefault((_kind_of(layer), is_last), []).append(place)
    first = [places[0] for places in groups.values()]
    others = {id(layer): _Passing(layer) for place, layer in enumerate(layers) if place not in first}
    decoder = copy.deepcopy(decoder, others)
    return decoder, [decoder_layers(decoder)[place] for place in first], [*map(len, groups.values())]


class _Passing(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(_plain(layer))  # a decoder may ask for the kind of attention

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


def _fill(decoder: nn.Module, how: How) -> None:
    """Give the decoder, in place, fake tensors in the precisions of a training for those on the meta device."""
    dtype = torch.float32 if how.weight_bytes == 4 else torch.bfloat16
    has_adapter = any(isinstance(module, LoraLayer) for module in decoder.modules())

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        own = torch.float32 if tensor.requires_grad and has_adapter else dtype
        return torch.empty(tensor.shape, dtype=own if tensor.is_floating_point() else tensor.dtype)

    for module in decoder.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(fake(weight), requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):  # buffers of fused_lora
                setattr(module, name, fake(value))
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = how.converts
            if how.has_dropout:
                module.lora_dropout = nn.ModuleDict(dict.fromkeys(module.lora_dropout, _Dropout()))


class _Dropout(nn.Module):
    """As a GPU has it: a mask of one byte a value is kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, 0.5, True)[0]


def _kind_of(layer: nn.Module) -> Any:
    """What layers of one kind have in common: their modules, plain attributes and the shapes of their weights."""
    modules = ((name, type(module), *sorted(_plain(module).items())) for name, module in layer.named_modules())
    weights = ((name, weight.shape, weight.requires_grad) for name, weight in layer.named_parameters())
    return tuple(modules), tuple(weights)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are no modules or tensors, but for a layer's number."""
    values = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | str | float)}
    return {name: value for name, value in values.items() if not name.endswith(("idx", "index"))}


def _count(run: _Run, layer: nn.Module, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of one `layer`, and its backward pass."""
    # Keys and values that layers share come in a dict, and are counted where they are made.
    for storage in _storages((args, [value for value in kwargs.values() if not isinstance(value, dict)])):
        run.shared[storage._cdata] = storage.nbytes()
        run.held.append(storage)  # so that no other takes its address
    leaf = hidden.detach().requires_grad_()
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    with _Live() as live:
        hidden = leaf.clone()
        output = forward(hidden, *args, **kwargs)
        del hidden
        passed = output.untyped_storage().nbytes()
        kept = live.now - passed
        live.start_backward()
        torch.autograd.backward(output, torch.empty_like(output), inputs=[leaf, *trained])
        gradients = sum(weight.grad.nbytes for weight in trained if weight.grad is not None)
    run.layers.append((kept, passed, live.peak - gradients))
    for weight in trained:
        weight.grad = None
    return output.detach()


def _count_compiled(
    how: How, length: int, run: _Run, layer: nn.Module, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The forward of one compiled `layer`."""
    is_plain = hasattr(layer, "linear_attn") and not how.has_kernels  # a loop over chunks
    if is_plain or speedups.keeps_answers(forward):
        run.compiled.append(None)
        return forward(hidden, *args, **kwargs).detach()
    weights = [vars(module) for module in layer.modules()]
    others = {storage._cdata for storage in _storages((weights, args, kwargs))}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in others:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def compute(hidden: torch.Tensor) -> torch.Tensor:
        return forward(hidden, *args, **kwargs)

    compiled = torch.compile(compute, backend=_backend(), fullgraph=True, dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = compiled(hidden.detach().requires_grad_())
    torch._dynamo.eval_frame.reset_code(compute.__code__)  # or there would soon be too many graphs of it
    sizes = [0.0, 0.0, 0.0]
    for tensor in saved.values():
        # A convolution pads a few tokens.
        power = sum(size >= length and size % length < CONVOLVED for size in tensor.shape)
        sizes[power] += tensor.untyped_storage().nbytes()
    fixed, token, pair = sizes
    run.compiled.append(Bytes(fixed, token / COMPILED_TOKENS, pair / COMPILED_TOKENS / length))
    return output.detach()


def _backend() -> Any:
    """torch.compile's own but for its last step, code for a GPU."""
    # Importing them takes a second or two, which most runs need not spend.
    from functorch.compile import nop
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import compile_fx

    table = compile_fx.select_decomp_table()
    return aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=compile_fx.partition_fn, decompositions=table)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class _Live(TorchDispatchMode):
    """Bytes of the storages that were made under this mode and are alive (`now`); in the backward pass the `peak` of
    those made there, as if nothing were freed of what was kept: a compiled layer frees it at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[int, bool]] = {}
        self.now = self.peak = 0
        self.is_backward = False

    def start_backward(self) -> None:
        self.now = self.peak = 0
        self.is_backward = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most calls; tensors made: none
            return args[0].device
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:  # else a view, or what was there before
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self.sizes:
            self.sizes[place] = storage.nbytes(), self.is_backward
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, place)

    def _remove(self, place: int) -> None:
        size, is_backward = self.sizes.pop(place)
        if is_backward == self.is_backward:
            self.now -= size
