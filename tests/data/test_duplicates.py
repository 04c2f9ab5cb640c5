import io
import random

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from vqa_sft.data.compare_images import fit_parts, place_windows
from vqa_sft.data.duplicates import DISTANCE, near_pairs, row_groups
from vqa_sft.data.hash_images import ASPECT_TOLERANCE, PARTS, Wholes, find_near_hashes, hash_windows, unpack
from vqa_sft.data.scan import Scan
from vqa_sft.images import ImageFacts, examine


def scan_of(*rows):
    """A scan of rows of PIL images; an image that stands in several rows is given as the same object."""
    numbers, scan = {}, Scan()
    for row in rows:
        of_row = []
        for image in row if isinstance(row, (list, tuple)) else [row]:
            if id(image) not in numbers:
                numbers[id(image)] = len(scan.images)
                scan.images.append(image if isinstance(image, ImageFacts) else examine(as_entry(image)))
            of_row.append(numbers[id(image)])
        scan.of_row.append(tuple(of_row))
    scan.names = [""] * len(scan.images)
    return scan


def as_entry(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def saved_again(image, kind, quality):
    return Image.open(io.BytesIO(as_entry(image, kind, quality=quality)["bytes"])).convert("RGB")


def resized(image, factor):
    return image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)


def cropped(image, keep_x, keep_y, at_x, at_y):
    width, height = round(image.width * keep_x), round(image.height * keep_y)
    left, top = round((image.width - width) * at_x), round((image.height - height) * at_y)
    return image.crop((left, top, left + width, top + height))


def scene(seed, size=(320, 240)):
    """Leaves on the ground, large and small over one another: the statistics of photographs."""
    rng = random.Random(seed)
    base = [rng.randrange(256) for _ in "rgb"]
    image = Image.new("RGB", size, tuple(base))
    draw = ImageDraw.Draw(image)
    for _ in range(500):
        radius = 3 / np.sqrt(rng.uniform(0.0006, 1))
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        colour = tuple((part + rng.randrange(256)) // 2 for part in base)
        draw.ellipse([x - radius, y - 0.7 * radius, x + radius, y + 0.7 * radius], fill=colour)
    return image


def photographs():
    """Parts of two photographs that do not overlap, and their mirror images: all different."""
    for array in load_sample_images().images:
        photograph = Image.fromarray(array)
        for left in range(0, 640, 320):
            for top in (0, 213):
                part = photograph.crop((left, top, left + 320, top + 213))
                yield part
                yield part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


WORDS = "the of and to in is you that it he was for on are as with his they at be this have from or one had".split()  # noqa: SIM905


def page(seed):
    rng, image = random.Random(seed), Image.new("RGB", (300, 400), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for top in range(25, 375, 16):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(8, 10)))
        draw.text((25, top), text[: rng.randint(20, 44) if rng.random() < 0.15 else 44], fill="black", font=font)
    return image


def chart(seed):
    rng, image = random.Random(seed), Image.new("RGB", (360, 270), "white")
    draw = ImageDraw.Draw(image)
    draw.line([40, 15, 40, 235, 345, 235], fill="black")
    for level in range(5):
        draw.text((15, 230 - 50 * level), str(10 * level), fill="black")
        draw.line([40, 235 - 50 * level, 345, 235 - 50 * level], fill="lightgrey")
    heights = [rng.uniform(20, 210) for _ in range(6)]
    if seed % 2:
        draw.line([(60 + 50 * i, 235 - height) for i, height in enumerate(heights)], fill="steelblue", width=2)
    else:
        for i, height in enumerate(heights):
            draw.rectangle([55 + 48 * i, 235 - height, 85 + 48 * i, 235], fill="steelblue")
    return image


def square(colour, ground="white", left=20, side=40):
    image = Image.new("RGB", (84, 84), ground)
    ImageDraw.Draw(image).rectangle([left, 20, left + side, 20 + side], fill=colour)
    return image


CHANGES = {
    "JPEG 30": lambda image: saved_again(image, "JPEG", 30),
    "JPEG 95": lambda image: saved_again(image, "JPEG", 95),
    "WebP": lambda image: saved_again(image, "WEBP", 60),
    "half": lambda image: resized(image, 0.5),
    "double": lambda image: resized(image, 2),
    "squeezed": lambda image: image.resize((224, 224)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.15),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
    "centre 90%": lambda image: cropped(image, 0.9, 0.9, 0.5, 0.5),
    "centre 80%": lambda image: cropped(image, 0.8, 0.8, 0.5, 0.5),
    "corner 80%": lambda image: cropped(image, 0.8, 0.8, 1, 0),
    "side 80%": lambda image: cropped(image, 0.8, 1, 0, 0),
    "anywhere 83%": lambda image: cropped(image, 0.83, 0.86, 0.3, 0.8),
    "centre 70%": lambda image: cropped(image, 0.7, 0.7, 0.5, 0.5),
    "all at once": lambda image: saved_again(resized(cropped(image, 0.85, 0.85, 0.2, 0.6), 0.6), "JPEG", 50),
}


@pytest.fixture(scope="module")
def different():
    """Images of many kinds, none of which is another one changed."""
    return [*map(scene, range(12)), *photographs(), *map(page, range(6)), *map(chart, range(6))]


# A photograph (and its mirror image) whose highlights are cut off by more light, and a chart of thin lines.
MISSED = {"brighter": {16, 17}, "anywhere 83%": {39}}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_meets_its_original_and_no_other(change, different):
    num = len(different)
    changed = [CHANGES[change](image) for image in different]
    groups = row_groups(scan_of(*different, *changed), DISTANCE)
    assert groups[:num] == list(range(num))
    meets = [ours if theirs == ours else None for ours, theirs in zip(groups, groups[num:], strict=False)]
    assert set(groups[num:]) & set(range(num)) == set(meets) - {None}
    assert set(range(num)) - set(meets) <= MISSED.get(change, set())


def test_flipped_and_turned_images_are_different(different):
    images = [different[0], *(different[0].transpose(method) for method in Image.Transpose)]
    assert row_groups(scan_of(*images), DISTANCE) == list(range(8))


@pytest.mark.medium
def test_no_two_handwritten_digits_are_one():
    digits = [
        Image.fromarray((255 - pixels * 15.9).astype(np.uint8)).resize((84, 84)) for pixels in load_digits().images
    ]
    assert len(set(row_groups(scan_of(*digits[:800]), DISTANCE))) == 800


@pytest.mark.parametrize("kind", [page, chart], ids=["pages", "charts"])
def test_pages_and_charts_of_one_style_are_not_joined(kind):
    assert len(set(row_groups(scan_of(*map(kind, range(60))), DISTANCE))) == 60


def test_one_drawing_in_several_colours_is_several_images():
    """Red and green are equally bright, and black on white is red on white with more contrast."""
    drawings = [square(colour) for colour in ("red", "green", "blue", "black", "orange")]
    drawings += [square("red", ground) for ground in ("yellow", "grey", "black")]
    assert row_groups(scan_of(*drawings), DISTANCE) == list(range(8))


def test_a_small_shape_on_a_plain_ground_meets_no_shape_of_another_size():
    """A crop of the one would look like the other, as would a crop of every such image."""
    assert row_groups(scan_of(square("red", left=20, side=15), square("red", left=18, side=18)), DISTANCE) == [0, 1]


def test_plain_images_are_one_when_their_colour_is():
    plain = [
        Image.new("RGB", (100, 80), colour) for colour in ("white", "white", "#f8f8f8", "#d0d0d0", "red", "#f00808")
    ]
    plain[1] = saved_again(plain[1], "JPEG", 60)
    assert row_groups(scan_of(*plain), DISTANCE) == [0, 0, 0, 1, 2, 2]


def test_frames_of_a_film_are_one_group_although_its_ends_differ():
    wide = scene(0, (900, 240))
    frames = [wide.crop((left, 0, left + 320, 240)) for left in range(0, 300, 6)]
    scan = scan_of(*frames, scene(1))
    assert row_groups(scan, DISTANCE) == [0] * 50 + [1]
    assert near_pairs(scan_of(frames[0]), scan_of(frames[-1]), DISTANCE) == []


def test_rows_are_joined_by_any_image_and_numbered_as_they_come():
    a, b, c, d = map(scene, range(4))
    bad = ImageFacts("not_an_image", digest=b"x" * 32)
    scan = scan_of([a], [], [b, c], [d], [saved_again(c, "JPEG", 60), d], [], [bad], [bad, a], [bad])
    assert row_groups(scan, DISTANCE) == [0, 1, 2, 2, 2, 3, 4, 0, 5]
    assert row_groups(scan, None) == [0, 1, 2, 3, 3, 4, 5, 0, 6]


def test_without_a_distance_only_equal_files_are_one():
    image = scene(0)
    rows = [image, image.copy(), saved_again(image, "JPEG", 95)]
    assert row_groups(scan_of(*rows), None) == [0, 0, 1]
    assert row_groups(scan_of(*rows), 0)[:2] == [0, 0]


def test_groups_do_not_depend_on_the_order_of_the_rows(different):
    rows = different + [CHANGES["all at once"](image) for image in different]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    shuffled = row_groups(scan_of(*(rows[i] for i in order)), DISTANCE)
    originals = [i % len(different) for i in order]
    assert len(set(zip(originals, shuffled, strict=True))) == len(different) == len(set(shuffled))


def test_a_larger_distance_finds_more_and_loses_nothing(different):
    changed = [cropped(image, 0.74, 0.77, 0.35, 0.6) for image in different]
    train, test = scan_of(*different), scan_of(*changed)
    found = [{pair[:2] for pair in near_pairs(test, train, distance)} for distance in (2, 8, DISTANCE)]
    assert found[0] < found[1] < found[2] <= {(i, i) for i in range(len(different))}
    assert len(found[2]) >= len(different) - 1


def test_pairs_of_test_and_training_images(different):
    a, b, c, d = different[:4]
    train = scan_of(a, [b, cropped(c, 0.8, 0.8, 0, 0)], a.copy())
    test = scan_of(c, saved_again(b, "JPEG", 50), a, d, ImageFacts("missing_image"))
    pairs = near_pairs(test, train, DISTANCE)
    assert [pair[:2] for pair in pairs] == [(0, 2), (1, 1), (2, 0), (2, 3)]
    assert [bits == 0 for _, _, bits in pairs] == [False, False, True, True]
    assert near_pairs(test, train, None) == [(2, 0, 0), (2, 3, 0)]
    assert near_pairs(test, scan_of(), DISTANCE) == near_pairs(scan_of(), train, DISTANCE) == []


# --- The parts --------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_whole_image_is_that_of_imagehash(different):
    images = scan_of(*different).images
    hashes, _, _ = hash_windows(images, 1)
    for image, ours in zip(images, hashes[:, 0], strict=True):
        grey = np.frombuffer(image.miniature[:1024], np.uint8).reshape(32, 32)
        theirs = imagehash.phash(Image.fromarray(grey)).hash
        assert np.unpackbits(ours[None].view(np.uint8)).astype(bool).tolist() == theirs.ravel().tolist()


@pytest.mark.medium
def test_the_hash_of_a_window_is_about_that_of_the_crop(different):
    hashes, _, _ = hash_windows(scan_of(*different).images, len(PARTS))
    apart = []
    for window in (3, 40, 90, 195):
        (top, height), (left, width) = PARTS[window // 14], PARTS[window % 14]
        crops = [
            image.resize((320, 320)).crop([round(320 * x) for x in (left, top, left + width, top + height)])
            for image in different
        ]
        theirs, _, _ = hash_windows(scan_of(*crops).images, 1)
        apart += np.bitwise_count(hashes[:, window] ^ theirs[:, 0]).tolist()
    assert np.median(apart) <= 2 and np.quantile(apart, 0.95) <= 8


def test_all_near_hashes_are_found():
    """Against three loops, with few hashes that are near, some images of one aspect and some of others."""
    rng = np.random.default_rng(0)
    num, windows = 30, len(PARTS) ** 2
    aspects = np.sort(rng.choice([0, 0.1, 0.3, -0.3], num) + rng.normal(0, 0.01, num))
    few = rng.integers(0, 2**63, 20, dtype=np.uint64)
    near = few[rng.integers(0, 20, (num, windows))] ^ np.uint64(1) << rng.integers(
        0, 64, (num, windows), dtype=np.uint64
    )
    nothing = np.zeros((num, 1))
    wholes = Wholes(np.arange(num), aspects, near[:, 0], nothing, nothing, nothing)
    found = find_near_hashes(near, aspects, wholes, 2, lambda row, place: np.ones(len(place), dtype=bool))
    found = {hit for hits in found for hit in zip(*(values.tolist() for values in hits), strict=True)}
    expected = set()
    for row in range(num):
        for place in range(num):
            for window in range(windows):
                ratio = PARTS[window % 14, 1] / PARTS[window // 14, 1]
                bits = bin(int(near[row, window]) ^ int(near[place, 0])).count("1")
                fits = abs(aspects[place] - aspects[row] - np.log(ratio)) <= ASPECT_TOLERANCE
                if bits <= 2 and (window == 0 or fits):
                    expected.add((row, place, window, bits))
    assert found == expected and len(expected) > 100


def test_the_part_that_was_cropped_is_found_again(different):
    images = different[:20]
    truth = [(0.04 + 0.005 * i, 0.82, 0.1 - 0.004 * i, 0.82) for i in range(20)]  # left, width, top, height
    crops = [
        image.resize((600, 600)).crop([round(600 * x) for x in (left, top, left + width, top + height)])
        for image, (left, width, top, height) in zip(images, truth, strict=True)
    ]
    grey, other = (unpack(scan_of(*side).images)[0] for side in (images, crops))
    aspects = np.ones(20, dtype=np.float32)
    start = np.full(20, [tuple(part) for part in PARTS].index((0.1, 0.8)) * 15)  # the middle, 80%
    parts = fit_parts(grey, other, place_windows(start, aspects), aspects)
    off = np.abs(parts - np.array(truth))
    assert off.max() < 0.02 and np.median(off) < 0.002
