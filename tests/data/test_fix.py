import csv
import json

import datasets
import pytest
from contest import rows_of, write_csv
from reports import report_on

from vqa_sft.data.fix import check_copy, write_copy
from vqa_sft.data.sources import open_source
from vqa_sft.errors import InputError


@pytest.fixture
def faulty(contest):
    """24 rows, of which 1, 2, 3 and 6 cannot be used."""
    rows = rows_of(contest)
    rows[1]["answer"], rows[2]["path"], rows[6]["id"] = "z", "images/nowhere.png", "row_005"
    (contest / "images/003.png").write_bytes(b"")
    write_csv(contest / "train.csv", rows)
    return contest


def copy(source, out, **options):
    """Check, copy without the bad rows, check the copy; returns how many were left out."""
    report = report_on(source, **options)
    check_copy(str(out), str(source), None)
    num_rows = write_copy(str(out), open_source(str(source)), report.loaded.problems.bad_rows())
    again = report_on(out, **options)
    assert not again.num_bad and again.num_rows == num_rows
    return report.num_rows - num_rows


def test_the_copy_holds_the_same_cells_and_is_clean(faulty):
    rows = rows_of(faulty)
    rows[0]["question"] = ' =HYPERLINK("x"), "quoted"\r\nand\ttabs '
    rows[9] |= {"a": "007", "b": "None", "c": "one\rtwo", "d": "", "answer": "a"}
    write_csv(faulty / "train.csv", rows)
    assert copy(faulty / "train.csv", faulty / "fixed.csv") == 4
    with (faulty / "fixed.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [row for i, row in enumerate(rows) if i not in (1, 2, 3, 6)]


def test_json_lines_under_either_name_are_copied_to_jsonl(tmp_path):
    (tmp_path / "rows.ndjson").write_text('{"id": "1"}\n{"id": "2"}\n')
    check_copy(str(tmp_path / "fixed.jsonl"), str(tmp_path / "rows.ndjson"), None)


def test_a_korean_spreadsheets_copy_is_utf_8(faulty):
    rows = [row | {"question": "무슨 색인가요?"} for row in rows_of(faulty)]
    text = "\r\n".join("\t".join(row) for row in [list(rows[0]), *(row.values() for row in rows)])
    (faulty / "train.tsv").write_bytes(text.encode("cp949"))
    copy(faulty / "train.tsv", faulty / "fixed.csv")
    assert (faulty / "fixed.csv").read_text(encoding="utf-8").count("무슨 색인가요?") == 20


def test_jsonl_is_copied_with_its_types(contest):
    lines = [{"id": i, "images": ["images/001.png"] * i, "question": "?", "choices": ["a", "b"]} for i in range(4)]
    for i, line in enumerate(lines):
        line["answer"] = [0, 7, 0, 0][i]
    lines[2]["note"] = "half \ud83d, whole 😀"
    source = contest / "train.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert copy(source, contest / "fixed.jsonl") == 1
    copied = [json.loads(line) for line in (contest / "fixed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert copied == [{**line, "note": line.get("note")} for i, line in enumerate(lines) if i != 1]


def test_images_inside_are_copied_and_files_of_a_saved_dataset_come_along(contest):
    rows = [{key: row[key] for key in row if key != "path"} for row in rows_of(contest)]
    rows[4]["answer"] = "z"
    images = [str(contest / row["path"]) for row in rows_of(contest)]
    table = datasets.Dataset.from_list(rows).add_column("image", images).cast_column("image", datasets.Image())
    table.save_to_disk(contest / "saved")
    assert copy(contest / "saved", contest / "fixed.parquet") == 1
    for row in rows_of(contest):
        (contest / row["path"]).unlink(missing_ok=True)
    again = datasets.Dataset.from_parquet(str(contest / "fixed.parquet"), cache_dir=str(contest / "cache"))
    assert again.features["image"] == datasets.Image() and again["id"][:] == [
        r["id"] for r in rows if r["answer"] != "z"
    ]
    assert again[4]["image"].size == (84 + 7 * (5 % 3), 84)
    assert copy(contest / "fixed.parquet", contest / "again.parquet") == 0


def test_a_copy_is_refused_where_it_would_be_wrong_or_in_the_way(faulty, tmp_path):
    source = str(faulty / "train.csv")
    (tmp_path / "there.csv").write_text("mine")
    for out, says in (
        ("fixed.parquet", "is written as .csv; got --fix"),
        ("there.csv", "exists, and nothing is overwritten"),
        ("nowhere/fixed.csv", "there is no folder"),
    ):
        with pytest.raises(InputError, match=says):
            check_copy(str(tmp_path / out), source, None)
    with pytest.raises(InputError, match="exists"):
        check_copy(source, source, None)
    (tmp_path / "other").mkdir()
    write_csv(tmp_path / "other/train.csv", rows_of(faulty))
    with pytest.raises(InputError, match="several folders"):
        check_copy(str(tmp_path / "fixed.csv"), [source, str(tmp_path / "other/train.csv")], None)


def test_a_copy_is_written_whole_or_not_at_all(faulty):
    source = open_source(str(faulty / "train.csv"))
    with pytest.raises(InputError, match="no row of .* can be used, so .* was not written"):
        write_copy(str(faulty / "fixed.csv"), source, range(24))
    assert not list(faulty.glob("fixed*"))
