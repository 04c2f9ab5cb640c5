"""How many tokens the collator makes of rows, without decoding an image; what `data.check.check` takes for it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from PIL import Image
from transformers import ProcessorMixin

from vqa_sft.batch.prompts import Prompts, check_prompts, control_tokens, render_prompt
from vqa_sft.batch.template import Options, render
from vqa_sft.images import size_of
from vqa_sft.questions.letters import identity_order

_BATCH = 1_000
_SAMPLE = 200  # rows
_IMAGE = 1_000_000  # characters, more than a row has


def prompt_checks(processor: ProcessorMixin, prompts: Prompts) -> dict[str, Any]:
    """The arguments of `data.check.check` for these prompts. Raises InputError where they hold a control token."""
    check_prompts(processor, prompts)
    return {
        "count_tokens": partial(count_tokens, processor, prompts),
        "control_tokens": control_tokens(processor),
    }


def count_tokens(
    processor: ProcessorMixin,
    prompts: Prompts,
    examples: datasets.Dataset,
    sizes: Sequence[Sequence[tuple[int, int]]],
) -> np.ndarray:
    """How many tokens the collator makes of every row; `sizes` holds the (width, height) of its images."""
    added = image_tokens(processor, sorted({size for of_row in sizes for size in of_row}), prompts.template_options)
    bos = processor.tokenizer.bos_token
    rows = examples.select_columns(["question", "choices", "context", "question_type"])
    counts = []
    for start in range(0, len(sizes), _BATCH):
        batch = sizes[start : start + _BATCH]
        texts = [
            render_prompt(processor, row | {"images": of_row}, identity_order(len(row["choices"])), prompts)
            for row, of_row in zip(rows.select(range(start, start + len(batch))), batch, strict=True)
        ]
        with_bos = not (bos and texts[0].startswith(bos))
        tokens = processor.tokenizer(texts, add_special_tokens=with_bos, verbose=False).input_ids
        counts += [len(ids) + sum(added[size] for size in of_row) for ids, of_row in zip(tokens, batch, strict=True)]
    return np.array(counts, dtype=int)


def relative_lengths(examples: datasets.Dataset) -> list[int]:
    """Numbers that are larger for longer rows, without looking at an image: characters, after the number of images."""
    texts = examples.select_columns(["question", "choices", "context"])
    characters = [len(row["question"]) + sum(map(len, row["choices"])) + len(row["context"] or "") for row in texts]
    # Not as Python objects: images may be bytes.
    images = examples.select_columns(["images"]).with_format("arrow").iter(_BATCH)
    counts = [count for batch in images for count in pc.list_value_length(batch["images"]).to_pylist()]
    return [_IMAGE * count + length for count, length in zip(counts, characters, strict=True)]


def uneven_tokens(
    processor: ProcessorMixin, examples: datasets.Dataset, options: Options | None = None
) -> list[int] | None:
    """About how many tokens of each row are not in every row: those of its images, by their headers, and of its texts,
    at the mean length of a token in the first rows. No image is decoded and few texts are tokenised. None where the
    processor does not count and images have many sizes."""
    texts = examples.select(range(min(len(examples), _SAMPLE))).select_columns(["question", "choices", "context"])
    joined = ["\n".join([row["question"], *row["choices"], row["context"] or ""]) for row in texts]
    num_tokens = sum(map(len, processor.tokenizer(joined, add_special_tokens=False, verbose=False).input_ids))
    rate = num_tokens / max(1, sum(map(len, joined)))
    sizes = [[_size_of(image) for image in row["images"]] for row in examples.select_columns(["images"])]
    distinct = sorted({size for of_row in sizes for size in of_row if size})
    added = image_tokens(processor, distinct, options, most=_SAMPLE)
    if distinct and not added:
        return None
    characters = [length % _IMAGE for length in relative_lengths(examples)]
    return [
        round(rate * length) + sum(added.get(size, 0) for size in of_row)
        for length, of_row in zip(characters, sizes, strict=True)
    ]


def _size_of(image: dict | None) -> tuple[int, int] | None:
    try:
        return size_of(image) if image else None
    except Exception:  # whatever Pillow raises; the collator says what is wrong with it
        return None


def image_tokens(
    processor: ProcessorMixin, sizes: Sequence[tuple[int, int]], options: Options | None = None, most: float = math.inf
) -> dict[tuple[int, int], int]:
    """How many tokens an image of each (width, height) adds to its placeholder; blank images of these sizes are
    processed where the processor does not count by itself, unless there are more than `most`: then none is known."""
    if not sizes:
        return {}
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    prompt = render(processor, [message], options or {})
    without = len(processor.tokenizer(prompt).input_ids)

    def added(size: tuple[int, int]) -> int:
        return len(processor(text=[prompt], images=[[Image.new("RGB", size)]])["input_ids"][0]) - without

    # transformers 5.23 has this for vLLM, for most families and without a promise, so it is compared once.
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is not None:
        numbers = count(image_sizes=[(height, width) for width, height in sizes])["num_image_tokens"]
        if numbers[0] - 1 == added(sizes[0]):
            return {size: number - 1 for size, number in zip(sizes, numbers, strict=True)}
    return {size: added(size) for size in sizes} if len(sizes) <= most else {}
