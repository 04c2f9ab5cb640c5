"""Inside a case of the benchmark: a script of recipes/, or another tool, under the clock and the profiler.

python -m vqa_sft.lab.watch SCRIPT HOW ARGUMENTS...     HOW: JSON of what benchmark.py asks for
"""

import csv
import functools
import json
import os
import runpy
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vqa_sft.lab.peers import PEERS

T4_GIB = 13.8
# Steps: until all that is compiled was, in most cases; before those that are timed; after them.
STARTED, WARM_UP, PROFILED = 3, 6, 3


class Watch:
    """Times steps: `warm_up` without, `steps` with the clock, `PROFILED` under the profiler for the idle share."""

    def __init__(self, steps: int, result: str | None, num_kernels: int = 0, warm_up: int = WARM_UP) -> None:
        self.steps, self.result, self.num_kernels, self.warm_up = steps, result, num_kernels, warm_up
        self.begin_s = time.perf_counter()
        self.num_steps = self.num_rows = 0
        self.values: dict[str, Any] = {}
        self.profiler: Any = None

    def tick(self, num_rows: int) -> None:
        """A step of so many rows has ended."""
        import torch

        self.num_steps += 1
        self.num_rows += num_rows
        on_gpu = torch.cuda.is_available()
        if self.num_steps in (STARTED, self.warm_up, self.warm_up + self.steps, self.warm_up + self.steps + PROFILED):
            if on_gpu:
                torch.cuda.synchronize()
            now_s = time.perf_counter()
        if self.num_steps == STARTED:
            self.values["first_steps_s"] = now_s - self.begin_s
        elif self.num_steps == self.warm_up:
            self.start_s, self.num_rows = now_s, 0
        elif self.num_steps == self.warm_up + self.steps:
            self.values["examples_per_s"] = self.num_rows / (now_s - self.start_s)
            self.values["rows_a_step"] = num_rows
            if on_gpu:
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()
                self.start_s = time.perf_counter()
        elif self.num_steps == self.warm_up + self.steps + PROFILED and self.profiler:
            self.profiler.stop()
            kernels = {event.key: event.self_device_time_total / 1e6 for event in self.profiler.key_averages()}
            kernels_s = sum(kernels.values())
            self.values["idle"] = max(0.0, 1 - kernels_s / (now_s - self.start_s))
            longest = sorted(kernels, key=lambda name: -kernels[name])[: self.num_kernels]
            self.values["exchanging"] = exchanging_s(self.profiler.events()) / (now_s - self.start_s)
            self.values["kernels"] = {name[:80]: f"{kernels[name] / kernels_s:.1%}" for name in longest}
            self.values["gaps"] = longest_gaps(self.profiler.events(), self.num_kernels)

    def finish(self) -> None:
        import torch

        from vqa_sft.models.fast.compilation import num_compilations

        if torch.cuda.is_available():
            self.values["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
            self.values["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.values["compilations"] = num_compilations()
        if self.num_kernels:
            self.values["compiling"] = compiling(self.num_kernels)
        if self.result and os.environ.get("RANK", "0") == "0":
            Path(self.result).write_text(json.dumps(self.values))


def compiling(num: int) -> dict[str, float]:
    """Seconds of the `num` longest parts of compilation so far, of which some hold others; then what of it the
    compiler's caches had."""
    from torch._dynamo import utils

    if not utils.compilation_time_metrics:
        return {}
    names, seconds = utils.compile_times(repr="csv", aggregate=True)
    parts = sorted(zip(map(float, seconds), names, strict=True), reverse=True)[:num]
    counters = {**utils.counters["inductor"], **utils.counters["aot_autograd"]}
    return {name: round(s, 1) for s, name in parts} | {name: n for name, n in counters.items() if "cache" in name}


def exchanging_s(events: Iterable[Any]) -> float:
    """Seconds in which kernels of NCCL run on this GPU and no others do, from the events of torch's profiler."""
    import torch

    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    others = [span for event, span in zip(kernels, spans, strict=True) if "nccl" not in event.name.lower()]
    return (covered(spans) - covered(others)) / 1e6


def longest_gaps(events: Iterable[Any], num: int) -> list[str]:
    """The longest times in which a GPU does nothing, with what it did before and after, from torch's profiler."""
    import torch

    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    gaps, last = [], None
    for kernel in kernels:
        if last is not None:
            gaps.append((kernel.time_range.start - last.time_range.end, last.key[:50], kernel.key[:50]))
        if last is None or kernel.time_range.end > last.time_range.end:
            last = kernel
    gaps.sort(reverse=True)
    return [f"{us / 1e3:.2f} ms: {before} -> {after}" for us, before, after in gaps[:num]]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much lies in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def run_watched(argv: list[str]) -> None:
    """Run a script of recipes/, or another tool, in this process under a `Watch`."""
    from vqa_sft.environment import set_library_defaults

    set_library_defaults()  # as the recipes do, before torch is imported
    import torch
    import transformers

    from vqa_sft.lab.random_models import draw_weights

    draw_weights()
    script, how, arguments = argv[0], json.loads(argv[1]), argv[2:]
    cap_gib = T4_GIB if how["as_t4"] else how["cap_gib"]
    if cap_gib:
        total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(cap_gib / total_gib)
    if how["as_t4"]:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.get_device_capability = lambda device=None: (7, 5)
        sys.modules["fla"] = None  # Triton needs compute capability 8.0
    measure_despite_triton()
    watch = Watch(how["steps"], how["result"], how["kernels"], how["warm_up"])

    class StepsOfTrainer(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.begin_s = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.tick(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)

    build = transformers.Trainer.__init__

    @functools.wraps(build)  # ms-swift reads the signature
    def build_watched(self: transformers.Trainer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.add_callback(StepsOfTrainer())

    transformers.Trainer.__init__ = build_watched
    if script == "recipes/predict.py":
        _watch_scoring(watch)
    if script in PEERS:
        PEERS[script](*arguments)
    elif script == "predictor":
        run_predictor(watch, *arguments)
    else:
        # A recipe ends its process without a clean-up; what was measured must be written before.
        from vqa_sft.models import processes

        leave = processes.leave

        def finish_and_leave(exit_code: int = 0) -> None:
            watch.finish()
            leave(exit_code)

        processes.leave = finish_and_leave
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
    watch.finish()


def measure_despite_triton() -> None:
    """flash-linear-attention 0.6 refuses the backward of the gated delta rule on Hopper with Triton 3.4 to 3.7.0, whose
    gradients are wrong there. Speed is what is measured here: let it run, with a note."""
    import importlib.util

    if importlib.util.find_spec("fla") is None:
        return
    from fla.ops.common import chunk_o

    if chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1:
        chunk_o.IS_NVIDIA_HOPPER = False
        print("This Triton gives wrong gradients of the gated delta rule on Hopper: only speed and memory count here.")


def _watch_scoring(watch: Watch) -> None:
    from vqa_sft.models.scoring import LetterModel

    score = LetterModel.letter_logits

    def score_watched(model: LetterModel, batch: dict, *args: Any) -> Any:
        logits = score(model, batch, *args)
        watch.tick(len(batch["groups"].unique()) if "groups" in batch else len(batch["answers"]))
        return logits

    LetterModel.letter_logits = score_watched  # type: ignore[assignment]


def run_predictor(watch: Watch, run: str, data: str, how: str) -> None:
    """`vqa_sft.Predictor` on one row after another, each waited for; `how`: JSON of its arguments."""
    from vqa_sft import Predictor

    predict = Predictor(run, **json.loads(how))
    with (Path(data) / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    predict.warm_up(Path(data) / first["path"], first["question"], [first[letter] for letter in "abcd"])
    for row in rows[: WARM_UP + watch.steps + PROFILED]:
        predict(Path(data) / row["path"], row["question"], [row[letter] for letter in "abcd"])
        watch.tick(1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_watched(sys.argv[1:])
