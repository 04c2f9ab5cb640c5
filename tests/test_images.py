import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vqa_sft import images
from vqa_sft.batch.augment import augment
from vqa_sft.data.problems import KINDS
from vqa_sft.images import examine, make_miniature, open_image

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def entry(data, path=None):
    return {"bytes": data, "path": path}


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data):
    """The pixels of the first row, as a model would see them."""
    image = open_image(entry(data))
    assert image.mode == "RGB" and examine(entry(data)).problem is None
    return [image.getpixel((x, 0)) for x in range(image.width)]


def png(width, bits, colour_type, row):
    """A PNG of one row, in forms that Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def palette(*colours):
    image = Image.new("P", (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(range(len(colours)))
    return image


def noise(width=60, height=40, seed=0):
    """An image whose files are long enough to be cut anywhere."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- What is shown ----------------------------------------------------------------------------------------------------

GREYS_16 = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)  # 0, 1, 128, 255 in 8 bits
FOUR_GREYS = [(0, 0, 0), (1, 1, 1), (128, 128, 128), WHITE]


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(GREYS_16), "PNG"),
        saved(Image.fromarray(GREYS_16), "TIFF"),
        saved(Image.fromarray(GREYS_16.astype(np.int32)), "TIFF"),
        saved(Image.fromarray((GREYS_16 // 257).astype(np.int32)), "TIFF"),
        saved(Image.fromarray((GREYS_16 / 257).astype(np.float32)), "TIFF"),
        saved(Image.fromarray((GREYS_16 / 65535).astype(np.float32)), "TIFF"),
        b"P5 4 1 65535\n" + GREYS_16.astype(">u2").tobytes(),
    ],
    ids=["I;16 PNG", "I;16 TIFF", "I TIFF", "I TIFF of 8 bits", "F TIFF to 255", "F TIFF to 1", "I PGM"],
)
def test_more_than_eight_bits_become_eight_without_losing_the_light_half(data):
    assert shown(data) == FOUR_GREYS
    assert examine(entry(data)).findings[0] == "sixteen_bit"


def test_sixteen_bits_become_eight_at_every_level():
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    opened = open_image(entry(saved(Image.fromarray(levels), "PNG")))
    assert np.asarray(opened)[..., 0].ravel().tolist() == list(range(256))


def test_sixteen_bits_in_colour_are_named_too():
    data = png(1, 16, 2, np.array([0, 32896, 65535], dtype=">u2").tobytes())
    assert shown(data) == [(0, 128, 255)] and "sixteen_bit" in examine(entry(data)).findings


def test_values_that_are_no_numbers_are_black():
    data = saved(Image.fromarray(np.array([[np.nan, np.inf, 1]], dtype=np.float32)), "TIFF")
    assert shown(data) == [(0, 0, 0), (0, 0, 0), WHITE]


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (saved(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), "PNG"), [WHITE]),
        (saved(Image.fromarray(np.array([[[10, 255], [10, 0], [10, 128]]], np.uint8), "LA"), "PNG"),
         [(10, 10, 10), WHITE, (132, 132, 132)]),
        (saved(palette(RED, BLUE), "PNG"), [RED, BLUE]),
        (saved(palette(RED, BLUE), "PNG", transparency=1), [RED, WHITE]),
        (saved(palette(RED, RED, BLUE), "PNG", transparency=bytes([255, 0, 128])), [RED, WHITE, (127, 127, 255)]),
        (saved(palette(RED, BLUE), "GIF", transparency=1), [RED, WHITE]),
        (saved(palette(RED, BLUE).convert("PA"), "TIFF"), [RED, BLUE]),
        (saved(Image.fromarray(np.array([[[1, 2, 3], [200, 100, 50]]], np.uint8)), "PNG", transparency=(1, 2, 3)),
         [WHITE, (200, 100, 50)]),
        (saved(Image.fromarray(np.array([[5, 6]], np.uint8)), "PNG", transparency=5), [WHITE, (6, 6, 6)]),
        (saved(Image.new("1", (2, 1), 1), "PNG"), [WHITE, WHITE]),
        (png(1, 16, 6, np.array([65535, 0, 0, 32896], dtype=">u2").tobytes()), [(255, 127, 127)]),
    ],
    ids=["RGBA", "LA", "P", "P one colour", "P by colour", "GIF", "PA", "RGB one colour", "L one grey", "1", "RGBA;16"],
)  # fmt: skip
def test_transparent_parts_stand_on_white(data, pixels):
    assert shown(data) == pixels


def test_cmyk_becomes_rgb_and_is_named():
    red = Image.new("CMYK", (8, 1), (0, 255, 255, 0))
    for data in (saved(red, "TIFF"), saved(red, "JPEG", quality=100)):
        assert shown(data) == [RED] * 8
        assert examine(entry(data)).findings[0] == "cmyk"


def test_an_adobe_jpeg_with_ycck_becomes_rgb():
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    marker = data.index(b"Adobe") + 11  # how its colours are transformed: 0 for CMYK, 2 for YCCK
    assert data[marker] == 0
    ycck = data[:marker] + b"\x02" + data[marker + 1 :]
    assert "cmyk" in examine(entry(ycck)).findings
    assert open_image(entry(ycck)).getpixel((0, 0)) != open_image(entry(data)).getpixel((0, 0))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_shown(kind):
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    data = saved(red, kind, save_all=True, append_images=[blue])
    assert np.abs(np.asarray(open_image(entry(data))) - np.array(RED)).max() <= 1 + (kind == "WEBP")
    # Phones write MPO under .jpg, with a depth map behind the image: neither is worth a word.
    assert examine(entry(data, "a.jpg" if kind == "MPO" else None)).findings == (() if kind == "MPO" else ("animated",))


def test_a_second_frame_that_is_cut_off_does_not_lose_the_first():
    red, blue = noise(), noise(seed=1)
    data = saved(red, "GIF", save_all=True, append_images=[blue])
    alone = len(saved(red, "GIF"))
    image = examine(entry(data[: alone + (len(data) - alone) // 2]))
    assert image.problem is None and "animated" in image.findings


CORNERS = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8))


@pytest.mark.parametrize(
    ("orientation", "letters"),
    list(enumerate(["RGBW", "GRWB", "WBGR", "BWRG", "RBGW", "BRWG", "WGBR", "GWRB"], start=1)),
)
def test_an_image_is_turned_as_its_camera_meant_it(orientation, letters):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(CORNERS.resize((40, 20), Image.Resampling.NEAREST), "PNG", exif=exif)
    turned = open_image(entry(data))
    assert turned.size == ((40, 20) if orientation < 5 else (20, 40))
    colours = {"R": RED, "G": (0, 255, 0), "B": BLUE, "W": WHITE}
    corners = [(0, 0), (turned.width - 1, 0), (0, turned.height - 1), (turned.width - 1, turned.height - 1)]
    assert [turned.getpixel(corner) for corner in corners] == [colours[letter] for letter in letters]
    # A processor that looks for the entry itself finds none.
    assert turned.getexif().get(0x0112) is None
    image = examine(entry(data))
    assert ("rotated" in image.findings) == (orientation > 1) and (image.width, image.height) == turned.size


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"]
)
def test_odd_exif_does_not_lose_an_image(exif):
    data = saved(Image.new("RGB", (40, 30), "red"), "JPEG", exif=exif)
    assert open_image(entry(data)).size == (40, 30) and examine(entry(data)).problem is None


# --- What is found ----------------------------------------------------------------------------------------------------


def test_the_facts_of_a_good_image(tmp_path):
    noise().save(tmp_path / "a.png")
    image = examine({"bytes": None, "path": str(tmp_path / "a.png")})
    assert (image.problem, image.findings, image.format) == (None, (), "PNG")
    assert (image.width, image.height) == (60, 40)
    assert len(image.digest) == 32
    assert image == examine(entry((tmp_path / "a.png").read_bytes(), "a.png"))
    assert image.miniature == make_miniature(noise()) and len(image.miniature) == 32 * 32 + 2 * 8 * 8


@pytest.mark.parametrize(
    "path", ["none.png", "", None, "folder", "a.png/b.png", "x" * 300 + ".png", "null\0byte.png", "loop.png", "pipe"]
)
def test_a_path_without_a_file_is_a_missing_image(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for somebody to write
    assert examine({"bytes": None, "path": path}) == images.ImageFacts("missing_image")


def test_devices_are_not_read():
    assert examine({"bytes": None, "path": "/dev/zero"}).problem == "missing_image"


def test_a_file_that_may_not_be_opened_is_named_as_such(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert examine({"bytes": None, "path": str(tmp_path / "a.png")}).problem == "unreadable_image"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty_image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "not_an_image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 50, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not_an_image"),
        (bytes(range(256)) * 9, "not_an_image"),
        (saved(noise(), "JPEG")[:900], "truncated_image"),
        (saved(noise(), "PNG")[:900], "truncated_image"),
        (saved(noise(), "WEBP")[:900], "truncated_image"),
        (saved(noise(), "BMP")[:900], "truncated_image"),
        (saved(noise(), "GIF")[:2000], "truncated_image"),
        (b"\xff\xd8\xff\xe0 and then nothing that makes sense", "truncated_image"),
        (saved(noise(), "PNG").replace(b"IHDR\0\0\0\x3c", b"IHDR\0\0\0\x3d"), "broken_image"),
        (saved(noise(), "JPEG2000")[:900], "broken_image"),
        (png(200_000_000, 8, 2, b""), "image_bomb"),
        (saved(Image.new("L", (4_020, 20)), "PNG"), "long_image"),
    ],
)
def test_what_cannot_be_shown_to_a_model_says_why(data, problem):
    assert examine(entry(data)).problem == problem and KINDS[problem].severity == "error"
    assert examine(entry(data)).miniature is None


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(20 * 10**9)  # takes no room on the disk
    found = examine({"bytes": None, "path": str(tmp_path / "large.png")})
    assert (found.problem, found.digest) == ("large_file", None)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    assert examine(entry(saved(noise(), "PNG"))).problem == "large_file"


def test_a_name_that_does_not_fit_the_format_is_found():
    data = saved(noise(), "PNG")
    for path, found in (("a.png", ()), ("a.PNG", ()), ("a.bin", ()), ("a", ()), ("a.jpg", ("wrong_extension",))):
        assert examine(entry(data, path)).findings == found
    assert examine(entry(saved(noise(), "JPEG"), "a.jpeg")).findings == ()


def test_tiny_images_are_found_and_the_smallest_long_one_is_not_refused():
    assert examine(entry(saved(Image.new("L", (28, 28)), "PNG"))).findings == ()
    assert examine(entry(saved(Image.new("L", (27, 400)), "PNG"))).findings == ("tiny_image",)
    assert examine(entry(saved(Image.new("L", (200, 1)), "PNG"))).problem is None
    assert examine(entry(saved(Image.new("L", (201, 1)), "PNG"))).problem == "long_image"


@pytest.mark.filterwarnings("ignore")  # what Pillow says of damaged files
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"])
def test_examine_finds_a_problem_exactly_where_open_image_fails(kind):
    """Whatever is done to a file: the check before a run must not promise more, or less, than the run can read."""
    whole, rng = saved(noise(), kind), random.Random(0)
    files = [whole[: rng.randrange(len(whole))] for _ in range(30)]
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(min(len(whole), rng.choice([40, 400, len(whole)])))] = rng.randrange(256)
        files.append(bytes(damaged))
    for data in files:
        found = examine(entry(data))
        try:
            size = open_image(entry(data)).size
        except Exception:
            assert found.problem is not None and KINDS[found.problem].severity == "error"
        else:
            assert found.problem in (None, "long_image") and (found.width, found.height) == size


def test_a_miniature_holds_what_imagehash_shrinks_an_image_to():
    image = noise(100, 80)
    grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    assert make_miniature(image)[:1024] == grey.tobytes()
    colours = np.frombuffer(make_miniature(Image.new("RGB", (700, 300), "red")), np.uint8)[1024:].reshape(2, 64)
    assert set(colours[0]) == {84} and set(colours[1]) == {255}


class Fixed:
    """Draws these factors, in the middle of what it is asked for or beside it."""

    def __init__(self, *factors):
        self.factors = iter(factors)

    def uniform(self, low, high):
        factor = next(self.factors)
        assert low <= factor <= high and low + high == 2
        return factor


def test_augmented_sides_have_factors_of_their_own():
    assert augment(noise(), 0.25, Fixed(0.75, 1.25, 1, 1, 1)).size == (45, 50)
    assert augment(noise(), 0.25, Fixed(1, 1, 1, 1, 1)).tobytes() == noise().tobytes()
    sizes = {augment(noise(), 0.1, random.Random(i)).size for i in range(300)}
    assert {width for width, _ in sizes} == set(range(54, 67)) and {height for _, height in sizes} == set(range(36, 45))
    thin = Image.new("RGB", (400, 2))  # longer would be refused
    assert augment(thin, 0.5, Fixed(1.5, 0.5, 1, 1, 1)).size == (400, 2)


def test_brightness_contrast_and_colour_are_mixed_as_their_definitions_say():
    image = np.asarray(noise()).astype(float)
    grey = (image @ [0.299, 0.587, 0.114])[..., None]  # ITU-R 601-2
    for factors, reference in (
        ((0.7, 1, 1), 0.7 * image),
        ((1, 1.3, 1), grey.mean() + 1.3 * (image - grey.mean())),
        ((1, 1, 0.7), grey + 0.7 * (image - grey)),
    ):
        found = np.asarray(augment(noise(), 0.3, Fixed(1, 1, *factors)))
        assert np.abs(found - reference.clip(0, 255)).max() < 2
