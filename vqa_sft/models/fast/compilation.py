"""Layers compiled in place: what that costs on this machine, what it saves, and whether it pays.

    compile_layers(base, layers, ...)     at any step: names, hooks, adapters and DDP around the model stay
    expect(layers, ...)                   seconds of compilation and the share of a step that it saves

What compilation took is kept in the compiler's own cache folder (TORCHINDUCTOR_CACHE_DIR, else one in /tmp): it is gone
when the compiled code is gone. Its name is made of all that the code depends on, so other versions have none.

Nothing is compiled beside running steps: while it traces, torch.compile sets the random state, the default dtype and
`torch.compiler.is_compiling` of the whole process, and puts them back at its end.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from vqa_sft.console import note
from vqa_sft.errors import InputError, printable
from vqa_sft.files import write_whole
from vqa_sft.models.fast import attention, linear_attention
from vqa_sft.models.fast.masked_attention import MASKED

# Graphs of one layer: with and without gradients, first layer (its input has none) and others, training and scoring.
MAX_GRAPHS = 32
# Of one kind of layer, forward and backward, where nothing is known: on H200s with empty caches 22 s with two kinds
# (Qwen2.5-VL-7B and its tower); three steps were done after 23 s with one kind (InternVL3.5-8B), 57 s with two
# (Gemma-4-12B).
SECONDS_A_GRAPH = 15.0
# Compiled layers saved 0.28 to 0.38 of a step's time there (Qwen2.5-VL-7B, Gemma-4-12B).
SHARE_SAVED = 0.3
# What the second process on a machine needs of the first one's seconds, where only those are known: 76 of 125 there.
# With the cache of `compile_layers` it is less; the second process measures it.
WARM_SHARE = 0.6
LEAST_SHARE = 0.05  # a measurement beside other work is not to rule out compilation for ever


@dataclass(frozen=True)
class Expected:
    """Of compilation."""

    seconds: float
    share_saved: float  # of a step's time
    is_measured: bool = False  # on this machine

    def __str__(self) -> str:
        known = "as measured here before" if self.is_measured else "estimated"
        return f"about {self.seconds:.0f} s of compilation ({known})"

    def pays(self, num_steps: int, step_s: float) -> bool:
        """For so many steps, which take `step_s` uncompiled."""
        return self.seconds < self.saved_s(num_steps, step_s)

    def saved_s(self, num_steps: int, step_s: float) -> float:
        return num_steps * step_s * self.share_saved


def expect(layers: Sequence[nn.Module], memory_budget: float) -> Expected:
    """By what an earlier run on this machine has measured, else by the number of graphs. Says where that is broken."""
    num_graphs = len(set(map(str, layers)))  # one for each kind of layer, whose text holds its widths and adapters
    try:
        known = _record(layers, memory_budget)
        values = json.loads(known.read_text(encoding="utf-8"))
        return Expected(float(values["seconds"]), float(values["share_saved"]), is_measured=True)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        say(f"what compilation took here before cannot be read ({printable(str(error))})")
    return Expected(SECONDS_A_GRAPH * num_graphs, SHARE_SAVED)


def remember(layers: Sequence[nn.Module], memory_budget: float, found: Expected, before: Expected) -> None:
    """Keep what a run has measured for the next ones on this machine; `before` is what it had expected."""
    seconds = max(0.0, found.seconds) * (1 if before.is_measured else WARM_SHARE)
    kept = Expected(round(seconds, 1), round(max(LEAST_SHARE, found.share_saved), 3), is_measured=True)
    try:
        write_whole(_record(layers, memory_budget), json.dumps(asdict(kept)))
    except (OSError, InputError) as error:
        say(f"what compilation took is not kept: {error}")


def _record(layers: Sequence[nn.Module], memory_budget: float) -> Path:
    """The file of what compilation of such layers takes here."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    recomputes = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)  # inside the graph
    of: list[Any] = [torch.__version__, transformers.__version__, device, memory_budget, recomputes]
    text = "\n".join([*map(str, of), *sorted(set(map(str, layers)))])
    return Path(cache_dir(), "vqa_sft", f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json")


def why_not(base: PreTrainedModel) -> str | None:
    """What keeps the layers of a model from being compiled, or None."""
    if getattr(base, "is_quantized", False):
        return "the base is quantised"
    # Packed rows one by one would be compiled again for every mixture of lengths.
    is_packed = base.get_decoder().config._attn_implementation == attention.DECODER
    if not attention.can_use_varlen(base.device, base.dtype) or (is_packed and not attention.uses_varlen(base)):
        return "that needs a GPU of compute capability 8.0 or newer, and half precision"
    return None


@functools.cache
def can_compile() -> bool:
    """Whether something small compiles on the GPU: a C compiler and Triton are needed. Says why not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device="cuda"))
    except Exception as error:  # whatever the tool chain raises
        say(f"layers are not compiled: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return False
    return True


def compile_layers(base: PreTrainedModel, layers: Sequence[nn.Module], memory_budget: float, **how: Any) -> None:
    """Compile layers of a model in place, at their next call. Of what a compiled layer would keep for its backward
    pass, it keeps the share `memory_budget` and computes again what is cheapest. `how` goes to torch.compile."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # A shape that does not compile runs uncompiled.
    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.activation_memory_budget = memory_budget
    # Else DDP has each layer cut in two at the size of its first bucket, though its own gradients are sent while the
    # layer before it computes anyway.
    torch._dynamo.config.optimize_ddp = False
    # Else Python's floats, such as an adapter's factor, are tensors on the CPU, for which the graphs of a GPU hold C++
    # code: to build it torch asks g++ in every process what the CPU can (11 s on two cores, cached code or not).
    torch._dynamo.config.specialize_float = True
    # Without it no graph that holds a function of ours with a backward of its own (fused_lora.py, attention.py) is read
    # from AOTAutograd's cache, and the next process traces and splits it again. They are pure functions of tensors.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    torch.compiler.config.cache_key_tag = _tag(torch.compiler.config.cache_key_tag)
    decoder = base.get_decoder()
    if decoder.config._attn_implementation == "sdpa":
        decoder.config._attn_implementation = MASKED
    decoder.register_forward_pre_hook(_ask_for_gradients, with_kwargs=True)
    for layer in layers:
        layer.compile(dynamic=True, **how)  # in place: names stay, and a copy of the model is not compiled


def _tag(others: str) -> str:
    """What torch adds to the names of cached graphs: the source of our custom operator, whose shapes and backward are
    in a graph and no part of its name (pytorch issue 144344)."""
    own = hashlib.sha256(Path(linear_attention.__file__).read_bytes()).hexdigest()[:16]
    return others if own in others else f"{others} vqa_sft {own}".strip()


def _ask_for_gradients(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """The first layer's input gets gradients as those of the others do: its graph is theirs, and compiled once. A graph
    of its own took 19 of 52 s of compilation for Qwen3-VL-8B; the price is one more gradient of its projections."""
    embeddings = kwargs.get("inputs_embeds")
    if embeddings is not None and torch.is_grad_enabled() and embeddings.is_leaf:
        embeddings.requires_grad_()


def is_compiled(model: nn.Module) -> bool:
    """Whether layers of it are, at this step."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def num_compilations() -> int:
    """Graphs compiled so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def say(line: str) -> None:
    note(f"Speed: {line}.")
