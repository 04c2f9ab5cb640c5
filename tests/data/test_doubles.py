import pytest
from doubles import read, write

from vqa_sft.data.duplicates import DISTANCE, row_groups
from vqa_sft.data.examples import read_examples
from vqa_sft.data.folds import make_folds
from vqa_sft.data.scan import scan_images
from vqa_sft.data.split import strata_of


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """400 rows, of which 120 show an image of another row again: (examples, scan, original of every row, its way)."""
    folder = tmp_path_factory.mktemp("doubles")
    write(folder, num_rows=400)
    examples = read_examples(str(folder / "train.csv")).examples
    truth = {row["id"]: row for row in read(folder / "truth.csv")}
    rows = [truth[row_id] for row_id in examples["id"]]
    return examples, scan_images(examples), [row["original"] for row in rows], [row["way"] for row in rows]


@pytest.mark.medium
def test_no_image_that_was_saved_again_resized_or_cropped_lies_in_two_folds(doubled):
    examples, scan, originals, ways = doubled
    folds = make_folds(strata_of(examples), row_groups(scan, DISTANCE), num_folds=5, seed=0)
    folds_of_original = {}
    for original, way, fold in zip(originals, ways, folds, strict=True):
        if way != "brighter":  # where highlights are cut off, a few are not recognised (docs/measurements)
            folds_of_original.setdefault(original, set()).add(fold)
    assert max(map(len, folds_of_original.values())) == 1


def test_different_images_are_not_joined(doubled):
    _, scan, originals, _ = doubled
    originals_of_group = {}
    for original, group in zip(originals, row_groups(scan, DISTANCE), strict=True):
        originals_of_group.setdefault(group, set()).add(original)
    assert max(map(len, originals_of_group.values())) == 1


def test_without_a_distance_only_equal_files_are_one_image(doubled):
    _, scan, originals, ways = doubled
    groups = row_groups(scan, None)
    first = dict(zip(originals[::-1], groups[::-1], strict=True))
    met = {way for original, way, group in zip(originals, ways, groups, strict=True) if first[original] == group}
    assert len(set(groups)) > len(set(row_groups(scan, DISTANCE))) and "same file" in met
