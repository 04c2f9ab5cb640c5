"""Problems between rows of a classification: images under two classes, classes with one row, or none. No torch."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

from vqa_sft.data.examples import CLASS, Loaded
from vqa_sft.data.scan import Scan
from vqa_sft.data.settle_classes import count_rows
from vqa_sft.images import ImageFacts


def find_class_problems(
    loaded: Loaded, scan: Scan, images: Sequence[ImageFacts], groups: Sequence[int] | None, training: Loaded | None
) -> None:
    """Add what is wrong with the classes of the rows; those of training are looked at when `training` is None.

    `images` are the different images of `scan`, and `groups` has one number for each, the same for those that are
    nearly the same; None: nobody looked.
    """
    assert loaded.classes is not None
    names = loaded.classes.names
    found, ids = loaded.examples[CLASS][:], loaded.examples["id"][:]
    group_of = {image.digest: ("group", group) for image, group in zip(images, groups or (), strict=False)}
    exact = [[scan.images[number].digest for number in numbers] for numbers in scan.of_row]
    near = [[group_of.get(digest) for digest in of_row if digest is not None] for of_row in exact]
    equal = _others(exact, found)
    for kind, others in (("classes_differ", equal), ("near_classes_differ", _others(near, found))):
        for row, other in others.items():
            if kind == "near_classes_differ" and row in equal:
                continue
            detail = f"{names[found[row]]!r:.60}, and {names[found[other]]!r:.60} in {ids[other]}"
            loaded.problems.add(ids[row], loaded.numbers[row], kind, detail)
    counts = count_rows(loaded.classes, (training or loaded).examples[CLASS])
    kind, wanted = ("only_of_class", 1) if training is None else ("class_not_trained", 0)
    for row, place in enumerate(found):
        if place is not None and counts[place] == wanted:
            loaded.problems.add(ids[row], loaded.numbers[row], kind, f"{names[place]!r:.60}")


def _others(keys: Sequence[Sequence[Hashable]], found: Sequence[int | None]) -> dict[int, int]:
    """Row -> the first row that shares a key with it and has another class."""
    first: dict[Hashable, dict[int, int]] = defaultdict(dict)  # key -> class -> its first row
    for row, place in enumerate(found):
        for key in keys[row] if place is not None else ():
            if key is not None:
                first[key].setdefault(place, row)
    others = {}
    for row, place in enumerate(found):
        rows = [other for key in keys[row] for of, other in first.get(key, {}).items() if of != place]
        if rows and place is not None:
            others[row] = min(rows)
    return others
