import gc
import os
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
from contest import write_contest
from scripts import train

# Medium tests (tests/README.md): those of these folders, and those that use these fixtures. Others carry the mark
# themselves.
TESTS = Path(__file__).parent
MEDIUM_FOLDERS = {"inference", "lab", "models", "recipes", "runs", "tiny", "training"}
MEDIUM_FIXTURES = {"families", "road", "sft", "three"}

# The files of these folders that look at what a run draws; others are tests/report/ and quick tests.
DRAWN = {"test_classification_run", "test_curves"}


def pytest_ignore_collect(collection_path, config):
    # Their modules import torch, for which the quick lane does not wait.
    is_quick = config.option.markexpr.startswith("not medium")
    return True if is_quick and collection_path in {TESTS / name for name in MEDIUM_FOLDERS} else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MEDIUM_FOLDERS or MEDIUM_FIXTURES & {*item.fixturenames}:
            item.add_marker(pytest.mark.medium)
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))  # others have 300 s (setup.cfg)


gc.disable()  # while libraries are imported, which are no garbage


def pytest_collection_finish():
    gc.enable()


def pytest_runtest_logfinish():
    # A training ends with a collection, which would look at every object of the libraries: half a second each time.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the run of three folds is killed")
    parser.addoption("--calls", type=int, default=48, help="of a Predictor by 16 threads")
    parser.addoption("--starts", type=int, default=1, help="how often two of a kind are started at once")


@pytest.fixture(autouse=True, scope="module")
def plots_are_not_drawn(request):
    """Every run draws five plots, which takes a quarter of a tiny run; these are made, and then not laid out."""
    if request.path.relative_to(TESTS).parts[0] not in MEDIUM_FOLDERS or request.path.stem in DRAWN:
        yield
        return
    from matplotlib.figure import Figure  # slow to import

    def save(self, file, **kwargs):
        if hasattr(file, "write"):
            file.write("<svg></svg>")
        else:
            Path(file).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """`families("llava")`: the folder of a tiny random model, built once a session."""
    from families import save_family

    root, built = tmp_path_factory.mktemp("families"), {}

    def folder(family):
        if family not in built:
            built[family] = str(save_family(family, root / family))
        return built[family]

    return folder


@pytest.fixture
def contest(tmp_path):
    return write_contest(tmp_path / "contest")


@pytest.fixture
def sft(contest):
    """`sft(model, key=value, ...)` trains on the contest's rows; more keys as in a recipe."""

    def run(model, output_dir, **values):
        defaults = {"train_data": contest / "train.csv", "num_train_epochs": 1, "per_device_train_batch_size": 4}
        defaults |= {"use_cpu": True, "dataloader_num_workers": 0, "disable_tqdm": True, "learning_rate": 1e-3}
        train(**defaults | values | {"model_name_or_path": model, "output_dir": output_dir})
        return output_dir

    return run


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """(contest, runs): three folds of it, and a fourth run of another rank."""
    from vqa_sft.data.folds import write_folds
    from vqa_sft.tiny import TINY_PATH

    folder = tmp_path_factory.mktemp("three")
    contest = write_contest(folder / "contest")
    write_folds(folder / "folds.csv", [f"row_{i:03d}" for i in range(24)], [i % 3 for i in range(24)])
    values = {"model_name_or_path": TINY_PATH, "train_data": contest / "train.csv", "learning_rate": 1e-2}
    values |= {"max_steps": 4, "use_cpu": True, "dataloader_num_workers": 0, "disable_tqdm": True}
    train(**values, fold="all", folds_file=folder / "folds.csv", output_dir=folder / "run")
    train(**values, output_dir=folder / "other", lora_r=4, validation_fraction=0.25)
    return contest, folder / "run"


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def road(request, families, contest):
    """A model with a LoRA that does something, its processor, letter ids, and rows of many lengths and images."""
    from gradients import road_of

    return road_of(families(request.param), contest)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("check", path, ...)`: exit code, what is printed, and what is said on stderr."""
    from vqa_sft.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vqa-sft", *map(str, arguments)])
        code = 0
        capsys.readouterr()  # what fixtures made libraries say
        try:
            main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def one_thread():
    """As the processes that tests start; two threads on busy cores wait for each other at every layer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
