"""Submissions of class probabilities: matched by name and by id, whatever the order of columns and rows."""

import csv
import unicodedata
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from vqa_sft.data.class_probs import keep_likely, read_class_probs, write_class_probs
from vqa_sft.errors import InputError
from vqa_sft.predictions.class_submission import submit_classes

NAMES = ["Audi A4", "쏘나타", "Kia K5, 2020", "Citroën C3", "van"]
IDS = ["t1", "t2", "t3"]


def decomposed(name):
    return unicodedata.normalize("NFD", name)


@pytest.fixture
def folder(tmp_path):
    """p.parquet: three rows, of which two classes are kept one by one."""
    probs = [[0.7, 0.1, 0.1, 0.05, 0.05], [0.0, 0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.2, 0.1, 0.4]]
    table = keep_likely(IDS, NAMES, np.array(probs), num_kept=2)
    write_class_probs(tmp_path / "p.parquet", table)
    return tmp_path


def sample(folder, columns, ids=IDS, cell="0"):
    with (folder / "sample.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [columns, *([row_id if name == "id" else cell for name in columns] for row_id in ids)]
        )


def written(folder, **how):
    submit_classes(folder / "p.parquet", folder / "s.csv", template=str(folder / "sample.csv"), overwrite=True, **how)
    with (folder / "s.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_are_matched_by_name_and_rows_by_id(folder):
    sample(folder, ["id", *NAMES])
    plain = {row["id"]: row for row in written(folder)}
    assert [float(plain["t1"][name]) for name in NAMES[:1]] == pytest.approx([0.7])
    assert float(plain["t1"]["van"]) == pytest.approx(0.2 / 3, rel=1e-5)
    sample(folder, ["van", NAMES[2], "id", NAMES[3], NAMES[1], NAMES[0]], IDS[::-1])
    moved = written(folder)
    assert [row["id"] for row in moved] == IDS[::-1]
    assert [*moved[0]] == ["van", NAMES[2], "id", NAMES[3], NAMES[1], NAMES[0]]
    assert all(row == plain[row["id"]] for row in moved)


def test_rows_sum_to_one_as_written_and_no_class_has_zero(folder):
    sample(folder, ["id", *NAMES])
    for row in written(folder):
        numbers = [Decimal(row[name]) for name in NAMES]
        assert sum(numbers) == 1 and min(numbers) > 0
    assert float(written(folder)[1]["van"]) == pytest.approx(1e-9, rel=0.1)


def test_names_of_another_form_and_other_names_are_found(folder):
    sample(folder, ["id", *map(decomposed, NAMES)])
    assert float(written(folder)[0][NAMES[0]]) == pytest.approx(0.7)
    assert decomposed("쏘나타") in written(folder)[0]  # as the template writes it
    lines = ["name,other_names", *(f'"{name}",{other}' for name, other in zip(NAMES[::-1], "edcba", strict=True))]
    (folder / "classes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sample(folder, ["id", *"edcba"])
    with pytest.raises(InputError, match="no class: .*'e', 'd'"):
        written(folder)
    row = written(folder, classes=str(folder / "classes.csv"))[0]
    assert float(row["a"]) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["id", *NAMES[:-1]], "classes without a column: 'van'"),
        (["id", *NAMES, "tram"], "columns that are no class: 'tram'"),
        (["id", *NAMES[:-1], "Van"], "no class: 'Van'; classes without a column: 'van'; 'Van' may be 'van'"),
        (["id", *NAMES, decomposed(NAMES[1])], "columns of one class: .*쏘나타"),
        (["id", *NAMES, ""], "column 7 has no name"),
        (["id", *NAMES, "van"], "more than one column 'van'"),
    ],
)
def test_other_columns_are_told_apart(folder, columns, said):
    sample(folder, columns)
    with pytest.raises(InputError, match=said):
        written(folder)
    assert not (folder / "s.csv").exists()


def test_a_template_of_396_classes_in_another_order_permutes_the_numbers_and_other_names_are_told(folder):
    names = [f"차종 {number:03} (2015~2020)" for number in range(396)]
    probs = np.random.default_rng(0).dirichlet(np.full(396, 0.1), 3)
    write_class_probs(folder / "p.parquet", keep_likely(IDS, names, probs, num_kept=396))
    sample(folder, ["id", *names])
    plain = written(folder)
    np.testing.assert_allclose([[float(row[name]) for name in names] for row in plain], probs, atol=1e-6)
    shuffled = np.random.default_rng(1).permutation(names).tolist()
    sample(folder, ["id", *shuffled])
    moved = written(folder)
    assert [*moved[0]] == ["id", *shuffled] and moved == plain
    for changed, said in (
        ([*shuffled[:-1], "버스"], f"no class: '버스'; classes without a column: '{shuffled[-1]}'"),
        (shuffled[:-1], f"395 columns .* 396 classes: classes without a column: '{shuffled[-1]}'"),
        ([*shuffled, shuffled[7]], f"more than one column '{shuffled[7]}'"),
    ):
        sample(folder, ["id", *changed])
        with pytest.raises(InputError, match=said.replace("(", r"\(").replace(")", r"\)")):
            written(folder)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (IDS[:2], "it lacks row t3"),
        ([*IDS, "t4"], "the predictions lack row t4"),
        ([*IDS, "t1"], "more than once row t1"),
        (["a", "b", "c"], "it lacks rows t1, t2, t3"),
    ],
)
def test_other_ids_are_told_apart(folder, ids, said):
    sample(folder, ["id", *NAMES], ids)
    with pytest.raises(InputError, match=said):
        written(folder)


def test_ids_without_the_suffix_of_images_are_told(folder):
    path = folder / "p.parquet"
    write_class_probs(path, replace(read_class_probs(path), ids=[f"test/{row_id}.jpg" for row_id in IDS]))
    sample(folder, ["id", *NAMES])
    with pytest.raises(InputError, match="These are names of images without suffix: predict from a table of such ids"):
        written(folder)


def test_a_column_of_labels_gets_names(folder):
    sample(folder, ["id", "label"], IDS[::-1], cell="van")
    assert [row["label"] for row in written(folder)] == ["van", NAMES[2], NAMES[0]]
    sample(folder, ["label", "id"], cell="")
    assert written(folder)[0] == {"label": NAMES[0], "id": "t1"}
    sample(folder, ["id", "label"], cell="0")
    with pytest.raises(InputError, match="holds '0', which is no class"):
        written(folder)
    assert written(folder, answer_format="text")[2]["label"] == "van"
    assert written(folder, answer_format="index_from_1")[2]["label"] == "5"
    for wrong in ("letter", "probabilities"):
        with pytest.raises(InputError):
            written(folder, answer_format=wrong)


def test_a_column_that_holds_words_is_no_probability(folder):
    sample(folder, ["id", *NAMES], cell="yes")
    with pytest.raises(InputError, match="no column of probabilities"):
        written(folder)


def test_without_a_template_names_or_all_probabilities_are_written(folder, run):
    assert run("submit", folder / "p.parquet", "--output", folder / "s.csv")[0] == 0
    assert (folder / "s.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        "t1,Audi A4",
        't2,"Kia K5, 2020"',
        "t3,van",
    ]
    how = ["--answer-format", "probabilities"]
    assert run("submit", folder / "p.parquet", "--output", folder / "all.csv", *how)[0] == 0
    with (folder / "all.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["id", *NAMES]
    code, _, error = run("submit", folder / "p.parquet", "--output", folder / "s.csv", *how)
    assert code == 2 and "exists and has other columns" in error
