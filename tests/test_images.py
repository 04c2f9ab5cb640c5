import io

import numpy as np
import pytest
from PIL import Image

from vqa_sft.images import examine, open_image


def as_entry(picture, kind, name=None, **options):
    buffer = io.BytesIO()
    if "exif" not in options and kind == "JPEG":
        options["exif"] = picture.getexif()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": name}


def test_transparent_parts_stand_on_white():
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):
        opened = open_image(as_entry(Image.new(mode, (4, 4), colour), "PNG"))
        assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    opened = open_image(as_entry(palette, "PNG", transparency=0))
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 0)) == (200, 0, 0)


def test_sixteen_bits_become_eight_without_losing_the_light_half():
    levels = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    assert levels.mode == "I;16"
    for kind in ("PNG", "TIFF"):
        opened = open_image(as_entry(levels, kind))
        assert [opened.getpixel((i % 16, i // 16)) for i in range(256)] == [(i, i, i) for i in range(256)]


def test_numbers_in_a_picture_become_greys():
    opened = open_image(as_entry(Image.fromarray(np.float32([[0.0, 0.5, 1.0]])), "TIFF"))
    assert [opened.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_cmyk_becomes_rgb():
    opened = open_image(as_entry(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = opened.getpixel((8, 8))
    assert opened.mode == "RGB" and red > 200 and green < 60 and blue < 60


def test_the_first_frame_of_an_animation_is_shown():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        entry = as_entry(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = open_image(entry).getpixel((20, 20))
        assert red > 240 and green < 20 and blue < 20
        assert "animated" in examine(entry).findings


def test_a_picture_is_turned_as_its_camera_meant_it_and_once_only():
    picture = Image.new("RGB", (60, 30), "white")
    picture.getexif()[0x0112] = 6  # orientation: turn a quarter
    entry = as_entry(picture, "JPEG")
    opened = open_image(entry)
    assert opened.size == (30, 60) and not opened.getexif()
    facts = examine(entry)
    assert (facts.width, facts.height, facts.findings) == (30, 60, ("rotated",))


def write(folder, name, content):
    (folder / name).write_bytes(content)
    return {"bytes": None, "path": str(folder / name)}


def noise(size=(64, 48)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("empty.png", lambda: b"", "empty_picture"),
        ("page.jpg", lambda: b"<html>404</html>", "not_a_picture"),
        ("cut.jpg", lambda: as_entry(noise(), "JPEG")["bytes"][:900], "truncated_picture"),
        ("cut.png", lambda: as_entry(noise(), "PNG")["bytes"][:900], "truncated_picture"),
        ("long.png", lambda: as_entry(Image.new("RGB", (300, 1)), "PNG")["bytes"], "long_picture"),
        ("bad.png", lambda: as_entry(noise(), "PNG")["bytes"].replace(b"IHDR", b"IXXR"), "broken_picture"),
    ],
)
def test_what_cannot_be_shown_to_a_model_has_a_name(tmp_path, name, make, problem):
    assert examine(write(tmp_path, name, make())).problem == problem


def test_what_is_no_file_is_missing(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path in ("none.png", "folder.png", "a\0b.png", "x" * 5_000):
        assert examine({"bytes": None, "path": f"{tmp_path}/{path}"}).problem == "missing_picture"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_and_half_a_bomb_is_a_warning(monkeypatch):
    entry = as_entry(Image.new("L", (300, 300)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    assert examine(entry).problem == "picture_bomb"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert examine(entry).findings == ("huge_picture",)


@pytest.mark.parametrize(
    ("entry", "findings"),
    [
        (lambda: as_entry(noise(), "PNG", "x/photo.jpg"), ("wrong_extension",)),
        (lambda: as_entry(noise(), "PNG", "photo.png"), ()),
        (lambda: as_entry(Image.new("CMYK", (40, 40)), "JPEG", "photo.jpeg"), ("cmyk",)),
        (lambda: as_entry(Image.new("I;16", (40, 40)), "PNG"), ("sixteen_bit",)),
        (lambda: as_entry(noise((20, 40)), "PNG"), ("tiny_picture",)),
    ],
)
def test_what_is_odd_about_a_picture_that_can_be_used_is_a_warning(entry, findings):
    facts = examine(entry())
    assert facts.problem is None and facts.findings == findings
