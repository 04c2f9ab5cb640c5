"""Images: read the same everywhere, and examined before they are needed. No torch."""

import errno
import hashlib
import io
import os
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Above the limit Pillow warns, above twice the limit it refuses; we say the first ourselves.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MAX_ASPECT = 200  # beyond it the Qwen-VL processors refuse an image, in the middle of a run
MIN_SIDE = 28  # pixels; one token of the Qwen-VL models
MAX_FILE_BYTES = 512 * 2**20

# What the EXIF entry "orientation" asks for. ImageOps.exif_transpose also rewrites the entries and fails on odd ones.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How files of the usual formats begin: a file that begins so and is not recognised is a damaged image.
BEGINNINGS = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|\0\0\0\x0cjP  |....ftypavif", re.DOTALL)
# The range of values of images with more than 8 bits: the smallest that holds the largest value.
FULL_SCALES = {"I": (255, 65535), "F": (1, 255, 65535)}

MINIATURE_PX = 32  # what imagehash.phash shrinks an image to
COLOUR_PX = 8


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts of one image. Width and height are those it is shown with; unknown facts are None."""

    problem: str | None  # a key of problems.KINDS, an error
    findings: tuple[str, ...] = ()  # keys of problems.KINDS, warnings
    format: str | None = None
    width: int | None = None
    height: int | None = None
    digest: bytes | None = None  # SHA-256 of the file
    miniature: bytes | None = None  # see make_miniature


def open_image(image: dict, least_px: int | None = None) -> Image.Image:
    """The image of one {bytes, path}, RGB, turned as its camera meant it, transparent parts on white.

    For a thumbnail: a JPEG may be decoded at a half, a quarter or an eighth of its size, with sides of at least
    `least_px`.
    """
    source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
    if image["bytes"] is None and os.path.exists(image["path"]) and not os.path.isfile(image["path"]):
        raise OSError(f"{image['path']} is no file")  # a pipe would be waited for
    with Image.open(source) as opened:
        if least_px is not None:
            opened.draft(None, (least_px, least_px))
        return _to_rgb(opened)


def source_of(decoded: str | os.PathLike | bytes | Image.Image) -> dict:
    """{bytes, path} of a path, the bytes of a file, or an image in memory."""
    if isinstance(decoded, bytes):
        return {"bytes": decoded, "path": None}
    if not isinstance(decoded, Image.Image):
        return {"bytes": None, "path": os.path.abspath(decoded)}
    buffer = io.BytesIO()
    _to_rgb(decoded).save(buffer, "BMP")  # takes no time
    return {"bytes": buffer.getvalue(), "path": None}


def digest_of(image: dict) -> str | None:
    """SHA-256 of the file of one {bytes, path}, which is not decoded, in hex; None where there is none to read."""
    data, problem = _read(image)
    return None if problem else hashlib.sha256(data).hexdigest()


def size_of(image: dict) -> tuple[int, int]:
    """Width and height as the header of one {bytes, path} says; nothing is decoded. Raises what Pillow raises."""
    with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
        return opened.size


def examine(image: dict, *, miniature: bool = True) -> ImageFacts:
    """The facts of one {bytes, path}, read and decoded once; never raises for what a file can hold."""
    data, problem = _read(image)
    if problem:
        return ImageFacts(problem)
    facts: dict[str, Any] = {"digest": hashlib.sha256(data).digest()}
    try:
        with Image.open(io.BytesIO(data)) as opened:
            facts["format"] = opened.format
            # Pillow forgets how the pixels are packed once it has read them.
            packed = [str(tile[3]) for tile in opened.tile]
            decoded = _to_rgb(opened)
            findings = _find_warnings(opened, packed, image["path"])
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, KeyError, ...
        return ImageFacts(_name_problem(error, data), **facts)
    facts |= {"width": decoded.width, "height": decoded.height}
    if max(decoded.size) > MAX_ASPECT * min(decoded.size):
        return ImageFacts("long_image", **facts)
    if min(decoded.size) < MIN_SIDE:
        findings.append("tiny_image")
    return ImageFacts(None, tuple(findings), **facts, miniature=make_miniature(decoded) if miniature else None)


def make_miniature(decoded: Image.Image) -> bytes:
    """What duplicates.py compares: 32 x 32 values of grey, then 8 x 8 of Cb and of Cr (1,152 bytes)."""
    # Shrinking by whole factors first is cheap and leaves four times the pixels that the filter needs.
    factors = [max(1, side // (4 * MINIATURE_PX)) for side in decoded.size]
    decoded = decoded.reduce(factors)
    grey = decoded.convert("L").resize((MINIATURE_PX, MINIATURE_PX), Image.Resampling.LANCZOS)
    colour = decoded.resize((COLOUR_PX, COLOUR_PX), Image.Resampling.LANCZOS).convert("YCbCr")
    return b"".join(part.tobytes() for part in (grey, *colour.split()[1:]))


def _to_rgb(opened: Image.Image) -> Image.Image:
    if opened.format == "EPS":
        raise UnidentifiedImageError("EPS files are programs; Pillow would have Ghostscript run them")
    opened.load()
    decoded, turn = opened, TURNS.get(_orientation(opened))
    if decoded.mode.startswith(("I", "F")):
        decoded = _to_eight_bits(decoded)
    if decoded.has_transparency_data:
        decoded = decoded.convert("RGBA")
        decoded = Image.alpha_composite(Image.new("RGBA", decoded.size, "white"), decoded)
    decoded = decoded.convert("RGB")
    # A processor that looks for the EXIF entry again must not turn the image twice.
    decoded.info = {}
    return decoded.transpose(turn) if turn is not None else decoded


def _to_eight_bits(decoded: Image.Image) -> Image.Image:
    # Pillow's own conversion cuts everything above 255 to white.
    values = np.nan_to_num(np.asarray(decoded, dtype=np.float32), posinf=0, neginf=0)
    scales = FULL_SCALES.get(decoded.mode, (65535,))
    largest = values.max()
    scale = next((scale for scale in scales if largest <= scale), largest)
    return Image.fromarray(np.rint(values.clip(0) * (255 / scale)).astype(np.uint8))


def _orientation(opened: Image.Image) -> int:
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # entries that are no EXIF at all; the image is fine
        return 1


def _read(image: dict) -> tuple[bytes, str | None]:
    """The bytes, and what is wrong with them. Opens regular files only: others may block for ever."""
    data, path = image["bytes"], image["path"] or ""
    try:
        if data is None and not stat.S_ISREG(os.stat(path).st_mode):
            return b"", "missing_image"
        num_bytes = os.stat(path).st_size if data is None else len(data)
        if num_bytes == 0:
            return b"", "empty_image"
        if num_bytes > MAX_FILE_BYTES:
            return b"", "large_file"
        if data is None:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES)
    except ValueError:  # a null byte in the path
        return b"", "missing_image"
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        return b"", "missing_image" if missing else "unreadable_image"
    return data, None


def _find_warnings(opened: Image.Image, packed: list[str], path: str | None) -> list[str]:
    expected = Image.registered_extensions().get(PurePath(path or "").suffix.lower())
    # Phones write MPO, a JPEG with a second image behind it, under .jpg.
    actual = "JPEG" if opened.format == "MPO" else opened.format
    checks = {
        "wrong_extension": expected not in (None, actual, opened.format),
        "animated": opened.format != "MPO" and _is_animated(opened),
        "cmyk": opened.mode == "CMYK",
        "sixteen_bit": opened.mode.startswith(("I", "F")) or any(";16" in how for how in packed),
        "rotated": _orientation(opened) in TURNS,
        "huge_image": opened.width * opened.height > Image.MAX_IMAGE_PIXELS,
    }
    return [kind for kind, found in checks.items() if found]


def _is_animated(opened: Image.Image) -> bool:
    try:
        return getattr(opened, "is_animated", False)
    except Exception:  # a second frame that is damaged; the first was read
        return True


def _name_problem(error: Exception, data: bytes) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "image_bomb"
    # Pillow says of a WebP file that is cut off only that it cannot be decoded; its header says how long it is.
    is_short = data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")
    if is_short or isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated_image"
    if isinstance(error, UnidentifiedImageError) and not BEGINNINGS.match(data):
        return "not_an_image"
    return "broken_image"
