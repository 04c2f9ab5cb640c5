"""Recipes and launch configurations are found by name where no such file exists; a file of the user comes first."""

from pathlib import Path

import pytest
from scripts import RECIPES

from vqa_sft.cli.scripts import launch_options
from vqa_sft.config.packaged import find_base, find_packaged
from vqa_sft.config.recipe import read_recipe
from vqa_sft.errors import InputError
from vqa_sft.tiny import TINY_PATH


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "recipes/demo.yaml"])
def test_a_recipe_of_ours_is_found_by_its_name(name, capsys):
    assert find_packaged(name, "recipes") == str(RECIPES / "demo.yaml")
    assert capsys.readouterr().out == f"Using {RECIPES / 'demo.yaml'}.\n"
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    assert find_packaged(name, "recipes") == name and not capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere.yaml", "other/demo.yaml", "sft.py", "../recipes/demo.yaml"])
def test_other_names_are_left_alone(name):
    assert find_packaged(name, "recipes") == name


def test_the_base_of_the_demo_is_found_from_everywhere(monkeypatch):
    assert read_recipe(["--config", "demo"]).values["model_name_or_path"] == str(TINY_PATH)
    monkeypatch.chdir(RECIPES.parent)
    assert read_recipe(["--config", "recipes/demo.yaml"]).values["model_name_or_path"] == "vqa_sft/tiny/base"
    assert find_base("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_launch_is_given_files_of_ours_by_their_path():
    configs = RECIPES.parent / "accelerate_configs"
    assert launch_options("cpu", None) == ["--config_file", str(configs / "cpu.yaml")]
    deepspeed = str(RECIPES.parent / "deepspeed_configs" / "zero3.json")
    assert launch_options("zero3", 2)[2:] == ["--num_processes", "2", "--deepspeed_config_file", deepspeed]
    with pytest.raises(
        InputError, match="no such configuration: nowhere. Name a file, or one of ours: a100, cpu, dual_t4"
    ):
        launch_options("nowhere", None)
