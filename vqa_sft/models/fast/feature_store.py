"""Features of the images on disk: a frozen vision tower sees each image once, not once an epoch and run.

    features/<tower>/<first two digits>/<digest>.safetensors
        features   (tokens, D) from Qwen2.5-VL; (1 + deepstack layers, tokens, D) from Qwen3-VL
        grid       (3,)  frames, rows and columns of patches, which the prompt needs

`digest` is that of the image's file, `tower` that of everything else that the features depend on: weights, precision,
pixel limits. Folds, epochs, runs and predictions share the files; another base or another limit has its own, and
deleting them is always safe. Augmented images have no digest of what was done to them, so a recipe with both is
refused.

    store = open_store(model, ...)        before the tower is sped up
    fill_store(model, collator, ...)      after it (fill_store.py); from then on the collators open no image

What cannot be stored or read goes through the tower as pixels, and a line reports it.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import PIL
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from vqa_sft.data.scan import cache_path
from vqa_sft.errors import InputError
from vqa_sft.models import processes
from vqa_sft.models.families import FAMILIES, tower_of
from vqa_sft.models.fast.packing import Packer
from vqa_sft.models.fast.speedups import base_of, say

FORMAT = 1  # count up when the files, or how images are read, change


class FeatureStore:
    """The files of one tower. Small, for it travels to the data loaders' workers.

    `is_filled` says whether collators may look for features here.
    """

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

    def remove(self, digest: str) -> None:
        with suppress(OSError):
            self.path(digest).unlink()

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
    over processes.

    Called by every process, and before the tower is sped up, which changes its weights' shapes. Raises InputError for a
    model whose rows are not packed.
    """
    base = base_of(model)
    if packer is None:
        known = " and ".join(family.label for family in FAMILIES.values())
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
