"""Digits and capital letters, drawn by code: in fonts, or as pen strokes. No handwriting is read from anywhere.

A pen glyph is a few strokes through points of an 11 x 11 grid, two hexadecimal digits each (x, then y downwards):
"-22 50 5a" is a straight-edged 1 with a flag, "~" runs a smooth curve through its points, "|" lifts the pen.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PEN = {
    "0": ["~50 22 05 28 5a 88 a5 82 50", "~70 31 05 38 5a 97 a3 71 40", "~50 32 25 38 5a 78 85 72 50 41"],
    "1": [
        "-50 5a",
        "-23 50 5a",
        "-23 50 5a|-2a 8a",
        "-50 4a",
        "~33 51 50 5a",
        "-50 5a|-3a 7a",
        "-05 60 6a",
        "~06 41 60 5a",
    ],
    "2": [
        "~12 30 70 92 84 47 1a|-1a 9a",
        "~12 30 70 92 65 29 08 27 59 9a",
        "~13 40 82 74 37 1a|~1a 49 9a",
        "~01 60 83 45 0a|-0a 8a",
    ],
    "3": [
        "~11 50 92 74 45|~45 86 98 5a 19",
        "-10 90 44|~44 86 98 5a 19",
        "~12 40 81 73 45 76 88 5a 09",
        "~10 70 82 54 34|~34 85 87 6a 0a",
    ],
    "4": [
        "-30 06 96|-70 7a",
        "-60 06 a6|-60 6a",
        "~20 14 26 96|-80 7a",
        "-10 15 85|-80 8a",
        "-70 07 97|-74 7a",
        "-60 05 95|-60 5a",
        "-40 16 96|-94 4a",
        "~50 15 27 95|-94 5a",
    ],
    "5": [
        "-90 20 14|~14 54 96 89 4a 19",
        "~20 14 64 97 6a 19|-20 90",
        "-80 30 25|~25 75 78 4a 0a",
        "-80 10 15|~15 54 87 5a 0a",
        "~90 21 24 75 87 5a 1a",
    ],
    "6": [
        "~80 41 16 29 5a 89 87 55 27 18",
        "~60 24 17 3a 7a 97 65 26",
        "~40 15 18 4a 79 77 46 17",
        "~90 42 27 5a 88 66 27",
    ],
    "7": [
        "-00 90 3a",
        "-00 90 4a|-25 85",
        "~01 50 91|~91 55 3a",
        "-02 00 90 3a",
        "-00 90 5a|-35 95",
        "~11 30 80 55 4a|-35 75",
        "~02 20 51 90 65 3a|-26 95",
    ],
    "8": [
        "~81 50 22 44 76 98 5a 18 36 64 82 70",
        "~50 22 55 82 50|~55 18 5a 98 55",
        "~40 12 45 86 88 4a 18 26 75 82 40",
        "~90 40 12 55 87 6a 38 55 92 80",
    ],
    "9": [
        "~92 60 23 36 75 92 7a",
        "~82 50 13 35 74 82|~82 86 6a 2a",
        "~82 50 22 24 55 84 82|-82 8a",
        "~91 50 13 25 64 91|-91 6a",
        "~72 40 12 24 65 72 86 7a 3a",
        "~82 50 12 24 55 82|~82 76 78 5a 09",
        "~80 40 12 35 74 80 97 6a 19",
    ],
    "A": ["-0a 50 aa|-27 87", "~0a 32 50 72 aa|-17 97"],
    "B": ["-00 0a|~00 70 82 75 05|~05 85 98 7a 0a"],
    "C": ["~92 60 13 17 6a 98", "~80 22 05 28 8a"],
    "D": ["-00 0a|~00 60 95 6a 0a"],
    "E": ["-90 00 0a 9a|-05 75", "-80 10|-10 1a|-15 75|-1a 8a"],
    "F": ["-90 00 0a|-05 75"],
    "G": ["~92 60 13 17 6a 98|-98 96 56", "~81 40 05 3a 89 96|-96 56"],
    "H": ["-00 0a|-90 9a|-05 95"],
    "I": ["-20 80|-50 5a|-2a 8a"],
    "J": ["-40 a0|~70 77 5a 18", "~80 87 5a 18"],
    "K": ["-00 0a|-90 05 9a", "-00 0a|-90 06|-34 9a"],
    "L": ["-00 0a 9a"],
    "M": ["-0a 00 56 a0 aa", "-0a 20 58 80 aa"],
    "N": ["-0a 00 9a 90"],
    "O": ["~50 22 05 28 5a 88 a5 82 50"],
    "P": ["-00 0a|~00 80 93 75 05"],
    "Q": ["~50 22 05 28 5a 88 a5 82 50|-67 aa"],
    "R": ["-00 0a|~00 80 93 75 05|-45 9a"],
    "S": ["~91 50 12 45 86 89 4a 09"],
    "T": ["-00 a0|-50 5a"],
    "U": ["~00 07 3a 7a 97 90"],
    "V": ["-00 5a a0"],
    "W": ["-00 2a 53 8a a0"],
    "X": ["-00 aa|-a0 0a"],
    "Y": ["-00 55 a0|-55 5a"],
    "Z": ["-00 90 0a 9a", "-00 90 0a 9a|-25 75"],
}
FONTS = [
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10", "cmti10", "cmtt10", "Aileron",
]  # fmt: skip
HELD_OUT_FONTS = ["DejaVuSansMono-BoldOblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta", "cmss10"]
INK_PX = 128  # glyphs are made at this height and then scaled down


def glyph_mask(rng: np.random.Generator, char: str, size_px: int, pen_share: float, fonts: list[str]) -> np.ndarray:
    """Ink coverage in 0..1 of one distorted glyph somewhere on a square, (size_px, size_px)."""
    ink = _pen_ink(rng, char) if rng.random() < pen_share else _font_ink(rng, char, fonts)
    coarse = rng.random() < 0.55
    if coarse:
        # What a low-resolution scanner sees: black or white at four times the grid, averaged, scaled up smoothly.
        grid = int(rng.choice([8, 8, 8, 10, 12, 16, 28]))
        fine = _place(rng, ink, 4 * grid, smallest=0.8 if grid < 16 else 0.5)
        image = fine.point(lambda value: 255 * (value > 110)).reduce(4)
        image = image.resize((size_px, size_px), Image.Resampling.BICUBIC)
    else:
        image = _place(rng, ink, size_px, smallest=0.45)
        if rng.random() < 0.4:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6) * size_px / 84))
    return np.asarray(image, dtype=np.float32) / 255


def _place(rng: np.random.Generator, ink: Image.Image, frame_px: int, smallest: float) -> Image.Image:
    """The ink scaled and put on a square frame: often filling its height, as segmented characters do."""
    fill = 1.0 if rng.random() < 0.4 else rng.uniform(smallest, 1.0)
    height = max(8, round(frame_px * fill))
    width = min(frame_px, max(2, round(height * ink.width / ink.height)))
    # The smaller the ink, the further from the middle it may stand.
    left = round((frame_px - width) * (0.5 + rng.uniform(-0.5, 0.5) * (1 - fill) / (1 - smallest + 1e-6)))
    top = round((frame_px - height) * rng.random())
    frame = Image.new("L", (frame_px, frame_px))
    frame.paste(ink.resize((width, height), Image.Resampling.BOX), (left, top))
    return frame


def _pen_ink(rng: np.random.Generator, char: str) -> Image.Image:
    variants = PEN[char]
    strokes = _strokes(variants[rng.integers(len(variants))])
    jitter = rng.uniform(0.15, 0.7)  # grid units
    strokes = [(smooth, points + rng.normal(0, jitter, points.shape)) for smooth, points in strokes]
    warp = _random_warp(rng)
    curves = [warp(_catmull_rom(points) if smooth else _dense(points)) for smooth, points in strokes]
    return _draw_curves(rng, curves, char)


def _strokes(text: str) -> list[tuple[bool, np.ndarray]]:
    """Whether it is smooth and its points (n, 2), of each stroke: "-22 50|~14 54" has two."""
    return [
        (stroke[0] == "~", np.array([[int(x, 16), int(y, 16)] for x, y in stroke[1:].split()], dtype=float))
        for stroke in text.split("|")
    ]


def _random_warp(rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A smooth random map of the plane: rotation, slant, stretch and two waves."""
    angle, slant = rng.normal(0, 0.12), rng.normal(0.1, 0.22)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, -slant], [0, 1]])
    amplitude, phase = rng.uniform(0, 0.6, 2), rng.uniform(0, 6.28, 2)
    frequency = rng.uniform(0.2, 0.6, 2)

    def warp(points: np.ndarray) -> np.ndarray:
        centred = points - 5
        waves = amplitude * np.sin(frequency * centred[:, ::-1] + phase)
        return (centred + waves) @ matrix.T

    return warp


def _catmull_rom(points: np.ndarray, per_segment: int = 6) -> np.ndarray:
    padded = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    p0, p1, p2, p3 = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = np.linspace(0, 1, per_segment, endpoint=False)[:, None, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return np.vstack([curve.transpose(1, 0, 2).reshape(-1, 2), points[-1:]])


def _dense(points: np.ndarray, per_segment: int = 5) -> np.ndarray:
    """Straight segments cut into pieces, so that the warp can bend them."""
    t = np.linspace(0, 1, per_segment, endpoint=False)[None, :, None]
    pieces = points[:-1, None] * (1 - t) + points[1:, None] * t
    return np.vstack([pieces.reshape(-1, 2), points[-1:]])


def _draw_curves(rng: np.random.Generator, curves: list[np.ndarray], char: str) -> Image.Image:
    thickness = rng.uniform(7, 32)
    points = np.vstack(curves)
    low, high = points.min(0), points.max(0)
    scale = (INK_PX - thickness) / max(high[1] - low[1], 1)
    aspect = rng.uniform(0.45, 1.1)
    if char == "1":
        aspect = min(aspect, 0.9)
    width = max(1, round((high[0] - low[0]) * scale * aspect + thickness))
    image = Image.new("L", (min(width, 2 * INK_PX), INK_PX))
    draw = ImageDraw.Draw(image)
    radius = thickness / 2
    for curve in curves:
        path = [tuple(p) for p in (curve - low) * [scale * aspect, scale] + radius]
        draw.line(path, fill=255, width=round(thickness), joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return image


def _font_ink(rng: np.random.Generator, char: str, fonts: list[str]) -> Image.Image:
    font = load_font(fonts[rng.integers(len(fonts))], INK_PX)
    image = Image.new("L", (2 * INK_PX, 2 * INK_PX))
    ImageDraw.Draw(image).text((INK_PX, INK_PX), char, fill=255, font=font, anchor="mm")
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.MaxFilter(int(rng.choice([3, 5, 7, 9]))))
    angle, slant, stretch = rng.normal(0, 0.1), rng.normal(0, 0.15), rng.uniform(0.75, 1.25)
    cos, sin = np.cos(angle) / stretch, np.sin(angle)
    a, b, d, e = cos, slant + sin, -sin, np.cos(angle)
    centre = INK_PX
    offset = (centre - a * centre - b * centre, centre - d * centre - e * centre)
    coefficients = (a, b, offset[0], d, e, offset[1])
    image = image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return image.crop(image.getbbox())


@lru_cache(maxsize=64)
def load_font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships, or Pillow's own Aileron: nothing is looked up on the machine."""
    if name == "Aileron":
        return ImageFont.load_default(size_px)
    import matplotlib  # a drawing-time dependency only

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size_px)
