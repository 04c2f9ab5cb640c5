import os

import datasets
import pytest
from contest import noise, rows_of, write_csv

from vqa_sft.data import scan
from vqa_sft.data.examples import read_examples, stream_examples
from vqa_sft.data.folds import write_folds
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.split import LEFT_OUT, TRAIN, VALIDATION, choose_parts, read_parts, select, write_parts
from vqa_sft.errors import InputError


def read(contest, name="train.csv"):
    return read_examples(str(contest / name))


@pytest.fixture
def doubled(contest):
    """24 different images, of which the last twelve are the first twelve saved again, smaller and as JPEG."""
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


def test_a_held_out_image_is_not_trained_on_even_when_it_was_saved_again(doubled):
    for seed in range(4):
        (parts,) = choose_parts([read(doubled)], validation_fraction=0.25, duplicate_distance=6, seed=seed)
        assert parts[:12] == parts[12:] and 4 <= parts.count(VALIDATION) <= 8


def test_unchecked_images_are_told_apart_by_their_files(contest):
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


def test_bad_images_stop_a_run_or_are_left_out_and_named(contest, capsys):
    (contest / "images/003.png").write_bytes(b"")
    (contest / "images/005.png").unlink()
    with pytest.raises(InputError, match="row_003.*\n.*row_005|row_005.*\n.*row_003"):
        choose_parts([read(contest)])
    loaded = [read(contest)]
    parts = choose_parts(loaded, on_bad_row="skip")
    assert [i for i, part in enumerate(parts[0]) if part == LEFT_OUT] == [3, 5]
    assert len(select(loaded, parts, TRAIN)) == 22
    printed = capsys.readouterr().out
    assert "the image file is empty: row row_003" in printed and "the image is missing: row row_005" in printed


def test_a_run_keeps_its_rows_and_refuses_others(contest, tmp_path):
    loaded = [read(contest), read(contest)]
    parts = choose_parts(loaded, on_bad_row="skip")
    assert parts == [[TRAIN] * 24, [VALIDATION] * 24]
    parts[0][7] = LEFT_OUT
    write_parts(tmp_path, loaded, parts)
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == "part,id,texts,label,images,pool,digest"
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


def test_a_start_decodes_every_image_once_and_the_next_start_none(contest, monkeypatch, tmp_path):
    seen = []
    examine = scan.examine
    monkeypatch.setattr(scan, "examine", lambda image, **how: seen.append(image["path"]) or examine(image, **how))
    monkeypatch.setattr(scan, "cache_path", lambda: tmp_path / "images.sqlite")
    validation = [row | {"id": f"v_{row['id']}"} for row in rows_of(contest)[:6]]
    write_csv(contest / "validation.csv", validation)
    for _ in range(2):
        choose_parts([read(contest), read(contest, "validation.csv")], validation_fraction=0.25)
        assert len(seen) == len(set(seen)) == 24  # also those that training and validation share


def changed_rows(contest, place, **cells):
    """train.csv with other cells in a row."""
    rows = rows_of(contest)
    rows[place] |= cells
    write_csv(contest / "train.csv", rows)


def begin(contest, folder, **how):
    loaded = [read(contest)]
    parts = choose_parts(loaded, **how)
    folder.mkdir(exist_ok=True)
    write_parts(folder, loaded, parts)
    return parts


def resume(contest, folder, **how):
    loaded = [read(contest)]
    choose_parts(loaded, **how)
    return read_parts(folder, loaded)


def test_a_resume_over_changed_data_is_refused_with_what_changed(contest, tmp_path):
    how = {"validation_fraction": 0.25}
    parts = begin(contest, tmp_path / "run", **how)
    assert resume(contest, tmp_path / "run", **how) == parts
    before = (contest / "train.csv").read_text(), (contest / "images/003.png").read_bytes()
    labels = [row["answer"] for row in rows_of(contest)]
    for place in range(7):
        changed_rows(contest, place, answer="abcd"[("abcd".index(labels[place]) + 1) % 4])
    shown = "labels of rows row_000, row_001, row_002, row_003, row_004, ... .7 of 24."
    with pytest.raises(InputError, match=f"the data have changed since the run in .* began: {shown}"):
        resume(contest, tmp_path / "run", **how)
    (contest / "train.csv").write_text(before[0])
    changed_rows(contest, 5, question="Which colour has the circle?")
    changed_rows(contest, 6, d="mauve")
    noise(contest / "images/003.png", 3)
    with pytest.raises(InputError, match=r"texts of rows row_005, row_006 \(2 of 24\); images of row row_003"):
        resume(contest, tmp_path / "run", **how)
    noise(contest / "images/003.png", 3)
    (contest / "train.csv").write_text(before[0])
    with pytest.raises(InputError, match="began: images of row row_003"):
        resume(contest, tmp_path / "run", **how)
    resume(contest, tmp_path / "run", check_images=False, **how)  # nobody looks at them
    (contest / "images/003.png").write_bytes(before[1])
    assert resume(contest, tmp_path / "run", **how) == parts


def test_images_that_moved_and_were_touched_are_the_same(contest, tmp_path):
    parts = begin(contest, tmp_path / "run")
    moved = contest.rename(tmp_path / "elsewhere")
    (moved / "images").rename(moved / "photos")
    write_csv(moved / "train.csv", [row | {"path": row["path"].replace("images", "photos")} for row in rows_of(moved)])
    for path in (moved / "photos").iterdir():
        os.utime(path, (0, 0))
    assert resume(moved, tmp_path / "run") == parts


def test_other_soft_targets_are_other_labels(contest, tmp_path):
    rows = [row | {"targets": "[0.7, 0.1, 0.1, 0.1]"} for row in rows_of(contest)]
    write_csv(contest / "train.csv", rows)

    def read_targets():
        return [read_examples(str(contest / "train.csv"), ReadOptions(columns={"targets": "targets"}))]

    loaded = read_targets()
    write_parts(tmp_path, loaded, choose_parts(loaded))
    read_parts(tmp_path, read_targets())
    changed_rows(contest, 4, targets="[0.4, 0.4, 0.1, 0.1]")
    with pytest.raises(InputError, match=r"began: labels of row row_004 \(1 of 24\)"):
        read_parts(tmp_path, read_targets())


def test_only_the_rows_that_are_scored_are_compared_for_a_prediction(contest, tmp_path):
    (parts,) = begin(contest, tmp_path / "run", validation_fraction=0.25)
    trained, validated = parts.index(TRAIN), parts.index(VALIDATION)
    before = (contest / "train.csv").read_text()
    changed_rows(contest, trained, question="Another?")
    assert read_parts(tmp_path / "run", [read(contest)], part=VALIDATION) == [parts]
    (contest / "train.csv").write_text(before)
    changed_rows(contest, validated, question="Another?")
    with pytest.raises(InputError, match=f"texts of row row_{validated:03d} .1 of {parts.count(VALIDATION)}.*Give it"):
        read_parts(tmp_path / "run", [read(contest)], "Give it.", VALIDATION)
    (contest / "train.csv").write_text(before)
    noise(contest / f"images/{validated:03d}.png", 1)
    with pytest.raises(InputError, match=f"images of row row_{validated:03d}"):
        read_parts(tmp_path / "run", [read(contest)], "Give it.", VALIDATION)


def test_rows_of_an_earlier_version_are_told_apart_by_their_ids_alone(contest, tmp_path):
    (parts,) = begin(contest, tmp_path / "run")
    lines = (tmp_path / "run" / "rows.csv").read_text().splitlines()
    old = [",".join(line.split(",")[:2]) for line in lines]
    assert old[0] == "part,id"
    (tmp_path / "run" / "rows.csv").write_text("\n".join(old) + "\n")
    changed_rows(contest, 0, question="Another?")
    assert resume(contest, tmp_path / "run") == [parts]


def test_the_first_rows_of_a_stream_are_compared(contest, tmp_path):
    def stream():
        return [stream_examples(str(contest / "train.csv"))]

    write_parts(tmp_path, stream(), [None])
    assert read_parts(tmp_path, stream()) == [None]
    changed_rows(contest, 2, question="Another?")
    with pytest.raises(InputError, match="the first 24 rows of .*train.csv have changed since the run in"):
        read_parts(tmp_path, stream())
