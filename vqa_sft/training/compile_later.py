"""Compilation in the middle of a run, if that pays: steps are measured first, and the steps left say what is saved.

    step 1, 2          uncompiled, not measured
    step 3 to 5        uncompiled, measured; the main process decides for all
    step 6 to 8        compiled, if they are: with the compilation itself, not measured
    step 9 to 13       measured, for the next run on this machine (models/fast/compilation.py)

Then CUDA graphs begin, if there are some (models/fast/training_graphs.py): at step 14, or at step 6 where layers are
not compiled.

Where layers are compiled from the first step on (`compile_layers: true`), the last two lines begin there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from vqa_sft.environment import is_main_process
from vqa_sft.models import processes
from vqa_sft.models.fast import compilation
from vqa_sft.models.fast.compilation import Expected, say
from vqa_sft.models.fast.speedups import base_of, layers_to_compile
from vqa_sft.training.callbacks import Speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP, MEASURED = 2, 3
COMPILING, MEASURED_COMPILED = 3, 5


class CompileLater(TrainerCallback):
    """Compiles the layers of `model`, adapted or not, after a few steps if the steps left pay for it; `speed` then
    counts from zero. Of layers that are compiled already it measures what that took. `start_graphs` is called when all
    of this is done."""

    def __init__(
        self,
        model: Any,
        memory_budget: float,
        speed: Speed,
        *,
        is_compiled: bool = False,
        start_graphs: Callable[[], None] = lambda: None,
    ) -> None:
        self.base: PreTrainedModel = base_of(model)
        self.layers = layers_to_compile(self.base)
        self.memory_budget, self.speed, self.is_compiled = memory_budget, speed, is_compiled
        self.start_graphs = start_graphs
        self.num_steps = 0  # of this process; a resumed run begins with those of an earlier one
        self.start_s = self.step_s = self.first_s = 0.0
        self.expected: Expected | None = None  # once layers are compiled

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.is_compiled:
            self.expected = compilation.expect(self.layers, self.memory_budget)
            self.num_steps = WARM_UP + MEASURED
            say(f"the first steps hold {self.expected}")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.is_compiled and self.num_steps == WARM_UP + MEASURED:  # its rows are there
            self.start_s = self.speed.clock_s()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_steps += 1
        if self.num_steps == WARM_UP:
            self.start_s = self.speed.clock_s()
        elif self.num_steps == WARM_UP + MEASURED:
            self.step_s = (self.speed.clock_s() - self.start_s) / MEASURED
            self.decide(state.global_step, state.max_steps)
            if self.expected is None:
                self.start_graphs()
        elif self.expected is not None and self.num_steps == WARM_UP + MEASURED + COMPILING:
            self.first_s = self.speed.clock_s() - self.start_s
            self.start_s += self.first_s
        elif self.expected is not None and self.num_steps == WARM_UP + MEASURED + COMPILING + MEASURED_COMPILED:
            self.learn((self.speed.clock_s() - self.start_s) / MEASURED_COMPILED)
            self.start_graphs()

    def decide(self, step: int, max_steps: int) -> None:
        """Compile or not, and print which. The times of processes differ: those of the main process count."""
        steps_left = max_steps - step
        expected = compilation.expect(self.layers, self.memory_budget)
        what = f"{expected} would save about {expected.saved_s(steps_left, self.step_s):.0f} s of the steps left"
        if not processes.from_main(expected.pays(steps_left, self.step_s)):
            say(f"layers are not compiled: {what}")
        elif compilation.can_compile():
            say(f"compiled from step {step + 1} on: {what}")
            compilation.compile_layers(self.base, self.layers, self.memory_budget)
            self.expected, self.start_s = expected, self.speed.clock_s()
            self.speed.num_steps = 0

    def learn(self, step_s: float) -> None:
        """Keep and say what it took; a compiled step takes `step_s`."""
        share_saved = 1 - step_s / self.step_s if self.step_s else self.expected.share_saved
        found = Expected(self.first_s - COMPILING * step_s, share_saved)
        instead = f" instead of {self.step_s:.2g}" if self.step_s else ""
        say(f"compilation took {found.seconds:.0f} s; a step takes {step_s:.2g} s{instead}")
        if is_main_process():
            compilation.remember(self.layers, self.memory_budget, found, self.expected)
