"""One table: examples/s, memory, share of the GPU's peak and idle share of our recipes, beside TRL and ms-swift.

    python -m vqa_sft.lab.benchmark                                    # the standard cases, on one GPU
    python -m vqa_sft.lab.benchmark --only 7B --steps 20
    python -m vqa_sft.lab.benchmark recipes/qwen3b_t4.yaml --as-t4     # recipes as they stand
    python -m vqa_sft.lab.benchmark --only Qwen3.5-9B --only InternVL  # some families
    python -m vqa_sft.lab.benchmark --only "7B train" --only "two GPUs"  # beside one, where there are two
    python -m vqa_sft.lab.benchmark --tiny                             # every kind of case and family, on a CPU
    python -m vqa_sft.lab.benchmark --tiny recipes/qwen3_5_9b.yaml     # a recipe with a small model of its family

Weights are random in the true shapes of the models, drawn on the GPU by every case (random_models.py); images are
noise. Every case (benchmark_cases.py) is a process of its own (watch.py) that runs `recipes/sft.py`,
`recipes/predict.py` or another tool with its own collator (peers.py): TRL's SFTTrainer, or ms-swift where it is
installed. Speed and memory do not depend on what the weights are; accuracy means nothing here.

The share of peak counts needed work only (needed_work.py): never padding or what is computed twice. The peak is that of
a bf16 matrix product on the same GPU. The idle share is what is left of the wall time without the kernels' own. The
last column is the time until three steps are done: from the start of training, or of a process that scores. On several
GPUs idle share and the time in which one does nothing but exchange gradients (`exchanging`) are the first one's.

`--as-t4` shows a recipe what a T4 shows it: an allocator that ends at 13.8 GiB (14.56 less its context), compute
capability 7.5, neither flash nor cuDNN attention, no flash-linear-attention. Its speed cannot be had that way.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.lab.benchmark_cases import Case, case_of_recipe, standard_cases, tiny_cases
from vqa_sft.lab.peers import PEERS, missing_packages
from vqa_sft.lab.watch import PROFILED


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
        help="print so many of the slowest kernels, of the longest gaps and of the longest parts of compilation",
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
        cases = [case_of_recipe(name, is_tiny=args.tiny) for name in args.recipes]
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
        how = {"use_cpu": args.tiny} | case.how
        _inside("predictor", [str(work / case.scores), str(data), json.dumps(how)], inside, work)
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
    command = [sys.executable, "-m", "vqa_sft.lab.watch"]
    if num_gpus == 1:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    else:
        launch = ["accelerate.commands.launch", "--config_file", "accelerate_configs/multi_gpu.yaml"]
        launch += ["--num_processes", str(num_gpus), "--main_process_port", "0", "--module", "vqa_sft.lab.watch"]
        command = [sys.executable, "-m", *launch]
    subprocess.run([*command, script, json.dumps(how), *arguments], check=True, env=environment)


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


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
