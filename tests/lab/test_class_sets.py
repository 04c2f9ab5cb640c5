"""Two classifications with known answers, and the small network that is a classifier from elsewhere."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vqa_sft.data.classes import read_classes
from vqa_sft.data.examples import CLASS, read_examples
from vqa_sft.data.options import CLASSIFICATION, ReadOptions
from vqa_sft.lab import class_sets, small_cnn

SIZES = {"num_train": 220, "num_test": 130}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "numbers"
    class_sets.write_numbers(folder, seed=0, **SIZES)
    return folder


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def options(question, **given):
    return ReadOptions(task=CLASSIFICATION, fixed_question=question, **given)


def test_the_numbers_are_read_as_an_image_folder_and_as_a_table_with_the_same_ids(numbers):
    folder = read_examples(str(numbers / "train"), options("Which?"))
    table = read_examples(str(numbers / "train.csv"), options("Which?", classes=str(numbers / "classes.csv")))
    names = [row["name"] for row in read_csv(numbers / "classes.csv")]
    assert names == [f"{number:02d}" for number in range(100)] == [*folder.classes.names]
    of_folder = dict(zip(folder.examples["id"], folder.examples[CLASS], strict=True))
    of_table = dict(zip(table.examples["id"], table.examples[CLASS], strict=True))
    assert of_folder == of_table and len(of_table) == 220


def test_the_test_rows_hold_no_label_and_the_submission_has_a_column_for_every_class(numbers):
    rows, labels = read_csv(numbers / "test.csv"), read_csv(numbers / "test_labels.csv")
    sample = read_csv(numbers / "sample_submission.csv")
    assert [*rows[0]] == ["ID", "img_path"]
    assert [row["ID"] for row in rows] == [row["ID"] for row in labels] == [row["ID"] for row in sample]
    listed = read_classes(str(numbers / "sample_submission.csv"))
    assert listed.names == read_classes(str(numbers / "classes.csv")).names


def test_every_class_has_as_many_images_as_every_other_give_or_take_one(numbers):
    for name, total in (("train.csv", 220), ("test_labels.csv", 130)):
        counts = np.unique([row["label"] for row in read_csv(numbers / name)], return_counts=True)[1]
        assert len(counts) == 100 and counts.max() - counts.min() == 1 and counts.sum() == total


def test_no_digit_is_in_two_folds_or_in_training_and_test():
    folds, test = class_sets._split_digits(0)
    pools = [{digit.tobytes() for digit in np.concatenate(pool)} for pool in (*folds, test)]
    assert sum(len(np.concatenate(pool)) for pool in (*folds, test)) == 1797 and len(pools[-1]) == 597
    for place, pool in enumerate(pools):
        for other in pools[place + 1 :]:
            assert not pool & other


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        class_sets.write_drawn(tmp_path / name, seed, num_train=5, num_test=4)
    files = {name: sorted((tmp_path / name).rglob("*.*")) for name in "abc"}
    contents = {name: [(str(f.relative_to(tmp_path / name)), f.read_bytes()) for f in files[name]] for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]


def test_the_drawn_classes_are_400_names_of_words_that_the_tiny_base_knows(tmp_path):
    class_sets.write_drawn(tmp_path, num_train=3, num_test=3)
    names, train, test = class_sets.read_rows(tmp_path)
    assert len(names) == len(set(names)) == 400 and "star and three moons" in names
    assert Image.open(train[0].path).size == (84, 84) and {row.fold for row in test} == {-1}


def test_small_shapes_do_not_touch_the_large_one():
    for seed in range(20):
        radii = [19.0, *[7.0] * 5]
        places = class_sets._place(np.random.default_rng(seed), radii)
        for i in range(6):
            for j in range(i):
                assert np.hypot(*np.subtract(places[i], places[j])) > radii[i] + radii[j]


def test_the_network_writes_probabilities_of_both_parts_that_sum_to_one(numbers, tmp_path):
    found = small_cnn.classify(numbers, tmp_path / "cnn", num_epochs=1)
    names, train, test = class_sets.read_rows(numbers)
    for part, rows in (("train", train), ("test", test)):
        arrays = np.load(tmp_path / "cnn" / f"{part}.npz")
        table = pq.read_table(tmp_path / "cnn" / f"{part}.parquet")
        assert arrays["ids"].tolist() == table["id"].to_pylist() == [row.row_id for row in rows]
        assert arrays["classes"].tolist() == table.column_names[1:] == names
        np.testing.assert_allclose(arrays["probs"].sum(axis=1), 1, atol=1e-4)
        np.testing.assert_array_equal(table[names[7]].to_numpy(), arrays["probs"][:, 7])
    assert 0 < found["test"]["recall@5"] < 1


def test_a_network_learns_what_it_is_shown():
    torch.manual_seed(0)
    labels = np.arange(48) % 3
    images = torch.randn(48, 3, 56, 56) * 0.1
    for row, label in enumerate(labels):  # a plain page, one line, a grid
        images[row, :, :: 6 if label else 60] += 1.0
        images[row, :, :, :: 6 if label == 2 else 60] += 1.0
    net = small_cnn.fit(images, labels, 3, 30, 0, "cpu")
    assert (small_cnn.predict(net, images, "cpu").argmax(axis=1) == labels).mean() > 0.9


def test_recall_at_k_is_the_share_of_rows_whose_class_is_among_the_k_likeliest():
    probs = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    found = small_cnn.measure(probs, np.array([1, 2]), ranks=(1, 2))
    assert found["recall@1"] == 0.5 and found["recall@2"] == 1.0
    assert found["nll"] == pytest.approx(-np.log([0.2, 0.6]).mean(), abs=1e-4)
