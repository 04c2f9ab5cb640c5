"""What is shown in place of images to see whether a model looks."""

from collections import Counter

import pytest
from contest import noise, write_csv
from PIL import Image

from vqa_sft.batch.control import BLANK, SWAPPED, blur as blurred, control_of, derange, donors_of, group_rows
from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.errors import InputError


def rows_with(folder, images):
    """A row for each list of names in `images`; a name is the seed of its noise and a letter: "1a" and "1b" are two
    files of one content."""
    for name in {name for of_row in images for name in of_row}:
        noise(folder / f"{name}.png", seed=int(name[:-1]))
    most = max(map(len, images))
    names = [{f"image_{i}": f"{of_row[i]}.png" if i < len(of_row) else "" for i in range(most)} for of_row in images]
    texts = {"question": "Which?", "a": "x", "b": "y", "answer": "a"}
    write_csv(folder / "rows.csv", [{"id": f"r{i}"} | of_row | texts for i, of_row in enumerate(names)])
    columns = {"image": [f"image_{i}" for i in range(most)]}
    return read_examples(str(folder / "rows.csv"), ReadOptions(columns=columns)).examples


@pytest.mark.parametrize("groups", [[*range(40)], [0] * 5 + [1] * 5, [0, 1, 1, 2, 2, 2, 3] * 5, [0, 1], [0, 0, 1, 2]])
def test_every_place_gets_one_of_another_group_the_same_for_a_seed(groups):
    to = derange(groups, seed=1)
    assert sorted(to) == [*range(len(groups))] and to == derange(groups, seed=1)
    assert all(groups[one] != groups[other] for one, other in enumerate(to))
    assert len(groups) < 30 or to != derange(groups, seed=2)


@pytest.mark.parametrize(("groups", "most"), [([0] * 7 + [1, 2], 4), ([0] * 6 + [1] * 3, 6), ([0, 0], 0), ([], 0)])
def test_of_a_group_with_more_than_half_of_the_places_as_many_as_can_be_get_another(groups, most):
    to = derange(groups)
    assert sorted(to) == [*range(len(groups))]
    assert sum(groups[one] != groups[other] for one, other in enumerate(to)) == most


def test_rows_that_share_an_image_are_one_group_also_through_others():
    assert group_rows([["a"], ["b", "c"], ["d"], ["c", "e"], ["e", "a"], [], ["d"]]) == [0, 0, 1, 0, 0, 2, 1]


def test_images_are_swapped_by_their_content_and_rows_without_stay(tmp_path):
    examples = rows_with(tmp_path, [["1a"], ["1b"], ["2a", "3a"], ["4a"], [], ["5a"]])
    donors = donors_of(examples)
    control = control_of(SWAPPED, examples, donors)
    assert donors.keys() == {"r0", "r1", "r2", "r3", "r5"} and Counter(donors.values()).most_common(1)[0][1] == 1
    assert control.changed(examples) == [True, True, True, True, False, True]
    assert control_of(BLANK, examples, {}).changed(examples) == control.changed(examples)
    for row in examples:
        for position, image in enumerate(row["images"]):
            shown = Image.open(control.source(row, position)["path"])
            assert shown.tobytes() != Image.open(image["path"]).tobytes()
    assert {donors["r0"], donors["r1"]}.isdisjoint({0, 1})


def test_rows_of_one_image_alone_cannot_be_swapped(tmp_path):
    with pytest.raises(InputError, match="all rows show the same image"):
        donors_of(rows_with(tmp_path, [["1a"], ["1b"], ["1a"]]))


def test_a_blurred_image_has_its_size_and_nothing_but_rough_colours():
    image = Image.new("RGB", (90, 60), "red")
    image.paste("blue", (45, 0, 90, 60))
    image.paste("white", (10, 10, 14, 14))  # a detail
    found = blurred(image)
    assert found.size == image.size
    left, right = found.getpixel((0, 30)), found.getpixel((89, 30))
    assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]
    assert max(abs(a - b) for a, b in zip(found.getpixel((12, 12)), found.getpixel((18, 12)), strict=True)) < 30
