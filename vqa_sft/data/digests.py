"""Digests that identify rows of different files, whatever their ids. No torch."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from vqa_sft.data.options import CLASS


def digests_of(examples: datasets.Dataset) -> list[str]:
    """The digest of each row."""
    names = ["question", "choices", "images", *([CLASS] if CLASS in examples.column_names else [])]
    return [row_digest(row) for row in examples.select_columns(names)]


def row_digest(example: Mapping[str, Any]) -> str:
    """16 hex digits that tell a row from others, whatever its id: of question, choices and images.

    An image counts by its content where the row holds it, else by the name of its file without suffix and case, so that
    a folder may move and a name be spelled as another disk has it. The answer does not count: a test set may come with
    answers and without; nor does the context: of two runs, one may have been trained without it. Of a classification
    the choices do not: other candidates make no other row.
    """
    images = [
        unicodedata.normalize("NFC", Path(image["path"]).stem).casefold()
        if image["bytes"] is None
        else hashlib.sha256(image["bytes"]).hexdigest()
        for image in example["images"]
    ]
    texts = [example["question"], [] if CLASS in example else example["choices"], images]
    return digest(texts)


def digest(content: object) -> str:
    """16 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
