"""The order of runs, retries and interruptions; that trainings really survive is shown in tests/recipes."""

import time

import pytest

from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.folds import write_folds
from vqa_sft.training.survive import Finished, Interrupted, Retry, train_runs


@pytest.fixture
def runs(tmp_path):
    """Of three folds."""
    write_folds(tmp_path / "folds.csv", ["a", "b", "c"], [0, 1, 2])
    values = {"model_name_or_path": "m", "train_data": "t.csv", "output_dir": tmp_path / "run", "auto_batch": True}
    values |= {"folds_file": tmp_path / "folds.csv", "fold": "all", "overwrite": True}
    return read_recipe([f"--{key}={value}" for key, value in values.items()]).runs()


def trained(runs, *ends):
    """What `train_runs` returns where its trainings end so, and the recipe of each of them."""
    seen, left = [], iter(ends)
    return train_runs(runs, lambda run, stop: seen.append(run) or next(left), time.monotonic()), seen


def test_folds_are_trained_one_after_another(runs, capsys):
    ended, seen = trained(runs, Finished(), Finished(), Finished())
    assert ended == Finished() and seen == runs
    assert [run.values["output_dir"] for run in seen] == runs[0].folders
    assert [run.arguments.overwrite for run in seen] == [True, False, False]  # the first moves all aside
    assert f"Fold 3 of 3: {runs[0].folders[2]}" in capsys.readouterr().out


def test_a_retry_has_other_settings_and_so_have_the_folds_after_it(runs):
    smaller, smallest = ({"per_device_train_batch_size": size} for size in (4, 2))
    ended, seen = trained(runs, Finished(), Retry(smaller), Retry(smallest), Finished(), Finished())
    assert ended == Finished()
    assert [run.values.get("per_device_train_batch_size") for run in seen] == [None, None, 4, 2, 2]
    assert [run.values["fold"] for run in seen] == [0, 1, 1, 1, 2]
    assert not any(run.arguments.overwrite or run.arguments.auto_batch for run in seen[2:])


@pytest.mark.parametrize(("by_sigterm", "reason"), [(True, "SIGTERM"), (False, "Time is up")])
def test_an_interruption_ends_all_and_says_what_the_same_command_does(runs, capsys, by_sigterm, reason):
    ended, seen = trained(runs, Finished(), Interrupted(by_sigterm))
    assert ended == Interrupted(by_sigterm) and len(seen) == 2
    _, second, third = runs[0].folders
    resumes = f"{reason}. {second} resumes with the same command without --overwrite, then {third}.\n"
    assert capsys.readouterr().out.endswith(resumes)
