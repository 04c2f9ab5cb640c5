import datasets
import numpy as np
import pytest
from conftest import write_csv
from PIL import Image
from test_data import rows_of

from vqa_sft import scan
from vqa_sft.data import read_examples, stream_examples
from vqa_sft.errors import InputError
from vqa_sft.folds import write_folds
from vqa_sft.split import LEFT_OUT, TRAIN, VALIDATION, choose_parts, read_parts, select, write_parts


def read(contest, name="train.csv"):
    return read_examples(str(contest / name))


def noise(path, seed, size=(120, 90)):
    """A picture of its own: coarse noise, so that no two of them are alike."""
    values = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def doubled(contest):
    """24 different pictures, of which the last twelve are the first twelve saved again, smaller and as JPEG."""
    rows = rows_of(contest)
    for i, row in enumerate(rows):
        row["path"] = f"images/{i:03d}.jpg" if i >= 12 else row["path"]
        noise(contest / row["path"], i % 12, size=(90, 68) if i >= 12 else (120, 90))
    write_csv(contest / "train.csv", rows)
    return contest


def test_every_row_is_trained_on_where_nothing_is_held_out(contest):
    loaded = [read(contest)]
    parts = choose_parts(loaded)
    assert parts == [[TRAIN] * 24]
    assert select(loaded, parts, TRAIN) is loaded[0].examples and select(loaded, parts, VALIDATION) is None


def test_a_held_out_picture_is_not_trained_on_even_when_it_was_saved_again(doubled):
    for seed in range(4):
        (parts,) = choose_parts([read(doubled)], validation_fraction=0.25, duplicate_distance=6, seed=seed)
        assert parts[:12] == parts[12:] and 4 <= parts.count(VALIDATION) <= 8


def test_unchecked_pictures_are_told_apart_by_their_files(contest):
    rows = [row | {"path": f"images/{i % 8:03d}.png"} for i, row in enumerate(rows_of(contest))]
    write_csv(contest / "train.csv", rows)
    (contest / "images/000.png").write_bytes(b"nobody looks")
    (parts,) = choose_parts([read(contest)], check_images=False, validation_fraction=0.25)
    assert parts[:8] == parts[8:16] == parts[16:] and VALIDATION in parts


def test_a_folds_file_says_what_is_validated_on(contest, tmp_path):
    loaded = [read(contest)]
    write_folds(tmp_path / "folds.csv", loaded[0].examples["id"][:], [i % 3 for i in range(24)])
    (parts,) = choose_parts(loaded, folds_file=str(tmp_path / "folds.csv"), fold=1)
    assert [i for i, part in enumerate(parts) if part == VALIDATION] == list(range(1, 24, 3))
    with pytest.raises(InputError, match="no row is in fold 3 of .*; it has the folds 0, 1, 2"):
        choose_parts(loaded, folds_file=str(tmp_path / "folds.csv"), fold=3)


def test_bad_pictures_stop_a_run_or_are_left_out_and_named(contest, capsys):
    (contest / "images/003.png").write_bytes(b"")
    (contest / "images/005.png").unlink()
    with pytest.raises(InputError, match="row_003.*\n.*row_005|row_005.*\n.*row_003"):
        choose_parts([read(contest)])
    loaded = [read(contest)]
    parts = choose_parts(loaded, on_bad_image="skip")
    assert [i for i, part in enumerate(parts[0]) if part == LEFT_OUT] == [3, 5]
    assert len(select(loaded, parts, TRAIN)) == 22
    printed = capsys.readouterr().out
    assert "the picture file is empty: row row_003" in printed and "the picture is missing: row row_005" in printed


def test_a_run_keeps_its_rows_and_refuses_others(contest, tmp_path):
    loaded = [read(contest), read(contest)]
    parts = choose_parts(loaded, on_bad_image="skip")
    assert parts == [[TRAIN] * 24, [VALIDATION] * 24]
    parts[0][7] = LEFT_OUT
    write_parts(tmp_path, loaded, parts)
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == "part,id,digest"
    assert (tmp_path / "rows.csv").read_text().splitlines()[1].startswith("train,row_000,")
    assert read_parts(tmp_path, loaded) == parts
    write_csv(contest / "train.csv", rows_of(contest)[1:])
    with pytest.raises(InputError, match="began with 48 rows, and the data have 47"):
        read_parts(tmp_path, [read(contest), loaded[1]])


def test_a_fold_that_holds_every_row_leaves_nothing_to_train_on(contest, tmp_path):
    write_folds(tmp_path / "folds.csv", [f"row_{i:03d}" for i in range(24)], [0] * 24)
    with pytest.raises(InputError, match="no row of .* is left to train on"):
        choose_parts([read(contest)], folds_file=str(tmp_path / "folds.csv"), fold=0)


def test_a_stream_has_no_parts(contest):
    loaded = [stream_examples(str(contest / "train.csv")), read(contest)]
    parts = choose_parts(loaded)
    assert parts == [None, [VALIDATION] * 24]
    assert isinstance(select(loaded, parts, TRAIN), datasets.IterableDataset)
    assert len(select(loaded, parts, VALIDATION)) == 24
    write_parts(contest, loaded, parts)
    assert read_parts(contest, loaded) == parts


def test_a_start_decodes_every_picture_once_and_the_next_start_none(contest, monkeypatch, tmp_path):
    seen = []
    examine = scan.examine
    monkeypatch.setattr(scan, "examine", lambda image, **how: seen.append(image["path"]) or examine(image, **how))
    monkeypatch.setattr(scan, "cache_path", lambda: tmp_path / "pictures.sqlite")
    validation = [row | {"id": f"v_{row['id']}"} for row in rows_of(contest)[:6]]
    write_csv(contest / "validation.csv", validation)
    for _ in range(2):
        choose_parts([read(contest), read(contest, "validation.csv")], validation_fraction=0.25)
        assert len(seen) == len(set(seen)) == 24  # also those that training and validation share
