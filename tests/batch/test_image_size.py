"""`max_pixels` and `min_pixels` for every family; the reference is what its processor returns for many images."""

import functools
import re
from types import SimpleNamespace

import processors
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaNextConfig, LlavaNextForConditionalGeneration, MllamaImageProcessor

from vqa_sft.batch.image_rules import sizes_of
from vqa_sft.batch.image_size import describe_images, limit_pixels
from vqa_sft.errors import InputError
from vqa_sft.models.load import follow_processor

pytestmark = pytest.mark.medium

FIXED = ("llava", "gemma3")
FAMILIES = [family for family in processors.FAMILIES if family not in FIXED]
ANY_AREA = ("qwen2_5_vl", "qwen3_vl", "glm4v", "glm46v", "kimi_k25")
LIMITS = (60_000, 200_704, 700_000)
SMALL = [(30, 30), (70, 25), (20, 60)]
LARGE = [(460, 460), (500, 450), (640, 480), (480, 640), (1280, 720), (400, 1100), (1200, 1100), (1800, 600)]
# MiniCPM-V rounds sides to the nearest token: an eighth more of images up to five times as long as high.
ROUNDING = {"minicpmv": 1.126}


def shown(processor, size):
    """(pixels, tokens) of a blank image in a prompt, from what the processor makes of the two."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    batch = processor(text=[prompt], images=[[Image.new("RGB", size)]], return_tensors="pt")
    return pixels_of(processor, batch), batch["input_ids"].shape[1] + 1 - len(processor.tokenizer(prompt).input_ids)


def pixels_of(processor, batch):
    process = processor.image_processor
    if "image_grid_thw" in batch:  # Qwen, GLM, Kimi: patches of a frame
        ((_, rows, columns),) = batch["image_grid_thw"].tolist()
        return rows * columns * process.patch_size**2
    for name, patch_px in (("spatial_shapes", "encoder_patch_size"), ("target_sizes", "patch_size")):
        if name in batch:  # LFM2-VL and MiniCPM-V: patches of the tiles or slices
            return sum(rows * columns for rows, columns in batch[name].tolist()) * getattr(process, patch_px) ** 2
    if "image_position_ids" in batch:  # Gemma 4: tokens of 3 x 3 patches, padded to the budget
        return int((batch["input_ids"] == processor.image_token_id).sum()) * (3 * process.patch_size) ** 2
    if "image_token_pooling" in batch:  # Molmo 2: crops of patches
        crops, patches, _ = batch["pixel_values"].shape
        return crops * patches * process.patch_size**2
    height, width = batch["pixel_values"].shape[-2:]  # tiles of one size
    return batch["pixel_values"].flatten(end_dim=-4).shape[0] * height * width


def limited(family, min_pixels=None, max_pixels=None):
    processor = processors.build(family)
    limit_pixels(processor, family, min_pixels, max_pixels)
    return processor


@functools.cache
def found(family, max_pixels):
    """What the limit makes of images of all shapes."""
    processor = limited(family, max_pixels=max_pixels)
    return [shown(processor, size) for size in SMALL + LARGE]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_is_shown_larger_than_max_pixels_and_the_next_size_would_be(family):
    for limit in LIMITS:
        choices = sizes_of(processors.build(family), high=4 * limit).choices
        if family not in ANY_AREA and choices[0].most > limit:
            with pytest.raises(InputError, match=f"shows an image at {choices[0].most:,} pixels or more"):
                limited(family, max_pixels=limit)
            continue
        most, _ = max(found(family, limit))
        assert most <= limit * ROUNDING.get(family, 1)
        if family in ANY_AREA:
            assert most > limit * (0.84 if family == "kimi_k25" else 0.91)  # whole tokens, and Kimi's padding
            continue
        larger = next((setting for setting in choices if setting.most > limit), None)
        if larger is not None:
            processor = limited(family, max_pixels=larger.most)
            assert max(shown(processor, size)[0] for size in (*larger.largest[:3], *LARGE)) > 0.9 * limit
            assert sizes_of(processor).now.values == larger.values


# Image processors of the library that none of the families above has.
OTHERS = ["PaddleOCRVL", "Ernie4_5_VLMoe", "VideoLlama3", "HunYuanVL", "MiniMaxM3VL", "CohereCompass", "Cosmos3Edge"]
OTHERS += ["Glmga", "Glm5Next", "MuseGlimmer", "Gemma4Unified", "Ovis2"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_image_processors_of_the_library_keep_the_limit_too(name):
    for limit in (165_000, 700_000):
        given = {"crop_to_patches": True} if name == "Ovis2" else {}
        process = getattr(transformers, f"{name}ImageProcessor")(**given)
        limit_pixels(SimpleNamespace(image_processor=process), name, None, limit)
        areas = []
        for size in SMALL + LARGE:
            batch = process([Image.new("RGB", size)], return_tensors="pt")
            if "image_grid_thw" in batch:
                areas.append(int(batch["image_grid_thw"].prod()) * process.patch_size**2)
            elif "num_soft_tokens_per_image" in batch:
                areas.append(int(batch["num_soft_tokens_per_image"].sum()) * 48**2)
            else:
                areas.append(batch["pixel_values"].numel() // 3)
        assert 0.7 * limit < max(areas) <= limit


@pytest.mark.parametrize("family", processors.FAMILIES)
def test_the_line_says_the_most_pixels_and_tokens_of_an_image(family):
    limit = None if family in FIXED else 700_000
    line = describe_images(limited(family, max_pixels=limit), limit)
    pixels, tokens = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:pixels|tokens)", line)[:2])
    assert max(found(family, limit))[0] <= pixels * ROUNDING.get(family, 1)
    assert max(number for _, number in found(family, limit)) <= tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_processor_shows_the_same_sizes_when_it_is_loaded(family, tmp_path):
    limit = {"gemma4": 322_560, "llava_next": 500_000}.get(family, 700_000)  # not what they have anyway
    processor = limited(family, max_pixels=limit)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert describe_images(loaded, limit) == describe_images(processor, limit)
    assert [shown(loaded, size) for size in SMALL + LARGE] == found(family, limit)
    assert shown(loaded, (1200, 1100)) != shown(processors.build(family), (1200, 1100))


# The most that a family enlarges small images to, where it does not stop at any area.
ENLARGES = {"kimi_k25": 784, "mistral3": 784, "minicpmv": 448**2, "lfm2_vl": 512**2, "gemma4": 1120 * 48**2}
ENLARGES |= {"cohere2_vision": 512**2, "llama4": 336**2, "molmo2": 2 * 378**2, "llava_next": 3 * 336**2}
ENLARGES |= {"llava_onevision": 2 * 384**2, "idefics3": 5 * 364**2, "smolvlm": 5 * 512**2}


@pytest.mark.parametrize("family", FAMILIES)
def test_small_images_are_shown_at_min_pixels_or_it_is_refused(family):
    for least in (700, 100_000, 250_000, 5_000_000):
        if least > ENLARGES.get(family, 10**8):
            says = f"does not enlarge a small image to more than {ENLARGES[family]:,} pixels; got min_pixels: {least}"
            with pytest.raises(InputError, match=says):
                limited(family, min_pixels=least)
            continue
        processor = limited(family, min_pixels=least)
        smallest = min(shown(processor, size)[0] for size in SMALL)
        assert smallest >= least * (0.85 if family == "gemma4" else 1)  # which rounds down to whole tokens


@pytest.mark.parametrize("family", ["qwen2_5_vl", "glm4v", "internvl"])
def test_both_limits_hold_where_there_is_a_size_between_them(family):
    processor = limited(family, min_pixels=210_000, max_pixels=700_000)
    assert all(210_000 <= shown(processor, size)[0] <= 700_000 for size in SMALL + LARGE)


def test_two_limits_without_a_size_between_them_are_refused():
    says = "no size for images between min_pixels: 170000 and max_pixels: 200000. Set max_pixels to 322560"
    with pytest.raises(InputError, match=says):
        limited("gemma4", min_pixels=170_000, max_pixels=200_000)


def test_a_limit_counts_one_frame_of_an_image():
    for family in ("glm4v", "glm46v"):
        assert shown(limited(family, max_pixels=200_704), (1000, 1000)) == (200_704, 256)


@pytest.mark.parametrize(
    ("family", "max_pixels", "becomes"),
    [
        ("qwen2_5_vl", 200_704, "at most 200,704 pixels, 256 tokens each (Qwen2_5_VL: 28 px a token)"),
        ("qwen3_vl", 200_704, "at most 200,704 pixels, 196 tokens each (Qwen3VL: 32 px a token)"),
        ("gemma4", 322_560, "at most 322,560 pixels, 142 tokens each (Gemma4: max_soft_tokens 140)"),
        ("internvl", 602_112, "at most 602,112 pixels, 770 tokens each (InternVL: tiles of 448 px, max_patches 2)"),
        ("mistral3", 200_704, "at most 200,704 pixels, 272 tokens each (Pixtral: longest edge 448 px)"),
        ("llava", None, "112,896 pixels each, whatever their size, 576 tokens at most (Llava)"),
    ],
)
def test_what_a_limit_becomes(family, max_pixels, becomes):
    assert describe_images(limited(family, max_pixels=max_pixels), max_pixels) == f"images: {becomes}"


def test_a_limit_between_two_sizes_becomes_the_lower_one_and_says_so():
    for family, becomes in (("gemma4", "161,280 pixels, 72"), ("internvl", "200,704 pixels, 258")):
        line = describe_images(limited(family, max_pixels=300_000), 300_000)
        assert f"at most {becomes} tokens each" in line and line.endswith("largest size within max_pixels 300,000")


def test_a_limit_below_the_smallest_size_names_it():
    for family, least in (("gemma4", 161_280), ("internvl", 200_704), ("smolvlm", 262_144), ("qwen3_vl", 1024)):
        says = f"shows an image at {least:,} pixels or more; got max_pixels: 900. Give at least {least}"
        with pytest.raises(InputError, match=says):
            limited(family, max_pixels=900)
        limited(family, max_pixels=least)


@pytest.mark.parametrize(("family", "pixels"), [("llava", "112,896"), ("gemma3", "802,816")])
def test_a_family_of_one_size_says_which(family, pixels):
    says = f"{family} shows every image at {pixels} pixels, whatever its size; remove "
    with pytest.raises(InputError, match=says + "max_pixels"):
        limited(family, max_pixels=200_704)
    with pytest.raises(InputError, match=says + "min_pixels and max_pixels"):
        limited(family, 100, 200_704)


def test_a_processor_that_is_not_known_says_no_more_than_what_was_seen():
    for process, says in (
        (transformers.Idefics2ImageProcessor(), "sizes of its own (142,884 to 720,300 pixels of those tried); remove"),
        (lambda images, **how: {"flattened_patches": images}, "sizes of its own; remove max_pixels"),
    ):
        with pytest.raises(InputError, match=re.escape(f"another shows images at {says}")):
            limit_pixels(SimpleNamespace(image_processor=process), "another", None, 700_000)


def test_a_list_of_sizes_that_the_model_numbers_is_left_alone():
    """Mllama's tower looks up the grid of an image by its place in a list that depends on the most tiles."""
    processor = SimpleNamespace(image_processor=MllamaImageProcessor(size={"height": 560, "width": 560}))
    with pytest.raises(InputError, match="remove max_pixels"):
        limit_pixels(processor, "mllama", None, 700_000)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_images_pass_at_the_smallest_limit(family):
    smallest = sizes_of(processors.build(family), high=1).choices[0].most
    processor = limited(family, max_pixels=smallest)
    assert all(shown(processor, size)[1] > 0 for size in ((2000, 10), (10, 2000)))


def test_llava_next_puts_images_together_by_the_sizes_of_its_processor():
    torch.manual_seed(0)
    processor = processors.build("llava_next")
    process = processor.image_processor
    process.size, process.crop_size = {"height": 28, "width": 28}, {"height": 28, "width": 28}
    process.image_grid_pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    limit_pixels(processor, "llava_next", None, 3 * 28 * 28)
    assert process.image_grid_pinpoints == [[28, 56], [56, 28]]

    def model(**sizes):
        text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "vocab_size": len(processor.tokenizer)}
        vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "patch_size": 14}
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
        config = LlavaNextConfig(
            text_config=text, vision_config=vision, image_token_id=processor.image_token_id, **sizes
        )
        return LlavaNextForConditionalGeneration(config).eval()

    expected, own = model(image_grid_pinpoints=[[28, 56], [56, 28]]), model()
    own.load_state_dict(expected.state_dict())
    image = Image.effect_noise((90, 80), 50).convert("RGB")
    batch = processor(text=["<image>?"], images=[[image]], return_tensors="pt")
    with torch.no_grad():
        with pytest.raises((ValueError, RuntimeError)):
            own(**batch)
        follow_processor(own, processor)
        assert torch.equal(own(**batch).logits, expected(**batch).logits)
