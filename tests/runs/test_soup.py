"""A soup against the mean of the weight changes themselves, and as a run that predict takes."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contest import write_hard_contest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from scripts import run_script
from torch.testing import assert_close

from vqa_sft.errors import InputError
from vqa_sft.models.load import load_processor
from vqa_sft.predictions.file import read_predictions
from vqa_sft.runs import folder as run_folder, hub, soup
from vqa_sft.runs.soup import CONFIG, WEIGHTS, make_soup, mean_factors, read_adapter
from vqa_sft.tiny import TINY_PATH

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in seed, rank and scaling."""
    folder = tmp_path_factory.mktemp("soup")
    contest = write_hard_contest(folder / "contest")
    for name, how in (("a", {"lora_r": 4}), ("b", {"lora_r": 6, "seed": 7, "use_rslora": True, "lora_alpha": 8})):
        values = {"model_name_or_path": TINY_PATH, "train_data": contest / "train.csv", "output_dir": folder / name}
        values |= {"max_steps": 6, "learning_rate": 1e-2, "use_cpu": True, "dataloader_num_workers": 0} | how
        values |= {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "disable_tqdm": True}
        run_script("sft", *(str(token) for key, value in values.items() for token in (f"--{key}", value)))
    return folder


def changes(folder):
    """What an adapter changes in every layer, (N, K)."""
    return {name: (b @ a).float() for name, (b, a) in read_adapter(folder)[0].items()}


def assert_changes(folder, expected):
    found = changes(folder)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, change in expected.items():
        assert_close(found[name], change, atol=1e-6, rtol=1e-4)


def test_the_change_of_a_soup_is_the_mean_of_changes(runs, tmp_path):
    a, b = changes(runs / "a"), changes(runs / "b")
    said = make_soup([runs / "a", runs / "b"], tmp_path / "soup")
    assert_changes(tmp_path / "soup", {name: (a[name] + b[name]) / 2 for name in a})
    assert "of rank 10, with 100.00% of the mean change" in said
    make_soup([runs / "a", runs / "b"], tmp_path / "weighted", weights=[3, 1])
    assert_changes(tmp_path / "weighted", {name: 0.75 * a[name] + 0.25 * b[name] for name in a})


def test_a_soup_of_one_adapter_with_itself_is_itself(runs, tmp_path):
    assert "of rank 4" in make_soup([runs / "a"] * 3, tmp_path / "soup")
    assert_changes(tmp_path / "soup", changes(runs / "a"))


def test_an_adapter_written_with_other_signs_is_the_same_adapter(runs, tmp_path):
    """The mean of factors would be nothing: (A - A) / 2."""
    other = tmp_path / "other"
    other.mkdir()
    for name in (CONFIG, run_folder.RUN):
        (other / name).write_text((runs / "a" / name).read_text())
    save_file({name: -tensor for name, tensor in load_file(runs / "a" / WEIGHTS).items()}, other / WEIGHTS)
    make_soup([runs / "a", other], tmp_path / "soup")
    assert_changes(tmp_path / "soup", changes(runs / "a"))


def test_a_smaller_rank_keeps_the_largest_parts_and_tells_how_much():
    torch.manual_seed(0)
    adapters = [{"x": (torch.randn(12, 3).double(), torch.randn(3, 9).double())} for _ in range(2)]
    whole = sum(b @ a for b, a in (adapter["x"] for adapter in adapters)) / 2
    factors, kept = mean_factors(adapters, [0.5, 0.5], rank=2)
    u, values, v = torch.linalg.svd(whole, full_matrices=False)
    b, a = factors["x"]
    assert_close((b @ a).double(), (u[:, :2] * values[:2]) @ v[:2], atol=1e-5, rtol=1e-5)
    assert kept == pytest.approx((values[:2].square().sum() / values.square().sum()).sqrt().item())


def test_predict_takes_a_soup_as_it_takes_a_run(runs, tmp_path):
    make_soup([runs / "a"] * 2, tmp_path / "soup")
    found = []
    for run in (runs / "a", tmp_path / "soup"):
        output = tmp_path / f"{run.name}.csv"
        arguments = ["--run", run, "--data", runs / "contest" / "test.csv", "--output", output]
        run_script("predict", *arguments, "--use_cpu", "--num_workers", "0")
        found.append(read_predictions(output.with_suffix(".parquet")).choice_logits)
    assert_close(torch.tensor(found[1]), torch.tensor(found[0]), atol=1e-4, rtol=1e-4)


# What lies in a run's folder by the end of a week, and belongs to that run alone.
STRAY = ("submission.csv", "submission.parquet", "validation.parquet", "out.fold0.parquet", "log.csv", "log.png")
STRAY += ("rows.csv", "out_of_fold.json", "weights.json", "notes.txt", "log.csv.0a1b2c3d.part", "training_args.bin")
STRAY += ("trainer_state.json", "report.html", "checkpoint-6/adapter_model.safetensors", "out.csv.parts/plan.json")


def a_week_later(run, target):
    shutil.copytree(run, target)
    for name in STRAY:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("of this run alone")
    return target


def test_a_soup_takes_nothing_that_belongs_to_one_run_alone(runs, tmp_path):
    make_soup([a_week_later(runs / "a", tmp_path / "a"), runs / "b"], tmp_path / "soup")
    processor = {path.name for path in Path(TINY_PATH).iterdir()} - {"config.json", "generation_config.json"}
    processor = {name for name in processor if not name.endswith((".safetensors", ".md"))}
    assert {path.name for path in (tmp_path / "soup").iterdir()} == processor | {CONFIG, WEIGHTS, run_folder.RUN}


def test_a_push_uploads_what_a_reader_needs_and_neither_rows_nor_answers(runs, tmp_path, monkeypatch):
    folder, uploaded = a_week_later(runs / "a", tmp_path / "a"), set()

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, **how):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, **patterns):
            names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            uploaded.update(filter_repo_objects(names, **patterns))

    monkeypatch.setattr(hub, "HfApi", Hub)
    hub.push_run(folder)
    assert not uploaded & {*STRAY}
    assert {CONFIG, WEIGHTS, "run.json", "recipe.yaml", "README.md", "tokenizer.json"} <= uploaded
    assert load_processor(copy_of(folder, uploaded, tmp_path / "pulled"))
    (folder / "model-00001-of-00002.safetensors").touch()  # a run of all weights
    hub.push_run(folder)
    assert "model-00001-of-00002.safetensors" in uploaded


def copy_of(folder, names, target):
    target.mkdir()
    for name in names:
        shutil.copy(folder / name, target)
    return str(target)


def test_a_soup_that_cannot_be_written_leaves_nothing(runs, tmp_path, monkeypatch):
    def save_file(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(soup, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        make_soup([runs / "a", runs / "b"], tmp_path / "soup")
    assert not any(tmp_path.iterdir())


def test_the_command_makes_a_soup_and_refuses_what_cannot_be_one(runs, tmp_path, run):
    command = ["soup", runs / "a", runs / "b", "--output", tmp_path / "soup"]
    code, printed, _ = run(*command, "--rank", "3")
    assert code == 0 and "layers of rank 3, with" in printed
    code, _, error = run(*command)
    assert code == 2 and "exists. Name another folder" in error

    other = tmp_path / "other"
    other.mkdir()
    for name in (CONFIG, run_folder.RUN):
        (other / name).write_text((runs / "a" / name).read_text())
    (other / WEIGHTS).write_bytes((runs / "a" / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(InputError, match="holds no adapter"):
        make_soup([runs / "a", other], tmp_path / "no")
    diverged = {name: tensor * float("nan") for name, tensor in load_file(runs / "a" / WEIGHTS).items()}
    save_file(diverged, other / WEIGHTS)
    with pytest.raises(InputError, match="that run has diverged"):
        make_soup([runs / "a", other], tmp_path / "no")
    run = json.loads((other / run_folder.RUN).read_text())
    run["num_letters"] = 5
    (other / run_folder.RUN).write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"num_letters of .* is 5"):
        make_soup([runs / "a", other], tmp_path / "no")
    for changed in ({"base_precision": "fp8"}, {"load_in_4bit": True}, {"model_revision": "v2"}):
        of_a = json.loads((runs / "a" / run_folder.RUN).read_text())
        of_a["recipe"] |= {"load_in_8bit": False} | changed  # False is as if it were not there
        (other / run_folder.RUN).write_text(json.dumps(of_a))
        with pytest.raises(
            InputError, match=f"{[*changed][0]} of .*other is {[*changed.values()][0]!r}, and of .*None"
        ):
            make_soup([runs / "a", other], tmp_path / "no")
    of_a = json.loads((runs / "a" / run_folder.RUN).read_text()) | {
        "classes": {"names": ["a cat", "a dog"], "other_names": [[], []]}
    }
    (other / run_folder.RUN).write_text(json.dumps(of_a))
    with pytest.raises(InputError, match="other is of other classes than .*a. Average runs of the same"):
        make_soup([runs / "a", other], tmp_path / "no")
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(InputError, match="weights"):
            make_soup([runs / "a", runs / "b"], tmp_path / "no", weights=weights)
    assert not (tmp_path / "no").exists()
