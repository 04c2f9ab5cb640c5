import csv
import os
import tarfile
import time
import unicodedata
import zipfile

import datasets
import pytest
from PIL import Image

from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.missing_images import describe_missing
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.read_images import ImagePaths
from vqa_sft.data.scan import scan_images

COMPOSED, APART = (unicodedata.normalize(form, "강아지.png") for form in ("NFC", "NFD"))


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def table(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "question", "a", "b", "answer"])
        writer.writerows([i, image, "Which?", "x", "y", "ab"[i % 2]] for i, image in enumerate(images))
    return str(path)


def message_of(source, **options):
    """What a training says of the rows whose images cannot be used, without its last line, which names options."""
    loaded = read_examples(source, ReadOptions(**options))
    scan_images(loaded.examples, cache=False).add_problems(loaded.problems, loaded.examples["id"], loaded.numbers)
    with pytest.raises(ValueError) as error:
        loaded.problems.raise_if_any(loaded.name)
    return str(error.value).rpartition("\n")[0]


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ("img/1.png", "img/1.png"),
        ("img/1.png", "./img/../img//1.png"),
        # Without its suffix, or with another of its format or case
        ("img/1.png", "img/1"),
        ("img/1.PNG", "img/1.png"),
        ("img/a.JPG", "img/a.jpg"),
        ("img/a.jpeg", "img/a.jpg"),
        ("img/a.jpe", "img/A.JPEG"),
        ("img/scan.tif", "img/scan.TIFF"),
        ("img/v1.5.webp", "img/v1.5"),
        ("img/a.jpg", "IMG/a.jpg"),
        # Letters apart and in one
        (COMPOSED, APART),
        (APART, COMPOSED),
        (f"{APART}/é.png", f"{COMPOSED}/e\u0301.png"),
        (f"{COMPOSED}/1.JPG", f"{APART}/1.jpg"),
        # As Windows and web pages write them
        ("img/1.png", "img\\1.png"),
        ("img/1.png", ".\\img\\1.png"),
        ("img/1.png", "\\img\\1.png"),
        ("img/1.png", "/img/1.png"),
        ("img/a.JPG", "\\Img\\a.jpg"),
        ("img\\1.png", "img\\1.png"),  # a name that Linux allows
    ],
)
def test_a_path_means_the_one_file_that_fits_it(tmp_path, there, written):
    touch(tmp_path / there, tmp_path / "img" / "other.png", tmp_path / "img" / "1.txt")
    paths = ImagePaths()
    for text in (written, written if written.startswith(("/", "\\")) else str(tmp_path / written)):
        found = paths.find(tmp_path, text)
        assert found == str(tmp_path / there) and os.path.isfile(found)
    is_as_written = os.path.abspath(tmp_path / written) == str(tmp_path / there)
    assert bool(paths.notes()) == (not is_as_written)


@pytest.mark.parametrize(
    ("there", "written"),
    [
        (["a.JPG", "a.jpeg"], "a.jpg"),
        (["a.png", "a.gif"], "a"),
        ([COMPOSED.upper(), APART.replace("png", "Png")], COMPOSED),
        (["Ab/1.png", "aB/1.png"], "ab/1.png"),
        (["a.png"], "a.jpg"),  # another format is another image
        (["a.txt"], "a"),
        ([], "a.png"),
    ],
)
def test_a_path_that_fits_several_files_or_none_stays_as_it_is(tmp_path, there, written):
    touch(*(tmp_path / name for name in there))
    paths = ImagePaths()
    assert paths.find(tmp_path, written) == str(tmp_path / written) and paths.notes() == []


def test_a_name_that_is_there_is_taken_before_all_others(tmp_path):
    touch(tmp_path / COMPOSED, tmp_path / APART, tmp_path / "a.jpg", tmp_path / "a.JPG", tmp_path / "a")
    for name in (COMPOSED, APART, "a.jpg", "a.JPG", "a"):
        assert ImagePaths().find(tmp_path, name) == str(tmp_path / name)


def test_what_leads_outside_is_refused_however_it_is_written(tmp_path):
    root = tmp_path / "root"
    touch(tmp_path / "secret.png", root / "img" / "1.png", tmp_path / "root2" / "1.png", root / "etc" / "hostname")
    for text in (
        "../secret.png",
        "..\\secret.png",
        "img\\..\\..\\secret.png",
        "img/../../root2/1.png",
        str(tmp_path / "secret.png"),
        str(tmp_path / "SECRET.png"),
        "/nowhere/1.png",
        "/",
        "/etc/hostname" if os.path.exists("/etc/hostname") else "/dev/null",  # another file than that of the root
        f"{root}/../secret.png",
        "/img/1.png\0",
    ):
        assert ImagePaths().find(root, text) is None, text


def test_a_root_and_its_folders_may_be_links(tmp_path):
    touch(tmp_path / "disk" / "real" / "1.png")
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "disk" / "img").symlink_to("real")
    data = table(
        tmp_path / "disk" / "train.csv", ["img/1.png", str(tmp_path / "link" / "img" / "1.png"), "real/1.png", "/img/1"]
    )
    expected = [str(tmp_path / "disk" / folder / "1.png") for folder in ("img", "real", "real", "img")]
    for source, options in (
        (data, {}),
        (str(tmp_path / "link" / "train.csv"), {}),
        (data, {"image_root": str(tmp_path / "link")}),
    ):
        loaded = read_examples(source, ReadOptions(**options))
        assert [os.path.realpath(images[0]["path"]) for images in loaded.examples["images"]] == [
            os.path.realpath(path) for path in expected
        ]
        assert loaded.problems.errors() == []
    touch(tmp_path / "secret.png")
    bad = table(tmp_path / "disk" / "bad.csv", [str(tmp_path / "link" / ".." / "secret.png")])
    assert "outside the image folder" in message_of(bad)


def test_other_spellings_are_counted_in_a_note_of_tables_and_streams_alike(tmp_path):
    for i in range(4):
        (tmp_path / "img").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "img" / f"{i}.PNG")
    written = ["img/0.PNG", "img/1.png", "img\\2.PNG", "/img/3", "img/1.png"]
    expected = [str(tmp_path / "img" / f"{i}.PNG") for i in (0, 1, 2, 3, 1)]
    source = table(tmp_path / "x.csv", written)
    loaded = read_examples(source)
    assert [images[0]["path"] for images in loaded.examples["images"]] == expected
    note = "3 images are found under another spelling of the name, such as 'img/1.PNG' for 'img/1.png'"
    assert loaded.notes[-1] == note
    assert stream_examples(source).notes[-1] == f"{note} (in the first 5 rows)"
    streamed = [row["images"][0]["path"] for row in stream_examples(source).examples]
    assert sorted(streamed) == sorted(expected)
    # The paths of a column of images too.
    columns = {"id": list("01234"), "question": ["?"] * 5, "a": ["x"] * 5, "b": ["y"] * 5, "answer": list("ababa")}
    columns["image"] = [{"bytes": None, "path": path} for path in written]
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"image": struct})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    loaded = read_examples(str(tmp_path / "x.parquet"))
    assert [images[0]["path"] for images in loaded.examples["images"]] == expected
    assert "3 images are found under another spelling" in loaded.notes[-1]
    stream = stream_examples(str(tmp_path / "x.parquet"))
    assert [row["images"][0]["path"] for row in stream.examples] == expected


def test_a_note_says_what_differs_in_names_that_look_alike(tmp_path):
    touch(tmp_path / APART)
    note = read_examples(table(tmp_path / "x.csv", [COMPOSED])).notes[-1]
    assert note.endswith(f"such as {COMPOSED!r} with its letters apart in one of the two (NFD)")


def test_several_files_that_may_be_meant_are_named_with_the_missing_image(tmp_path):
    touch(tmp_path / "a.JPG", tmp_path / "a.jpeg")
    message = message_of(table(tmp_path / "x.csv", ["a.jpg", "b.jpg"]))
    assert "the image is missing" in message and "a.jpg may be a.JPG or a.jpeg: write which." in message


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("inside", ["img/{}.png", "{}.png", "data/img/{}.png"])
def test_an_archive_with_the_missing_images_is_named_with_the_command_that_unpacks_it(tmp_path, kind, inside):
    images = tmp_path / "elsewhere" / "1.png"
    images.parent.mkdir()
    Image.new("RGB", (32, 32)).save(images)
    folder = tmp_path / "my data"
    source = table(folder / "x.csv", [f"img/{i}.png" for i in range(12)])
    archive = folder / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for i in range(10):
                file.write(images, inside.format(i))
    else:
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as file:
            for i in range(10):
                file.add(images, inside.format(i))
    message = message_of(source)
    assert f"{archive} holds 10 of 12: " in message
    command = message.rpartition("of 12: ")[2].removesuffix(".").partition(", then set image_root")[0]
    if kind != "zip":  # unzip is not everywhere
        assert os.system(command) == 0
    else:
        target = command.rpartition(" -d ")[2].strip("'")
        assert command.startswith(f"unzip '{archive}' -d ")
        zipfile.ZipFile(archive).extractall(target)
    if inside.startswith("data"):
        assert "then set image_root to where data/img/0.png fits the paths" in message
    else:
        assert os.path.isfile(folder / "img" / "9.png")
        assert "img/10.png" in message_of(source) and "img/9.png" not in message_of(source)


def test_what_is_no_archive_or_holds_others_is_not_named(tmp_path):
    source = table(tmp_path / "x.csv", ["img/1.png"])
    touch(tmp_path / "broken.zip", tmp_path / "broken.tar.gz")
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as file:
        file.writestr("main.py", "")
        file.writestr("other/2.png", "")  # of other data
    assert message_of(source).endswith("it is relative to image_root.")
    assert message_of(table(tmp_path / "x.csv", ["1.png", "2.png", "3.png"])).endswith("relative to image_root.")
    assert describe_missing(["/" + "a/" * 1_500 + "x.png", "x" * 5_000, str(tmp_path / "img" / "\ud800.png")]) == ""


def test_a_folder_is_listed_once_however_many_rows_name_its_files(tmp_path, monkeypatch):
    names = [f"{i:06d}.JPG" for i in range(5_000)]
    (tmp_path / "img").mkdir()
    for name in names:
        (tmp_path / "img" / name).touch()
    calls, real = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: calls.append(path) or real(path))
    monkeypatch.setattr(os.path, "lexists", None)  # no row asks for its own file
    paths, start = ImagePaths(), time.process_time()
    for _ in range(5):
        for name in names:
            assert paths.find(tmp_path, f"img\\{name[:-3]}jpg").endswith(name)
    assert calls.count(str(tmp_path / "img")) == 1 and len(calls) <= 2
    assert time.process_time() - start < 20  # about 1 s
    assert paths.notes()[0].startswith("5,000 images are found")
