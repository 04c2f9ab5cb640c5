"""What a wheel holds, and that the demo works from one, outside the checkout."""

import configparser
import os
import shutil
import subprocess
import sys

import pytest
from scripts import RECIPES

ROOT = RECIPES.parent
SOURCES = ("vqa_sft", "recipes", "accelerate_configs", "deepspeed_configs")
ELSEWHERE = ["vqa_sft.recipes", "vqa_sft.accelerate_configs", "vqa_sft.deepspeed_configs"]


def test_every_package_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = setup["options"]["packages"].split()
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "vqa_sft").rglob("*.py")}
    assert sorted(listed) == sorted([".".join(folder.parts) for folder in folders] + ELSEWHERE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_from_a_wheel_outside_the_checkout(tmp_path):
    source, target, work = tmp_path / "source", tmp_path / "target", tmp_path / "work"
    work.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = ("--no-deps", "--no-index", "--quiet")
    run("pip", "wheel", *pip, "--no-build-isolation", "--wheel-dir", tmp_path, source)
    run("pip", "install", *pip, "--target", target, *tmp_path.glob("*.whl"))
    run("vqa_sft.tiny", "numbers", "data/numbers")
    few = ("--config", "demo.yaml", "--max_steps", 2, "--limit", 64)
    said = run("vqa_sft.cli", "train", *few)
    assert f"Using {target}/vqa_sft/recipes/demo.yaml." in said and "Saved to runs/demo" in said
    said = run("vqa_sft.cli", "train", *few, "--output_dir", "runs/launched", "--accelerate_config", "cpu")
    assert f"Using {target}/vqa_sft/accelerate_configs/cpu.yaml." in said
    weights = [(work / "runs" / name / "adapter_model.safetensors").read_bytes() for name in ("demo", "launched")]
    assert weights[0] == weights[1]
    rows = ("--data", "data/numbers/test.csv", "--limit", 64, "--use_cpu", "--output", "submission.csv")
    run("vqa_sft.cli", "predict", "--run", "runs/demo", *rows)
    assert len((work / "submission.csv").read_text().splitlines()) == 65
    assert "submission.parquet" in run(
        "vqa_sft.cli", "score", "submission.parquet", "--answers", "data/numbers/test_answers.csv"
    )
