"""Draws pictures and asks about them: the only thing that the tiny base ever sees.

An example is drawn from (seed, index) alone, so any process draws the same one, and a held-out set is another seed:

    >>> example = draw_example(seed=0, index=9, kind="count")
    >>> example["question"], example["choices"], example["answer"], example["answer_text"]
    ('How many moons are there?', ['5', '4', '1', '3'], 0, '5')
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vqa_sft.questions.letters import LETTERS
from vqa_sft.tiny.glyphs import FONTS, HELD_OUT_FONTS, glyph_mask
from vqa_sft.tiny.words import COLOURS, NUMBER_WORDS, PLACES, SHAPES, WORDINGS, YES_NO, with_particle

PICTURE_PX = 84
SCALE = 2  # scenes are drawn twice as large and averaged down: smooth edges
KOREAN_SHARE = 0.3
Asked = tuple[Image.Image, str, str, list[str]]  # the picture, the question, the right choice, the wrong ones


def draw_examples(num_examples: int, seed: int, kind: str | None = None, held_out: str = "") -> list[dict]:
    """`num_examples` examples in canonical columns; see `draw_example`."""
    return [draw_example(seed, index, kind, held_out) for index in range(num_examples)]


def draw_example(seed: int, index: int, kind: str | None = None, held_out: str = "") -> dict:
    """One picture and its question: id, image, question, choices, answer, question_type, answer_text.

    `held_out` may be "wordings" or "fonts": questions worded, or glyphs set, as training never does.
    """
    rng = np.random.default_rng([seed, index])
    kind = kind or KIND_NAMES[rng.choice(len(KIND_NAMES), p=KIND_SHARES)]
    image, question, right, wrong = KINDS[kind](Sketch(rng, held_out))
    num_choices = min(1 + len(wrong), int(rng.choice([2, 3, 4, 5, 6], p=[0.1, 0.15, 0.5, 0.15, 0.1])))
    choices = [right, *rng.permutation(np.array(wrong, dtype=object))[: num_choices - 1]]
    order = rng.permutation(num_choices)
    return {
        "id": f"{seed}-{index}",
        "image": image,
        "question": question,
        "choices": [str(choices[i]) for i in order],
        "answer": int(np.flatnonzero(order == 0)[0]),
        "question_type": kind,
        "answer_text": right,
    }


class Sketch:
    """The random state of one example: its generator, its language, and what is held out."""

    def __init__(self, rng: np.random.Generator, held_out: str) -> None:
        self.rng = rng
        self.language = "ko" if rng.random() < KOREAN_SHARE else "en"
        self.held_out = held_out
        self.fonts = HELD_OUT_FONTS if held_out == "fonts" else FONTS

    def pick(self, values: Sequence, num: int) -> list:
        return [values[i] for i in self.rng.choice(len(values), size=num, replace=False)]

    def one(self, values: Sequence) -> Any:
        return values[self.rng.integers(len(values))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def ask(self, key: str, **words: str) -> str:
        wordings = WORDINGS[key][self.language]
        wording = wordings[-1] if self.held_out == "wordings" else self.one(wordings[:-1])
        topics = {f"{name}_topic": with_particle(word, "은는") for name, word in words.items()}
        subjects = {f"{name}_subject": with_particle(word, "이가") for name, word in words.items()}
        return str(wording).format(**words, **topics, **subjects)

    def colour(self, name: str) -> str:
        return name if self.language == "en" else COLOURS[name][1]

    def shape(self, name: str) -> str:
        return name if self.language == "en" else SHAPES[name][1]

    def shapes(self, name: str) -> str:
        return SHAPES[name][0 if self.language == "en" else 1]

    def place(self, name: str) -> str:
        return name if self.language == "en" else PLACES[name]

    def numbers(self, values: Sequence[int]) -> list[str]:
        """Digits, or now and then words."""
        if self.chance(0.8):
            return [str(value) for value in values]
        return [NUMBER_WORDS[self.language][value] for value in values]

    def rgb(self, name: str) -> tuple[int, int, int]:
        """A shade of the named colour."""
        base = np.array(COLOURS[name][0]) * self.rng.uniform(0.94, 1.06) + self.rng.normal(0, 7, 3)
        red, green, blue = (int(v) for v in np.clip(base, 0, 255))
        return red, green, blue


# ---- kinds of questions


def ask_digit(sketch: Sketch) -> Asked:
    digit = int(sketch.rng.integers(10))
    image = draw_glyph(sketch, str(digit), pen_share=0.75)
    right, *wrong = sketch.numbers([digit, *(d for d in range(10) if d != digit)])
    return image, sketch.ask("digit"), right, wrong


def ask_letter(sketch: Sketch) -> Asked:
    letter = str(sketch.one(LETTERS))
    image = draw_glyph(sketch, letter, pen_share=0.4)
    return image, sketch.ask("letter"), letter, [other for other in LETTERS if other != letter]


def ask_shape(sketch: Sketch) -> Asked:
    shape, other = sketch.pick(list(SHAPES), 2)
    colour, other_colour = sketch.pick(list(COLOURS), 2)
    scene = Scene(sketch, avoid=(colour, other_colour))
    if sketch.chance(0.4):
        question = sketch.ask("shape of", colour=sketch.colour(colour))
        draw_pair(scene, (shape, colour), (other, other_colour))
    else:
        question = sketch.ask("shape")
        scene.put_anywhere(shape, colour, 10, 36)
    return scene.finish(), question, sketch.shape(shape), [sketch.shape(name) for name in SHAPES if name != shape]


def ask_colour(sketch: Sketch) -> Asked:
    shape, other = sketch.pick(list(SHAPES), 2)
    colour, other_colour = sketch.pick(list(COLOURS), 2)
    if sketch.chance(0.15):
        scene = Scene(sketch, paper=sketch.rgb(colour))
        scene.put_anywhere(shape, other_colour, 10, 24)
        question = sketch.ask("background")
    else:
        scene = Scene(sketch, avoid=(colour, other_colour))
        question = sketch.ask("colour", shape=sketch.shape(shape))
        if sketch.chance(0.5):
            draw_pair(scene, (shape, colour), (other, other_colour))
        else:
            scene.put_anywhere(shape, colour, 9, 34)
    return scene.finish(), question, sketch.colour(colour), [sketch.colour(name) for name in COLOURS if name != colour]


def ask_count(sketch: Sketch) -> Asked:
    shape, other = sketch.pick(list(SHAPES), 2)
    colours = sketch.pick(list(COLOURS), 2)
    number = int(sketch.rng.integers(1, 7))
    others = int(sketch.rng.integers(1, 4)) if sketch.chance(0.35) else 0
    scene = Scene(sketch, avoid=tuple(colours))
    scene.scatter([(shape, colours[0])] * number + [(other, colours[1])] * min(others, 9 - number))
    right, *wrong = sketch.numbers([number, *(n for n in range(1, 7) if n != number)])
    return scene.finish(), sketch.ask("count", shape=sketch.shape(shape), shapes=sketch.shapes(shape)), right, wrong


def ask_place(sketch: Sketch) -> Asked:
    shape, other = sketch.pick(list(SHAPES), 2)
    colour, other_colour = sketch.pick(list(COLOURS), 2)
    cells = sketch.pick(range(9), 2)
    scene = Scene(sketch, avoid=(colour, other_colour))
    scene.put_in_cell(shape, colour, cells[0])
    if sketch.chance(0.5):
        scene.put_in_cell(other, other_colour, cells[1])
    names = list(PLACES)
    right = names[cells[0]]
    question = sketch.ask("place", shape=sketch.shape(shape))
    return scene.finish(), question, sketch.place(right), [sketch.place(name) for name in names if name != right]


def ask_comparison(sketch: Sketch) -> Asked:
    asks = (compare_size, compare_size, compare_darkness, compare_place, compare_place, compare_counts, is_bigger,
            is_left_of, is_there, compare_numbers, compare_numbers)  # fmt: skip
    return sketch.one(asks)(sketch)


def compare_size(sketch: Sketch) -> Asked:
    big, small = sketch.pick(list(SHAPES), 2)
    scene = draw_sizes(sketch, big, small)
    key = str(sketch.one(("bigger", "smaller")))
    right, wrong = (big, small) if key == "bigger" else (small, big)
    return scene.finish(), sketch.ask(key), sketch.shape(right), other_shapes(sketch, right, wrong)


def compare_darkness(sketch: Sketch) -> Asked:
    dark, light = sketch.pick(list(SHAPES), 2)
    scene = Scene(sketch, paper=(255, 255, 255))
    level = int(sketch.rng.integers(20, 110))
    lighter = int(sketch.rng.integers(level + 75, 225))
    draw_pair(scene, (dark, (level,) * 3), (light, (lighter,) * 3))
    return scene.finish(), sketch.ask("darker"), sketch.shape(dark), other_shapes(sketch, dark, light)


def compare_place(sketch: Sketch) -> Asked:
    shapes = sketch.pick(list(SHAPES), 2)
    colours = sketch.pick(list(COLOURS), 2)
    scene = Scene(sketch, avoid=tuple(colours))
    key = str(sketch.one(("further left", "further right", "higher")))
    near, far = sketch.rng.integers(14, 34), sketch.rng.integers(50, 70)
    across = sketch.rng.integers(16, 68, 2)
    for shape, colour, along, side in zip(shapes, colours, (near, far), across, strict=True):
        x, y = (side, along) if key == "higher" else (along, side)
        scene.put(shape, colour, x, y, sketch.rng.uniform(9, 14))
    right, wrong = shapes[::-1] if key == "further right" else shapes
    return scene.finish(), sketch.ask(key), sketch.shape(right), other_shapes(sketch, right, wrong)


def compare_counts(sketch: Sketch) -> Asked:
    more, fewer = sketch.pick(list(SHAPES), 2)
    colours = sketch.pick(list(COLOURS), 2)
    num_fewer = int(sketch.rng.integers(1, 4))
    num_more = int(sketch.rng.integers(num_fewer + 1, 10 - num_fewer))
    scene = Scene(sketch, avoid=tuple(colours))
    scene.scatter([(more, colours[0])] * num_more + [(fewer, colours[1])] * num_fewer)
    first, second = sketch.pick([more, fewer], 2)
    words = {"shape": sketch.shape(first), "shapes": sketch.shapes(first)}
    words |= {"other": sketch.shape(second), "others": sketch.shapes(second)}
    rest = [sketch.shapes(name) for name in SHAPES if name not in (more, fewer)]
    return (
        scene.finish(),
        sketch.ask("more", **words),
        sketch.shapes(more),
        [sketch.shapes(fewer), *sketch.pick(rest, 2)],
    )


def is_bigger(sketch: Sketch) -> Asked:
    big, small = sketch.pick(list(SHAPES), 2)
    scene = draw_sizes(sketch, big, small)
    first, second = sketch.pick([big, small], 2)
    question = sketch.ask("is bigger", shape=sketch.shape(first), other=sketch.shape(second))
    return scene.finish(), question, *yes_or_no(sketch, first == big)


def is_left_of(sketch: Sketch) -> Asked:
    left, right = sketch.pick(list(SHAPES), 2)
    colours = sketch.pick(list(COLOURS), 2)
    scene = Scene(sketch, avoid=tuple(colours))
    across = (sketch.rng.integers(14, 34), sketch.rng.integers(50, 70))
    for shape, colour, x in zip((left, right), colours, across, strict=True):
        scene.put(shape, colour, x, sketch.rng.integers(16, 68), sketch.rng.uniform(9, 14))
    first, second = sketch.pick([left, right], 2)
    question = sketch.ask("is left of", shape=sketch.shape(first), other=sketch.shape(second))
    return scene.finish(), question, *yes_or_no(sketch, first == left)


def is_there(sketch: Sketch) -> Asked:
    shapes = sketch.pick(list(SHAPES), 4)
    colours = sketch.pick(list(COLOURS), 3)
    scene = Scene(sketch, avoid=tuple(colours))
    num_shown = int(sketch.rng.integers(1, 4))
    scene.scatter(list(zip(shapes[:num_shown], colours, strict=False)))
    shown = sketch.chance(0.5)
    asked = str(sketch.one(shapes[:num_shown])) if shown else shapes[3]
    return scene.finish(), sketch.ask("is there", shape=sketch.shape(asked)), *yes_or_no(sketch, shown)


def compare_numbers(sketch: Sketch) -> Asked:
    pair = sketch.pick(range(10), 2)
    image = Image.new("RGB", (PICTURE_PX, PICTURE_PX), "white")
    half = PICTURE_PX // 2
    for i, digit in enumerate(pair):
        mask = glyph_mask(sketch.rng, str(digit), half, pen_share=0.4, fonts=sketch.fonts)
        tile = Image.fromarray((255 * (1 - mask)).astype(np.uint8)).convert("RGB")
        image.paste(tile, (i * half, int(sketch.rng.integers(0, half + 1))))
    right, *wrong = sketch.numbers([max(pair), min(pair), *(d for d in range(10) if d not in pair)])
    return image, sketch.ask("larger number"), right, [wrong[0], *sketch.pick(wrong[1:], 3)]


def other_shapes(sketch: Sketch, right: str, wrong: str) -> list[str]:
    """The other shape of the picture and two that are not in it."""
    return [
        sketch.shape(name) for name in [wrong, *sketch.pick([name for name in SHAPES if name not in (right, wrong)], 2)]
    ]


def yes_or_no(sketch: Sketch, value: bool) -> tuple[str, list[str]]:
    yes, no = YES_NO[sketch.language]
    return (yes, [no]) if value else (no, [yes])


# ---- pictures


def draw_glyph(sketch: Sketch, char: str, pen_share: float) -> Image.Image:
    """One digit or letter: mostly dark ink on light paper, sometimes light on dark or in colour."""
    rng = sketch.rng
    pen_share = 0.0 if sketch.held_out == "fonts" else pen_share
    mask = glyph_mask(rng, char, PICTURE_PX, pen_share, sketch.fonts)[..., None]
    mask = mask * (1.0 if rng.random() < 0.5 else rng.uniform(0.6, 1.0))
    ink, paper = rng.uniform(0, 90, 3), rng.uniform(185, 255, 3)
    style = rng.random()
    if style < 0.6:
        ink, paper = np.full(3, ink[0] * (rng.random() < 0.5)), np.full(3, 255 if rng.random() < 0.6 else paper[0])
    elif style < 0.75:
        ink, paper = paper, ink
    elif style < 0.9:
        ink = np.array(sketch.rgb(str(sketch.one(("red", "green", "blue", "purple", "brown", "orange")))))
    picture = paper * (1 - mask) + ink * mask
    return add_noise(rng, picture)


def add_noise(rng: np.random.Generator, picture: np.ndarray) -> Image.Image:
    if rng.random() < 0.4:
        picture = picture + rng.normal(0, rng.uniform(2, 12), picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def draw_pair(scene: "Scene", first: tuple, second: tuple) -> None:
    """Two (shape, colour) in two cells that do not touch in a way that hides either."""
    cells = scene.sketch.pick([(24, 24), (60, 24), (24, 60), (60, 60)], 2)
    for (shape, colour), (x, y) in zip((first, second), cells, strict=True):
        radius = scene.sketch.rng.uniform(9, 17)
        jitter = scene.sketch.rng.integers(-4, 5, 2)
        scene.put(shape, colour, x + jitter[0], y + jitter[1], radius)


def draw_sizes(sketch: Sketch, big: str, small: str) -> "Scene":
    """Two shapes of clearly different size, at opposite corners or side by side."""
    colours = sketch.pick(list(COLOURS), 2)
    scene = Scene(sketch, avoid=tuple(colours))
    radius = sketch.rng.uniform(13, 21)
    sizes = [radius, radius / sketch.rng.uniform(1.6, 2.4)]
    ends = sketch.one((((22, 22), (62, 62)), ((62, 22), (22, 62)), ((22, 42), (62, 42)), ((42, 22), (42, 62))))
    ends = sketch.pick(ends, 2)
    for shape, colour, size, (x, y) in zip((big, small), colours, sizes, ends, strict=True):
        scene.put(shape, colour, x, y, size)
    return scene


class Scene:
    """Coloured shapes on paper; coordinates in pixels of the finished picture."""

    def __init__(self, sketch: Sketch, avoid: tuple[str, ...] = (), paper: tuple[int, int, int] | None = None) -> None:
        self.sketch = sketch
        rng = sketch.rng
        if paper is None:
            level = 255 if rng.random() < 0.5 else int(rng.integers(225, 256))
            paper = (level,) * 3
            if rng.random() < 0.15 and "black" not in avoid:
                paper = tuple(int(v) for v in rng.integers(0, 30, 3))
        self.image = Image.new("RGB", (PICTURE_PX * SCALE,) * 2, paper)
        self.draw = ImageDraw.Draw(self.image)
        self.paper = paper

    def put(self, shape: str, colour: str | tuple[int, int, int], x: float, y: float, radius: float) -> None:
        rgb = self.sketch.rgb(colour) if isinstance(colour, str) else colour
        draw_shape(
            self.draw, shape, x * SCALE, y * SCALE, radius * SCALE, self.sketch.rng.normal(0, 0.1), rgb, self.paper
        )

    def put_anywhere(self, shape: str, colour: str, smallest: float, largest: float) -> None:
        radius = self.sketch.rng.uniform(smallest, largest)
        x, y = self.sketch.rng.uniform(radius + 1, PICTURE_PX - radius - 1, 2)
        self.put(shape, colour, x, y, radius)

    def put_in_cell(self, shape: str, colour: str, cell: int, smallest: float = 7.5, largest: float = 12.5) -> None:
        """`cell` counts the nine thirds of the picture row by row."""
        row, column = divmod(cell, 3)
        radius = self.sketch.rng.uniform(smallest, largest)
        slack = max(13.5 - radius, 0)
        dx, dy = self.sketch.rng.uniform(-slack, slack, 2)
        self.put(shape, colour, 14 + 28 * column + dx, 14 + 28 * row + dy, radius)

    def scatter(self, shapes: list[tuple[str, str]]) -> None:
        for (shape, colour), cell in zip(shapes, self.sketch.pick(range(9), len(shapes)), strict=True):
            self.put_in_cell(shape, colour, cell)

    def finish(self) -> Image.Image:
        image = self.image.reduce(SCALE)
        if self.sketch.chance(0.15):
            image = image.filter(ImageFilter.GaussianBlur(self.sketch.rng.uniform(0.3, 0.9)))
        return add_noise(self.sketch.rng, np.asarray(image, dtype=np.float32))


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, angle: float, rgb: tuple, paper: tuple
) -> None:
    """One filled shape around (x, y)."""
    if shape in ("circle", "ring"):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=rgb)
        if shape == "ring":
            hole = radius * 0.55
            draw.ellipse([x - hole, y - hole, x + hole, y + hole], fill=paper)
        return
    points = SHAPE_POINTS[shape] * radius
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    draw.polygon([(px + x, py + y) for px, py in points @ rotation], fill=rgb)


def _polygon(corners: int, first_angle: float, radii: Sequence[float] = (1.0,)) -> np.ndarray:
    angles = first_angle + np.arange(corners) * 2 * np.pi / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, y], 1) / 16


def _moon() -> np.ndarray:
    outer, inner = np.linspace(0.9, 2 * np.pi - 0.9, 30), np.linspace(2 * np.pi - 1.25, 1.25, 30)
    inner_arc = np.stack([0.35 + 0.85 * np.cos(inner), 0.83 * np.sin(inner)], 1)
    return np.vstack([np.stack([np.cos(outer), np.sin(outer)], 1), inner_arc])


SHAPE_POINTS = {
    "square": _polygon(4, np.pi / 4) * 1.15,
    "triangle": _polygon(3, -np.pi / 2) * 1.1,
    "star": _polygon(10, -np.pi / 2, (1.1, 0.45)),
    "diamond": _polygon(4, 0) * [0.75, 1.1],
    "cross": np.array([(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3),
                       (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]) / 3.0,
    "heart": _heart(),
    "arrow": np.array([(-6, -2), (0, -2), (0, -5), (6, 0), (0, 5), (0, 2), (-6, 2)]) / 6.0,
    "moon": _moon(),
}  # fmt: skip
KINDS = {
    "digit": ask_digit,
    "letter": ask_letter,
    "shape": ask_shape,
    "colour": ask_colour,
    "count": ask_count,
    "place": ask_place,
    "comparison": ask_comparison,
}
KIND_NAMES = tuple(KINDS)
KIND_SHARES = (0.19, 0.09, 0.12, 0.11, 0.12, 0.15, 0.22)


def draw_kind(seed: int, index: int, kinds: Sequence[str]) -> str:
    """One of `kinds`, in their usual shares."""
    shares = np.array([KIND_SHARES[KIND_NAMES.index(kind)] for kind in kinds])
    return str(np.random.default_rng([seed, index, 9]).choice(kinds, p=shares / shares.sum()))


def write_sheet(output: Path, seed: int, per_kind: int = 16) -> None:
    """A contact sheet with one row per kind, and the first picture of each row as a file of its own."""
    output.mkdir(parents=True, exist_ok=True)
    step = PICTURE_PX + 4
    sheet = Image.new("RGB", (per_kind * step, len(KINDS) * step), "grey")
    for row, kind in enumerate(KINDS):
        for column, example in enumerate(draw_examples(per_kind, seed, kind)):
            sheet.paste(example["image"], (column * step, row * step))
            if column == 0:
                example["image"].save(output / f"{kind}.png")
    sheet.save(output / "sheet.png")
