"""predict.py with images that are withheld, and `vqa-sft blind`, which compares."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from contest import rows_of, write_csv
from PIL import Image
from scripts import run_script

from vqa_sft.batch.collator import BLANK_SIZE
from vqa_sft.batch.control import Control, donors_of
from vqa_sft.data.examples import load_examples
from vqa_sft.inference.scorer import Scorer
from vqa_sft.predictions.file import read_predictions
from vqa_sft.questions.letters import Views
from vqa_sft.tiny import TINY_PATH


def predict(run, data, output, *more):
    run_script("predict", "--run", run, "--data", data, "--output", output, "--num_workers", 0, "--use_cpu", *more)


def logits_of(path):
    return np.concatenate(read_predictions(path).choice_logits)


def test_what_is_shown_is_what_a_file_with_such_images_would_show(three, tmp_path):
    contest, run = three
    predict(run, contest / "train.csv", tmp_path / "out.csv", "--images", "original,blank,swapped")
    predict(run, contest / "train.csv", tmp_path / "plain.csv")
    # Several passes are those of a prediction each.
    assert (tmp_path / "out.original.parquet").read_bytes() == (tmp_path / "plain.parquet").read_bytes()
    Image.new("RGB", BLANK_SIZE, "white").save(contest / "images" / "white.png")
    rows, donors = rows_of(contest), donors_of(load_examples(str(contest / "train.csv"))[0])
    write_csv(contest / "blank.csv", [row | {"path": "images/white.png"} for row in rows])
    write_csv(contest / "swapped.csv", [row | {"path": rows[donors[row["id"]]]["path"]} for row in rows])
    for kind in ("blank", "swapped"):
        predict(run, contest / f"{kind}.csv", tmp_path / f"{kind}.csv")
        for name in (kind, f"{kind}.fold1"):  # of all runs, and of each
            found = read_predictions(tmp_path / f"out.{name}.parquet")
            assert found.images == kind and all(found.changed)
            np.testing.assert_allclose(
                logits_of(tmp_path / f"out.{name}.parquet"), logits_of(tmp_path / f"{name}.parquet"), atol=1e-5
            )
        # Rows are still those of the data, for whoever compares.
        assert found.digests == read_predictions(tmp_path / "plain.parquet").digests
        assert not np.allclose(logits_of(tmp_path / f"{kind}.parquet"), logits_of(tmp_path / "plain.parquet"), atol=0.1)


def test_a_model_that_looks_is_told_from_one_whose_answers_have_nothing_to_do_with_the_images(three, tmp_path, run):
    contest, folds = three
    code, out, err = run("blind", folds, "--use_cpu", "--num_workers", 0)
    assert code == 0 and "The model looks at the image: accuracy falls from" in out, err
    found = json.loads((folds / "blind.json").read_text())
    assert found["looks"] and found["rows"] == 24 and {*found["images"]} == {"original", "blank", "swapped", "blurred"}
    assert (found["data"], found["views"]) == ("validation", "orders identity")
    assert found["images"]["swapped"]["fall_95"][0] > 0 and "most frequent answer of training" in found["baselines"]
    assert not (folds / "blind.json.parts").exists()
    # Rows whose answers are those of other rows: whatever the model sees, it is right as often.
    rows = rows_of(contest)
    write_csv(contest / "any.csv", [row | {"answer": "abcd"[i * 7 % 4]} for i, row in enumerate(rows)])
    base = ("--run", "none", "--model", TINY_PATH, "--data", contest / "any.csv", "--output", tmp_path / "base.json")
    code, out, err = run("blind", *base, "--use_cpu", "--num_workers", 0, "--images", "blank,swapped")
    assert code == 0 and "Beware: the image hardly matters" in out, err
    assert not json.loads((tmp_path / "base.json").read_text())["looks"]
    # A file of ours is replaced, no other.
    (tmp_path / "base.json").write_text("{}")
    code, out, err = run("blind", *base)
    assert code == 2 and err.count("\n") == 1 and "is no table of vqa-sft blind" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--images", "blank,grey"), "--images must be some of blank,swapped,blurred; got blank,grey"),
        (("--on_bad_row", "guess"), "--on_bad_row is no option of `vqa-sft blind`"),
        (("--output", "out.csv"), "--output must end in .json"),
        (("--data", "{contest}/test.csv"), "has no answers"),
        (("--num-processes", "2"), "--num_processes goes with --accelerate_config"),
    ],
)
def test_what_cannot_be_compared_is_one_line(three, run, more, says):
    contest, folds = three
    code, out, err = run("blind", folds / "fold0", *(text.replace("{contest}", str(contest)) for text in more))
    assert code == 2 and not out and err.strip().splitlines()[-1].startswith("error: ") and says in err, err
    code, out, err = run("blind", "none", "--model", TINY_PATH)
    assert code == 2 and "--output FILE.json is missing" in err


def test_no_feature_of_the_images_as_they_are_is_taken_from_the_cache():
    store, packer = object(), SimpleNamespace(has_grids=True, packs_rows=True)
    rest = {"processor": None, "prompts": None, "num_letters": 4, "packer": packer, "store": store}
    scorer = Scorer(model=None, letter_ids=None, precision="fp32", **rest)
    assert scorer.collators(Views())[0].features is store
    assert scorer.collators(Views(), None, Control("blurred"))[0].features is None


def test_rows_of_one_image_are_told_before_weights_are_loaded(three, tmp_path, capsys, monkeypatch):
    contest, folds = three
    write_csv(contest / "one.csv", [row | {"path": "images/000.png"} for row in rows_of(contest)])
    monkeypatch.setattr("vqa_sft.inference.scorer.load", None)
    with pytest.raises(SystemExit):
        predict(folds / "fold0", contest / "one.csv", tmp_path / "out.csv", "--images", "original,swapped")
    assert "all rows show the same image. Leave swapped out" in capsys.readouterr().err


def test_rows_without_an_image_are_counted_apart(three, tmp_path, run):
    contest, folds = three
    rows = rows_of(contest)
    write_csv(contest / "some.csv", [row | ({"path": ""} if i < 6 else {}) for i, row in enumerate(rows)])
    data = ("--data", contest / "some.csv", "--output", tmp_path / "some.json")
    code, out, err = run("blind", folds / "fold0", *data, "--use_cpu", "--num_workers", 0, "--images", "swapped")
    assert code == 0 and "6 rows without an image are not in the table" in out, err
    assert json.loads((tmp_path / "some.json").read_text())["images"]["swapped"]["rows"] == 18
