"""Features of images: each family's own numbers, each image once, all of them kept."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from contest import noise, write_csv
from encoders import save_encoder
from PIL import Image
from quantised import save_quantised
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vqa_sft.data.examples import read_examples
from vqa_sft.data.options import ReadOptions
from vqa_sft.data.scan import scan_images
from vqa_sft.errors import InputError
from vqa_sft.models import image_features
from vqa_sft.models.encoders import NamedEncoder, TowerEncoder, load_encoder, prepare
from vqa_sft.models.image_features import row_features
from vqa_sft.tiny import TINY_PATH

CPU = [torch.device("cpu")]
KINDS = ("CLIP", "Siglip", "Dinov2", "DINOv3ViT", "ConvNext", "ViT")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """The cache of this test alone."""
    monkeypatch.setattr(image_features, "cache_path", lambda: tmp_path / "home" / "images.sqlite")
    return tmp_path / "home" / "pooled"


@pytest.fixture
def images(tmp_path):
    for i, size in enumerate([(64, 64), (90, 60), (60, 90)]):
        noise(tmp_path / f"{i}.png", i, size)
    return [Image.open(tmp_path / f"{i}.png") for i in range(3)]


def encode(encoder, images):
    return encoder.encode(prepare(encoder.processor, encoder.is_batched, images))


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_named_encoder_are_those_of_plain_transformers(tmp_path, images, kind):
    folder = save_encoder(kind, tmp_path / kind)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    expected = []
    for image in images:  # one by one
        pixels = processor(images=image, return_tensors="pt").pixel_values
        with torch.no_grad():
            if kind in ("CLIP", "Siglip"):
                expected.append(model.get_image_features(pixel_values=pixels).pooler_output[0])
            elif kind == "ViT":
                expected.append(model(pixel_values=pixels).last_hidden_state[0].mean(dim=0))
            else:
                expected.append(model(pixel_values=pixels).pooler_output[0].flatten())
    encoder = load_encoder(str(folder), "fp32")
    assert isinstance(encoder, NamedEncoder) and encoder.takes_mean == (kind == "ViT")
    torch.testing.assert_close(encode(encoder, images), torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next", "smolvlm", "gemma4"])
def test_features_of_a_tower_are_the_mean_of_the_tokens_that_the_whole_model_sees(families, images, family):
    folder = families(family)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = []
    for image in images:
        inputs = processor.image_processor(images=[image], return_tensors="pt")
        inputs.pop("num_soft_tokens_per_image", None)
        with torch.no_grad():
            tokens = model.get_image_features(**inputs).pooler_output
        expected.append(torch.cat([part.reshape(-1, part.shape[-1]) for part in tokens]).mean(dim=0))
    encoder = load_encoder(folder, "fp32")
    assert isinstance(encoder, TowerEncoder) and encoder.is_batched == (family != "smolvlm")
    torch.testing.assert_close(encode(encoder, images), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_no_weights_of_the_language_model_are_held():
    model = load_encoder(str(TINY_PATH), "fp32").model
    assert all(weight.is_meta for weight in model.get_decoder().parameters())
    assert not any(weight.is_meta for weight in model.model.visual.parameters())


@pytest.mark.parametrize(
    ("kind", "inside_text"),
    [*((kind, inside) for kind in ("fp8", "compressed fp8", "compressed int4") for inside in (False, True))]
    + [("bitsandbytes 4 bit", False)],
)
def test_the_tower_of_a_quantised_checkpoint_gives_what_the_whole_one_gives(
    families, images, tmp_path, kind, inside_text
):
    whole = families("qwen3_vl")
    folder = save_quantised(whole, kind, tmp_path / "small", inside_text=inside_text)
    found = encode(load_encoder(folder, "fp32"), images)
    torch.testing.assert_close(found, encode(load_encoder(whole, "fp32"), images), atol=1e-5, rtol=1e-4)


def test_texts_are_those_of_plain_transformers_and_of_length_1(tmp_path):
    folder = save_encoder("CLIP", tmp_path / "clip")
    texts = ["a photo of a 0.", "nine eight"]
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0] for text in texts]
    found = load_encoder(str(folder), "fp32").encode_texts(texts)
    torch.testing.assert_close(found, torch.stack([one / one.norm() for one in alone]), atol=1e-5, rtol=1e-4)


# --- Each image once --------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    """Eight rows of six images, of which two are equal files."""
    (tmp_path / "img").mkdir()
    for i in range(6):
        noise(tmp_path / f"img/{i}.png", i)
    (tmp_path / "img/5.png").write_bytes((tmp_path / "img/0.png").read_bytes())
    named = [0, 1, 2, 3, 4, 5, 1, 2]
    table = [{"id": f"r{i}", "path": f"img/{image}.png", "label": "ab"[i % 2]} for i, image in enumerate(named)]
    write_csv(tmp_path / "train.csv", table)
    options = ReadOptions(task="classification", fixed_question="Which?")
    examples = read_examples(str(tmp_path / "train.csv"), options).examples
    return examples, scan_images(examples)


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """It counts the images that it sees."""
    encoder = load_encoder(str(save_encoder("Dinov2", tmp_path / "dino")), "fp32")
    encoder.seen = 0
    pool = NamedEncoder.pool

    def count(self, inputs):
        encoder.seen += len(inputs["pixel_values"])
        return pool(self, inputs)

    monkeypatch.setattr(NamedEncoder, "pool", count)
    return encoder


def test_each_image_is_seen_once_by_the_digest_of_its_file_and_never_again(rows, encoder):
    (features,) = row_features(encoder, [rows], CPU, batch_size=2)
    assert encoder.seen == 5 and features.shape == (8, 32)
    paths = [of_row[0]["path"] for of_row in rows[0]["images"]]
    alone = [encode(encoder, [Image.open(path).convert("RGB")])[0].numpy() for path in paths]
    np.testing.assert_allclose(features, alone, atol=2e-3)  # half precision on disk
    encoder.seen = 0
    again = row_features(encoder, [rows, rows], CPU)
    assert encoder.seen == 0 and np.array_equal(again[0], again[1])
    assert np.array_equal(again[0], features)  # rounded before they are kept, not only on disk


def test_an_interrupted_computation_continues_and_damaged_files_are_computed_again(rows, encoder, store, monkeypatch):
    monkeypatch.setattr(image_features, "FILE_IMAGES", 2)
    write = image_features._write
    monkeypatch.setattr(image_features, "_write", lambda *given: write(*given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # killed after the first file
        row_features(encoder, [rows], CPU, batch_size=1)
    monkeypatch.setattr(image_features, "_write", write)
    encoder.seen = 0
    (features,) = row_features(encoder, [rows], CPU, batch_size=1)
    assert encoder.seen == 3
    damaged = sorted(store.rglob("*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    encoder.seen = 0
    again = row_features(encoder, [rows], CPU, batch_size=1)[0]
    assert encoder.seen > 0
    np.testing.assert_allclose(again, features, atol=2e-3)


def test_features_that_cannot_be_kept_are_used_all_the_same(rows, encoder, store, capsys):
    store.parent.mkdir(parents=True)
    store.write_text("a file in place of the folder")
    (features,) = row_features(encoder, [rows], CPU)
    assert features.shape == (8, 32) and "Features of 5 images are not kept" in capsys.readouterr().out


def test_other_weights_or_sizes_have_features_of_their_own(tmp_path, encoder):
    same = load_encoder(encoder.name, "fp32")
    assert same.key() == encoder.key()
    same.processor.crop_size = {"height": 24, "width": 24}
    other = load_encoder(str(save_encoder("Dinov2", tmp_path / "other", seed=1)), "fp32")
    keys = {encoder.key(), same.key(), other.key(), load_encoder(str(TINY_PATH), "fp32").key()}
    keys.add(load_encoder(str(TINY_PATH), "fp32", max_pixels=56 * 56).key())
    assert len(keys) == 5


def test_several_devices_share_the_batches(rows, encoder):
    one = row_features(encoder, [rows], CPU, batch_size=1)[0]
    for path in image_features.cache_path().parent.rglob("*.npz"):
        path.unlink()
    np.testing.assert_array_equal(row_features(encoder, [rows], CPU * 3, batch_size=1)[0], one)


def test_workers_read_images_as_this_process_does(rows, encoder):
    tables, batches = [rows[0]], [[("first", (0, 0, 0))], [("second", (0, 3, 0)), ("third", (0, 4, 0))]]
    alone, shared = ([*image_features.compute_features(encoder, tables, batches, CPU, num)] for num in (0, 2))
    for (digests, features), (others, same) in zip(alone, shared, strict=True):
        assert digests == others and np.array_equal(features, same)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_gives_nearly_the_same(families, images, precision):
    exact, lower = (load_encoder(families("qwen3_vl"), name) for name in ("fp32", precision))
    assert next(lower.modules[0].parameters()).dtype != torch.float32 and exact.key() != lower.key()
    torch.testing.assert_close(encode(lower, images), encode(exact, images), atol=0.1, rtol=0.1)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_an_encoder_of_timm_names_the_package_that_it_needs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "timm_wrapper", "architecture": "resnet18"}')
    with pytest.raises(InputError, match="is one of timm. Install it: pip install timm"):
        load_encoder(str(tmp_path), "fp32")


def test_what_cannot_be_an_encoder_is_refused_in_one_line(tmp_path, rows, encoder):
    folder = save_encoder("ConvNext", tmp_path / "conv")
    (folder / "model.safetensors").write_bytes(
        (save_encoder("ViT", tmp_path / "vit") / "model.safetensors").read_bytes()
    )
    for name, said in ((folder, "does not hold the weights"), (tmp_path / "nowhere", "cannot be loaded")):
        with pytest.raises(InputError, match=said) as error:
            load_encoder(str(name), "fp32")
        assert "\n" not in str(error.value)
    examples, scan = rows
    scan.of_row[3] = ()
    with pytest.raises(InputError, match="needs an image in every row; there is none in row r3"):
        row_features(encoder, [(examples, scan)], CPU)
