"""A small convolutional network as a classifier from elsewhere: all class probabilities of a set of class_sets.py.

    python -m vqa_sft.lab.small_cnn data/drawn400                   # -> data/drawn400/cnn/; minutes on two CPU cores
    python -m vqa_sft.lab.small_cnn data/drawn400 --epochs 2        # try it

For each of the training images the network that has not seen its fold, for test images one network
fitted to all: train.npz, train.parquet, test.npz and test.parquet. A .npz has the arrays ids (N,), classes (C,) and
probs (N, C); a .parquet the column id and one column a class. Training images are moved, scaled and recoloured.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vqa_sft.lab.class_sets import ClassRow, read_rows

INPUT_PX = 56
NUM_EPOCHS, BATCH, LEARNING_RATE = 30, 32, 5e-3
WIDTH = 16  # channels of the first block; each of the next three has twice as many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a set that class_sets.py wrote")
    parser.add_argument("--epochs", type=int, default=NUM_EPOCHS)
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the first of four blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--use_cpu", action="store_true", help="do not use the GPU")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    print(json.dumps(classify(args.folder, args.folder / "cnn", args.epochs, args.seed, device, args.width), indent=1))


def classify(
    folder: Path, output: Path, num_epochs: int = NUM_EPOCHS, seed: int = 0, device: str = "cpu", width: int = WIDTH
) -> dict:
    """Write probabilities of training rows, out of fold, and of test rows. Returns accuracy, NLL and recall of both."""
    started_s = time.monotonic()
    names, train, test = read_rows(folder)
    images, labels, folds = read_images(train), _labels(train), np.array([row.fold for row in train])
    probs = np.zeros((len(train), len(names)), np.float32)
    for fold in np.unique(folds):
        kept = folds != fold
        net = fit(images[kept], labels[kept], len(names), num_epochs, seed, device, width)
        probs[~kept] = predict(net, images[~kept], device)
    net = fit(images, labels, len(names), num_epochs, seed, device, width)
    of_test = predict(net, read_images(test), device)
    output.mkdir(parents=True, exist_ok=True)
    write_probs(output / "train", [row.row_id for row in train], names, probs)
    write_probs(output / "test", [row.row_id for row in test], names, of_test)
    found = {"train, out of fold": measure(probs, labels), "test": measure(of_test, _labels(test))}
    return {**found, "minutes": round((time.monotonic() - started_s) / 60, 1)}


def read_images(rows: Sequence[ClassRow]) -> torch.Tensor:
    """(N, 3, INPUT_PX, INPUT_PX), -1 to 1."""
    pixels = []
    for row in rows:
        with Image.open(row.path) as image:
            small = image.convert("RGB").resize((INPUT_PX, INPUT_PX), Image.Resampling.BOX)
        pixels.append(np.asarray(small, dtype=np.float32))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def make_net(num_classes: int, first_width: int = WIDTH) -> nn.Module:
    """Four blocks that halve the sides; the mean and the maximum over places; a linear layer."""
    widths = [first_width << block for block in range(4)]
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for channels, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*layers, MeanAndMax(), nn.Dropout(0.2), nn.Linear(2 * widths[-1], num_classes))
    return net.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU


def _as_net(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


class MeanAndMax(nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)


def fit(
    images: torch.Tensor,
    labels: np.ndarray,
    num_classes: int,
    num_epochs: int,
    seed: int,
    device: str,
    width: int = WIDTH,
) -> nn.Module:
    """A network fitted with AdamW and one cycle of the learning rate."""
    torch.manual_seed(seed)
    net = make_net(num_classes, width).to(device)
    images, targets = images.to(device), torch.from_numpy(labels).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_epochs * steps)
    net.train()
    for _ in range(num_epochs):
        for rows in torch.randperm(len(images)).to(device).split(BATCH):
            loss = F.cross_entropy(net(_as_net(augment(images[rows]))), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def augment(images: torch.Tensor) -> torch.Tensor:
    """Each image moved, scaled, turned a little, lighter or darker, its colour channels in another order."""
    num, device = len(images), images.device
    angle = torch.randn(num, device=device) * 0.08
    scale = 1 + (torch.rand(num, device=device) - 0.5) * 0.3
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = (torch.rand(2, num, device=device) - 0.5) * 0.3
    matrices = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain = 1 + (torch.rand(num, 3, 1, 1, device=device) - 0.5) * 0.4
    return moved[:, torch.randperm(3, device=device)] * gain + (torch.rand(num, 1, 1, 1, device=device) - 0.5) * 0.3


@torch.no_grad()
def predict(net: nn.Module, images: torch.Tensor, device: str) -> np.ndarray:
    """Probabilities (N, C)."""
    parts = [net(_as_net(part.to(device))).softmax(dim=1).cpu().numpy() for part in images.split(500)]
    return np.concatenate(parts)


def write_probs(path: Path, ids: Sequence[str], names: Sequence[str], probs: np.ndarray) -> None:
    """PATH.npz and PATH.parquet."""
    np.savez_compressed(path.with_suffix(".npz"), ids=np.array(ids), classes=np.array(names), probs=probs)
    columns = {"id": pa.array(ids), **{name: pa.array(probs[:, place]) for place, name in enumerate(names)}}
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))


def measure(probs: np.ndarray, labels: np.ndarray, ranks: Sequence[int] = (1, 5, 10, 25)) -> dict[str, float]:
    """NLL, and recall at K: the share of rows whose class is among the K most likely; at 1 the accuracy."""
    own = probs[np.arange(len(labels)), labels]
    place = (probs > own[:, None]).sum(axis=1)
    recalls = {f"recall@{rank}": round(float((place < rank).mean()), 4) for rank in ranks}
    return {"nll": round(float(-np.log(np.maximum(own, 1e-9)).mean()), 4), **recalls}


def _labels(rows: Sequence[ClassRow]) -> np.ndarray:
    return np.array([row.label for row in rows])


if __name__ == "__main__":
    main()
