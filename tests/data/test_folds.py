import random
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from vqa_sft.data.folds import hold_out_rows, make_folds, max_deviation, read_folds, write_folds
from vqa_sft.errors import InputError

TYPE_SHARES = (0.45, 0.2, 0.12, 0.1, 0.06, 0.05, 0.02)


def draw_strata(num_rows, seed):
    """(answer, question type, number of choices) as contests have them: most rows with four choices, few types rare."""
    rng = random.Random(seed)
    choices = rng.choices((4, 2, 3, 5), (90, 4, 3, 3), k=num_rows)
    types = rng.choices("abcdefg", TYPE_SHARES, k=num_rows)
    return [(rng.randrange(number), kind, number) for number, kind in zip(choices, types, strict=True)]


def draw_groups(num_rows, seed):
    """30% of the rows share their image with others: five groups of up to 60 rows, many of 2 to 6."""
    rng = random.Random(seed)
    sizes = [rng.randint(20, 60) for _ in range(5)] if num_rows >= 3_000 else []
    while sum(sizes) < 0.3 * num_rows:
        sizes.append(rng.randint(2, 6))
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    groups += range(len(sizes), len(sizes) + num_rows - len(groups))
    rng.shuffle(groups)
    return groups


def counts_off(keys, folds, num_folds):
    """The largest distance of a fold's count from its share, over all keys; the slow way."""
    return max(
        abs(sum(k == key and f == fold for k, f in zip(keys, folds, strict=True)) - total / num_folds)
        for key, total in Counter(keys).items()
        for fold in range(num_folds)
    )


def folds_of_each(groups, folds):
    found = {}
    for group, fold in zip(groups, folds, strict=True):
        found.setdefault(group, set()).add(fold)
    return found


def folds_of_sklearn(strata, groups, num_folds):
    numbers = np.unique([" ".join(map(str, stratum)) for stratum in strata], return_inverse=True)[1]
    folds = np.full(len(strata), -1)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    for fold, (_, rows) in enumerate(splitter.split(numbers, numbers, groups)):
        folds[rows] = fold
    return folds.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_no_group_lies_in_two_folds_and_every_row_in_one(seed):
    groups = draw_groups(800, seed)
    folds = make_folds(draw_strata(800, seed), groups, 5, seed)
    assert len(folds) == 800 and set(folds) == set(range(5))
    assert all(len(found) == 1 for found in folds_of_each(groups, folds).values())


@pytest.mark.parametrize("num_folds", [2, 3, 5, 10])
def test_without_shared_images_no_stratum_is_off_by_more_than_one_row(num_folds):
    for seed in range(4):
        strata = draw_strata(400, seed)
        folds = make_folds(strata, range(400), num_folds, seed)
        assert counts_off(strata, folds, num_folds) <= 1
        assert all(counts_off([stratum[i] for stratum in strata], folds, num_folds) < 1.5 for i in range(3))
        assert counts_off([None] * 400, folds, num_folds) < 1


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_folds_are_at_least_as_even_as_those_of_scikit_learn():
    strata, groups = draw_strata(10_000, 0), draw_groups(10_000, 0)
    ours = max_deviation(strata, make_folds(strata, groups, 5, 0), [1 / 5] * 5)
    theirs = max_deviation(strata, folds_of_sklearn(strata, groups, 5), [1 / 5] * 5)
    assert all(a <= b + 1e-6 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert ours.stratum <= 1 and ours.part <= 1 and ours.size <= 1


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_folds_of_large_groups_only_are_far_more_even_than_those_of_scikit_learn():
    strata, groups = draw_strata(4_000, 0), [row % 100 for row in range(4_000)]
    ours = max_deviation(strata, make_folds(strata, groups, 5, 0), [1 / 5] * 5)
    theirs = max_deviation(strata, folds_of_sklearn(strata, groups, 5), [1 / 5] * 5)
    assert ours.size < 1e-6 and ours.stratum < theirs.stratum / 2 and ours.part < theirs.part / 2


def test_a_rare_stratum_is_spread_even_where_its_rows_stand_in_large_groups():
    # Five rare rows, each in another group of 3 to 12 rows; no exchange of single rows can spread them afterwards.
    spread = 0
    for seed in range(10):
        rng = random.Random(seed)
        groups = [group for group in range(60) for _ in range(rng.randint(3, 12))] + [*range(60, 120)]
        strata = [(rng.choice("abc"), rng.choice("xyz"), 4) for _ in groups]
        for group in rng.sample(range(60), 5):
            strata[groups.index(group)] = ("rare", "x", 4)
        folds = make_folds(strata, groups, 5, seed)
        rare = [fold for fold, stratum in zip(folds, strata, strict=True) if stratum[0] == "rare"]
        spread += sorted(rare) == [0, 1, 2, 3, 4]
    assert spread == 10  # without regard to rarity: 3


def test_the_deviation_is_that_of_counting_one_by_one():
    rng = random.Random(0)
    strata, folds = draw_strata(200, 0), [rng.randrange(3) for _ in range(200)]
    off = max_deviation(strata, folds, [1 / 3] * 3)
    assert off.stratum == pytest.approx(counts_off(strata, folds, 3))
    assert off.part == pytest.approx(max(counts_off([stratum[i] for stratum in strata], folds, 3) for i in range(3)))
    assert off.size == pytest.approx(counts_off([None] * 200, folds, 3))


def test_a_seed_gives_the_same_folds_again_and_another_seed_another():
    strata, groups = draw_strata(300, 0), draw_groups(300, 0)
    first, again, other = (make_folds(strata, groups, 5, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_folds_do_not_depend_on_what_groups_are_called():
    strata, groups = draw_strata(300, 0), draw_groups(300, 0)
    names = list(range(1_000, 1_000 + len(set(groups))))
    random.Random(1).shuffle(names)
    renamed = [names[group] for group in groups]
    assert make_folds(strata, groups, 5, 0) == make_folds(strata, renamed, 5, 0)
    assert hold_out_rows(strata, groups, 0.1, 0) == hold_out_rows(strata, renamed, 0.1, 0)


def test_folds_are_the_same_on_every_machine_and_stay_so():
    # Predictions made out of fold by one version must still be out of fold for the next.
    strata = [(i * i % 7 % 4, i % 11 // 4, 4 - i % 13 // 12) for i in range(2_000)]
    groups = [i * i % 1_999 for i in range(2_000)]
    assert make_folds(strata[:20], groups[:20], 3, 0) == [1, 1, 0, 1, 1, 1, 2, 0, 0, 1, 0, 2, 0, 0, 2, 1, 2, 2, 0, 2]
    assert zlib.crc32(bytes(make_folds(strata, groups, 5, 0))) == 2489663606
    assert zlib.crc32(bytes(hold_out_rows(strata, groups, 0.1, 0))) == 512011288


@pytest.mark.medium
def test_folds_do_not_depend_on_how_python_hashes():
    script = (
        "from vqa_sft.data.folds import make_folds\n"
        "strata = [('abcd'[i * i % 4], 'xyz'[i % 3], 4) for i in range(200)]\n"
        "print(make_folds(strata, [i % 150 for i in range(200)], 4, 0))"
    )
    printed = [
        subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    assert printed[0].stdout == printed[1].stdout != b""


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.33, 0.5])
def test_a_hold_out_has_its_fraction_of_the_rows_and_of_every_stratum(fraction):
    for seed in range(3):
        strata, groups = draw_strata(1_000, seed), draw_groups(1_000, seed)
        held_out = hold_out_rows(strata, groups, fraction, seed)
        assert all(len(found) == 1 for found in folds_of_each(groups, held_out).values())
        assert abs(sum(held_out) - fraction * 1_000) < 1
        for stratum, total in Counter(strata).items():
            count = sum(yes and other == stratum for yes, other in zip(held_out, strata, strict=True))
            assert abs(count - fraction * total) <= 1


def test_a_hold_out_has_its_share_of_the_rows_with_shared_images():
    groups = draw_groups(2_000, 0)
    held_out = hold_out_rows(draw_strata(2_000, 0), groups, 0.1, 0)
    size = Counter(groups)
    shared = [yes for yes, group in zip(held_out, groups, strict=True) if size[group] > 1]
    assert sum(shared) / len(shared) == pytest.approx(0.1, abs=0.02)


def test_rows_that_are_too_few_to_stratify_are_held_out_all_the_same():
    assert 1 <= sum(hold_out_rows(draw_strata(12, 0), range(12), 0.1, seed=0)) <= 2


def test_too_few_images_are_an_error():
    strata = draw_strata(30, 0)
    with pytest.raises(InputError, match="5 folds need at least 5 different images; got 3"):
        make_folds(strata, [i % 3 for i in range(30)], 5, 0)
    with pytest.raises(InputError, match="num_folds must be at least 2; got 1"):
        make_folds(strata, range(30), 1, 0)
    with pytest.raises(InputError, match="0.1 leaves no row for validation: there are 3 different images in 30 rows"):
        hold_out_rows(strata, [i % 3 for i in range(30)], 0.1, 0)
    with pytest.raises(InputError, match="0.9 leaves no row for training: .* Use a smaller fraction"):
        hold_out_rows(strata, [0] * 30, 0.9, 0)
    with pytest.raises(InputError, match="between 0 and 1; got 1.5"):
        hold_out_rows(strata, range(30), 1.5, 0)


IDS = ["1", "0001", "a,b", 'say "hi"', "two\nlines", "car\rriage", "=1+1", "고양이_01", " spaces ", "x;y", "-1"]


def test_folds_come_back_in_the_order_of_the_data_whatever_the_ids(tmp_path):
    folds = [i % 4 - 1 for i in range(len(IDS))]
    write_folds(tmp_path / "new" / "folds.csv", IDS, folds)
    assert read_folds(tmp_path / "new" / "folds.csv", IDS) == folds
    assert read_folds(tmp_path / "new" / "folds.csv", IDS[::-1]) == folds[::-1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folds.csv"]


def test_a_file_of_folds_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folds.csv"
    write_folds(path, ["x", "y"], [0, 1])
    with pytest.raises(ValueError):
        write_folds(path, ["x", "y", "z"], [1, 0])
    assert read_folds(path, ["x", "y"]) == [0, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp949"])
@pytest.mark.parametrize("separator", [",", ";"])
def test_a_file_that_a_spreadsheet_saved_is_read(tmp_path, encoding, separator):
    rows = [("id", "fold"), *((f"고양이 사진 {i}", str(i % 3)) for i in range(9))]
    text = "\r\n".join(separator.join(row) for row in rows) + "\r\n"
    (tmp_path / "folds.csv").write_bytes(text.encode(encoding))
    assert read_folds(tmp_path / "folds.csv", [row_id for row_id, _ in rows[1:]]) == [i % 3 for i in range(9)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,part\nx,0\ny,1\n", "must have the columns id and fold; found: id, part"),
        ("id,fold\nx,0\ny,1\nx,1\n", r"ids more than once: row x \(1 of 3\)"),
        ("id,fold\nx,0\ny,1.5\n", r"`fold` must be 0, 1, ... or -1; got another in row y \('1.5'\) \(1 of 2\)"),
        ("id,fold\nx,-2\ny,\n", r"got another in rows x \('-2'\), y \(''\)"),
        ("id,fold\nx,0\n", r"not in the file: row y \(1 of 2\)"),
        ("id,fold\nx,0\ny,1\nz,0\n", r"only in the file: row z \(1 of 3\)"),
        ("id,fold\nx,0\nz,1\n", r"not in the file: row y \(1 of 2\).\n  only in the file: row z"),
        ("id,fold\n", r"not in the file: rows x, y \(2 of 2\)"),
        ("", "it is empty"),
        ('id,fold\nx,0\n"y,1\n', "cannot be read as CSV"),
    ],
)
def test_a_file_of_folds_that_cannot_be_used_is_an_error(tmp_path, text, message):
    (tmp_path / "folds.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_folds(tmp_path / "folds.csv", ["x", "y"])


def test_a_file_of_folds_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such file: .*folds.csv"):
        read_folds(tmp_path / "folds.csv", ["x"])


def test_zeros_that_a_spreadsheet_cut_are_named(tmp_path):
    (tmp_path / "folds.csv").write_text("id,fold\n1,0\n2,1\n0,1\n")
    with pytest.raises(InputError, match=r"rows 0001, 0002, 000 \(3 of 3\)(?s:.*)zeros that ids begin with"):
        read_folds(tmp_path / "folds.csv", ["0001", "0002", "000"])


def test_a_part_of_the_data_finds_its_folds_in_a_file_of_all(tmp_path):
    write_folds(tmp_path / "folds.csv", ["x", "y", "z"], [0, 1, 2])
    assert read_folds(tmp_path / "folds.csv", ["z", "x"], whole=False) == [2, 0]
    with pytest.raises(InputError, match=r"not in the file: row w"):
        read_folds(tmp_path / "folds.csv", ["x", "w"], whole=False)
