"""How long a training takes from loaded weights to its end: uncompiled, compiled, and by the rule that chooses.

    python -m vqa_sft.lab.start                        # 500 and 3,000 rows of Qwen2.5-VL-7B's shape, on one GPU: 30 min
    python -m vqa_sft.lab.start --rows 3000 --only rule
    python -m vqa_sft.lab.start --tiny                 # does it run? on a CPU, where nothing is compiled

Weights are random and images noise, as in benchmark.py. Every case is a process of its own that runs `recipes/sft.py`.
"cold" begins with an empty folder of compiled code (TORCHINDUCTOR_CACHE_DIR, with Triton's inside), "warm" with that
of the case before. The rule comes warm first, after a compiled run has measured compilation; then cold; at last once
with so many rows that it compiles in the middle, and warm after that.
"""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqa_sft.console import table
from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.lab.benchmark_cases import FIXED, QWEN_7B

BATCH_SIZE = 16
NUM_IMAGES = 1008  # rows beyond come again
LONG = 10_000  # rows with which compilation in the middle pays
HEADER = ("", "rows", "launch to weights, s", "to step 1, s", "weights to end, s", "examples/s")


@dataclass(frozen=True)
class Case:
    how: str  # "uncompiled", "compiled" or "rule"
    rows: int
    cold: bool = False

    @property
    def name(self) -> str:
        return self.how if self.how == "uncompiled" else f"{self.how}, {'cold' if self.cold else 'warm'}"


def cases_of(rows: list[int], long: int = LONG) -> list[Case]:
    """In the order in which they find the caches as they should."""
    cases = [Case("uncompiled", num) for num in rows]
    cases += [Case("compiled", num, cold) for num in rows for cold in (True, False)]
    cases += [Case("rule", num, cold) for cold in (False, True) for num in rows]
    return [*cases, Case("rule", long, cold=True), Case("rule", rows[-1])]


@exits_with_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 3000])
    parser.add_argument("--shape", default=QWEN_7B, help="a model of vqa_sft/models/shapes.py")
    parser.add_argument("--recipe", default="recipes/qwen7b.yaml")
    parser.add_argument("--only", default="", help="the cases whose names hold it")
    parser.add_argument("--work", type=Path, default=Path("runs/start"), help="folder for models, data and runs")
    parser.add_argument("--tiny", action="store_true", help="a small shape and few rows, on a CPU")
    args = parser.parse_args()
    if not args.tiny:
        import torch

        if not torch.cuda.is_available():
            raise InputError("there is no GPU here. Try --tiny, which runs on a CPU.")
    from vqa_sft.lab.random_models import save_random_model, small_shape, write_data

    how: dict[str, Any] = {"side_px": (60, 120), "num_words": (5, 20)} if args.tiny else FIXED
    model = save_random_model(small_shape(args.shape) if args.tiny else args.shape, args.work / "model")
    data = args.work / "data"
    if not (data / "train.csv").is_file():
        write_data(data, 24 if args.tiny else NUM_IMAGES, **how)
    cases = cases_of([32], 48) if args.tiny else cases_of(args.rows)
    cases = [case for case in cases if args.only in case.name]
    lines = []
    for case in cases:
        found = run_case(case, args, model, data)
        lines.append(
            [case.name, f"{case.rows:,}", *(f"{found[name]:.1f}" for name in ("weights_s", "first_s", "end_s"))]
        )
        lines[-1].append(f"{case.rows / found['end_s']:.1f}")
        print(json.dumps({f"{case.name}, {case.rows} rows": found}), flush=True)
    print(table([HEADER, *lines]))


def run_case(case: Case, args: argparse.Namespace, model: Path, data: Path) -> dict[str, Any]:
    """What the case's own process measured; raises CalledProcessError when it failed."""
    compiled, result = args.work.resolve() / "compiled", args.work.resolve() / "result.json"
    if case.cold:
        shutil.rmtree(compiled, ignore_errors=True)
    result.unlink(missing_ok=True)
    options: dict[str, Any] = {"model_name_or_path": model, "train_data": data / "train.csv", "overwrite": True}
    options |= {"output_dir": args.work / "run", "validation_fraction": 0, "eval_strategy": "no", "save_strategy": "no"}
    options |= {"load_best_model_at_end": False, "early_stopping_patience": "null", "check_images": False}
    options |= {"max_steps": case.rows // BATCH_SIZE, "global_batch_size": BATCH_SIZE}
    options |= {"per_device_train_batch_size": BATCH_SIZE, "max_pixels": 7056 if args.tiny else 200704}
    options |= {"min_pixels": 7056, "use_cpu": True, "dataloader_num_workers": 0} if args.tiny else {}
    options |= {} if case.how == "rule" else {"compile_layers": case.how == "compiled"}
    command = [sys.executable, "-m", "vqa_sft.lab.start", "--inside", str(result), str(time.time())]
    command += [
        "--config",
        args.recipe,
        *(token for key, value in options.items() for token in (f"--{key}", str(value))),
    ]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(compiled), "HF_HOME": str(args.work.resolve() / "cache")}
    environment.pop("TRITON_CACHE_DIR", None)
    subprocess.run(command, check=True, env=environment)
    return json.loads(result.read_text())


def run_inside(result: str, launched_s: float, arguments: list[str]) -> None:
    """Run `recipes/sft.py` in this process, and write the seconds from launch to loaded weights, and from these to the
    end of the first step and of the last."""
    from vqa_sft.environment import set_library_defaults

    set_library_defaults()  # as the recipe does, before torch is imported
    import transformers

    from vqa_sft.lab.random_models import draw_weights
    from vqa_sft.models import load
    from vqa_sft.training.callbacks import now_s

    draw_weights()
    loaded_s, values = 0.0, {}
    load_model = load.load_model

    def load_and_mark(*args: Any, **kwargs: Any) -> Any:
        nonlocal loaded_s
        model = load_model(*args, **kwargs)
        loaded_s, values["weights_s"] = now_s(), time.time() - launched_s
        return model

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                values["first_s"] = now_s() - loaded_s

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            values["end_s"] = now_s() - loaded_s
            Path(result).write_text(json.dumps(values))

    build = transformers.Trainer.__init__

    def build_watched(self: transformers.Trainer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.add_callback(Steps())

    load.load_model, transformers.Trainer.__init__ = load_and_mark, build_watched
    sys.argv = ["recipes/sft.py", *arguments]
    runpy.run_path("recipes/sft.py", run_name="__main__")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1:2] == ["--inside"]:
        run_inside(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    else:
        main()
