import datasets
import pytest
from doubles import draw

from vqa_sft import scan
from vqa_sft.data import FEATURES
from vqa_sft.problems import Problems
from vqa_sft.scan import scan_pictures


def examples_of(*images):
    rows = [
        {"id": f"r{i}", "images": of_row, "question": "?", "choices": ["x", "y"]} for i, of_row in enumerate(images)
    ]
    rows = [row | {"answer": 0, "context": "", "question_type": "general"} for row in rows]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def on_disk(path):
    return {"bytes": None, "path": str(path)}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Two pictures on disk, a.png and b.png, and an empty cache."""
    for seed, name in enumerate(("a.png", "b.png")):
        draw(seed).save(tmp_path / name)
    monkeypatch.setattr(scan, "cache_path", lambda: tmp_path / "cache" / "pictures.sqlite")
    return tmp_path


@pytest.fixture
def examined(monkeypatch):
    """What is examined, and not taken from the cache."""
    seen = []
    examine = scan.examine
    monkeypatch.setattr(scan, "examine", lambda image, **how: seen.append(image["path"]) or examine(image, **how))
    return seen


def test_every_distinct_picture_is_examined_once_in_the_order_of_the_rows(pictures, examined):
    a, b = on_disk(pictures / "a.png"), on_disk(pictures / "b.png")
    inside = {"bytes": (pictures / "b.png").read_bytes(), "path": None}
    found = scan_pictures(examples_of([a], [b, a], [], [inside], [inside]))
    assert found.of_row == [(0,), (1, 0), (), (2,), (2,)]
    assert len(examined) == 3 and found.pictures[1].digest == found.pictures[2].digest
    assert (found.pictures[0].width, found.pictures[0].height) == draw(0).size


def test_a_second_scan_decodes_nothing_but_what_has_changed(pictures, examined):
    examples = examples_of([on_disk(pictures / "a.png")], [on_disk(pictures / "b.png")])
    first = scan_pictures(examples)
    assert scan_pictures(examples) == first and len(examined) == 2
    (pictures / "b.png").write_bytes(b"")
    assert scan_pictures(examples).pictures[1].problem == "empty_picture" and len(examined) == 3


def test_a_scan_without_hashes_does_not_spoil_the_cache_for_one_with_them(pictures):
    examples = examples_of([on_disk(pictures / "a.png")])
    scan_pictures(examples, hashes=False)
    assert scan_pictures(examples).pictures[0].miniature is not None


def test_a_cache_that_cannot_be_used_changes_nothing(pictures, monkeypatch):
    examples = examples_of([on_disk(pictures / "a.png")])
    first = scan_pictures(examples, cache=False)
    (pictures / "cache").mkdir(exist_ok=True)
    (pictures / "cache" / "pictures.sqlite").write_bytes(b"no database" * 100)
    assert scan_pictures(examples) == first
    monkeypatch.setattr(scan, "cache_path", lambda: pictures / "a.png" / "no" / "folder.sqlite")
    assert scan_pictures(examples) == first


def test_problems_name_the_row_and_the_file(pictures):
    (pictures / "b.png").write_bytes(b"text")
    found = scan_pictures(examples_of([on_disk(pictures / "a.png"), on_disk(pictures / "b.png")], []))
    problems = Problems(2)
    found.add_problems(problems, ["r0", "r1"], [7, 8])
    (item,) = problems.errors()
    assert item[0] == "not_a_picture" and item[2] == [f"r0 ({pictures.name}/b.png)"] and problems.bad_rows() == [7]
    assert found.bad(0) == (1,) and found.bad(1) == ()
