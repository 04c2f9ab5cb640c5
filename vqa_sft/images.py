"""Pictures: read the same everywhere, and checked before they are needed. No torch."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_ASPECT = 200  # beyond it the Qwen-VL processors refuse a picture, in the middle of a run


def image_problem(image: dict) -> str | None:
    """Why this {bytes, path} cannot be shown to a model, or None."""
    try:
        if image["bytes"] is None and not Path(image["path"] or "").is_file():
            return "picture is missing"
        width, height = open_image(image).size
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError, ...
        return f"picture cannot be decoded ({type(error).__name__})"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"picture is more than {MAX_ASPECT} times as long as wide"
    return None


def open_image(image: dict) -> Image.Image:
    """The picture of one {bytes, path}, RGB, turned as its camera meant it, transparent parts on white."""
    source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
    with Image.open(source) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):
            # Pillow's own conversion cuts everything above 255 to white.
            picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
