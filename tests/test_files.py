"""Files are there whole or not at all, and one process at a time writes a folder or an output."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from contest import write_hard_contest
from scripts import RECIPES, run_forked

from vqa_sft.data import folds
from vqa_sft.errors import InputError
from vqa_sft.files import (
    UNFINISHED,
    begins_with,
    check_output,
    held,
    lying_in,
    remove_unfinished,
    whole,
    whole_folder,
    write_whole,
)
from vqa_sft.inference import passes
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs import folder as run_folder
from vqa_sft.tiny import TINY_PATH
from vqa_sft.training import curves

ROOT = RECIPES.parent
HOLD = """
import os, sys, time
from vqa_sft.files import held
with held(sys.argv[1], "output_dir"):
    if len(sys.argv) > 2 and os.fork() == 0:  # a worker of a loader, which outlives its parent
        os.write(1, f"{os.getpid()}\\n".encode())  # in one piece
        time.sleep(60)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


def start(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    with whole(tmp_path / "x.csv") as one, whole(tmp_path / "x.csv") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x.csv").read_text() == "one" and os.listdir(tmp_path) == ["x.csv"]


def full_disk(monkeypatch):
    def replace(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: folds.write_folds(folder / "folds.csv", ["a", "b"], [0, 1]),
        lambda folder: run_folder.write_json(folder / "run.json", {}),
        lambda folder: curves.write_log(folder / "log.csv", [{"step": 1, "loss": 2.0}]),
        lambda folder: curves.draw(folder / "log.png", [{"step": 1, "loss": 2.0}]),
        lambda folder: passes.write_table(passes.SCHEMA.empty_table(), folder / "0.parquet"),
        lambda folder: write_whole(folder / "report.html", "x"),
    ],
    ids=["folds", "run.json", "log.csv", "log.png", "shard", "report"],
)
def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch, write):
    with monkeypatch.context() as patched:
        full_disk(patched)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
    assert not os.listdir(tmp_path)
    write(tmp_path)
    assert len(os.listdir(tmp_path)) == 1


def test_a_folder_takes_the_place_of_an_earlier_one_only_when_it_is_whole(tmp_path):
    target = tmp_path / "out"
    with whole_folder(target) as part:
        (part / "a").write_text("first")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as part:
        (part / "a").write_text("second")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "first" and os.listdir(target) == ["a"]
    with whole_folder(target) as part:
        (part / "b").touch()
    assert os.listdir(target) == ["b"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_a_killed_process_left_is_made_again_and_one_of_others_is_kept(tmp_path):
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "mine").touch()
    with pytest.raises(InputError, match="out.part, where the new folder is made, is none of ours"):
        whole_folder(tmp_path / "out").__enter__()
    (part / UNFINISHED).touch()
    with whole_folder(tmp_path / "out"):
        assert os.listdir(part) == [UNFINISHED]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out cannot be written.*Name another folder"):
        whole_folder(tmp_path / "file" / "out").__enter__()


def test_an_output_replaces_neither_an_input_nor_what_others_wrote(tmp_path):
    ours, mine, folder = tmp_path / "ours.csv", tmp_path / "mine.csv", tmp_path / "folder.csv"
    ours.write_text('"id","fold"\n')
    mine.write_text("id,fold\n")
    folder.mkdir()
    how = {"suffix": ".csv", "is_ours": begins_with('"id","fold"'), "kind": "file of `vqa-sft folds`"}
    for path in (ours, tmp_path / "new.csv", tmp_path / "NEW.CSV"):
        check_output(path, **how, reads=[mine, None])
    for path, reads, says in (
        (mine, (), "mine.csv exists and is no file of `vqa-sft folds`. Name another file with --output"),
        (tmp_path / "x.txt", (), "--output must end in .csv; got .*x.txt"),
        (ours, (tmp_path / "folder.csv/../ours.csv",), "--output is one of the files that are read: .*ours.csv"),
        (folder, (), "--output .*folder.csv is a folder. Name a file"),
    ):
        with pytest.raises(InputError, match=says):
            check_output(path, **how, reads=reads)
    assert lying_in(tmp_path, [ours, tmp_path, tmp_path.parent, "nowhere/model"]) == [str(ours), str(tmp_path)]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in ("log.csv.0a1b2c3d.part", "mine.part", "log.csv"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "mine.part"]


def test_a_folder_that_another_process_holds_is_refused_with_who_holds_it(tmp_path):
    process = start(HOLD, tmp_path / "run")
    try:
        assert process.stdout.readline() == "held\n"
        (tmp_path / "link").symlink_to(tmp_path / "run")
        for name in (tmp_path / "run", f"{tmp_path}/run/", tmp_path / "link"):
            told = f"is being written by process {process.pid} on .+ since 20.+Wait until that ends, or choose another"
            with pytest.raises(InputError, match=told), held(name, "output_dir"):
                pass
        with held(tmp_path / "other", "output_dir"):  # is nobody's
            pass
    finally:
        process.kill()
        process.wait()
    with held([tmp_path / "run", tmp_path / "run"], "output_dir"):  # a dead holder does not block
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run.lock").exists()


def test_a_killed_holder_does_not_block_though_its_workers_live(tmp_path):
    process = start(HOLD, tmp_path / "run", "with a worker")
    said = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    (worker,) = (int(line) for line in said - {"held"})
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)  # lives
        with held(tmp_path / "run", "output_dir"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_disk_without_locks_is_told_and_written(tmp_path, monkeypatch, capsys):
    import filelock

    def acquire(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with held(tmp_path / "run", "output_dir"):
        pass
    assert "has no locks: nothing stops a second process" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_told_as_such(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="output_dir .*file/run cannot be written"),
        held(tmp_path / "file/run", "output_dir"),
    ):
        pass


# Starts pairs of commands at once, one pair after another, and prints their exit codes. Imports once for all of them.
def assert_one_was_refused(ended, what):
    (works, *_), (refused, _, error) = sorted(ended)
    assert (works, refused) == (0, 2), ended
    assert "is being written by process" in error and f"choose another {what}" in error and "Traceback" not in error
    return next(number for number, (code, *_) in enumerate(ended) if code == 0)


@pytest.mark.medium
def test_of_two_trainings_and_two_predictions_started_at_once_one_works_and_one_is_refused(tmp_path, request):
    """`--starts 10` for ten of each. The two trainings differ in their seeds, the predictions in their orders."""
    contest = write_hard_contest(tmp_path / "contest")
    recipe = {"model_name_or_path": TINY_PATH, "train_data": contest / "train.csv", "max_steps": 3, "use_cpu": True}
    recipe |= {"validation_data": contest / "validation.csv", "dataloader_num_workers": 0, "disable_tqdm": True}
    recipe |= {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
    }
    given = [token for key, value in recipe.items() for token in (f"--{key}", value)]
    # Orders that take long enough for the other process to come in the meantime.
    seeds, orders, pairs = (1, 2), ("rotations", 8), []
    common = ["recipes/predict.py", "--data", contest / "test.csv", "--use_cpu", "--num_workers", 0]
    for number in range(request.config.getoption("--starts")):
        run, output = tmp_path / f"run{number}", tmp_path / f"out{number}.csv"
        pairs.append([["recipes/sft.py", *given, "--output_dir", run, "--seed", seed] for seed in seeds])
        pairs.append([[*common, "--run", run, "--output", output, "--orders", order] for order in orders])
    ended, known = run_forked([[(command, {}) for command in pair] for pair in pairs], tmp_path), {}
    for number, (trainings, predictions) in enumerate(zip(ended[::2], ended[1::2], strict=True)):
        run, output = tmp_path / f"run{number}", tmp_path / f"out{number}.csv"
        seed = seeds[assert_one_was_refused(trainings, "output_dir")]
        weights, saved = (run / "adapter_model.safetensors").read_bytes(), run_folder.read_run(run)
        assert saved.recipe["seed"] == seed and known.setdefault(seed, weights) == weights
        order = orders[assert_one_was_refused(predictions, "--output")]
        found = read_predictions(output.with_suffix(".parquet"))
        assert found.metadata["orders"] == order and len(found.ids) == 32
        with output.open() as file:
            answers = [row["answer"] for row in csv.DictReader(file)]
        assert answers == ["abcd"[best] for best in found.best]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".lock", ".part", ".parts")]


def test_a_lock_file_alone_holds_nothing_and_a_held_one_that_says_nothing_holds(tmp_path):
    (tmp_path / "run.lock").write_text('{"host": "gone", "pid": 1, "since": "long ago"}')
    with held(tmp_path / "run", "output_dir"):
        pass
    (tmp_path / "run.lock").write_bytes(b"\xff half")
    process = start(HOLD, tmp_path / "run")
    try:
        assert process.stdout.readline() == "held\n"
        os.truncate(tmp_path / "run.lock", 0)
        with pytest.raises(InputError, match="is being written by another process"), held(tmp_path / "run", "x"):
            pass
    finally:
        process.kill()
        process.wait()
