import io

import numpy as np
from PIL import Image

from vqa_sft.images import image_problem, open_image


def as_entry(picture, kind):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"exif": picture.getexif()} if kind == "JPEG" else {}))
    return {"bytes": buffer.getvalue(), "path": None}


def test_transparent_parts_stand_on_white():
    opened = open_image(as_entry(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"))
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_become_eight_without_losing_the_light_half():
    levels = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    assert levels.mode == "I;16"
    opened = open_image(as_entry(levels, "PNG"))
    assert [opened.getpixel((i % 16, i // 16)) for i in range(256)] == [(i, i, i) for i in range(256)]


def test_a_picture_is_turned_as_its_camera_meant_it():
    picture = Image.new("RGB", (20, 10), "white")
    picture.getexif()[0x0112] = 6  # orientation: turn a quarter
    assert open_image(as_entry(picture, "JPEG")).size == (10, 20)


def test_what_cannot_be_shown_to_a_model_says_why(tmp_path):
    Image.new("RGB", (300, 1)).save(tmp_path / "long.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, part in (
        ("none.png", "is missing"),
        ("text.png", "cannot be decoded"),
        ("long.png", "200 times as long"),
    ):
        assert part in image_problem({"bytes": None, "path": str(tmp_path / name)})
    Image.new("RGB", (200, 1)).save(tmp_path / "fine.png")
    assert image_problem({"bytes": None, "path": str(tmp_path / "fine.png")}) is None
