"""`vqa-sft blind`: one prediction with images shown in several ways, and what they make of it."""

import contextlib
import shutil
import sys
from pathlib import Path

from vqa_sft.batch.control import KINDS, ORIGINAL
from vqa_sft.cli.scripts import run_script
from vqa_sft.config.prediction import BASE, read_prediction
from vqa_sft.errors import InputError
from vqa_sft.files import begins_with, check_output

START = '{\n  "looks"'  # how such a file begins
PREDICTIONS = "predictions.csv"
TAKEN = ("images", "output", "template", "answer_format", "streaming", "on_bad_row")  # options of predict that are ours


def score_blind(
    tokens: list[str], output: str | None, images: str, accelerate_config: str | None, num_processes: int | None
) -> str:
    """Score, write the JSON, return the table. `tokens` are options of predict. Raises InputError.

    Scores are saved in blind.json.parts/ until then: the same command resumes after an interruption.
    """
    from vqa_sft.inference.blind import check_answers, most_frequent_answers
    from vqa_sft.inference.plan import find_runs
    from vqa_sft.inference.rows import read_rows
    from vqa_sft.predictions.blind import compare, describe
    from vqa_sft.predictions.file import read_predictions
    from vqa_sft.runs.folder import write_json

    tokens, path = _complete(tokens, output, images)
    args = read_prediction(tokens)
    parts = Path(args.output).parent
    check_output(path, suffix=".json", reads=[args.data], is_ours=begins_with(START), kind="table of vqa-sft blind")
    _check_parts(parts)
    with contextlib.redirect_stdout(sys.stderr):
        runs = find_runs(args)
        rows = read_rows(args, runs)
        check_answers(rows)
        frequent = most_frequent_answers(args, runs, rows)
        run_script("predict", tokens, accelerate_config, num_processes, waits=True)
    files = {each.images[0]: read_predictions(Path(each.output).with_suffix(".parquet")) for each in args.apart}
    found = compare(files, {"most frequent answer of training": frequent} if frequent else {})
    write_json(path, found | {"data": args.data or args.part})
    shutil.rmtree(parts)
    return f"{describe(found)}\nWrote {path}"


def _complete(tokens: list[str], output: str | None, images: str) -> tuple[list[str], Path]:
    """The options of the prediction, and where the JSON goes."""
    from vqa_sft.config.fields import read_command_line
    from vqa_sft.predictions.blind import BLIND

    given = read_command_line(tokens)
    if taken := [name for name in given if name in TAKEN]:
        raise InputError(f"--{taken[0]} is no option of `vqa-sft blind`. Leave it out.")
    kinds = images.split(",")
    if not kinds or {*kinds} - {*KINDS[1:]}:
        raise InputError(f"--images must be some of {','.join(KINDS[1:])}; got {images}.")
    runs = given.get("run", [])
    if output is None and (len(runs) != 1 or runs == [BASE]):
        raise InputError("--output FILE.json is missing: only one run has a folder for it.")
    path = Path(output) if output is not None else Path(runs[0]) / BLIND
    parts = ["--images", ",".join([ORIGINAL, *kinds]), "--output", str(_parts_of(path) / PREDICTIONS)]
    part = [] if {"data", "part", "config"} & given.keys() else ["--part", "validation"]
    return [*tokens, *part, *parts], path


def _parts_of(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def _check_parts(parts: Path) -> None:
    """Raises InputError where the folder of the scores, which is removed at the end, holds what is not ours."""
    stem = PREDICTIONS.removesuffix(".csv")
    if parts.exists() and not (parts.is_dir() and all(path.name.startswith(f"{stem}.") for path in parts.iterdir())):
        raise InputError(f"{parts} is in the way and none of our folders. Move it, or name another --output.")
