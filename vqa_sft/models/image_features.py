"""Features of every image by a frozen encoder: each image once, by the digest of its file, kept on disk for all runs.

    pooled/<encoder>/<some>.npz     digests (images,) and features (images, D), some thousand images a file

`encoder` is a digest of weights, precision and processor (encoders.py), so that nothing is taken for what it is not.
Deleting the files is always safe. A computation that was interrupted continues after the last file.
"""

import os
import queue
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from vqa_sft.console import note, progress
from vqa_sft.data.scan import Scan, cache_path, count_cores
from vqa_sft.errors import InputError, name_rows
from vqa_sft.files import whole
from vqa_sft.images import open_image
from vqa_sft.models.encoders import Encoder, Inputs, prepare

FILE_IMAGES = 4096
MOST = 6e4  # of a number in half precision
Place = tuple[int, int, int]  # source, row, position in the row
Rows = tuple[datasets.Dataset, Scan]


def choose_devices(use_cpu: bool) -> list[torch.device]:
    """Every GPU that is visible, else the CPU."""
    count = 0 if use_cpu else torch.cuda.device_count()
    return [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]


def row_features(
    encoder: Encoder, sources: Sequence[Rows], devices: Sequence[torch.device], batch_size: int = 64
) -> list[np.ndarray]:
    """(rows, D) float32 of each source: the mean over a row's images. Raises InputError for a row without an image, and
    where memory is too small for a batch."""
    places: dict[str, Place] = {}
    for number, (examples, scan) in enumerate(sources):
        _check_images(examples, scan)
        for row, of_row in enumerate(scan.of_row):
            for position, image in enumerate(of_row):
                places.setdefault(scan.images[image].digest.hex(), (number, row, position))
    folder = cache_path().parent / "pooled" / encoder.key()
    known = _read(folder, places)
    missing = [digest for digest in places if digest not in known]
    note(f"Features of {len(places):,} images: {len(missing):,} to compute, {len(known):,} found in {folder}")
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    named = [[(digest, places[digest]) for digest in batch] for batch in batches]
    found: dict[str, np.ndarray] = {}
    # On a CPU the encoder has all cores.
    num_workers = 0 if devices[0].type == "cpu" else min(count_cores(), 8 * len(devices))
    for digests, features in compute_features(
        encoder, [examples for examples, _ in sources], named, devices, num_workers
    ):
        found |= zip(digests, map(_round, features), strict=True)
        if len(found) >= FILE_IMAGES:
            _write(folder, found)
            known |= found
            found = {}
    if found:
        _write(folder, found)
    known |= found
    return [
        np.stack([np.mean([known[scan.images[image].digest.hex()] for image in row], axis=0) for row in scan.of_row])
        for _, scan in sources
    ]


def _check_images(examples: datasets.Dataset, scan: Scan) -> None:
    bare = [row for row, of_row in enumerate(scan.of_row) if not of_row]
    if bare:
        ids = examples["id"][:]
        raise InputError(
            f"a classifier of images needs an image in every row; there is none in "
            f"{name_rows([ids[row] for row in bare], len(ids))}. Leave them out."
        )


def compute_features(
    encoder: Encoder,
    tables: Sequence[datasets.Dataset],
    batches: list[list[tuple[str, Place]]],
    devices: Sequence[torch.device],
    num_workers: int,
) -> Iterator[tuple[list[str], np.ndarray]]:
    """(digests, features) of each batch, in their order; the device that is free takes the next."""
    if not batches:
        return
    read = partial(_prepare, encoder.processor, encoder.is_batched, tables)
    loader = DataLoader(batches, None, collate_fn=read, num_workers=num_workers)
    free: queue.SimpleQueue[Encoder] = queue.SimpleQueue()
    for copied in encoder.copies(devices):
        free.put(copied)

    def encode(inputs: Inputs) -> np.ndarray:
        one = free.get()
        try:
            return one.encode(inputs).numpy()
        finally:
            free.put(one)

    waiting: deque[tuple[list[str], Future]] = deque()
    with ThreadPoolExecutor(len(devices)) as pool:
        bar: Iterable = progress(loader, desc="Image features", in_logs=True)
        for digests, inputs in bar:
            waiting.append((digests, pool.submit(encode, inputs)))
            if len(waiting) > 2 * len(devices):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(digests: list[str], computed: Future) -> tuple[list[str], np.ndarray]:
    try:
        features = computed.result()
    except torch.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory is too small for {len(digests)} images. Lower --batch_size.") from error
    if not np.isfinite(features).all():
        raise InputError("the encoder gives numbers that are not finite. Take another precision or encoder.")
    return digests, features


def _prepare(
    processor: object, is_batched: bool, tables: Sequence[datasets.Dataset], batch: list[tuple[str, Place]]
) -> tuple[list[str], Inputs]:
    images = [open_image(tables[number][row]["images"][position]) for _, (number, row, position) in batch]
    return [digest for digest, _ in batch], prepare(processor, is_batched, images)


def _read(folder: Path, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Digest -> features, as far as they are there. A damaged file is removed."""
    wanted, known = set(wanted), {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                digests, features = file["digests"].tolist(), file["features"]
            known |= {
                digest: features[i].astype(np.float32)
                for i, digest in enumerate(digests)
                if digest in wanted and np.isfinite(features[i]).all()
            }
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
            note(f"{path} is damaged; its images are computed again.")
            with suppress(OSError):
                path.unlink()
    return known


def _round(features: np.ndarray) -> np.ndarray:
    """What half precision keeps of an image's features (D,), which is enough for a classifier, unless a number is too
    large for it. Rounded before they are used, so that a second call, which finds them on disk, has the same ones."""
    return features.astype(np.float16).astype(np.float32) if np.abs(features).max() < MOST else features


def _write(folder: Path, found: dict[str, np.ndarray]) -> None:
    features = np.stack(list(found.values()))
    kept = features.astype(np.float16) if np.abs(features).max() < MOST else features
    try:
        with whole(folder / f"{uuid4().hex}.npz") as unfinished, unfinished.open("wb") as file:
            np.savez(file, digests=np.array(list(found)), features=kept)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, InputError) as error:  # a full disk, or one that cannot be written
        note(f"Features of {len(found):,} images are not kept: {error}")
