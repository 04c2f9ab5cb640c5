import io

import imagehash
import numpy as np
import pytest
from doubles import draw
from PIL import Image

from vqa_sft import duplicates
from vqa_sft.duplicates import DISTANCE, near_pairs, row_groups
from vqa_sft.images import MINIATURE_PX, examine
from vqa_sft.scan import Scan


def facts(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return examine({"bytes": buffer.getvalue(), "path": None})


def scan_of(*pictures, rows=None):
    pictures = [facts(picture) if isinstance(picture, Image.Image) else picture for picture in pictures]
    return Scan(pictures, rows or [(i,) for i in range(len(pictures))], [""] * len(pictures))


def test_the_hash_of_a_whole_picture_is_that_of_imagehash():
    for seed in range(5):
        picture = facts(draw(seed))
        grey = np.frombuffer(picture.miniature[: MINIATURE_PX**2], np.uint8).reshape(MINIATURE_PX, MINIATURE_PX)
        reference = imagehash.phash(Image.fromarray(grey)).hash.ravel()
        (ours,) = duplicates._hash([picture], 1)[0].ravel()
        assert (np.unpackbits(np.frombuffer(ours.tobytes(), np.uint8)) == reference).all()


def test_rows_that_are_linked_by_way_of_others_are_one_group():
    one, other = draw(1), draw(2)
    again = facts(one, "JPEG", quality=60)
    rows = [(0,), (1,), (2, 1), (3,), ()]
    scan = scan_of(one, other, again, draw(3), rows=rows)
    assert row_groups(scan, DISTANCE) == [0, 0, 0, 1, 2]
    assert row_groups(scan, None) == [0, 1, 1, 2, 3]


def test_flipped_and_turned_pictures_are_different_pictures():
    picture = draw(4)
    turned = [picture.transpose(how) for how in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180)]
    assert row_groups(scan_of(picture, *turned), DISTANCE) == [0, 1, 2]


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_pairs_between_two_sets_tell_equal_files_from_nearly_equal_ones(quality):
    picture, left = draw(5), draw(6)
    width, height = left.size
    crop = left.crop((0, 0, round(width * 0.85), round(height * 0.85)))
    train = scan_of(facts(picture), draw(7), left)
    test = scan_of(facts(picture, "JPEG", quality=quality), facts(picture), crop)
    pairs = near_pairs(test, train, DISTANCE)
    assert [(ours, theirs) for ours, theirs, _ in pairs] == [(0, 0), (1, 0), (2, 2)]
    assert pairs[1][2] == 0 and pairs[0][2] >= 1 and pairs[2][2] >= 1
    assert near_pairs(test, train, None) == [(1, 0, 0)]


def test_bad_pictures_link_nothing():
    bad = examine({"bytes": b"no picture", "path": None})
    assert row_groups(scan_of(bad, bad), DISTANCE) == [0, 1]
