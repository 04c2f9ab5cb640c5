"""Features from disk against the tower's own: the same rows, the same logits, the same gradients, no image opened."""

import errno
import pickle
from pathlib import Path

import pytest
import torch
from contest import rows_of, write_csv
from datasets import Dataset
from families import save_family
from gradients import assert_same, gradients_of
from PIL import Image
from safetensors.torch import load_file
from scripts import run_script
from trl import ModelConfig

from vqa_sft.batch import collator as collators
from vqa_sft.batch.collator import AnswerCollator, TrainCollator
from vqa_sft.batch.prompts import Prompts
from vqa_sft.data.examples import FEATURES
from vqa_sft.models.families import PACKED
from vqa_sft.models.fast import feature_store, speedups, vision
from vqa_sft.models.load import load_model, load_processor
from vqa_sft.models.scoring import answer_logits
from vqa_sft.predictions.file import read_predictions


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The cache of this test alone."""
    monkeypatch.setattr(feature_store, "cache_path", lambda: tmp_path / "home" / "images.sqlite")
    return tmp_path / "home" / "features"


@pytest.fixture
def opened(monkeypatch):
    """The images that collators opened, in this process."""
    paths = []
    open_image = collators.open_image
    monkeypatch.setattr(collators, "open_image", lambda image: paths.append(image["path"]) or open_image(image))
    return paths


def files(home):
    return sorted(path for path in home.rglob("*") if path.is_file())


def collators_of(model, processor, precision="fp32", blank=None):
    """A collator that opens images and one that has a store, still empty; the tower is sped up and frozen."""
    packer = speedups.pack_rows(model.get_base_model(), precision)
    store = feature_store.open_store(model, processor, packer, precision)
    speedups.speed_up(model)
    return [AnswerCollator(processor, Prompts(), 4, blank, packer, features) for features in (None, store)]


def fill(model, collator, rows, precision="fp32", batch_size=2, num_workers=0):
    feature_store.fill_store(model, collator, [Dataset.from_list(rows, FEATURES)], precision, batch_size, num_workers)


@pytest.fixture
def contest(contest):
    """With images that are all different, so that they are easily counted."""
    for i, path in enumerate(sorted(contest.glob("images/*.png"))):
        drawn_image = Image.open(path)
        drawn_image.putpixel((i, 0), (0, 0, 0))
        drawn_image.save(path)
    return contest


def test_features_from_disk_give_the_logits_and_gradients_of_images(road, opened):
    model, processor, letter_ids, rows = road
    by_pixels, by_features = collators_of(model, processor)
    fill(model, by_features, rows)
    opened.clear()
    pixels, features = by_pixels(rows), by_features(rows)
    assert len(opened) == 5  # rows 0 to 4 show 1, 1, 0, 2 and 1 images
    assert "pixel_values" not in features and not any(name.endswith("window_index") for name in features)
    assert features["ids"] == pixels["ids"]
    for name in features.keys() - {"image_features", "ids"}:
        torch.testing.assert_close(features[name], pixels[name], rtol=0, atol=0, msg=name)
    ours, theirs = (gradients_of(model, batch, letter_ids) for batch in (features, pixels))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
    assert_same(ours, theirs)
    text_only = [rows[2], rows[2] | {"question": "Which?"}]
    assert torch.equal(by_features(text_only)["input_ids"], by_pixels(text_only)["input_ids"])


def test_features_in_half_precision_are_those_that_the_tower_gives(road):
    model, processor, _, rows = road
    by_pixels, by_features = collators_of(model.bfloat16(), processor, "bf16")
    fill(model, by_features, rows, "bf16", batch_size=8)
    features, pixels = by_features(rows), by_pixels(rows)
    assert features["image_features"].dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = answer_logits(model, features), answer_logits(model, pixels)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)
    images = {name: value for name, value in pixels.items() if name == "pixel_values" or name.startswith("image_")}
    by_tower = vision.run_tower(model.get_base_model(), images, "bf16")
    # Which images share a batch changes how a product is cut into blocks, and so the last bit.
    torch.testing.assert_close(features["image_features"], by_tower, atol=0.02, rtol=0.02)


def test_training_orders_and_left_padding_stay_as_they_are(road):
    model, processor, _, rows = road
    processor.tokenizer.padding_side = "left"
    by_pixels, by_features = collators_of(model, processor)
    fill(model, by_features, rows)
    packer, store = by_features.packer, by_features.features
    plain, stored = (
        TrainCollator(processor, Prompts(), 4, seed=3, packer=packer, features=features, supervises_end=True)
        for features in (None, store)
    )
    for name in ("input_ids", "position_ids", "answer_positions", "end_positions", "orders", "answers"):
        assert torch.equal(plain(rows)[name], stored(rows)[name])


def test_a_second_run_computes_nothing_and_opens_no_image(road, opened, capsys, monkeypatch):
    model, processor, _, rows = road
    _, collator = collators_of(model, processor)
    fill(model, collator, rows, num_workers=2)
    assert "features of 4 images, 4 computed, 0 found" in capsys.readouterr().out
    monkeypatch.setattr(feature_store, "run_tower", lambda *args: pytest.fail("the tower ran"))
    _, again = collators_of(model, processor)
    assert again.features.folder == collator.features.folder
    again(rows)
    assert opened  # before it is filled
    opened.clear()
    fill(model, again, rows)
    again(rows)
    assert not opened and "features of 4 images, 0 computed, 4 found" in capsys.readouterr().out
    rows[0]["images"][0] = rows[0]["images"][0] | {"bytes": Path(rows[0]["images"][0]["path"]).read_bytes()}
    again(rows)
    assert not opened  # the same bytes are the same image
    assert len(pickle.dumps(again.features)) < 1000


@pytest.mark.parametrize("damage", ["cut off", "empty", "other bytes", "another image's", "gone"])
def test_a_damaged_file_is_noticed_and_computed_again(road, home, opened, capsys, damage):
    model, processor, _, rows = road
    by_pixels, collator = collators_of(model, processor)
    fill(model, collator, rows, batch_size=1)  # so that the same bits come again
    expected, whole = collator(rows), {path: path.read_bytes() for path in files(home)}
    path, other = list(whole)[:2]
    content = bytearray(whole[path])
    content[-5] ^= 1
    damages = {"cut off": whole[path][:-1], "empty": b"", "other bytes": bytes(content)}
    path.unlink()
    if damage != "gone":
        path.write_bytes(damages.get(damage, whole[other]))
    # Batches that need it are made of pixels.
    opened.clear()
    assert torch.equal(collator(rows)["pixel_values"], by_pixels(rows)["pixel_values"]) and opened
    collator(rows)
    assert capsys.readouterr().out.count("damaged or gone") == 1
    fill(model, collator, rows, batch_size=1)
    assert "1 computed, 3 found" in capsys.readouterr().out
    assert files(home) == list(whole)
    assert torch.equal(collator(rows)["image_features"], expected["image_features"])


def test_a_disk_that_does_not_answer_now_loses_nothing(road, home, monkeypatch):
    model, processor, _, rows = road
    _, collator = collators_of(model, processor)
    fill(model, collator, rows)
    stored = files(home)

    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(feature_store, "safe_open", fails)
    assert "image_features" not in collator(rows)
    assert files(home) == stored


def test_a_start_finds_files_that_are_cut_off_or_stand_in_the_wrong_place(road, home, capsys):
    model, processor, _, rows = road
    _, collator = collators_of(model, processor)
    fill(model, collator, rows, batch_size=1)
    whole = {path: load_file(path)["features"].clone() for path in files(home)}
    first, second, third, fourth = whole
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    third.write_bytes(fourth.read_bytes())
    fill(model, collator, rows, batch_size=1)
    assert "3 computed, 1 found" in capsys.readouterr().out
    assert files(home) == list(whole)
    assert all(torch.equal(load_file(path)["features"], features) for path, features in whole.items())


def test_a_writer_that_is_killed_leaves_nothing_half(home, monkeypatch):
    store = feature_store.FeatureStore(home / "tower")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_store.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write("ab12", torch.ones(4, 8), torch.tensor([1, 4, 4]))
    assert not files(home) and store.num_bytes("ab12") == 0


def test_weights_limits_and_precision_have_folders_of_their_own(families, tmp_path):
    folders = [families("qwen2_5_vl"), save_family("qwen2_5_vl", tmp_path / "other", seed=1)]
    models = [load_model(ModelConfig(model_name_or_path=str(folder), dtype=None), "fp32") for folder in folders]
    processor, small = load_processor(folders[0]), load_processor(folders[0], min_pixels=784, max_pixels=3136)
    keys = [feature_store.tower_key(*how) for how in ((models[0], processor, "fp32"), (models[1], processor, "fp32"))]
    keys += [feature_store.tower_key(models[0], small, "fp32"), feature_store.tower_key(models[0], processor, "bf16")]
    assert len(set(keys)) == 4
    again = load_model(ModelConfig(model_name_or_path=str(folders[0]), dtype=None), "fp32")
    assert feature_store.tower_key(again, load_processor(folders[0]), "fp32") == keys[0]


@pytest.mark.parametrize(
    "family", [name if "qwen3_5" not in name else pytest.param(name, marks=pytest.mark.slow) for name in PACKED]
)
def test_training_and_prediction_with_features_end_as_without(
    families, contest, sft, tmp_path, home, opened, capsys, family
):
    values = {"validation_fraction": 0.25, "num_train_epochs": 2}
    plain = sft(families(family), tmp_path / "plain", **values)
    opened.clear()
    run = sft(families(family), tmp_path / "run", cache_image_features=True, **values)
    assert len(opened) == len(files(home)) > 10  # once each, over two epochs and three evaluations
    weights, expected = (load_file(folder / "adapter_model.safetensors") for folder in (run, plain))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-4, rtol=1e-3)
    opened.clear()
    submissions = [predict(folder, contest, tmp_path / f"{folder.name}.csv") for folder in (run, plain)]
    assert len(opened) == 24  # those of the run without features
    assert submissions[0][0] == submissions[1][0]
    for ours, theirs in zip(*(logits for _, logits in submissions), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    opened.clear()
    rotated = [
        predict(folder, contest, tmp_path / f"{folder.name}.csv", "--orders", "rotations") for folder in (run, plain)
    ]
    assert len(opened) == 24  # once, whatever the orders
    for ours, theirs, identity in zip(*(logits for _, logits in (*rotated, submissions[0])), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4) != pytest.approx(identity, abs=1e-4)
    assert "0 computed" in capsys.readouterr().out


def predict(run, contest, output, *more):
    run_script("predict", "--run", run, "--data", contest / "test.csv", "--output", output, "--num_workers", 0, *more)
    return output.read_text(), read_predictions(output.with_suffix(".parquet")).choice_logits


def test_a_image_that_is_blanked_has_features_too(families, contest, sft, tmp_path, opened):
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=1, cache_image_features=True)
    plain = sft(families("qwen2_5_vl"), tmp_path / "plain", max_steps=1)
    (contest / "images/003.png").write_bytes(b"no image")
    (contest / "images/004.png").unlink()
    opened.clear()
    ours = predict(run, contest, tmp_path / "ours.csv", "--on_bad_row", "guess")
    assert not opened
    theirs = predict(plain, contest, tmp_path / "theirs.csv", "--on_bad_row", "guess")
    assert ours[0] == theirs[0]
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(theirs[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("trouble", ["full while writing", "full before", "no folder"])
def test_a_disk_that_takes_no_features_costs_time_and_no_run(
    families, contest, sft, tmp_path, home, monkeypatch, capsys, trouble
):
    if trouble == "full while writing":
        write_bytes = Path.write_bytes

        def full(path, content):
            if path.suffix == ".tmp" and len(files(home)) >= 8:
                write_bytes(path, content[:50])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write_bytes(path, content)

        monkeypatch.setattr(Path, "write_bytes", full)
    elif trouble == "full before":
        monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30 + 100}))
    else:
        home.parent.mkdir()
        home.write_text("a file where the folder should be")
    run = sft(families("qwen2_5_vl"), tmp_path / "run", max_steps=2, cache_image_features=True)
    printed = capsys.readouterr()
    assert printed.out.count("Speed: images go through the tower every time") == 1
    assert "Traceback" not in printed.out + printed.err
    assert (run / "run.json").is_file() and not [path for path in files(home) if path != home]
    assert len(predict(run, contest, tmp_path / "out.csv")[1]) == 24


def test_what_cannot_be_cached_is_refused(families, contest, sft, tmp_path, capsys):
    def refused(says, **values):
        with pytest.raises(SystemExit) as stop:
            sft(values.pop("model", families("qwen2_5_vl")), tmp_path / "run", cache_image_features=True, **values)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and "Traceback" not in error, error

    refused("remove streaming", streaming=True, max_steps=1)
    refused("remove use_peft: false", use_peft=False)
    refused("remove fast: false", fast=False)
    refused("this model is llava", model=families("llava"))
    refused("needs a vision tower that stays as it is", lora_target_modules="all-linear")


def test_images_are_computed_once_however_many_rows_show_them(families, contest, sft, tmp_path, home, opened):
    rows = [row | {"path": f"images/{i % 5:03d}.png"} for i, row in enumerate(rows_of(contest))]
    write_csv(contest / "train.csv", rows)
    (contest / "images/001.png").write_bytes((contest / "images/000.png").read_bytes())
    sft(families("qwen3_vl"), tmp_path / "run", max_steps=1, cache_image_features=True, dataloader_num_workers=0)
    assert len(opened) == len(files(home)) == 4


def test_the_estimate_of_the_disk_space_is_what_the_features_take(road, home, capsys):
    model, processor, _, rows = road
    _, collator = collators_of(model, processor)
    data = Dataset.from_list(rows, FEATURES).select_columns(["id", "images"])
    rows = torch.utils.data.ConcatDataset([data])
    config = model.get_base_model().config
    feature_store.fill_store(model, collator, [data], "fp32", 4, 0)
    for digest, place in feature_store._plan(collator, config, rows, "fp32")[0].items():
        features, _ = collator.features.read(digest)
        assert feature_store._num_values(collator, config, rows, place) == features.numel()


def test_a_image_that_nobody_checked_is_named_when_it_cannot_be_read(families, contest, sft, tmp_path, capsys):
    (contest / "images/007.png").write_bytes(b"no image")
    for workers in (0, 2):
        values = {"check_images": False, "dataloader_num_workers": workers, "cache_image_features": True}
        with pytest.raises(SystemExit) as stop:
            sft(families("qwen2_5_vl"), tmp_path / "run", **values)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "the image of row row_007" in error and "Traceback" not in error
