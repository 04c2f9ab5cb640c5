"""CONTRIBUTING.md says which files a row passes; here it is traced."""

import re
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from contest import write_contest
from scripts import run_script

import vqa_sft
from vqa_sft.tiny import TINY_PATH

pytestmark = pytest.mark.medium
ROOT = Path(vqa_sft.__file__).parent
NUM_ROWS = 256
SHARED = ("questions/letters.py", "questions/references.py", "questions/types.py", "images.py", "errors.py")
DECISIONS = ("settle_columns.py", "settle_answers.py")  # they look at all rows of a source
LOOKS = ("data/scan.py", "data/digests.py", "inference/plan.py")
BY_COLUMN = ("inference/results.py", "predictions/file.py")  # all rows at once


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return write_contest(tmp_path_factory.mktemp("way"), num_rows=NUM_ROWS)


def documented(begin, end):
    """The files of a table of CONTRIBUTING.md."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = []
    for cell in re.findall(r"^\| ([\w/.]+\.py(?:, [\w/.]+)*) \|", text[text.index(begin) : text.index(end)], re.M):
        folder = cell.partition("/")[0]
        files += [name if "/" in name else f"{folder}/{name}" for name in cell.split(", ")]
    return files


def trace(function):
    """How often something is called in each file of ours, but the SHARED ones, by `function` and not by DECISIONS."""
    calls, deciding = Counter(), []

    def look(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call":
            if name.endswith(DECISIONS):
                deciding.append(frame)
            elif name.startswith(str(ROOT)) and not deciding:
                calls[Path(name).relative_to(ROOT).as_posix()] += 1
        elif event == "return" and deciding and deciding[-1] is frame:
            deciding.pop()

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return Counter({name: count for name, count in calls.items() if name not in SHARED})


def of_every_row(calls, num_rows=NUM_ROWS):
    return {name for name, count in calls.items() if count >= num_rows}


def test_a_row_passes_nine_files_from_the_source_to_the_loss(contest, tmp_path):
    from trainers import build_trainer

    from vqa_sft.data.examples import read_examples

    read = trace(lambda: read_examples(str(contest / "train.csv")))
    trainer, examples, _ = build_trainer(TINY_PATH, contest, tmp_path, num_rows=16)

    def train():
        for row in examples:
            trainer.compute_loss(trainer.model, trainer.data_collator([row]))

    files = documented("Training, from a CSV", "Prediction, from a CSV")
    assert {*files} == of_every_row(read) | of_every_row(trace(train), num_rows=16) and len(files) == 9


def test_a_row_passes_eleven_files_from_the_source_to_the_submission(contest, tmp_path, one_thread):
    import vqa_sft.inference.scorer  # noqa: F401 (its import is no part of the way)

    options = {"run": "none", "model": TINY_PATH, "data": contest / "test.csv", "output": tmp_path / "out.csv"}
    options |= {"batch_size": 1, "num_workers": 0}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    calls = trace(lambda: run_script("predict", *arguments, "--use_cpu"))
    found = of_every_row(calls)
    assert all(calls[name] for name in BY_COLUMN) and found >= {*LOOKS}
    fast = {name for name in found if name.startswith("models/fast/")} | {"models/families.py"}
    files = documented("Prediction, from a CSV", "Every package may use")
    assert {*files} == found - fast - {*LOOKS} | {*BY_COLUMN} and len(files) == 11
