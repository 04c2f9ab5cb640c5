"""Features of the images on disk: a frozen vision tower sees each image once, not once an epoch and run.

    features/<tower>/<first two digits>/<digest>.safetensors
        features   (tokens, D) from Qwen2.5-VL; (1 + deepstack layers, tokens, D) from Qwen3-VL
        grid       (3,)  frames, rows and columns of patches, which the prompt needs

`digest` is that of the image's file, `tower` that of everything else that the features depend on: weights, precision,
pixel limits. Folds, epochs, runs and predictions share the files; deleting them is always safe. Augmented images have
no digest, so a recipe with both is refused.

    store = open_store(model, ...)        before the tower is sped up
    fill_store(model, collator, ...)      after it; from then on the collators open no image

What cannot be stored or read goes through the tower as pixels, and a line reports it.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import PIL
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vqa_sft.batch.collator import BLANK_SIZE, AnswerCollator
from vqa_sft.console import progress
from vqa_sft.data.scan import cache_path, count_cores
from vqa_sft.errors import InputError
from vqa_sft.images import size_of
from vqa_sft.models import processes
from vqa_sft.models.families import FAMILIES, PACKED, num_deepstack, tower_of
from vqa_sft.models.fast.compilation import say
from vqa_sft.models.fast.packing import Packer
from vqa_sft.models.fast.speedups import base_of
from vqa_sft.models.fast.vision import is_frozen, run_tower
from vqa_sft.models.load import DTYPES

FORMAT = 1  # count up when the files, or how images are read, change
RESERVED_BYTES = 2**30  # left free, for a run saves its checkpoints too
BLOCK_ROWS = 128
WRITERS = 4

Place = tuple[int, int]  # number of a row, and of an image in it


class FeatureStore:
    """The files of one tower. Small, for it travels to the data loaders' workers. Once it `is_filled`, collators look
    for features here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_filled = False
        self._has_said = False

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def find(self, digests: Sequence[str | None]) -> dict[str, torch.Tensor] | None:
        """`image_features` (tokens of all images, D) or (1 + deepstack layers, tokens, D), and `image_grid_thw`
        (images, 3); None where there are no images, or one of them is not stored."""
        found = []
        for digest in digests:
            stored = self.read(digest) if digest else None
            if stored is None:
                return None
            found.append(stored)
        if not found:
            return None
        features, grids = zip(*found, strict=True)
        return {"image_features": torch.cat(features, dim=-2), "image_grid_thw": torch.stack(grids)}

    def read(self, digest: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Features and grid of an image, mapped into memory; None, and the file removed, where they are damaged."""
        path = self.path(digest)
        with suppress(OSError):  # gone, or a disk that does not answer now
            try:
                with safe_open(path, framework="pt") as file:
                    features, grid = file.get_tensor("features"), file.get_tensor("grid")
                    if file.metadata() == self._metadata(digest, features, grid):
                        return features, grid
            except SafetensorError:
                pass
            path.unlink()  # the next run computes it
        if not self._has_said:  # in a worker, which must not ask for the state of the processes
            print(f"Speed: {path} is damaged or gone; images go through the tower where features are missing.")
            self._has_said = True
        return None

    def num_bytes(self, digest: str) -> int:
        """The size of an image's file, 0 where it must be computed. Its content is not read; `read` looks at it."""
        path = self.path(digest)
        try:
            with safe_open(path, framework="pt") as file:  # raises for a file that is cut off
                metadata = file.metadata() or {}
            is_ours = (metadata.get("tower"), metadata.get("digest")) == (self.folder.name, digest)
            return path.stat().st_size if is_ours else 0
        except (OSError, SafetensorError):
            return 0

    def write(self, digest: str, features: torch.Tensor, grid: torch.Tensor) -> None:
        """Whole or not at all, whoever else writes it and whenever it is killed. Raises OSError."""
        path = self.path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({"features": features, "grid": grid}, self._metadata(digest, features, grid))
        half = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        try:
            half.write_bytes(content)
            os.replace(half, path)
        except BaseException:
            with suppress(OSError):
                half.unlink()
            raise

    def _metadata(self, digest: str, features: torch.Tensor, grid: torch.Tensor) -> dict[str, str]:
        # Whose features they are, and a checksum: a disk that lost power may hold zeros at the right length.
        checksum = zlib.crc32(_bytes(grid), zlib.crc32(_bytes(features)))
        return {"tower": self.folder.name, "digest": digest, "crc32": str(checksum)}


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def open_store(
    model: nn.Module, processor: ProcessorMixin, packer: Packer | None, precision: str
) -> FeatureStore | None:
    """The store of a model's vision tower, still empty for the collators; None, with a line, where the tower is spread
    over processes. Called by every process, before the tower is sped up, which changes its weights' shapes. Raises
    InputError for a family without it."""
    base = base_of(model)
    if packer is None or not packer.has_grids:
        known = " and ".join(FAMILIES[name].label for name in PACKED)
        raise InputError(
            f"cache_image_features is known for {known} with attn_implementation sdpa; this model is "
            f"{base.config.model_type}, or its attention another. Remove cache_image_features."
        )
    if processes.shards_weights():
        say("images go through the tower every time: its weights are spread over processes")
        return None
    # One process names the folder, so that all have the same.
    name = tower_key(base, processor, precision) if PartialState().is_main_process else None
    return FeatureStore(cache_path().parent / "features" / processes.from_main(name))


def tower_key(model: PreTrainedModel, processor: ProcessorMixin, precision: str) -> str:
    """A digest of everything but the image that its features depend on."""
    digest = hashlib.sha256()
    for name, tensor in tower_of(model).state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    config = model.config.vision_config.to_dict()
    config.pop("_name_or_path", None)
    settings = (FORMAT, PIL.__version__, precision, config, processor.image_processor.to_dict())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def fill_store(
    model: nn.Module,
    collator: AnswerCollator,
    parts: Sequence[datasets.Dataset],
    precision: str,
    batch_size: int,
    num_workers: int,
) -> None:
    """Compute the features of all images of `parts` that the collator's store lacks. Called by every process, each does
    its share. Raises InputError where the tower is trained, and for an image that cannot be read."""
    base, state = base_of(model), PartialState()
    store: Any = collator.features
    if not is_frozen(tower_of(base)):
        raise InputError(
            "cache_image_features needs a vision tower that stays as it is, and this run trains it: look at "
            "lora_target_modules and lora_modules_to_save, or remove cache_image_features."
        )
    rows = ConcatDataset([part.with_format(None).select_columns(["id", "images"]) for part in parts])
    plan = _plan(collator, base.config, rows, precision) if state.is_main_process else None
    places, missing, problem = processes.from_main(plan)
    if not problem:
        # Batches are cut before they are dealt out, so any number of processes computes the same ones.
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        own = batches[state.process_index :: state.num_processes]
        named = [[(digest, places[digest]) for digest in batch] for batch in own]
        problem = _first(_compute(base, collator, rows, named, precision, num_workers))
        sizes = [] if problem else [store.num_bytes(digest) for digest in places]
        problem = problem or _first(None if all(sizes) else f"not every process sees all files in {store.folder}")
        if problem:
            # What is there is of little use when batches lack some of it, and the run itself may need the room.
            for digest in chain.from_iterable(own):
                with suppress(OSError):
                    store.path(digest).unlink()
    if problem:
        say(f"images go through the tower every time, for their features cannot be stored: {problem}")
        return
    store.is_filled = True
    counts = f"{len(missing):,} computed, {len(places) - len(missing):,} found"
    say(f"features of {len(places):,} images, {counts}: {sum(sizes) / 1e6:,.1f} MB in {store.folder}")


def _first(problem: str | None) -> str | None:
    """The first problem that a process has; waits for all."""
    return next(filter(None, gather_object([problem])), None)


def _plan(
    collator: AnswerCollator, config: PreTrainedConfig, rows: ConcatDataset, precision: str
) -> tuple[dict[str, Place], list[str], str | None]:
    """Where each distinct image stands, which are not stored, and why they cannot be."""
    store: Any = collator.features
    with ThreadPoolExecutor(count_cores()) as pool:  # reading and hashing release the GIL
        places = _find_images(collator, rows, pool)
        sizes = pool.map(store.num_bytes, places)
        missing = [digest for digest, size in zip(places, sizes, strict=True) if not size]
    if not missing:
        return places, missing, None
    num_values = sum(_num_values(collator, config, rows, places[digest]) for digest in missing)
    needed = num_values * DTYPES[precision].itemsize
    say(f"features of {len(missing):,} images will take about {needed / 1e6:,.1f} MB in {store.folder}")
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store.folder).free
    except OSError as error:
        return places, missing, str(error)
    full = f"{free / 1e6:,.0f} MB are free, of which {RESERVED_BYTES / 1e6:,.0f} are left for the run"
    return places, missing, full if needed > free - RESERVED_BYTES else None


def _find_images(collator: AnswerCollator, rows: ConcatDataset, pool: ThreadPoolExecutor) -> dict[str, Place]:
    """Digest -> where it first stands, of all images that can be read; nothing is decoded."""
    places: dict[str, Place] = {}
    paths: set[str] = set()
    for first, block in _read_blocks(rows):
        new = []
        for number, row in enumerate(block, first):
            for position, image in enumerate(row["images"]):
                if image["bytes"] is not None or image["path"] not in paths:
                    new.append((row, (number, position)))
                if image["bytes"] is None:
                    paths.add(image["path"])
        digests = pool.map(lambda found: collator.digest(found[0], found[1][1]), new)
        for digest, (_, place) in zip(digests, new, strict=True):
            if digest is not None:
                places.setdefault(digest, place)
    return places


def _read_blocks(rows: ConcatDataset) -> Iterator[tuple[int, list[dict]]]:
    """Some rows at a time, far faster than one by one, with the number of the first."""
    for first, part in zip([0, *rows.cumulative_sizes], rows.datasets, strict=False):
        for start in range(0, len(part), BLOCK_ROWS):
            block = part[start : start + BLOCK_ROWS]
            yield first + start, [dict(zip(block, row, strict=True)) for row in zip(*block.values(), strict=True)]


def _num_values(collator: AnswerCollator, config: PreTrainedConfig, rows: ConcatDataset, place: Place) -> int:
    """How many numbers the features of an image will be, from its header."""
    number, position = place
    row = rows[number]
    processor = collator.processor.image_processor
    try:
        width, height = BLANK_SIZE if collator.is_blank(row, position) else size_of(row["images"][position])
        num_patches = processor.get_number_of_image_patches(height, width)
    except Exception:  # what cannot be read will be refused when it is
        return 0
    num_levels = 1 + num_deepstack(config)
    return num_patches // processor.merge_size**2 * config.vision_config.out_hidden_size * num_levels


def _compute(
    base: PreTrainedModel,
    collator: AnswerCollator,
    rows: ConcatDataset,
    batches: list[list[tuple[str, Place]]],
    precision: str,
    num_workers: int,
) -> str | None:
    """Compute and write features; what went wrong when they were written."""
    if not batches:
        return None
    # A batch is one element of what is loaded.
    loader = DataLoader(batches, None, collate_fn=partial(_preprocess, collator, rows), num_workers=num_workers)
    tower = tower_of(base)
    was_training = tower.training
    tower.eval()
    store: Any = collator.features
    writes: list[Future] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for digests, inputs in progress(loader, desc="Image features", in_logs=True):
            computed = _features_of_each(base, inputs, precision)
            problem = _problem_of(writes)  # those of the batch before, which were written meanwhile
            if problem:
                break
            computed = zip(digests, computed, inputs["image_grid_thw"], strict=True)
            writes = [pool.submit(store.write, *of_image) for of_image in computed]
        problem = problem or _problem_of(writes)
    tower.train(was_training)
    return problem


def _problem_of(writes: Sequence[Future]) -> str | None:
    try:
        for write in writes:
            write.result()
    except OSError as error:
        return str(error)
    return None


def _preprocess(
    collator: AnswerCollator, rows: ConcatDataset, places: list[tuple[str, Place]]
) -> tuple[list[str], dict[str, Any]]:
    """The images at these places as the tower takes them; runs in a worker."""
    images = [collator.image(rows[number], position) for _, (number, position) in places]
    batch = collator.processor.image_processor(images=images, return_tensors="pt")
    grid = batch["image_grid_thw"]
    packer: Any = collator.packer
    inputs = packer.pack_images(batch["pixel_values"], grid) | {"image_grid_thw": grid}
    return [digest for digest, _ in places], inputs


def _features_of_each(base: PreTrainedModel, inputs: dict[str, Any], precision: str) -> list[torch.Tensor]:
    """Features of each image, on the CPU."""
    tower = tower_of(base)
    features = run_tower(base, send_to_device(inputs, next(tower.parameters()).device), precision)
    num_tokens = inputs["image_grid_thw"].prod(dim=-1) // tower.spatial_merge_size**2
    return [of_image.contiguous() for of_image in features.cpu().split(num_tokens.tolist(), dim=-2)]
