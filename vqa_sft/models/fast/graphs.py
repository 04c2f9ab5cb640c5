"""CUDA graphs of what few rows go through: one replay in place of thousands of kernels that Python launches one by one.

    use_graphs(base, CudaCapture())      for the vision tower and the decoder; for scoring, one call at a time

One row of a 7B model keeps a GPU busy for 20 ms and Python for 100. A graph holds for inputs of certain shapes, and is
captured when they come for the second time. Packed rows of the decoder are filled up to a multiple of 64 tokens by one
row more, to which no other attends. Weights may be written to between calls (adapters.py does), but not replaced.

Reference: docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from vqa_sft.console import note
from vqa_sft.models.families import PACKED, round_up, tower_of
from vqa_sft.models.fast.adapter_state import watch
from vqa_sft.models.fast.attention import DECODER
from vqa_sft.models.fast.vision import take_masks_without_waiting

MULTIPLE = 64  # of tokens, to which packed rows are filled up
MAX_GRAPHS = 64  # of one module; the one that was not used for longest goes first
MAX_TOKENS = 2048  # more keep a GPU busy for longer than Python takes; four patches are a token
VALUES = torch.Tensor | bool | int | float | str | None

Run = Callable[[], list[Any]]
Replay = Callable[[], list[Any]]  # runs it again, on the same memory
# Of runs that follow one another, as a backward pass does its forward pass.
Capture = Callable[..., list[Replay]]  # (*runs)


class Graphed:
    """`Graphed(forward, capture)` gives what `forward` gives, by a graph for each shape of its arguments. Calls with
    gradients, or with arguments that are neither tensors nor plain values, go to `forward`; all calls do once the
    adapters of the module that it is `of` are not those of its beginning."""

    has_gradients = False

    def __init__(self, forward: Callable[..., Any], capture: Capture, of: nn.Module | None = None) -> None:
        self.forward, self.capture, self.is_able = forward, capture, True
        self.has_same_adapters = watch(nn.Module() if of is None else of)
        self.graphs: OrderedDict[Hashable, Callable[[list[Any]], Any] | None] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_able and not self.has_same_adapters():
            self.stop("adapters are disabled, merged or others than before")
        leaves, structure = tree_flatten((args, kwargs))
        is_ours = self.is_able and torch.is_grad_enabled() == self.has_gradients
        if not is_ours or not all(isinstance(leaf, VALUES) for leaf in leaves):
            return self.forward(*args, **kwargs)
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (structure, autocast, *map(_shape, leaves))
        if not self.is_due(key):
            return self.forward(*args, **kwargs)
        graph = self.graphs[key]
        if graph is None:
            try:
                graph = self.graphs[key] = self.new_graph(leaves, structure)
            except RuntimeError as error:  # a GPU without room for it, a kernel that cannot be captured
                self.stop((str(error).splitlines() or [type(error).__name__])[0])
                return self.forward(*args, **kwargs)
        return graph(leaves)

    def is_due(self, key: Hashable) -> bool:
        """Whether a shape has a graph, or gets one now."""
        if key not in self.graphs:
            # Kernels are chosen and workspaces made by the first call, which a capture could not do.
            self.graphs[key] = None
            if len(self.graphs) > MAX_GRAPHS:
                self.graphs.popitem(last=False)
            return False
        self.graphs.move_to_end(key)
        return True

    def new_graph(self, leaves: list[Any], structure: Any) -> Callable[[list[Any]], Any]:
        return Graph(self.forward, leaves, structure, self.capture)

    def stop(self, why: str) -> None:
        self.is_able = False
        self.forget()
        note(f"Speed: no CUDA graphs: {why}.")

    def forget(self) -> None:
        """All graphs, and the memory that they share."""
        self.graphs.clear()


class Graph:
    """A call of `forward` on memory of its own."""

    def __init__(self, forward: Callable, leaves: list[Any], structure: Any, capture: Callable) -> None:
        self.inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(self.inputs, structure)

        def run() -> list[Any]:
            outputs, self.structure = tree_flatten(forward(*args, **kwargs))
            return outputs

        (self.replay,) = capture(run)

    def __call__(self, leaves: list[Any]) -> Any:
        for own, given in zip(self.inputs, leaves, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(given)
        # All graphs share their memory: the next one writes over these outputs.
        outputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.replay()]
        return tree_unflatten(outputs, self.structure)


def _shape(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


class CudaCapture:
    """Captures each run as a CUDA graph; all share one pool of memory, for they never run at the same time. After one
    that failed it refuses the next ones."""

    _one_at_a_time = threading.Lock()  # in a process

    def __init__(self) -> None:
        self.pool, self.has_failed = torch.cuda.graph_pool_handle(), False

    def __call__(self, *runs: Run) -> list[Replay]:
        if self.has_failed:
            raise RuntimeError("a capture has failed before")
        stream = torch.cuda.current_stream()
        try:
            # Weights that autocast has cast for the call around this one would be gone with it.
            with self._one_at_a_time, without_cache():
                # Once as they are: compiled layers hold for one state of autocast, and in this one they would be
                # compiled inside the capture.
                for run in runs:
                    run()
                return [self._capture(run) for run in runs]
        except RuntimeError:
            self.has_failed = True
            raise
        finally:
            torch.cuda.set_stream(stream)  # torch 2.11 stays on its own where a capture fails

    def _capture(self, run: Run) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Other threads prepare the next rows meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> list[Any]:
            graph.replay()
            return outputs

        return replay


def without_cache() -> torch.autocast:
    """Autocast as it is, without its cache of weights that are cast."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)


def use_graphs(model: PreTrainedModel, capture: Capture) -> bool:
    """Let the vision tower and the decoder of a model that scores packed rows go by graphs; whether they do."""
    decoder = model.get_decoder()
    if decoder.config._attn_implementation != DECODER:
        return False
    take_masks_without_waiting(decoder)
    decoder.forward = partial(forward_filled, decoder.forward, Graphed(decoder.forward, capture, decoder))
    if model.config.model_type in PACKED:
        tower = tower_of(model)
        tower.forward = partial(forward_tower, Graphed(tower.forward, capture, tower))
    return True


def forward_filled(forward: Callable, graphed: Graphed, *args: Any, **kwargs: Any) -> Any:
    """A decoder's forward of packed rows, filled up."""
    hidden_states, cu_seq_lens = kwargs.get("inputs_embeds"), kwargs.get("cu_seq_lens_q")
    if args or hidden_states is None or cu_seq_lens is None or hidden_states.shape[1] > MAX_TOKENS:
        return forward(*args, **kwargs)
    outputs = graphed(**fill_up(kwargs))
    if kwargs.get("keep_positions") is None:
        outputs.last_hidden_state = outputs.last_hidden_state[:, : hidden_states.shape[1]]
    return outputs


def forward_tower(graphed: Graphed, pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A tower's forward, without what is the decoder's though it reaches every module: it is of the texts' lengths."""
    own = {name: value for name, value in kwargs.items() if name not in ("keep_positions", "shared_prefix")}
    return (graphed if len(pixels) <= 4 * MAX_TOKENS else graphed.forward)(pixels, *args, **own)


def fill_up(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments of packed rows (packing.py), with one row more: their number of tokens becomes the next
    multiple of 64, that of B rows written out the next of 64 B, so that few graphs serve all lengths."""
    cu_seq_lens, shared_prefix = kwargs["cu_seq_lens_q"], kwargs.get("shared_prefix")
    num_tokens = kwargs["inputs_embeds"].shape[1]
    num_written = num_tokens if shared_prefix is None else len(shared_prefix[0])
    more = MULTIPLE - num_tokens % MULTIPLE
    of_all = MULTIPLE * (len(cu_seq_lens) - 1)
    more_written = more if shared_prefix is None else of_all - num_written % of_all
    filled = {
        "inputs_embeds": F.pad(kwargs["inputs_embeds"], (0, 0, 0, more)),
        "position_ids": F.pad(kwargs["position_ids"], (0, more)),
        "cu_seq_lens_q": F.pad(cu_seq_lens, (0, 1), value=num_written + more_written),
        "max_length_q": max(kwargs["max_length_q"], round_up(of_all)),
    }
    if shared_prefix is not None:
        places, own, copies = shared_prefix
        places = F.pad(places, (0, more_written), value=num_tokens)
        own = F.pad(own, (0, more), value=num_written)
        # The copies are for gradients. Those of the filler's tokens are none: zeros, of which one is taken.
        filled["shared_prefix"] = places, own, copies if torch.is_grad_enabled() else copies[:0, :0]
    if kwargs.get("visual_pos_masks") is not None:
        filled["visual_pos_masks"] = F.pad(kwargs["visual_pos_masks"], (0, more))
        features = kwargs["deepstack_visual_embeds"]  # of which the masks take as many as they have places
        filled["deepstack_visual_embeds"] = [F.pad(level, (0, 0, 0, -len(level) % MULTIPLE)) for level in features]
    return kwargs | filled
