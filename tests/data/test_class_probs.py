"""Files of class probabilities: the most likely classes one by one, the others together."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from vqa_sft.data.class_probs import (
    SMALLEST,
    check_probs,
    is_class_probs,
    keep_likely,
    read_class_probs,
    write_class_probs,
)
from vqa_sft.errors import InputError

NAMES = ["cat", "dog", "소나타", "Audi A4, 2017", "e"]
PROBS = np.array([[0.1, 0.2, 0.4, 0.25, 0.05], [0.0, 0.0, 1.0, 0.0, 0.0]])


def test_kept_classes_and_the_others_give_the_table_back(tmp_path):
    kept = keep_likely(["r1", "r2"], NAMES, PROBS, num_kept=3)
    assert kept.indices.tolist() == [[2, 3, 1], [2, 0, 1]]
    write_class_probs(tmp_path / "p.parquet", kept)
    read = read_class_probs(tmp_path / "p.parquet")
    assert (read.ids, read.names) == (["r1", "r2"], tuple(NAMES))
    dense = read.dense()
    np.testing.assert_allclose(dense[0], [0.075, 0.2, 0.4, 0.25, 0.075], rtol=1e-6)
    np.testing.assert_allclose(dense[1], [SMALLEST, SMALLEST, 1, SMALLEST, SMALLEST], rtol=1e-5)
    for label in range(5):
        np.testing.assert_allclose(np.exp(read.log_prob_of(np.array([label, label]))), dense[:, label], rtol=1e-5)


def test_a_table_of_few_classes_is_kept_whole():
    kept = keep_likely(["r1", "r2"], NAMES, PROBS)
    assert kept.num_kept == 5 and np.isneginf(kept.tail).all()
    np.testing.assert_allclose(kept.dense()[0], PROBS[0], rtol=1e-6)


def test_rows_taken_keep_what_belongs_to_them():
    kept = keep_likely(["r1", "r2"], NAMES, PROBS, num_kept=3)
    kept.labels[:] = [3, 2]
    taken = kept.take([1])
    assert (taken.ids, taken.labels.tolist(), taken.indices.tolist()) == (["r2"], [2], [[2, 0, 1]])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0.5, np.nan, 0.5], "no probabilities .*r2.*such as nan"),
        ([0.5, np.inf, 0.5], "no probabilities .*such as inf"),
        ([1.5, -0.5, 0.0], "below 0 in row r2.*such as -0.5"),
        ([2.0, 1.0, 3.0], "sum to 1 in row r2.*they sum to 6"),
    ],
)
def test_numbers_that_are_no_probabilities_are_refused_with_their_rows(row, said):
    with pytest.raises(InputError, match=said):
        check_probs(["r1", "r2"], np.array([[0.2, 0.3, 0.5], row]), "p.npz")


def test_digests_that_are_known_are_kept_where_others_are_not(tmp_path):
    kept = keep_likely(["r1", "r2"], NAMES, PROBS)
    for digests in ([None, "two"], ["one", "two"]):
        write_class_probs(tmp_path / "p.parquet", replace(kept, digests=digests))
        assert read_class_probs(tmp_path / "p.parquet").digests == digests
    write_class_probs(tmp_path / "p.parquet", kept)
    assert read_class_probs(tmp_path / "p.parquet").digests == []


@pytest.mark.parametrize("label", [-2, 5])
def test_labels_beyond_the_list_are_refused(label, tmp_path):
    kept = keep_likely(["r1", "r2"], NAMES, PROBS)
    write_class_probs(tmp_path / "p.parquet", replace(kept, labels=np.array([0, label], np.int32)))
    with pytest.raises(InputError, match="labels beyond its list"):
        read_class_probs(tmp_path / "p.parquet")


def test_the_most_likely_class_stands_first_and_has_a_finite_number(tmp_path):
    kept, path = keep_likely(["r1", "r2"], NAMES, PROBS, num_kept=3), tmp_path / "p.parquet"
    infinite = np.where(np.array([[False], [True]]), -np.inf, kept.log_probs)
    for changed, said in (
        ({"log_probs": kept.log_probs[:, ::-1], "indices": kept.indices[:, ::-1]}, "is not the most likely one"),
        ({"log_probs": infinite, "tail": np.array([kept.tail[0], 0])}, "log-probabilities that are not finite"),
    ):
        write_class_probs(path, replace(kept, **changed))
        with pytest.raises(InputError, match=f"damaged: it has .*{said}"):
            read_class_probs(path)


def test_other_files_are_refused_in_one_line(tmp_path):
    kept = keep_likely(["r1", "r2"], NAMES, PROBS, num_kept=3)
    write_class_probs(tmp_path / "p.parquet", kept)
    assert is_class_probs(tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "plain.parquet")
    assert not is_class_probs(tmp_path / "plain.parquet") and not is_class_probs(tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"plain.parquet is no file of class probabilities \(KeyError\)"):
        read_class_probs(tmp_path / "plain.parquet")
    kept.ids[1] = "r1"
    write_class_probs(tmp_path / "p.parquet", kept)
    with pytest.raises(InputError, match="ids that are there twice"):
        read_class_probs(tmp_path / "p.parquet")
