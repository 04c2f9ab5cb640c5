"""Splits that never put one picture on both sides."""

import hashlib
from collections import Counter

import datasets
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from vqa_sft.errors import InputError


def image_key(images: list[dict]) -> str:
    """A name for the pictures of one example: equal when the paths, or the bytes, are equal."""
    parts = [image["path"].encode() if image["bytes"] is None else image["bytes"] for image in images]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def hold_out(examples: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation examples: about `fraction` held out, stratified by answer, grouped by picture."""
    num_splits = round(1 / fraction)
    # Numbered as they come: the splitter sorts groups, and paths would make the split depend on where the data lie.
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(image_key(images), len(numbers)) for images in examples["images"]]
    if len(numbers) < num_splits:
        raise InputError(
            f"validation_fraction {fraction} needs at least {num_splits} different pictures; got {len(numbers)}. "
            "Use a larger fraction or a validation_data file."
        )
    # With few rows no answer may be frequent enough to be spread over the parts; then they are not stratified.
    stratify = max(Counter(examples["answer"]).values()) >= num_splits
    kind = StratifiedGroupKFold if stratify else GroupKFold
    splitter = kind(n_splits=num_splits, shuffle=True, random_state=seed)
    train, validation = next(splitter.split(groups, examples["answer"], groups))
    return examples.select(train), examples.select(validation)
