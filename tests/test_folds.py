import datasets
import pytest

from vqa_sft.data import FEATURES
from vqa_sft.errors import InputError
from vqa_sft.folds import hold_out


def examples_with(num_rows, num_pictures, folder="here"):
    return datasets.Dataset.from_list(
        [
            {
                "id": str(i),
                "images": [{"bytes": None, "path": f"{folder}/{i % num_pictures}.png"}],
                "question": "?",
                "choices": ["x", "y"],
                "answer": i % 2,
            }
            for i in range(num_rows)
        ],
        features=FEATURES,
    )


def paths(examples):
    return {images[0]["path"] for images in examples["images"]}


def test_no_picture_stands_on_both_sides_and_no_row_is_lost():
    examples = examples_with(200, 50)
    train, validation = hold_out(examples, 0.2, seed=0)
    assert not paths(train) & paths(validation)
    assert sorted([*train["id"], *validation["id"]]) == sorted(examples["id"])
    assert 30 <= len(validation) <= 50


def test_a_seed_gives_the_same_split_again_and_another_seed_another():
    ids = [hold_out(examples_with(100, 100), 0.1, seed)[1]["id"][:] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_the_same_data_in_another_folder_give_the_same_split():
    ids = [hold_out(examples_with(100, 70, folder), 0.1, 0)[1]["id"][:] for folder in ("here", "a/place/there")]
    assert ids[0] == ids[1]


def test_rows_that_are_too_few_to_stratify_are_split_all_the_same():
    train, validation = hold_out(examples_with(12, 12), 0.1, seed=0)
    assert len(train) + len(validation) == 12 and 1 <= len(validation) <= 2


def test_too_few_pictures_for_a_split_are_an_error():
    with pytest.raises(InputError, match="at least 10 different pictures; got 3"):
        hold_out(examples_with(30, 3), 0.1, seed=0)
