import io
import os
import sqlite3
import subprocess
import sys
import threading
import tracemalloc

import datasets
import pytest
from PIL import Image

from vqa_sft.data import scan as scans
from vqa_sft.data.examples import FEATURES
from vqa_sft.data.problems import Problems
from vqa_sft.data.scan import scan_images
from vqa_sft.images import ImageFacts, examine


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of these tests; nothing is written into the home of who runs them."""
    monkeypatch.setattr(scans, "cache_path", lambda: tmp_path / "home" / "vqa_sft" / "images.sqlite")
    return tmp_path / "home" / "vqa_sft" / "images.sqlite"


@pytest.fixture
def examined(monkeypatch):
    """The images that were examined, as they were given, not in order."""
    seen, lock = [], threading.Lock()

    def spy(image, **options):
        with lock:
            seen.append(image)
        return examine(image, **options)

    monkeypatch.setattr(scans, "examine", spy)
    return seen


def save(path, colour="red", size=(40, 30)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return {"bytes": None, "path": str(path)}


def in_bytes(colour="red", path=None):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def dataset(*rows):
    features = datasets.Features({name: FEATURES[name] for name in ("id", "images")})
    columns = {"id": [f"row_{i}" for i in range(len(rows))], "images": list(rows)}
    return datasets.Dataset.from_dict(columns, features=features)


def test_every_distinct_image_is_examined_once_and_numbered_as_it_first_comes(tmp_path, examined):
    red, blue = save(tmp_path / "red.png"), save(tmp_path / "blue.png", "blue")
    scan = scan_images(dataset([blue], [red, blue], [], [in_bytes()], [blue, blue], [in_bytes()]))
    assert scan.of_row == [(0,), (1, 0), (), (2,), (0, 0), (2,)]
    assert len(examined) == 3
    # The same file under a path and in bytes: two images, of one digest.
    assert scan.images[1].digest == scan.images[2].digest


def test_the_order_does_not_depend_on_which_thread_is_first(tmp_path, monkeypatch):
    images = [save(tmp_path / f"{i:03d}.png", (i, 0, 0), size=(400 - 3 * i, 30)) for i in range(130)]
    monkeypatch.setattr(scans, "count_cores", lambda: 8)
    scan = scan_images(dataset(*([image] for image in images)), cache=False)
    assert [facts.width for facts in scan.images] == [400 - 3 * i for i in range(130)]
    assert scan.images == [examine(image) for image in images]
    assert scan.of_row == [(i,) for i in range(130)]


def test_images_in_bytes_are_one_when_their_bytes_and_endings_are():
    rows = [[in_bytes(path=path)] for path in (None, "a.png", "b.png", "c.jpg")]
    scan = scan_images(dataset(*rows))
    assert scan.of_row == [(0,), (1,), (1,), (2,)]
    assert [facts.findings for facts in scan.images] == [(), (), ("wrong_extension",)]


def test_problems_are_told_by_row_with_the_name_of_the_file(tmp_path):
    good, gone = save(tmp_path / "images" / "good.png"), {"bytes": None, "path": str(tmp_path / "images" / "007.png")}
    tiny = save(tmp_path / "images" / "tiny.jpg", size=(20, 20))
    scan = scan_images(dataset([good], [good, gone], [tiny], [], [gone, gone], [{"bytes": b"text", "path": None}]))
    assert [scan.bad(row) for row in range(6)] == [(), (1,), (), (), (0, 1), (0,)]
    problems = Problems(total=60)
    scan.add_problems(problems, [f"row_{i}" for i in range(6)], rows=[10, 11, 12, 13, 14, 15])
    assert [(key, labels) for key, _, labels in problems] == [
        ("missing_image", ["row_1 (images/007.png)", "row_4 (images/007.png, images/007.png)"]),
        ("not_an_image", ["row_5"]),
        ("tiny_image", ["row_2 (images/tiny.jpg)"]),
    ]
    assert problems.bad_rows() == [11, 14, 15]


def test_a_second_scan_decodes_nothing(tmp_path, examined):
    (tmp_path / "text.png").write_text("no image")
    rows = [[save(tmp_path / "a.png")], [in_bytes("blue")], [{"bytes": None, "path": str(tmp_path / "text.png")}]]
    first = scan_images(dataset(*rows))
    assert len(examined) == 3
    assert scan_images(dataset(*rows)) == first and len(examined) == 3
    assert scan_images(dataset(*rows), cache=False) == first and len(examined) == 6


def test_a_file_that_changed_or_appeared_is_read_again(tmp_path, examined):
    image, gone = save(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "b.png")}
    before = scan_images(dataset([image], [gone]))
    assert [facts.problem for facts in before.images] == [None, "missing_image"]
    save(tmp_path / "a.png", "blue", size=(50, 30))
    save(tmp_path / "b.png")
    after = scan_images(dataset([image], [gone]))
    assert [facts.width for facts in after.images] == [50, 40] and len(examined) == 4
    # The same size and bytes of another time count as changed too.
    os.utime(tmp_path / "b.png", ns=(1, 1))
    scan_images(dataset([gone]))
    assert len(examined) == 5


def test_what_was_scanned_without_hashes_is_scanned_again_when_they_are_needed(tmp_path, examined):
    rows = dataset([save(tmp_path / "a.png")])
    assert scan_images(rows, hashes=False).images[0].miniature is None
    with_hashes = scan_images(rows)
    assert with_hashes.images[0].miniature is not None and len(examined) == 2
    assert scan_images(rows) == with_hashes
    assert scan_images(rows, hashes=False).images[0].miniature is None and len(examined) == 2


def test_another_version_of_the_check_does_not_believe_the_cache(tmp_path, examined, monkeypatch):
    rows = dataset([save(tmp_path / "a.png")])
    scan_images(rows)
    monkeypatch.setattr(scans, "VERSION", "another")
    scan_images(rows)
    assert len(examined) == 2


@pytest.mark.parametrize("harm", ["corrupt", "folder", "no folder", "another table", "read-only"])
def test_a_cache_that_does_not_work_is_no_cache(harm, cache, tmp_path, examined):
    if harm == "no folder":
        cache.parent.parent.write_text("a file where the folder should be")
    else:
        cache.parent.mkdir(parents=True)
    if harm == "corrupt":
        cache.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    elif harm == "folder":
        cache.mkdir()
    elif harm == "another table":
        with sqlite3.connect(cache) as connection:
            connection.execute(f"CREATE TABLE {scans.TABLE} (something)")
    elif harm == "read-only":
        with sqlite3.connect(cache) as connection:
            connection.execute("CREATE TABLE other (a)")
        cache.chmod(0o400)
        cache.parent.chmod(0o500)
    rows = dataset([save(tmp_path / "a.png")], [save(tmp_path / "b.png", "blue")])
    assert scan_images(rows).of_row == [(0,), (1,)] and len(examined) == 2
    assert len(scan_images(rows).images) == 2


def test_a_cache_that_is_locked_is_no_cache(cache, tmp_path, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(scans.sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.05))
    rows = dataset([save(tmp_path / "a.png")])
    scan_images(rows)
    other = connect(cache)
    other.execute("BEGIN EXCLUSIVE")
    assert len(scan_images(rows).images) == 1
    other.close()


@pytest.mark.medium
def test_several_processes_fill_one_cache(cache, tmp_path):
    rows = dataset(*([save(tmp_path / f"{i}.png", (i, i, i))] for i in range(40)))
    rows.save_to_disk(tmp_path / "rows")
    program = (
        "import datasets, pathlib, sys; from vqa_sft.data import scan; "
        f"scan.cache_path = lambda: pathlib.Path({str(cache)!r}); scan.BATCH = 3; "
        f"print(len(scan.scan_images(datasets.load_from_disk({str(tmp_path / 'rows')!r})).images))"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == ["40"] * 3
    with sqlite3.connect(cache) as connection:
        assert connection.execute(f"SELECT COUNT(*) FROM {scans.TABLE}").fetchone() == (40,)


def test_an_image_and_what_the_cache_gives_back_are_equal(cache):
    stored = scans.Cache(cache)
    images = {
        b"good": ImageFacts(None, ("animated", "tiny_image"), "GIF", 20, 30, b"d" * 32, b"m" * 1152),
        b"bad": ImageFacts("truncated_image", format="PNG", digest=b"e" * 32),
    }
    for key, facts in images.items():
        stored.add(key, facts)
    stored.close()
    assert scans.Cache(cache).find([b"good", b"bad", b"unknown", None], hashes=True) == images


def test_the_memory_of_a_scan_stays_small():
    """Facts and miniatures of 100,000 images must stay below 200 MB; here is a hundredth of them."""
    rows = dataset(*([in_bytes((i % 256, i // 256, 0))] for i in range(1000)))
    scan_images(rows, cache=False)  # imports what is imported at first use
    tracemalloc.start()
    scan = scan_images(rows, cache=False)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(scan.images) == 1000 and size < 1.75e6
