"""A run that was killed resumes with the same command, and ends as the run that was not killed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from contest import write_hard_contest
from safetensors.torch import load_file, save_file
from scripts import RECIPES, Forked, run_script
from torch.testing import assert_close

from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs import checkpoints, folder as run_folder
from vqa_sft.tiny import TINY_PATH

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = TINY_PATH
# 24 rows to train on in 3 steps of 8, a checkpoint after every epoch; long enough to be killed in the middle.
RECIPE = {"model_name_or_path": MODEL, "num_train_epochs": 4, "global_batch_size": 8}
RECIPE |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
RECIPE |= {"gradient_checkpointing": False, "disable_tqdm": True, "shuffle_choices": True}
RECIPE |= {"image_augmentation": 0.2, "flip_images": True}


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return write_hard_contest(tmp_path_factory.mktemp("resume") / "contest")


def arguments(contest, output_dir, **values):
    data = {"train_data": contest / "train.csv", "validation_data": contest / "validation.csv"}
    values = RECIPE | data | {"output_dir": output_dir} | values
    return [str(token) for key, value in values.items() for token in (f"--{key}", value)]


def kill_after_a_whole_checkpoint(contest, output_dir, **values):
    command = [RECIPES / "sft.py", *arguments(contest, output_dir, **values)]
    running = Forked([(command, {})], contest, output_dir.name)
    try:
        while not any(output_dir.glob(f"checkpoint-*/{checkpoints.MARKER}")):
            assert not running.has_ended(), "the run ended before it could be killed"
            time.sleep(0.002)
        os.killpg(*running.pids, signal.SIGKILL)  # with its loader's workers
    finally:
        [(code, _, _)] = running.wait()
    assert code == -signal.SIGKILL
    assert not run_folder.is_finished(output_dir)
    saved = checkpoints.last_whole_checkpoint(output_dir)
    assert saved and not saved.endswith("-12")  # 4 epochs x 3 steps


def result(run):
    """What a run has learnt, in bytes, and what it answers."""
    validation = read_predictions(run / run_folder.VALIDATION)
    weights = (run / "adapter_model.safetensors").read_bytes()
    return weights, validation.ids, validation.choice_logits


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"dataloader_num_workers": 0}, id="after an epoch"),
        # Checkpoints in the middle of an epoch, while two workers draw orders ahead.
        pytest.param(
            {"dataloader_num_workers": 2, "save_steps": 5, "eval_steps": 5}
            | {"save_strategy": "steps", "eval_strategy": "steps"},
            id="inside an epoch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_ends_with_the_weights_of_the_run_that_was_not_killed(contest, tmp_path, values):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_script("sft", *arguments(contest, whole, **values))
    kill_after_a_whole_checkpoint(contest, killed, **values)
    run_script("sft", *arguments(contest, killed, **values))
    assert result(killed) == result(whole)


@pytest.fixture
def train(contest, tmp_path):
    """`train(key=value, ...)` trains three epochs in this process and returns the run folder."""

    def run(**values):
        values = {"num_train_epochs": 3, "dataloader_num_workers": 0} | values
        run_script("sft", *arguments(contest, **{"output_dir": tmp_path / "run"} | values))
        return tmp_path / "run"

    return run


def steps(run):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize("values", [{}, {"max_steps": 5, "lr_scheduler_type": "constant"}], ids=["epochs", "steps"])
def test_a_run_killed_after_its_last_checkpoint_has_nothing_left_to_train(train, values):
    run = train(**values)
    before, checkpoint = result(run), checkpoints.last_whole_checkpoint(run)
    for name in (run_folder.RUN, run_folder.VALIDATION, "adapter_model.safetensors"):
        (run / name).unlink()
    assert result(train(**values)) == before and checkpoints.last_whole_checkpoint(run) == checkpoint


def test_a_run_that_stopped_early_and_was_killed_then_has_nothing_left_to_train(train):
    run = train(learning_rate=0, early_stopping_patience=1, num_train_epochs=4)
    before = result(run)
    assert checkpoints.last_whole_checkpoint(run).endswith("checkpoint-6")  # the second epoch was no better
    for name in (run_folder.RUN, run_folder.VALIDATION, "adapter_model.safetensors"):
        (run / name).unlink()
    assert result(train(learning_rate=0, early_stopping_patience=1, num_train_epochs=4)) == before
    assert checkpoints.last_whole_checkpoint(run).endswith("checkpoint-6")


def test_a_run_of_all_weights_finds_them_again_in_its_checkpoints(train, tmp_path, capsys):
    values = {"use_peft": False, "learning_rate": 1e-3, "save_total_limit": 3}
    values["output_dir"] = f"{tmp_path / 'run'}/"  # as a shell completes it
    run = train(**values)
    before = load_file(run / "model.safetensors")
    assert any(name.startswith("visual.") for name in before)  # as the hub names them
    best = json.loads((run / "checkpoint-9" / "trainer_state.json").read_text())["best_model_checkpoint"]
    checkpoint = load_file(Path(best) / "model.safetensors")
    assert torch.equal(before["model.norm.weight"], checkpoint["model.language_model.norm.weight"])
    for name in (run_folder.RUN, "model.safetensors"):
        (run / name).unlink()
    for step in (6, 9):  # killed in the second epoch
        shutil.rmtree(run / f"checkpoint-{step}")
    train(**values)
    assert f"Resuming from {run / 'checkpoint-3'}." in capsys.readouterr().out
    after = load_file(run / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_that_lacks_weights_is_refused(train, capsys):
    run = train(use_peft=False, max_steps=6)
    (run / run_folder.RUN).unlink()
    weights = load_file(run / "checkpoint-3" / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, run / "checkpoint-3" / "model.safetensors", {"format": "pt"})
    checkpoints.mark_whole(run / "checkpoint-3")
    shutil.rmtree(run / "checkpoint-6")
    with pytest.raises(SystemExit) as stop:
        train(use_peft=False, max_steps=6)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "1 of the weights are not in it" in error and "Traceback" not in error


def test_a_checkpoint_without_its_marker_is_passed_over_and_removed(train, capsys):
    run = train(save_total_limit=3)
    before = result(run)
    assert steps(run) == [3, 6, 9]
    (run / run_folder.RUN).unlink()
    (run / "checkpoint-9" / checkpoints.MARKER).unlink()
    (run / "checkpoint-9" / "optimizer.pt").write_bytes(b"half of i")
    assert checkpoints.last_whole_checkpoint(run) == str(run / "checkpoint-6")
    assert result(train(save_total_limit=3)) == before
    output = capsys.readouterr().out
    assert "checkpoint-9 was not finished when the run stopped; it is removed" in output
    assert f"Resuming from {run / 'checkpoint-6'}." in output
    assert (run / "checkpoint-9" / checkpoints.MARKER).is_file()


@pytest.mark.parametrize("cut", [0, 5_000, None])
def test_a_checkpoint_that_was_copied_in_part_is_refused_and_kept(train, capsys, cut):
    run = train(save_total_limit=3)
    before = result(run)
    (run / run_folder.RUN).unlink()
    optimiser = run / "checkpoint-9" / "optimizer.pt"
    content = optimiser.read_bytes()
    if cut is None:  # transformers would begin with another optimiser, and say nothing
        optimiser.unlink()
    else:
        optimiser.write_bytes(content[:cut])
    with pytest.raises(SystemExit) as stop:
        train(save_total_limit=3)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert "checkpoint-9 is not as it was saved: optimizer.pt cut or not there. Copy it again, or delete it" in error
    shutil.rmtree(run / "checkpoint-9")  # as the message says
    assert result(train(save_total_limit=3)) == before


def test_a_checkpoint_of_an_earlier_version_is_resumed(train):
    run = train()
    before = result(run)
    (run / run_folder.RUN).unlink()
    (run / "checkpoint-9" / checkpoints.MARKER).write_bytes(b"")
    assert result(train()) == before


def test_a_run_that_goes_on_with_smaller_micro_batches_and_recomputation_ends_as_it_would_have(train):
    """As the message says that is printed where a GPU's memory runs out."""
    run = train(save_total_limit=3)
    before = load_file(run / "adapter_model.safetensors")
    (run / run_folder.RUN).unlink()
    for step in (6, 9):  # killed in the second epoch
        shutil.rmtree(run / f"checkpoint-{step}")
    train(save_total_limit=3, per_device_train_batch_size=2, gradient_checkpointing=True)
    after = load_file(run / "adapter_model.safetensors")
    assert steps(run) == [3, 6, 9] and after.keys() == before.keys()
    for name, weight in before.items():
        assert_close(after[name], weight, rtol=1e-3, atol=1e-3)


def test_a_killed_run_is_not_resumed_over_changed_labels(train, contest, tmp_path, capsys):
    data = shutil.copytree(contest, tmp_path / "data")
    how = {"train_data": data / "train.csv", "validation_data": data / "validation.csv", "max_steps": 3}
    run = train(**how)
    (run / run_folder.RUN).unlink()
    text = (data / "validation.csv").read_text()
    rows = text.splitlines()
    (data / "validation.csv").write_text("\n".join([*rows[:-1], rows[-1][:-1] + "abcd"["bcda".index(rows[-1][-1])]]))
    with pytest.raises(SystemExit) as stop:
        train(**how)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "began: labels of row row_031 (1 of 32). Choose another output_dir" in error
    (data / "validation.csv").write_text(text)
    assert run_folder.is_finished(train(**how))


def test_the_newest_whole_checkpoint_is_the_one_with_the_most_steps(tmp_path):
    for step in (9, 80, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert checkpoints.last_whole_checkpoint(tmp_path) is None
    for step in (9, 80):
        (tmp_path / f"checkpoint-{step}" / checkpoints.MARKER).touch()
    assert checkpoints.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-80")
    assert checkpoints.remove_broken_checkpoints(tmp_path) == ["checkpoint-100"]
    assert steps(tmp_path) == [9, 80]


def test_another_recipe_in_the_same_folder_is_refused_and_the_changed_keys_are_named(train, capsys):
    run = train(max_steps=1)
    (run / run_folder.RUN).unlink()  # the same whether it is finished or not
    for finished in (False, True):
        with pytest.raises(SystemExit) as stop:
            train(max_steps=1, learning_rate=2e-2, lora_r=8, logging_steps=5)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in error
        assert "learning_rate: 0.01 -> 0.02" in error and "lora_r: None -> 8" in error and "--overwrite" in error
        assert "logging_steps" not in error  # changes nothing in the weights
        if not finished:
            assert train(max_steps=1) == run and run_folder.is_finished(run)


def test_a_finished_run_is_trained_again_only_when_it_is_to_be_overwritten(train, capsys):
    run = train(max_steps=1)
    written = (run / run_folder.RUN).stat().st_mtime_ns
    capsys.readouterr()
    train(max_steps=1)
    assert "is finished. Give --overwrite to train it again" in capsys.readouterr().out
    assert (run / run_folder.RUN).stat().st_mtime_ns == written
    train(max_steps=2, overwrite=True)
    assert (run / run_folder.RUN).stat().st_mtime_ns > written and steps(run) == [2]


def test_early_stopping_keeps_its_patience_over_a_resume(train):
    # A learning rate of 0: the first evaluation stays the best, and the third after it is one too many.
    values = {"learning_rate": 0, "num_train_epochs": 8, "early_stopping_patience": 3, "save_total_limit": 10}
    run = train(**values)
    assert steps(run) == [3, 6, 9, 12]
    # As if killed with patience for one more.
    (run / run_folder.RUN).unlink()
    shutil.rmtree(run / "checkpoint-12")
    assert steps(train(**values)) == [3, 6, 9, 12]
