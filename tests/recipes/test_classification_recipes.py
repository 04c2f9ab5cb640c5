"""The recipes for classifications, each on a few made-up files laid out as its head says."""

import csv
from dataclasses import replace

import pytest
from PIL import Image
from scripts import RECIPES

from vqa_sft.config.recipe import read_recipe
from vqa_sft.data.classes import read_classes
from vqa_sft.data.examples import CLASS, read_examples

NAMES = ["sedan, 2 doors", "세단 2020", "van_2015-2018"]


@pytest.fixture
def contest(tmp_path):
    """train/CLASS/*.png, test.csv (ID, img_path) and sample_submission.csv."""
    for number in range(6):
        folder = tmp_path / "train" / NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + number, 56), (40 * number, 9, 90)).save(folder / f"{number}.png")
    (tmp_path / "test").mkdir()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "test" / "TEST_0.png")
    for name, rows in (
        ("test.csv", [["ID", "img_path"], ["TEST_0", "./test/TEST_0.png"]]),
        ("sample_submission.csv", [["ID", *NAMES[::-1]], ["TEST_0", *["0.333"] * 3]]),
    ):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return tmp_path


@pytest.mark.parametrize("name", ["classification", "hecto_cars"])
def test_a_recipe_reads_an_image_folder_and_shows_ten_candidates_out_of_fold(contest, name):
    own = read_recipe(["--config", str(RECIPES / f"{name}.yaml")]).arguments
    loaded = read_examples(str(contest / "train"), replace(own.data_options, classes=None))
    assert loaded.classes.names == tuple(sorted(NAMES))
    of = dict(zip(loaded.examples["id"], loaded.examples[CLASS], strict=True))
    assert {row_id: loaded.classes.names[place] for row_id, place in of.items()} == {
        f"{NAMES[number % 3]}/{number}.png": NAMES[number % 3] for number in range(6)
    }
    assert {*loaded.examples["question"]} == {own.fixed_question}
    assert own.num_candidates == 10 and own.candidate_pool == 20 and own.candidates.endswith("train.parquet")


def test_the_cars_have_the_classes_of_the_submission_in_its_order_and_test_rows_without_a_class(contest):
    own = read_recipe(["--config", str(RECIPES / "hecto_cars.yaml")]).arguments
    assert own.classes.endswith("sample_submission.csv")
    listed = read_classes(str(contest / "sample_submission.csv"))
    assert listed.names == tuple(NAMES[::-1])
    options = replace(own.data_options, classes=listed)
    train = read_examples(str(contest / "train"), options)
    assert [listed.names[place] for place in train.examples[CLASS]] == [
        row.split("/")[0] for row in train.examples["id"]
    ]
    test = read_examples(str(contest / "test.csv"), replace(options, answers="optional"))
    assert test.examples["id"][:] == ["TEST_0"] and test.examples[CLASS][:] == [None]
