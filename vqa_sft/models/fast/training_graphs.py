"""CUDA graphs of training with few packed rows a micro-batch: the decoder's forward and backward, and a frozen tower.

    start = use_training_graphs(base, CudaCapture)     nothing changes yet
    start()                                            from now on shapes are captured when they come again

    a shape, filled up      1st time as it is | 2nd time captured | then two replays, forward and backward

Four rows of a 7B model leave a GPU idle for most of a step, in which Python launches kernels. A replay is one launch.
What differs from graphs without gradients (graphs.py):

    activations     in memory that all graphs share: backward must come before the next forward, and once
    gradients       of the trained weights are copied into one set of buffers, which autograd adds to `.grad`
    weights         are captured under aliases; an optimiser writes to their memory, nobody may replace them

Exact: the same kernels on the same values, with one row more, to which nobody attends and which has no gradients.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from vqa_sft.console import note
from vqa_sft.models.families import PACKED, tower_of
from vqa_sft.models.fast.graphs import (
    Capture,
    Graphed,
    forward_filled,
    forward_tower,
    without_cache,
)
from vqa_sft.models.fast.vision import take_masks_without_waiting

MAX_GRAPHS = 32  # of one module
SPARE = 0.05  # of the GPU's memory, for what is not counted


def use_training_graphs(base: PreTrainedModel, new_capture: Callable[[], Capture]) -> Callable[[], None]:
    """Prepare the decoder and the frozen tower of a model that trains packed rows; the function that is returned lets
    them go by graphs. Layers must be compiled before it is called, or never."""
    decoder = base.get_decoder()
    take_masks_without_waiting(decoder)
    prepared: list[Graphed] = [TrainingGraphed(decoder, new_capture())]
    decoder.forward = partial(_forward_decoder, decoder.forward, prepared[0])
    if base.config.model_type in PACKED:
        tower = tower_of(base)
        # In memory of its own: it may run between a forward of the decoder and its backward.
        prepared.append(KeptGraphed(tower.forward, new_capture(), tower))
        tower.forward = partial(_forward_frozen, prepared[1])
    for graphed in prepared:
        graphed.is_able = False

    def start() -> None:
        for graphed in prepared:
            graphed.is_able = True

    return start


def _forward_decoder(forward: Callable, graphed: Graphed, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with without_cache():  # from the start: compiled layers hold for one state of autocast
        if not graphed.is_able:
            return forward(*args, **kwargs)
        return forward_filled(forward, graphed, *args, **kwargs)


@torch.no_grad()
def _forward_frozen(graphed: Graphed, *args: Any, **kwargs: Any) -> Any:
    with without_cache():
        return forward_tower(graphed, *args, **kwargs)


class KeptGraphed(Graphed):
    """Graphs that are never replaced. In training shapes come by chance: where there are hundreds, captures, which take
    as long as several steps, would save nothing."""

    def __init__(self, forward: Callable[..., Any], capture: Capture, of: nn.Module | None = None) -> None:
        super().__init__(forward, capture, of)
        self.most, self.of_a_step = MAX_GRAPHS, 0

    def is_due(self, key: Hashable) -> bool:
        if key not in self.graphs:
            self.graphs[key] = None
            return False
        num_graphs = sum(graph is not None for graph in self.graphs.values())
        if self.graphs[key] is None and num_graphs < self.most and not self.has_room():
            self.most = num_graphs
            note(f"Speed: CUDA graphs of {num_graphs} shapes and no more: the GPU's memory might not do.")
        return self.graphs[key] is not None or num_graphs < self.most

    def has_room(self) -> bool:
        """Whether a GPU may hold the activations of the largest step so far twice: outside the graphs, which have
        memory of their own, and inside, where what they do not use now counts as free."""
        if not torch.cuda.is_available():
            return True
        now, (free, total) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
        self.of_a_step = self.of_a_step or torch.cuda.max_memory_allocated() - now
        return free + torch.cuda.memory_reserved() - now > 2 * self.of_a_step + SPARE * total


class TrainingGraphed(KeptGraphed):
    """A decoder's forward by graphs that have a backward each."""

    has_gradients = True

    def __init__(self, decoder: nn.Module, capture: Capture) -> None:
        super().__init__(decoder.forward, capture, decoder)
        self.decoder = decoder
        self.trained: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # and where each of them is
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}  # of all graphs
        self.num_runs = 0  # forward and backward: who comes back late finds another number

    def new_graph(self, leaves: list[Any], structure: Any) -> "TrainingGraph":
        if not self.trained:
            for module in self.decoder.modules():
                for name, weight in module._parameters.items():
                    if weight is not None and weight.requires_grad:
                        self.trained.setdefault(weight, []).append((module, name))
        return TrainingGraph(self, leaves, structure)

    def forget(self) -> None:
        super().forget()
        self.gradients.clear()

    @contextmanager
    def aliased(self) -> Iterator[list[nn.Parameter]]:
        """The trained weights under other names for the same memory. Autograd keeps the stream on which a weight was
        first used, and a backward that is captured may not wait for another stream than its own."""
        aliases = {weight: nn.Parameter(weight.detach()) for weight in self.trained}
        try:
            self._put(aliases)
            yield [*aliases.values()]
        finally:
            self._put({weight: weight for weight in self.trained})

    def _put(self, weights: dict[nn.Parameter, nn.Parameter]) -> None:
        for weight, places in self.trained.items():
            for module, name in places:
                module._parameters[name] = weights[weight]

    def keep(self, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The buffers that now hold gradients of the trained weights; None where a weight has none."""
        found = {
            weight: gradient for weight, gradient in zip(self.trained, gradients, strict=True) if gradient is not None
        }
        for weight in found:  # by the run before a capture, and so in no graph's memory
            if weight not in self.gradients:
                self.gradients[weight] = torch.empty_like(weight, requires_grad=False)
        torch._foreach_copy_([self.gradients[weight] for weight in found], [*found.values()])
        return [self.gradients[weight] if weight in found else None for weight in self.trained]


class TrainingGraph:
    """A call of a decoder's forward and its backward, on memory of their own."""

    def __init__(self, of: TrainingGraphed, leaves: list[Any], structure: Any) -> None:
        self.of, self.structure = of, structure
        self.inputs = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.needed = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        self.gradient: torch.Tensor | None = None  # of the hidden states
        self.replay_forward, self.replay_backward = of.capture(self.run_forward, self.run_backward)

    def __call__(self, leaves: list[Any]) -> Any:
        hidden_states = Replay.apply(self, leaves, *(leaves[i] for i in self.needed), *self.of.trained)
        return tree_unflatten([hidden_states], self.output_structure)

    def run_forward(self) -> list[Any]:
        leaves = list(self.inputs)
        for i in self.needed:
            leaves[i] = leaves[i].detach().requires_grad_()
        args, kwargs = tree_unflatten(leaves, self.structure)
        with torch.enable_grad(), self.of.aliased() as weights:
            outputs, self.output_structure = tree_flatten(self.of.forward(*args, **kwargs))
        if len(outputs) != 1:
            raise RuntimeError("the decoder gives more than hidden states")
        self.output, self.sources = outputs[0], [*(leaves[i] for i in self.needed), *weights]
        if self.gradient is None:  # by the run before a capture
            self.gradient = torch.zeros_like(self.output, requires_grad=False)
        return [self.output.detach()]

    def run_backward(self) -> list[Any]:
        output, sources = self.output, self.sources
        del self.output, self.sources  # and with them what forward has kept
        with torch.autocast("cuda", enabled=False):  # as where a Trainer calls backward
            found = torch.autograd.grad(output, sources, self.gradient, allow_unused=True)
        num_inputs = len(self.needed)
        self.of_weights = self.of.keep(found[num_inputs:])
        return [*found[:num_inputs]]

    def forward(self, leaves: list[Any]) -> tuple[torch.Tensor, int]:
        for own, given in zip(self.inputs, leaves, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(given)
        (hidden_states,) = self.replay_forward()
        self.of.num_runs += 1
        return hidden_states.clone(), self.of.num_runs

    def backward(self, number: int, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        if number != self.of.num_runs:
            raise RuntimeError(
                "what this forward has kept for its backward is gone: CUDA graphs share their memory. Call backward "
                "once, and before the next forward; or set fast: false."
            )
        self.of.num_runs += 1
        self.gradient.copy_(gradient)
        of_inputs = [None if found is None else found.clone() for found in self.replay_backward()]
        # Autograd clones a gradient to which others refer, as `gradients` does, and takes others as they are.
        return [*of_inputs, *self.of_weights]


class Replay(torch.autograd.Function):
    """Inputs and weights that need gradients -> hidden states."""

    @staticmethod
    def forward(ctx: Any, graph: TrainingGraph, leaves: list[Any], *sources: torch.Tensor) -> torch.Tensor:
        hidden_states, number = graph.forward(leaves)
        ctx.graph, ctx.number = graph, number
        return hidden_states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.graph.backward(ctx.number, gradient)
