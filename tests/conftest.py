import csv
import importlib.util
import os
import random
import sys
import tempfile
from pathlib import Path

# Nothing in this suite may reach the network, and two processes on two cores must not fight over them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Caches of a session of its own: nothing of the user's is read, and nothing is left.
_HOME = tempfile.TemporaryDirectory(prefix="vqa_sft_tests_")
os.environ["HF_HOME"] = _HOME.name

import pytest
import torch
from families import save_family
from PIL import Image, ImageDraw


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the run of three folds is killed")
    parser.addoption("--calls", type=int, default=64, help="of a Predictor by 16 threads")
    parser.addoption("--starts", type=int, default=2, help="how often two of a kind are started at once")


RECIPES = Path(__file__).parent.parent / "recipes"
COLOURS = ("red", "green", "blue", "black")


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """`families("llava")`: the folder of a tiny random model, built once a session."""
    root, built = tmp_path_factory.mktemp("families"), {}

    def folder(family):
        if family not in built:
            built[family] = str(save_family(family, root / family))
        return built[family]

    return folder


def write_contest(folder, num_rows=24, seed=0):
    """Squares of four colours as a contest's files: train.csv, test.csv, images/; returns the folder."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_rows):
        choices = rng.sample(COLOURS, 4)
        answer = rng.randrange(4)
        path = f"images/{i:03d}.png"
        image = Image.new("RGB", (84 + 7 * (i % 3), 84), "white")
        ImageDraw.Draw(image).rectangle([20, 20, 60, 60], fill=choices[answer])
        image.save(folder / path)
        rows.append({"id": f"row_{i:03d}", "path": path, "question": "Which colour has the square?"})
        rows[-1] |= dict(zip("abcd", choices, strict=True)) | {"answer": "abcd"[answer]}
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "test.csv", [{key: row[key] for key in row if key != "answer"} for row in rows])
    write_csv(folder / "test_answers.csv", [{key: row[key] for key in ("id", "answer")} for row in rows])
    return folder


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def contest(tmp_path):
    return write_contest(tmp_path / "contest")


def run_script(name, *arguments):
    """Run a script of recipes/ in this process: the same code as a launch, without ten seconds of imports."""
    script = RECIPES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = sys.argv
    sys.argv = [str(script), *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = before


@pytest.fixture
def sft(contest):
    """`sft(model, key=value, ...)` trains on the contest's rows; more keys as in a recipe."""

    def train(model, output_dir, **values):
        defaults = {"train_data": contest / "train.csv", "num_train_epochs": 1, "per_device_train_batch_size": 4}
        defaults |= {"use_cpu": True, "dataloader_num_workers": 0, "disable_tqdm": True, "learning_rate": 1e-3}
        values = defaults | values | {"model_name_or_path": model, "output_dir": output_dir}
        run_script("sft", *(token for key, value in values.items() for token in (f"--{key}", value)))
        return output_dir

    return train


def write_hard_contest(folder):
    """32 rows whose answers the tiny base gets wrong, so that there is something to learn: 24 to train on and 8 in
    validation.csv; test.csv holds all of them."""
    write_contest(folder, num_rows=32)
    with (folder / "train.csv").open() as file:
        rows = [row | {"answer": "bcda"["abcd".index(row["answer"])]} for row in csv.DictReader(file)]
    write_csv(folder / "train.csv", rows[:24])
    write_csv(folder / "validation.csv", rows[24:])
    return folder


@pytest.fixture
def one_thread():
    """As the processes that tests start; two threads on busy cores wait for each other at every layer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
