"""Whether a run has the same probabilities in everybody's hands: each way out of it, against recipes/predict.py.

    python -m vqa_sft.lab.agreement runs/demo data/numbers/test.csv --limit 200 --dtype fp32 bf16
    python -m vqa_sft.lab.agreement runs/demo data/numbers/test.csv --ways pipeline "transformers serve"

The run is exported in each dtype, merged and with its adapter beside the base, and every row is asked alone. A way that
cannot be had says why in its line. "mean of rows" is that of each row's largest difference. Servers with chat
completions (vLLM) are asked by vllm_agreement.py. Exit code 1 where an answer differs in fp32, or a probability by more
than 1e-4.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from vqa_sft.config.prediction import read_prediction
from vqa_sft.console import progress, table
from vqa_sft.errors import InputError, exits_with_message
from vqa_sft.inference.plan import find_runs
from vqa_sft.inference.rows import read_rows
from vqa_sft.lab import ways_out
from vqa_sft.lab.ablation import run_recipe
from vqa_sft.lab.answers import difference
from vqa_sft.lab.ways_out import Ask, Exported
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs.export import export_run

EXACT = 1e-4  # of a probability, in fp32
WAYS: dict[str, Callable[[Exported], AbstractContextManager[Ask]]] = {
    "Predictor.decide": ways_out.predictor,
    "pipeline": ways_out.decision_pipeline,
    "pipeline, adapter": ways_out.adapter_pipeline,
    "transformers serve": ways_out.transformers_serve,
    "plain transformers": ways_out.plain_transformers,
    "plain PEFT": ways_out.plain_peft,
}
HEADER = ["way", "dtype", "rows", "largest difference", "mean of rows", "answers that differ", "questions/s"]


@exits_with_message
def main() -> None:
    args = parse_args()
    scores = {"run": args.run, "data": args.data, "output": args.work / "predict.csv"}
    if args.limit:
        scores["limit"] = args.limit
    if not torch.cuda.is_available():
        scores["use_cpu"] = ""
    run_recipe("predict.py", scores)
    expected = [np.array(probs) for probs in read_predictions(args.work / "predict.parquet").probs]
    given = read_prediction(
        [str(part) for name, value in scores.items() for part in (f"--{name}", value) if part != ""]
    )
    [run] = runs = find_runs(given)
    rows = [*read_rows(given, runs).of_run[0]]
    lines, exact = [HEADER], True
    for dtype in args.dtype:
        merged, adapter = args.work / f"merged_{dtype}", args.work / f"adapter_{dtype}"
        print(export_run(args.run, str(merged), dtype=dtype, overwrite=True))
        print(export_run(args.run, str(adapter), dtype=dtype, overwrite=True, adapter=True))
        for name in args.ways:
            way = WAYS[name]
            if way is ways_out.predictor and dtype != args.dtype[0]:
                continue  # it computes in the precision of the run
            line, largest, num_other = measure(way(Exported(run, merged, adapter, dtype)), rows, expected)
            lines.append([name, dtype, *line])
            exact = exact and (dtype != "fp32" or (num_other == 0 and largest <= EXACT))
    print(table(lines, left=2))
    sys.exit(int(not exact))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run with an adapter")
    parser.add_argument("data", help="rows to score; answers are not needed")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32"])
    parser.add_argument("--ways", nargs="*", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--work", type=Path, default=Path("runs/agreement"), help="folder of what is written")
    return parser.parse_args()


def measure(
    way: AbstractContextManager[Ask], rows: Sequence[dict], expected: Sequence[np.ndarray]
) -> tuple[list[str], float, int]:
    """The cells of a line; the largest difference of a probability, and how many answers are others."""
    try:
        with way as ask:
            ask(rows[0])  # what is compiled or loaded at the first question
            started_s = time.perf_counter()
            found = [np.array(ask(row)) for row in progress(rows, desc="Asking", unit=" questions")]
            took_s = time.perf_counter() - started_s
    except InputError as error:
        return ["0", str(error), "", "", ""], 0.0, 0
    gaps = difference(found, expected)
    cells = [f"{len(found)}", f"{gaps.largest:.1e}", f"{gaps.mean_largest:.1e}", f"{gaps.num_answers}"]
    return [*cells, f"{len(found) / took_s:.1f}"], gaps.largest, gaps.num_answers


if __name__ == "__main__":
    main()
