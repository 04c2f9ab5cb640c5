"""Does a model look? What rows show in place of their own images: nothing, those of another row, or rough colours.

    original    the images as they are
    blank       white squares
    swapped     each image of a row is one of another row, the same in every prediction of these rows
    blurred     so strongly that BLOBS x BLOBS colours are left, at the size of the image

No torch.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from vqa_sft.errors import InputError
from vqa_sft.images import digest_of

if TYPE_CHECKING:  # it takes a second to load
    from datasets import Dataset

ORIGINAL, BLANK, SWAPPED, BLURRED = KINDS = ("original", "blank", "swapped", "blurred")
BLOBS = 2  # of a blurred image, along each side


@dataclass(frozen=True)
class Control:
    """What a collator shows of the images of some rows; `donors` says of swapped rows, by id, the number of the row
    whose images they show, and `images` holds those."""

    kind: str
    donors: dict[str, int] = field(default_factory=dict)
    images: "Dataset | None" = None

    def source(self, row: dict, position: int) -> dict:
        """The {bytes, path} that is opened for an image of a row."""
        if row["id"] not in self.donors:
            return row["images"][position]
        given = self.images[self.donors[row["id"]]]["images"]
        return given[position % len(given)]

    def changed(self, examples: "Dataset") -> list[bool]:
        """Whether each row shows something else than its images; one without images does not."""
        if self.kind == SWAPPED:
            return [row_id in self.donors for row_id in examples["id"]]
        return [bool(images) for images in examples["images"]]


def control_of(kind: str, examples: "Dataset", donors: dict[str, int]) -> Control | None:
    """The control of this kind for these rows, with `donors_of` them where images are swapped; None: as they are."""
    if kind != SWAPPED:
        return None if kind == ORIGINAL else Control(kind)
    return Control(kind, donors, examples.select_columns(["images"]))


def donors_of(examples: "Dataset", seed: int = 0) -> dict[str, int]:
    """Row id -> number of the row whose images it shows in place of its own, without rows that have no image and rows
    for which none with other images is left. Every image is read, to compare contents. Raises InputError where all
    rows show the same image."""
    with_images = [number for number, images in enumerate(examples["images"]) if images]
    groups = group_rows([[_key(image) for image in examples[number]["images"]] for number in with_images])
    donors = [with_images[place] for place in derange(groups, seed)]
    group_of = dict(zip(with_images, groups, strict=True))
    ids, pairs = examples["id"][:], zip(with_images, donors, strict=True)
    found = {ids[own]: donor for own, donor in pairs if group_of[own] != group_of[donor]}
    if with_images and not found:
        raise InputError("--images swapped: all rows show the same image. Leave swapped out.")
    return found


def _key(image: dict) -> Any:
    return digest_of(image) or image["path"]


def group_rows(keys: Sequence[Sequence[Any]]) -> list[int]:
    """A number for each row, the same for rows that share an image, be it through other rows."""
    from scipy.sparse import coo_array  # with which the help of a command would be slow
    from scipy.sparse.csgraph import connected_components

    numbers: dict[Any, int] = {}  # of images, after those of the rows
    edges = [(row, numbers.setdefault(key, len(keys) + len(numbers))) for row, of in enumerate(keys) for key in of]
    size = len(keys) + len(numbers)
    rows, images = zip(*edges, strict=True) if edges else ((), ())
    graph = coo_array(([1] * len(edges), (rows, images)), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(keys)].tolist()


def derange(groups: Sequence[int], seed: int = 0) -> list[int]:
    """A permutation of the places that gives as many as can be one of another group: places in a random order, those
    of a group together, moved on by the size of the largest group, or of all others where these are fewer."""
    rng = random.Random(seed)
    sizes = Counter(groups)
    largest = max(sizes.values(), default=0)
    drawn = {group: rng.random() for group in sizes}
    order = sorted(range(len(groups)), key=lambda place: (drawn[groups[place]], groups[place], rng.random()))
    step = min(largest, len(groups) - largest)
    moved = order[step:] + order[:step]
    to = dict(zip(order, moved, strict=True))
    return [to[place] for place in range(len(groups))]


def blur(image: Image.Image) -> Image.Image:
    """Nothing but rough colours, at the size of the image."""
    return image.resize((BLOBS, BLOBS), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
