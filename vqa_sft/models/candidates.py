"""From images to the most likely classes of every row: features, a classifier, probabilities. Training rows out of
fold."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vqa_sft.data.class_probs import ClassProbs, keep_likely
from vqa_sft.data.classes import Classes
from vqa_sft.data.digests import digests_of
from vqa_sft.data.find_files import quote
from vqa_sft.data.read_class_probs_table import labels_of
from vqa_sft.errors import InputError
from vqa_sft.models.encoders import Encoder, NamedEncoder
from vqa_sft.models.image_features import Rows, row_features
from vqa_sft.models.probe import (
    Classifier,
    LinearProbe,
    NearestNeighbours,
    ZeroShot,
    average_texts,
    class_texts,
    cross_fit,
)


@dataclass
class Classified:
    """Probabilities of each part, those of training first and out of fold; what made them, and notes for the user."""

    parts: list[ClassProbs]
    metadata: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def check_classifier(name: str, encoder: Encoder) -> None:
    """Raises InputError where the encoder reads no text and the classifier needs it."""
    if name == "zero_shot" and not (isinstance(encoder, NamedEncoder) and encoder.reads_text):
        raise InputError(
            f"zero_shot compares images with the names of classes, and {encoder.name} has no encoder of text. Take one "
            "of both, such as SigLIP 2 or CLIP, or another classifier."
        )


def build_classifier(name: str, encoder: Encoder, classes: Classes) -> Classifier:
    if name != "zero_shot":
        return LinearProbe() if name == "linear" else NearestNeighbours()
    assert isinstance(encoder, NamedEncoder)
    texts = class_texts(classes.names, classes.other_names, classes.descriptions)
    return ZeroShot(average_texts(encoder.encode_texts, texts))


def classify(
    parts: Sequence[Rows],
    classes: Classes,
    encoder: Encoder,
    classifier: Classifier,
    fold_of: Sequence[int],
    devices: Sequence[torch.device],
    batch_size: int,
) -> Classified:
    """Probabilities of the rows of every part; the first is that of training, whose rows have the folds `fold_of`."""
    features, *rest = row_features(encoder, parts, devices, batch_size)
    labels = labels_of(parts[0][0])
    fitted = cross_fit(classifier, features, labels, fold_of, len(classes), devices[0])
    tables = [fitted.out_of_fold, *map(fitted.predict, rest)]
    found = []
    for (examples, _), table in zip(parts, tables, strict=True):
        probs = keep_likely(examples["id"][:], classes.names, table, source="the classifier")
        found.append(replace(probs, labels=labels_of(examples), digests=digests_of(examples)))
    source = f"{classifier.label} on features of {encoder.name}"
    metadata = {
        "source": source,
        "folds": max(fold_of) + 1,
        "setting": fitted.setting,
        "temperature": fitted.temperature,
    }
    return Classified(found, metadata, note_folds(classes, labels, fold_of))


def note_folds(classes: Classes, labels: Sequence[int], fold_of: Sequence[int]) -> list[str]:
    """Which classes have all their rows in one fold."""
    folds = defaultdict(set)
    for label, fold in zip(labels, fold_of, strict=True):
        folds[int(label)].add(fold)
    alone = [classes.names[label] for label, found in sorted(folds.items()) if len(found) == 1]
    if not alone:
        return []
    return [
        f"classes whose rows are all in one fold ({len(alone):,}): {quote(alone)}; what predicts them out of fold has "
        "seen no row of their class"
    ]
