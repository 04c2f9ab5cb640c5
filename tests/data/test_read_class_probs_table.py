"""Probabilities of any classifier: classes are matched by name, and what is wrong is refused in a line of its own."""

import csv
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vqa_sft.data import read_class_probs_table
from vqa_sft.data.class_probs import keep_likely, write_class_probs
from vqa_sft.data.classes import Classes
from vqa_sft.data.read_class_probs_table import read_any_class_probs
from vqa_sft.errors import InputError

NAMES = ("Audi A4, 2017", "쏘나타 2020", "index")
CLASSES = Classes(NAMES, "classes.csv", other_names=(("A4",), (), ()))
IDS = ["r1", "007", "r 3"]
PROBS = np.array([[0.5, 0.3, 0.2], [0.1, 0.15, 0.75], [0.0, 1.0, 0.0]])


def write(path, names=NAMES, ids=IDS, probs=PROBS, id_name="id"):
    """The same table in the format that the suffix names; returns the path."""
    if path.name.startswith("own"):
        write_class_probs(path, keep_likely(list(ids), list(names), np.array(probs)))
    elif path.suffix == ".parquet":
        columns = [pa.array(ids), *(pa.array([row[place] for row in probs]) for place in range(len(names)))]
        pq.write_table(pa.Table.from_arrays(columns, names=[id_name, *names]), path)
    elif path.suffix == ".npz":
        np.savez(path, ids=np.array(ids), classes=np.array(names), probs=np.array(probs))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow([id_name, *names])
            writer.writerows([row_id, *row] for row_id, row in zip(ids, probs, strict=True))
    return path


@pytest.mark.parametrize("name", ["own.parquet", "p.parquet", "p.csv", "p.tsv", "p.npz"])
def test_columns_in_any_order_give_the_same_numbers_in_the_order_of_the_list(tmp_path, name, monkeypatch):
    monkeypatch.setattr(read_class_probs_table, "_ROWS", 2)  # parts of 2 rows and 1
    for order in itertools.permutations(range(3)):
        shown = ["A4" if place == 0 else NAMES[place] for place in order]
        path = write(tmp_path / name, shown, probs=PROBS[:, order])
        read = read_any_class_probs(path, CLASSES)
        assert (read.ids, read.names) == (IDS, NAMES)
        np.testing.assert_allclose(read.dense(), PROBS, atol=1e-6)
        assert read_any_class_probs(path, None).names == tuple(shown)


def test_labels_of_a_file_of_ours_follow_their_classes(tmp_path):
    kept = keep_likely(IDS, ["index", "A4", "쏘나타 2020"], PROBS[:, [2, 0, 1]])
    kept.labels[:] = [1, 0, -1]
    write_class_probs(tmp_path / "own.parquet", kept)
    assert read_any_class_probs(tmp_path / "own.parquet", CLASSES).labels.tolist() == [0, 2, -1]


def test_the_first_column_holds_ids_where_none_has_a_usual_name(tmp_path):
    assert read_any_class_probs(write(tmp_path / "p.csv", id_name="image_name"), CLASSES).ids == IDS
    with pytest.raises(InputError, match="has no column of ids"):
        read_any_class_probs(write(tmp_path / "p.csv", NAMES[1:], probs=PROBS[:, 1:], id_name="audi a4 2017"), CLASSES)


def test_whole_numbers_are_ids_too(tmp_path):
    for name in ("p.parquet", "p.npz"):
        assert read_any_class_probs(write(tmp_path / name, ids=[1, 2, 30]), CLASSES).ids == ["1", "2", "30"]


WRONG_NUMBERS = {
    "no probabilities .* in row 007 .*such as nan": [[0.5, 0.3, 0.2], [0.1, np.nan, 0.75], [0, 1, 0]],
    "below 0 in row r1 .*such as -0.1": [[0.9, -0.1, 0.2], [0.1, 0.15, 0.75], [0, 1, 0]],
    "do not sum to 1 in row r 3 .*they sum to 0.5": [[0.5, 0.3, 0.2], [0.1, 0.15, 0.75], [0, 0.5, 0]],
    "seems to hold logits: numbers from -3 to 12.5": [[-3, 2.5, 1], [12.5, 0, 1], [7, 8, 9]],
    "holds log-probabilities": np.log(PROBS[[0, 1, 0]]).tolist(),
    "holds per cent": (PROBS * 100).tolist(),
}


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.npz"])
@pytest.mark.parametrize("said", WRONG_NUMBERS)
def test_numbers_that_are_no_probabilities_are_named_for_what_they_are(tmp_path, name, said):
    path = write(tmp_path / name, probs=WRONG_NUMBERS[said])
    with pytest.raises(InputError, match=said):
        read_any_class_probs(path, CLASSES)


@pytest.mark.parametrize("name", ["own.parquet", "p.parquet", "p.csv", "p.npz"])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (NAMES[:2], "lacks 1 of the 3 classes of classes.csv: 'index'. Give every class a column"),
        (("audi-a4 2017", *NAMES[1:]), "1 names that are no class .*Is 'Audi A4, 2017' meant by 'audi-a4 2017'"),
        ((*NAMES, "bicycle"), "1 names that are no class of classes.csv: 'bicycle'. Rename them"),
        ((*NAMES, "A4"), "several columns for one class: 'Audi A4, 2017', 'A4'"),
    ],
)
def test_classes_that_do_not_fit_are_refused_by_name(tmp_path, name, names, said):
    probs = np.full((3, len(names)), 1 / len(names))
    with pytest.raises(InputError, match=said) as error:
        read_any_class_probs(write(tmp_path / name, names, probs=probs), CLASSES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["own.parquet", "p.parquet", "p.csv", "p.npz"])
def test_an_id_is_there_once(tmp_path, name):
    with pytest.raises(InputError, match="ids (more than once: row r1|that are there twice)"):
        read_any_class_probs(write(tmp_path / name, ids=["r1", "r2", "r1"]), CLASSES)


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "p.npz"
    for arrays, said in (
        ({"ids": np.array(IDS), "probs": PROBS}, "lacks the arrays classes; it has ids, probs"),
        ({"ids": np.array(IDS[:2]), "classes": np.array(NAMES), "probs": PROBS}, r"ids \(2,\).* do not fit"),
        ({"ids": np.array(IDS), "classes": np.arange(3), "probs": PROBS}, "of int64 and probs .* do not fit"),
        ({"ids": np.array(IDS), "classes": np.array(NAMES, object), "probs": PROBS}, "holds Python objects"),
        ({"ids": np.array([0.5, 1, 2]), "classes": np.array(NAMES), "probs": PROBS}, "whole numbers; got 0.5"),
        ({"ids": np.array(IDS), "classes": np.array(NAMES), "probs": PROBS.astype("U")}, "in place of numbers"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=said):
            read_any_class_probs(path, CLASSES)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "p.csv",
            'id,A4,쏘나타 2020,index\nr1,0.5,"0,3",0.2\n',
            "column '쏘나타 2020' holds '0,3' in place of a number",
        ),
        ("p.csv", "id,A4,쏘나타 2020,index\nr1,0.5,0.5\n", "cannot be read"),
        ("p.csv", "id,A4,쏘나타 2020,index\nr1,0.5,,0.5\n", "no probabilities"),
        ("p.csv", "id,A4,쏘나타 2020,index\n,0.5,0,0.5\n", "texts or whole numbers; got ''"),
        ("p.csv", "id,A4,쏘나타 2020,index\n", "has no rows"),
        ("p.parquet", "nothing", "cannot be read"),
        ("p.npz", "nothing", "cannot be read .*it is no .npz archive"),
        ("p.npz", "\x93NUMPY\x01", "cannot be read .*it is no .npz archive"),
        ("p.xlsx", "nothing", "read from .parquet, .csv, .tsv, .npz; got"),
        (None, "", "no such file"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, text, said):
    if name:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said) as error:
        read_any_class_probs(tmp_path / (name or "nowhere.csv"), CLASSES)
    assert "\n" not in str(error.value)


def test_a_column_of_text_is_named(tmp_path):
    pq.write_table(pa.table({"id": IDS, "A4": ["0.5"] * 3, NAMES[1]: [0.5] * 3}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="column 'A4' holds string in place of numbers"):
        read_any_class_probs(tmp_path / "p.parquet", CLASSES)
