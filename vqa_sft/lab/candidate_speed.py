"""How fast candidates are made: images/s of vision encoders in their true shapes, seconds of the classifier.

    python -m vqa_sft.lab.candidate_speed --images 4096            # on every GPU that is visible
    python -m vqa_sft.lab.candidate_speed --tiny                   # does it run? on a CPU

Weights are random and images are noise, as in benchmark.py: speed does not depend on what they are. The images are read
and decoded as `vqa-sft candidates` does it, by worker processes; the first batches warm up. The classifier is a linear
probe on random features of the contest that this was made for: 33,000 training rows of 396 classes, in five folds.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, SiglipImageProcessor, SiglipVisionConfig

from vqa_sft.data.examples import read_examples
from vqa_sft.data.scan import Scan, scan_images
from vqa_sft.errors import exits_with_message
from vqa_sft.images import ImageFacts
from vqa_sft.lab.random_models import draw_weights, save_random_model, small_shape, write_data
from vqa_sft.models import image_features
from vqa_sft.models.encoders import Encoder, load_encoder
from vqa_sft.models.load import choose_precision
from vqa_sft.models.probe import LinearProbe, cross_fit

WARM_UP = 0.25  # of the images
# google/siglip2-so400m-patch14-384, vision_config of its config.json on the Hub
SIGLIP2 = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP2 |= {"image_size": 384, "patch_size": 14}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"image_size": 56, "patch_size": 14}
CONTEST = (33_000, 396)  # rows, classes
TOWER = "Qwen/Qwen2.5-VL-7B-Instruct"


@exits_with_message
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="small shapes and few images, on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.batch_size = 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_images, side = (24, 64) if args.tiny else (args.images, 448)
        data = write_data(folder / "data", num_images, side_px=(side, side))
        draw_weights()
        shape = small_shape(TOWER) if args.tiny else TOWER
        encoders = {
            "SigLIP2-so400m, 384 px": save_encoder(folder / "siglip", SMALL if args.tiny else SIGLIP2),
            "tower of Qwen2.5-VL-7B, 448 px": save_tower(folder / "model", shape),
        }
        precision, device = choose_precision({"use_cpu": args.tiny}), image_features.choose_devices(args.tiny)[0]
        print(f"{num_images:,} images of {side} px, batches of {args.batch_size}, {precision}, {device}", flush=True)
        for label, path in encoders.items():
            encoder = load_encoder(str(path), precision, device, max_pixels=200704)
            speed = measure_images(encoder, data, args)
            print(f"{label}: {speed:.0f} images/s", flush=True)
    rows, classes, width = (60, 3, 8) if args.tiny else (*CONTEST, SIGLIP2["hidden_size"])
    print(f"linear probe, five folds of {rows:,} rows, {classes} classes: {measure_probe(rows, classes, width):.0f} s")


def save_encoder(folder: Path, shape: dict[str, int]) -> Path:
    """A folder with the random weights of a SigLIP vision tower of this shape."""
    config: PreTrainedConfig = SiglipVisionConfig(**shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    size = {"height": shape["image_size"], "width": shape["image_size"]}
    SiglipImageProcessor(size=size).save_pretrained(folder)
    return folder


def save_tower(folder: Path, shape: str) -> Path:
    """A folder with a random model of this shape but one decoder layer: an encoder needs none, and 28 are drawn on the
    CPU for minutes."""
    save_random_model(shape, folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = 1
    if config.text_config.layer_types:
        config.text_config.layer_types = config.text_config.layer_types[:1]
    config.save_pretrained(folder)
    return folder


def measure_images(encoder: Encoder, data: Path, args: argparse.Namespace) -> float:
    """Images/s of features after the first ones, nothing kept from earlier runs."""
    examples = read_examples(str(data / "train.csv")).examples
    scan = scan_images(examples)
    places = {image.digest.hex(): (0, row, 0) for row, (image,) in enumerate(_images_of(scan))}
    digests = list(places)
    starts = range(0, len(digests), args.batch_size)
    batches = [[(digest, places[digest]) for digest in digests[at : at + args.batch_size]] for at in starts]
    devices = image_features.choose_devices(args.tiny)
    num_workers = 0 if args.tiny else min(image_features.count_cores(), 8 * len(devices))
    done, counted, begin_s = 0, 0, time.perf_counter()
    for found, _ in image_features.compute_features(encoder, [examples], batches, devices, num_workers):
        done += len(found)
        if not counted and done >= WARM_UP * len(digests):
            counted, begin_s = done, time.perf_counter()
    return (done - counted) / (time.perf_counter() - begin_s)


def _images_of(scan: Scan) -> list[list[ImageFacts]]:
    return [[scan.images[number] for number in of_row] for of_row in scan.of_row]


def measure_probe(rows: int, classes: int, width: int) -> float:
    """Seconds of `cross_fit` on random features (rows, width)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=rows)
    centres = rng.normal(size=(classes, width)).astype(np.float32)
    features = centres[labels] + 2 * rng.normal(size=(rows, width)).astype(np.float32)
    begin_s = time.perf_counter()
    device = image_features.choose_devices(False)[0]
    cross_fit(LinearProbe(), features, labels, np.arange(rows) % 5, classes, device)
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    main()
