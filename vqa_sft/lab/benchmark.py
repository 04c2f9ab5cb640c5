"""One table: examples/s, memory, share of the GPU's peak and idle share of our recipes, beside TRL and ms-swift.

    python -m vqa_sft.lab.benchmark                                    # the standard cases, on one GPU
    python -m vqa_sft.lab.benchmark --only 7B --steps 20
    python -m vqa_sft.lab.benchmark recipes/qwen3b_t4.yaml --as-t4     # recipes as they stand
    python -m vqa_sft.lab.benchmark --only Qwen3.5-9B --only InternVL  # some families
    python -m vqa_sft.lab.benchmark --only "7B train" --only "two GPUs"  # beside one, where there are two
    python -m vqa_sft.lab.benchmark --tiny                             # every kind of case and family, on a CPU
    python -m vqa_sft.lab.benchmark --tiny recipes/qwen3_5_9b.yaml     # a recipe with a small model of its family

Weights are random in the true shapes of the models, drawn on the GPU by every case (random_models.py); images are
noise. Every case is a process of its own that runs `recipes/sft.py`, `recipes/predict.py` or another tool with its own
collator (peers.py): TRL's SFTTrainer, or ms-swift where it is installed. Speed and memory do not depend on what the
weights are; accuracy means nothing here.

The share of peak counts needed work only (needed_work.py): never padding or what is computed twice. The peak is that of
a bf16 matrix product on the same GPU. The idle share is what is left of the wall time without the kernels' own. The
last column is the time until three steps are done: from the start of training, or of a process that scores. On several
GPUs idle share and the time in which one does nothing but exchange gradients (`exchanging`) are the first one's.

`--as-t4` shows a recipe what a T4 shows it: an allocator that ends at 13.8 GiB (14.56 less its context), compute
capability 7.5, neither flash nor cuDNN attention, no flash-linear-attention. Its speed cannot be had that way.
"""

import argparse
import csv
import functools
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vqa_sft.config.fields import read_yaml
from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.lab.peers import PEERS, missing_packages

T4_GIB = 13.8
# Steps: until all that is compiled was, in most cases; before those that are timed; after them.
STARTED, WARM_UP, PROFILED = 3, 6, 3
FEW_ROWS, GRAPHS_WARM_UP = 4, 16  # which go by CUDA graphs, from step 9 on where layers are compiled at first
DDP_WARM_UP = 12  # it times its first ten steps itself, and waits for the GPU in each
QWEN_7B, QWEN_3B, QWEN3_8B = (f"Qwen/Qwen{name}-Instruct" for name in ("2.5-VL-7B", "2.5-VL-3B", "3-VL-8B"))
# label, shape, recipe, rows a step; TRL beside them
FAMILIES = (
    ("Qwen3.5-9B", "Qwen/Qwen3.5-9B", "qwen3_5_9b", 32),
    ("Gemma-4-12B", "google/gemma-4-12B-it", "gemma4_12b", 16),
    ("InternVL3.5-8B", "OpenGVLab/InternVL3_5-8B-HF", "internvl3_5_4b", 16),
    ("Qwen3-VL-30B-A3B", "Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3vl_30b_a3b", 16),
)
OTHER_FAMILIES = (  # on a CPU only
    ("Gemma-4-E4B", "google/gemma-4-E4B-it", "gemma4_e4b_t4"),
    ("Ministral-3-8B", "mistralai/Ministral-3-8B-Instruct-2512-BF16", "ministral3_8b"),
    ("Qwen3.5-35B-A3B", "Qwen/Qwen3.5-35B-A3B", "qwen3_5_35b_a3b"),
)
# What makes ms-swift faster where memory allows; without flash-attn it refuses `padding_free` and `packing`.
TUNED_SWIFT = {"gradient_checkpointing": False, "dataloader_num_workers": 8, "lora_dropout": 0}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Images of 448 px a side and texts of about 174 tokens with the template: 430 tokens a row; then of 80 to 310 tokens.
# A word is one token of the random models.
FIXED = {"num_words": (95, 95), "side_px": (448, 448)}
MIXED = {"num_words": (5, 235), "side_px": (160, 1280)}
LARGE = FIXED | {"side_px": (768, 768)}
# Ten names of one to six words, and a short question that is the same for all rows of a classification.
CANDIDATES = {"num_words": (6, 6), "side_px": (448, 448), "num_choices": 10}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    kind: str  # "train", "trl", "swift", "score" or "latency"
    shape: str
    recipe: str = ""
    data: dict = field(default_factory=lambda: FIXED)
    batch_size: int = 16
    options: dict[str, Any] = field(default_factory=dict)  # of the recipe, of TRL's LoraConfig, or of ms-swift
    cap_gib: float | None = None
    baseline: str | None = None  # the case whose examples/s are 1.0
    scores: str = ""  # the case whose run is scored
    how: dict[str, Any] = field(default_factory=dict)  # arguments of predict.py
    num_views: int = 1  # of a row, among those that `batch_size` counts
    num_runs: int = 1  # as many copies of it, scored at once
    num_gpus: int = 1  # of one machine, by DDP, with `batch_size` rows each

    @property
    def warm_up(self) -> int:
        if self.num_gpus > 1:
            return DDP_WARM_UP
        return WARM_UP if self.batch_size > FEW_ROWS or self.kind != "train" else GRAPHS_WARM_UP


def standard_cases() -> list[Case]:
    cases = []
    for size, shape, recipe, rows in (
        ("7B", QWEN_7B, "qwen7b", 16),
        ("3B", QWEN_3B, "qwen7b", 32),
        ("Qwen3-VL-8B", QWEN3_8B, "qwen3vl8b_a100", 16),
    ):
        trl = f"{size} TRL by default"
        ours: dict[str, Any] = {"shape": shape, "recipe": f"recipes/{recipe}.yaml", "batch_size": rows, "baseline": trl}
        if shape == QWEN3_8B:
            ours["options"] = {"max_pixels": 200704}
        cases.append(Case(trl, "trl", shape, batch_size=8))
        cases.append(Case(f"{size} train", "train", **ours))
        if shape == QWEN_7B:
            swift: dict[str, Any] = {"kind": "swift", "shape": shape, "baseline": trl}
            cases.append(Case(f"{size} ms-swift by default", **swift, batch_size=8))
            swift["batch_size"] = 16
            cases.append(Case(f"{size} ms-swift, tuned", **swift, options=TUNED_SWIFT))
            compiled = TUNED_SWIFT | {"torch_compile": True}
            cases.append(Case(f"{size} ms-swift, tuned, compiled", **swift, options=compiled))
            cases.append(Case(f"{size} train, mixed sizes", "train", **ours | {"data": MIXED}))
            two: dict[str, Any] = ours | {"num_gpus": 2, "baseline": f"{size} train"}
            cases.append(Case(f"{size} train, two GPUs", "train", **two))
            two |= {"data": MIXED, "baseline": f"{size} train, mixed sizes"}
            cases.append(Case(f"{size} train, mixed sizes, two GPUs", "train", **two))
            large = {"data": LARGE, "batch_size": 8, "options": {"max_pixels": 768 * 768}}
            cases.append(Case(f"{size} train, 768 px", "train", **ours | large))
            four: dict[str, Any] = {"batch_size": 4}
            cases.append(Case(f"{size} train, four rows", "train", **ours | four))
            four |= {"options": {"compile_layers": False}}
            cases.append(Case(f"{size} train, four rows, uncompiled", "train", **ours | four))
            cached: dict[str, Any] = {"options": {"cache_image_features": True}, "batch_size": 32}
            cases.append(Case(f"{size} train, cached features", "train", **ours | cached))
            rounded = {"base_precision": "fp8"}
            cases.append(Case(f"{size} train, FP8 base", "train", **ours | {"options": rounded}))
            both = cached | {"options": cached["options"] | rounded}
            cases.append(Case(f"{size} train, FP8 base, cached features", "train", **ours | both))
            # Four rows fit without recomputing more, but leave a GPU of this kind waiting for Python.
            small: dict[str, Any] = {"options": {"activation_memory_budget": 0.2}, "batch_size": 12, "cap_gib": 24}
            cases.append(Case(f"{size} train, within 24 GiB", "train", **ours | small))
            score: dict[str, Any] = {"kind": "score", "shape": shape, "batch_size": 32, "scores": f"{size} train"}
            cases.append(Case(f"{size} score", **score))
            for trained in ("cached features", "FP8 base"):
                of_run = {"scores": f"{size} train, {trained}"}
                cases.append(Case(f"{size} score, {trained}", **score | of_run))
            turned = score | {"how": {"orders": "rotations"}, "num_views": 4, "batch_size": 64}
            turned |= {"baseline": f"{size} score"}
            cases.append(Case(f"{size} score, rotations", **turned))
            cases.append(Case(f"{size} score, ten candidates", **score | {"data": CANDIDATES}))
            cases.append(Case(f"{size} score, rotations, five runs", **turned | {"num_runs": 5}))
            cases.append(Case(f"{size} one row at a time", **score | {"kind": "latency", "batch_size": 1}))
        if shape == QWEN_3B:
            cases.append(Case(f"{size} score", "score", shape, batch_size=32, scores=f"{size} train"))
    for family in FAMILIES:
        cases += family_cases(*family)
    return cases


def family_cases(label: str, shape: str, recipe: str, rows: int = 16) -> list[Case]:
    """TRL's and ours; for a mixture of experts with adapters on attention alone, then on the experts as well."""
    trl = Case(f"{label} TRL by default", "trl", shape, batch_size=8)
    # There is room for what the recipes recompute.
    whole = {"gradient_checkpointing": False}
    own: dict[str, Any] = {"recipe": f"recipes/{recipe}.yaml", "batch_size": rows, "options": whole}
    ours = Case(f"{label} train", "train", shape, **own, baseline=trl.name)
    if "A3B" not in shape:
        return [trl, ours]
    of_trl = replace(trl, name=f"{label} experts, TRL", options={"target_parameters": EXPERTS})
    experts = replace(ours, name=f"{label} experts, train", options={"lora_target_parameters": EXPERTS})
    # A GPU of 80 GB has 79 GiB, less its context.
    return [trl, replace(ours, cap_gib=78), of_trl, replace(experts, baseline=of_trl.name)]


def tiny_cases() -> list[Case]:
    from vqa_sft.lab.random_models import small_shape

    data = {"num_words": (5, 20), "side_px": (60, 120)}
    of_families = [case for row in FAMILIES for case in family_cases(*row)]
    of_families += [case for row in OTHER_FAMILIES for case in family_cases(*row) if case.kind == "train"]
    small = [
        replace(case, shape=small_shape(case.shape), data=data, batch_size=2, cap_gib=None) for case in of_families
    ]
    ours: dict[str, Any] = {
        "shape": "tiny",
        "recipe": "vqa_sft/lab/digits.yaml",
        "data": data,
        "batch_size": 4,
        "baseline": "TRL",
    }
    few = {"dataloader_num_workers": 1}
    return [
        Case("TRL", "trl", "tiny", data=data, batch_size=4),
        Case("ms-swift", "swift", "tiny", data=data, batch_size=4, baseline="TRL"),
        Case("ms-swift, tuned", "swift", "tiny", data=data, batch_size=4, baseline="TRL", options=TUNED_SWIFT | few),
        Case("train", "train", **ours),
        Case("train, two GPUs", "train", **ours | {"num_gpus": 2, "baseline": "train"}),
        Case("cached features", "train", **ours | {"options": {"cache_image_features": True}}),
        Case("FP8 base", "train", **ours | {"options": {"base_precision": "fp8"}}),  # whole, which is said
        Case("score", "score", "tiny", data=data, batch_size=4, scores="train"),
        Case("score, FP8 base", "score", "tiny", data=data, batch_size=4, scores="FP8 base"),
        Case(
            "rotations",
            "score",
            "tiny",
            data=data,
            batch_size=8,
            scores="train",
            how={"orders": "rotations"},
            num_views=4,
        ),
        Case("five runs", "score", "tiny", data=data, batch_size=4, scores="train", num_runs=5),
        Case("one row at a time", "latency", "tiny", data=data, batch_size=1, scores="train"),
        *small,
    ]


@exits_with_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="recipe files, run as they stand; default: the standard cases")
    parser.add_argument("--only", action="append", help="the case of this name, or all whose names hold it")
    parser.add_argument("--steps", type=int, default=16, help="timed steps per case")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="folder for models, data and runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the recipes")
    parser.add_argument(
        "--kernels",
        type=int,
        default=0,
        help="print so many of the slowest kernels and of the longest gaps",
    )
    parser.add_argument("--as-t4", action="store_true", help="show the recipes a T4")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
    args = parser.parse_args()
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1; got {args.steps}.")
    if not args.tiny:
        import torch

        if not torch.cuda.is_available():
            raise InputError("there is no GPU here. Try --tiny, which runs every kind of case on a CPU.")

    cases = tiny_cases() if args.tiny else [case for case in standard_cases() if case.num_gpus <= num_gpus()]
    if args.recipes:
        cases = [_case_of_recipe(name, is_tiny=args.tiny) for name in args.recipes]
    cases = chosen_cases(cases, args.only)
    results: dict[str, dict] = {}
    peak = None if args.tiny else _in_own_process(measure_peak_tflops)
    for case in cases:
        try:
            results[case.name] = run_case(case, args)
        except subprocess.CalledProcessError as error:
            results[case.name] = {"failed": error.returncode}
            print(json.dumps({case.name: results[case.name]}), flush=True)
    print(
        f"Peak: {peak:.0f} TFLOP/s, a bf16 product of 8192 x 8192 matrices." if peak else "On a CPU: no share of peak."
    )
    print(table(cases, results, peak))


def chosen_cases(cases: list[Case], only: list[str] | None) -> list[Case]:
    """Those that `only` names and that this machine has the packages for; prints which others are left out. Raises
    InputError for a text of `only` that names none, or none that can run."""
    names = {case.name for case in cases}

    def is_named(case: Case, text: str) -> bool:
        return text == case.name or text not in names and text in case.name

    named = [case for case in cases if not only or any(is_named(case, text) for text in only)]
    if not named:
        raise InputError(f"--only {' '.join(only)} names no case; there are: {', '.join(sorted(names))}.")
    missing = missing_packages("swift")
    runnable = [case for case in named if case.kind != "swift" or not missing]
    left_out = [case for case in named if case not in runnable]
    if left_out:
        names_left = ", ".join(case.name for case in left_out)
        said = f"install ms-swift for {names_left}: pip install --no-deps {' '.join(missing)}"
        for text in only or []:
            matched = [case for case in named if is_named(case, text)]
            if matched and all(case in left_out for case in matched):
                raise InputError(f"--only {text} names what cannot run here; {said}")
        print(f"Left out; {said}")
    return runnable


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """What the case's own process measured, which is printed; raises CalledProcessError when it failed."""
    from vqa_sft.lab.random_models import save_random_model, write_data
    from vqa_sft.models.shapes import SHAPES

    work = args.work
    model = save_random_model(case.shape, work / "model")
    num_steps = case.warm_up + args.steps + PROFILED
    rows = max(case.batch_size * case.num_gpus // case.num_views, 16) * num_steps
    sizes = [number for limits in case.data.values() for number in ([limits] if isinstance(limits, int) else limits)]
    data = work / "_".join(["data", *map(str, sizes), str(rows)])
    if not (data / "test.csv").is_file():
        write_data(data, rows, **case.data)
    run, result = work / case.name, work / "result.json"
    result.unlink(missing_ok=True)
    recipe = ["--config", case.recipe, "--model_name_or_path", str(model)]
    options = {"train_data": data / "train.csv", "output_dir": run, "overwrite": True, "validation_fraction": 0}
    options |= {"max_steps": num_steps, "save_strategy": "no", "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False, "early_stopping_patience": "null", "check_images": False}
    # Other processors keep the setting of their checkpoint: 280 tokens an image of Gemma 4, one tile of InternVL.
    has_areas = SHAPES[case.shape][0].startswith("qwen")
    options |= {"max_pixels": 200704} if has_areas else {"max_pixels": "null", "min_pixels": "null"}
    if case.batch_size:
        options |= {"per_device_train_batch_size": case.batch_size}
        options |= {"global_batch_size": case.batch_size * case.num_gpus}
        options |= {"compile_layers": not args.tiny}
    if args.tiny:
        options |= {"use_cpu": True, "dataloader_num_workers": 0}
        options |= {"max_pixels": 7056, "min_pixels": 7056} if has_areas else {}
    if not case.batch_size:  # a recipe as it stands
        kept = ["train_data", "output_dir", "overwrite", "max_steps"]
        kept += ["use_cpu", "dataloader_num_workers"] if args.tiny else []
        options = {name: options[name] for name in kept}
    options |= {} if case.kind in PEERS else case.options | dict(text.split("=", 1) for text in args.set)
    for name, value in options.items():
        recipe += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    inside = {"result": str(result), "steps": args.steps, "as_t4": args.as_t4, "cap_gib": case.cap_gib}
    inside |= {"kernels": args.kernels, "warm_up": case.warm_up}
    if case.kind in PEERS:
        arguments = [str(model), str(data), str(case.batch_size), str(options["max_pixels"]), str(options["max_steps"])]
        _inside(case.kind, [*arguments, json.dumps(case.options)], inside, work)
    elif case.kind == "train":
        _inside("recipes/sft.py", recipe, inside, work, case.num_gpus)
    elif case.kind == "latency":
        _inside("predictor", [str(work / case.scores), str(data), str(args.tiny)], inside, work)
    else:  # scores the run that an earlier case trained
        runs = [work / case.scores] + [work / f"{case.scores} {number}" for number in range(2, case.num_runs + 1)]
        for copy in runs[1:]:
            shutil.copytree(runs[0], copy, dirs_exist_ok=True)
        scored = ["--run", *map(str, runs), "--data", str(data / "test.csv")]
        scored += [token for name, value in case.how.items() for token in (f"--{name}", str(value))]
        scored += ["--output", str(run / "submission.csv"), "--batch_size", str(case.batch_size)]
        scored += ["--num_workers", "0", "--use_cpu"] if args.tiny else ["--num_workers", "8", "--compile_layers"]
        _inside("recipes/predict.py", scored, inside, work)
    found = json.loads(result.read_text())
    print(json.dumps({case.name: found}), flush=True)  # whoever stops it now has this
    is_plain = case.batch_size and case.kind != "latency" and not case.how and case.num_runs == 1
    found["tflop"] = mean_tflop(model, data, options["max_pixels"] if has_areas else None, case) if is_plain else None
    return found


def _inside(script: str, arguments: list[str], how: dict, work: Path, num_gpus: int = 1) -> None:
    # What is kept of noise images is of no use to anybody else.
    environment = os.environ | {"HF_HOME": str(work.resolve() / "cache")}
    command = [sys.executable, "-m", "vqa_sft.lab.benchmark"]
    if num_gpus == 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    else:
        launch = ["accelerate.commands.launch", "--config_file", "accelerate_configs/multi_gpu.yaml"]
        launch += ["--num_processes", str(num_gpus), "--main_process_port", "0", "--module", "vqa_sft.lab.benchmark"]
        command = [sys.executable, "-m", *launch]
    subprocess.run([*command, "--inside", script, json.dumps(how), *arguments], check=True, env=environment)


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _in_own_process(function: Callable[[], float]) -> float | None:
    """What a function of this module prints, run in a process of its own: the GPU stays free."""
    code = f"from vqa_sft.lab import benchmark; print(benchmark.{function.__name__}())"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def measure_peak_tflops() -> float:
    """TFLOP/s of a bf16 product of two 8192 x 8192 matrices: the best of twenty, before the GPU is warm and slower."""
    import torch

    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    times_ms = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return 2 * 8192**3 / min(times_ms[5:]) / 1e9


def table(cases: list[Case], results: dict[str, dict], peak_tflops: float | None) -> str:
    """A Markdown table, one line a case."""
    lines = ["| | rows a step | examples/s | ratio | peak GiB | share of peak | compilations | GPU idle | 3 steps |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        found = results[case.name]
        if "failed" in found:
            lines.append(f"| {case.name} | | failed with exit code {found['failed']} | | | | | | |")
            continue
        speed, base = found["examples_per_s"], results.get(case.baseline or "", {}).get("examples_per_s")
        digits = 1 if case.num_gpus == 1 else 2
        ratio = f"{speed / base:.{digits}f}" if base else ""
        needed_tflops = speed / case.num_gpus * (found.get("tflop") or 0)
        share = f"{needed_tflops / peak_tflops:.0%}" if peak_tflops and needed_tflops else ""
        idle = f"{found['idle']:.0%}" if found.get("idle") is not None else ""
        memory = f"{found['peak_gib']:.1f}" if found.get("peak_gib") else ""
        lines.append(
            f"| {case.name} | {found['rows_a_step']} | {speed:.1f} | {ratio} | {memory} | {share} "
            f"| {found['compilations']} | {idle} | {found['first_steps_s']:.0f} s |"
        )
    return "\n".join(lines)


def mean_tflop(model: Path, data: Path, max_pixels: int | None, case: Case) -> float:
    """Needed work of one example of the data, in TFLOP, by its real tokens and patches."""
    from PIL import Image
    from transformers import AutoConfig

    from vqa_sft.batch.count_tokens import count_tokens
    from vqa_sft.batch.prompts import builtin_prompts, render_prompt
    from vqa_sft.data.examples import load_examples
    from vqa_sft.lab.needed_work import count_work
    from vqa_sft.models.load import load_processor
    from vqa_sft.questions.letters import identity_order

    min_pixels = min(50176, max_pixels) if max_pixels else None
    processor = load_processor(str(model), min_pixels=min_pixels, max_pixels=max_pixels)
    prompts = builtin_prompts("en", by_type=True)
    work = count_work(AutoConfig.from_pretrained(model))
    examples, _ = load_examples(str(data / "train.csv"))
    cached = bool(case.options.get("cache_image_features"))
    # What all begin with is needed once a step, not once a row.
    prompts_of = [render_prompt(processor, row, identity_order(len(row["choices"])), prompts) for row in examples]
    start = os.path.commonprefix(prompts_of).partition(processor.image_token)[0]
    num_spared = len(processor.tokenizer(start)["input_ids"]) * (1 - 1 / case.batch_size)
    sizes = []
    for row in examples:
        with Image.open(row["images"][0]["path"] or io.BytesIO(row["images"][0]["bytes"])) as image:
            sizes.append(image.size)
    total = 0.0
    for tokens, (width, height) in zip(
        count_tokens(processor, prompts, examples, [[size] for size in sizes]), sizes, strict=True
    ):
        # Gradients of the decoder's activations are as much again as its forward.
        total += (1 if case.kind == "score" else 2) * work.decoder(int(tokens), num_spared)
        total += 0 if cached else work.tower(work.num_patches(processor, height, width))
    return total / len(examples) / 1e12


# --- Inside a case ----------------------------------------------------------------------------------------------------


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
        if self.result and os.environ.get("RANK", "0") == "0":
            Path(self.result).write_text(json.dumps(self.values))


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


def run_inside(argv: list[str]) -> None:
    """`--inside SCRIPT HOW ARGUMENTS...`: run a script of recipes/, or TRL, in this process under a `Watch`."""
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


def run_predictor(watch: Watch, run: str, data: str, use_cpu: str) -> None:
    """`vqa_sft.Predictor` on one row after another, each waited for."""
    from vqa_sft import Predictor

    predict = Predictor(run, use_cpu=use_cpu == "True")
    with (Path(data) / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    predict.warm_up(Path(data) / first["path"], first["question"], [first[letter] for letter in "abcd"])
    for row in rows[: WARM_UP + watch.steps + PROFILED]:
        predict(Path(data) / row["path"], row["question"], [row[letter] for letter in "abcd"])
        watch.tick(1)


def _case_of_recipe(recipe: str, *, is_tiny: bool) -> Case:
    """A recipe as it stands, on images of mixed sizes; on a CPU with a small model of its family."""
    from vqa_sft.lab.random_models import small_shape
    from vqa_sft.models.shapes import SHAPES

    shape = read_yaml(recipe).get("model_name_or_path")
    if shape not in SHAPES:
        raise InputError(f"{recipe} is of the model {shape}; shapes are known of: {', '.join(SHAPES)}.")
    data = {"num_words": (10, 60), "side_px": (60, 120) if is_tiny else (320, 1280)}
    return Case(Path(recipe).stem, "train", small_shape(shape) if is_tiny else shape, recipe, data, batch_size=0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1:2] == ["--inside"]:
        run_inside(sys.argv[2:])
    else:
        main()
