"""Folds at the same time: which starts when, on which GPU, and what becomes of the others where one ends early. The
script is a fake; that folds at once are those one after another is shown in tests/recipes/test_folds_run.py."""

import json
import os
import signal
import sys
import threading
import time

import pytest
import torch

from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.folds import write_folds
from vqa_sft.errors import InputError
from vqa_sft.training import at_once
from vqa_sft.training.survive import Finished, Interrupted

# Opens its folder after a while and finishes after another; notes when, and on which GPU. `ends` may say how it ends.
SCRIPT = """
import json, os, pathlib, sys, time
number, started_s = json.loads(os.environ["VQA_SFT_FOLD"])
root = pathlib.Path(sys.argv[1])
ends = json.loads((root / "ends.json").read_text()).get(str(number), 0)
noted = {"begin": time.monotonic(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "started_s": started_s}
print("reads", flush=True)
if ends == 2:
    sys.exit(2)
time.sleep(0.4)
folder = root / f"fold{number}"
folder.mkdir(exist_ok=True)
(folder / "recipe.yaml").write_text("")
noted["open"] = time.monotonic()
time.sleep(0.6 if ends != "long" else 60)
if ends != "time":
    (folder / "run.json").write_text("{}")
noted["end"] = time.monotonic()
(root / f"noted{number}.json").write_text(json.dumps(noted))
"""


@pytest.fixture
def folds(tmp_path, monkeypatch):
    """`folds(devices, ends={number: how})` trains four folds of the fake: how all ended, what each noted."""
    write_folds(tmp_path / "folds.csv", [*"abcd"], [*range(4)])
    values = {"model_name_or_path": "m", "train_data": "t.csv", "output_dir": tmp_path, "fold": "all"}
    values |= {"folds_file": tmp_path / "folds.csv", "folds_at_once": 2}
    runs = read_recipe([f"--{key}={value}" for key, value in values.items()]).runs()
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py"), str(tmp_path)])

    def train(devices, ends=None):
        (tmp_path / "ends.json").write_text(json.dumps(ends or {}))
        ended = at_once.train_at_once(runs, devices, 12.5)
        return ended, [json.loads(path.read_text()) for path in sorted(tmp_path.glob("noted*.json"))]

    return train


def test_as_many_train_at_a_time_as_there_are_devices_and_each_has_its_own(folds, capfd):
    ended, noted = folds(["4", "7"])
    assert ended == Finished() and len(noted) == 4
    for one in noted:
        together = [other for other in noted if other["begin"] <= one["begin"] < other["end"]]
        assert len({other["gpu"] for other in together}) == len(together) <= 2
    assert {one["gpu"] for one in noted} == {"4", "7"} and {one["started_s"] for one in noted} == {12.5}
    said = capfd.readouterr().out.splitlines()
    assert sorted(said) == [f"fold{number}: reads" for number in range(4)]


def test_the_others_start_when_the_first_has_opened_its_folder(folds):
    _, noted = folds([None, None, None])
    assert min(one["begin"] for one in noted[1:]) > noted[0]["open"]
    assert noted[1]["begin"] < noted[0]["end"]


def test_what_the_first_finds_wrong_is_said_once(folds, capfd, tmp_path):
    with pytest.raises(InputError, match="fold0 failed, as was said above"):
        folds([None, None], {"0": 2})
    assert capfd.readouterr().out == "fold0: reads\n" and not list(tmp_path.glob("noted*"))


def test_where_one_fails_those_that_train_go_on_and_no_other_starts(folds, tmp_path):
    with pytest.raises(InputError, match="fold1 failed"):
        folds([None, None], {"1": 2})
    assert [path.name for path in tmp_path.glob("noted*")] == ["noted0.json"]


def test_a_run_that_is_refused_has_failed_though_its_folder_was_finished_before(folds, tmp_path):
    for number in range(4):
        (tmp_path / f"fold{number}").mkdir()
        (tmp_path / f"fold{number}" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="fold0 failed, as was said above"):
        folds([None, None], {"0": 2})
    assert not list(tmp_path.glob("noted*"))


def test_a_fold_whose_time_is_up_ends_all(folds, tmp_path, capfd):
    ended, noted = folds([None], {"1": "time"})
    assert ended == Interrupted(by_sigterm=False) and len(noted) == 2
    left = ", ".join(str(tmp_path / f"fold{number}") for number in (1, 2, 3))
    assert capfd.readouterr().out.endswith(f"Time is up. The same command resumes {left}.\n")


def test_a_sigterm_reaches_those_that_train_and_no_other_starts(folds, tmp_path):
    def send():
        while not (tmp_path / "fold1" / "recipe.yaml").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    ended, noted = folds([None, None], {"0": "long", "1": "long"})
    assert ended == Interrupted(by_sigterm=True) and not noted


@pytest.mark.parametrize(
    ("visible", "names"), [(None, ["0", "1"]), ("3,5,6", ["3", "5"]), ("GPU-a,MIG-b", ["GPU-a", "MIG-b"])]
)
def test_gpus_are_those_that_are_visible(monkeypatch, visible, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    num_gpus = len(visible.split(",")) if visible else 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert at_once.choose_devices(2, use_cpu=False) == names
    assert at_once.choose_devices(2, use_cpu=True) == [None, None]
    with pytest.raises(InputError, match=f"folds_at_once is 9, and {num_gpus} GPUs are visible"):
        at_once.choose_devices(9, use_cpu=False)


def test_a_launch_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Launch one: python recipes/sft.py"):
        at_once.choose_devices(2, use_cpu=True)


def test_only_a_process_that_was_started_for_a_fold_has_one(monkeypatch):
    assert at_once.own_fold(["a", "b"]) is None
    monkeypatch.setenv(at_once.VARIABLE, "[1, 2.5]")
    assert at_once.own_fold(["a", "b"]) == ("b", 2.5)
