"""The road of docs/classification.md, run as it stands there on the tiny base and a few digits."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import yaml
from scripts import run_script

from vqa_sft.data.class_probs import read_class_probs
from vqa_sft.predictions.class_metrics import class_metrics
from vqa_sft.predictions.class_tables import with_labels
from vqa_sft.tiny import TINY_PATH
from vqa_sft.tiny.digits import split_digits, to_picture

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TINY = {"model_name_or_path": str(TINY_PATH), "use_cpu": True, "num_train_epochs": 1, "learning_rate": 2e-3}
TINY |= {"num_candidates": 4, "candidate_pool": 6, "validation_fraction": 0.25, "dataloader_num_workers": 0}
OF_A_GPU = ("load_in_4bit", "use_bnb_nested_quant", "attn_implementation", "max_pixels", "min_pixels")


def commands():
    """The lines of the page's shell blocks, the road first; continued lines joined."""
    page = (ROOT / "docs/classification.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    ((?:vqa-sft|accelerate launch) .*)$", page, re.MULTILINE)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the data and the recipe that the road names."""
    digits, train, test = split_digits(0)
    for part, rows in (("train", train[:120]), ("test", test[:40])):
        for row in map(int, rows):
            folder = tmp_path / "data" / part / (WORDS[digits.target[row]] if part == "train" else "")
            folder.mkdir(parents=True, exist_ok=True)
            to_picture(digits.images[row]).save(folder / f"{row}.png")
    with (tmp_path / "data/sample_submission.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ID", *WORDS], *([f"{row}.png", *[0.1] * 10] for row in test[:40])])
    labels = [f"{row}.png,{WORDS[digits.target[row]]}" for row in test[:40]]
    (tmp_path / "answers.csv").write_text("\n".join(["id,label", *labels]) + "\n")
    recipe = yaml.safe_load((ROOT / "recipes/classification.yaml").read_text(encoding="utf-8"))
    recipe = {key: value for key, value in recipe.items() if key not in OF_A_GPU} | TINY
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/classification.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_road_leads_from_images_to_a_submission(place, run):
    road = commands()[:6]
    assert [words[1] for words in road] == ["check", "candidates", "launch", "launch", "fuse", "submit"]
    for words in road:
        if words[0] == "vqa-sft":
            code, _, error = run(*words[1:])
            assert code == 0, (words, error)
        else:
            script = next(number for number, word in enumerate(words) if word.endswith(".py"))
            on_cpu = ["--use_cpu", "true", "--num_workers", "0"] if "predict" in words[script] else []
            run_script(Path(words[script]).stem, *words[script + 1 :], *on_cpu)
    with (place / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and [*rows[0]] == ["ID", *WORDS]
    assert all(abs(sum(float(row[name]) for name in WORDS) - 1) < 1e-6 for row in rows)
    fused = with_labels(read_class_probs("fused.parquet"), "fused.parquet", "answers.csv")
    assert class_metrics(fused)["accuracy"] > 0.6  # by chance 0.1
    for words in (
        "score fused.parquet candidates/test.parquet --answers answers.csv",
        "label-errors runs/classification",
    ):
        code, printed, error = run(*words.split())
        assert code == 0 and printed, error


def test_every_command_of_the_page_exists_with_its_options(run):
    ours = [words for words in commands() if words[0] == "vqa-sft"]
    assert len(ours) >= 15
    for words in ours:
        code, printed, _ = run(words[1], "--help")
        known = printed.replace("_", "-")
        assert code == 0
        assert all(word.replace("_", "-") in known for word in words if word.startswith("--")), words
        assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/"))
