"""The rows on the page of `vqa-sft report`: their images, made small, and their HTML. No torch."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from markupsafe import Markup
from PIL import Image

from vqa_sft.data.problems import IMAGES, KINDS
from vqa_sft.images import examine, open_image, size_of
from vqa_sft.questions.letters import LETTERS
from vqa_sft.report.page import render
from vqa_sft.report.report_inputs import Inputs

MAX_CARD_BYTES = 9_000_000  # of all rows; plots and tables take less than 1 MB more
_LEAST_CARD_BYTES = 1_000
_IMAGE_BYTES = 4_800_000  # of all images, before base64 makes them a third larger
_MIN_BYTES, _MAX_BYTES = 2_000, 12_000  # of one image
_STEPS = ((256, 75), (256, 60), (192, 70), (192, 55), (160, 55), (128, 50), (96, 40), (64, 30))  # pixels, JPEG quality
_MAX_THUMBNAILS = 4  # of a row
_SHOWN_INPUTS = 2  # with a bar for each choice; of more, what they chose


def make_cards(inputs: Inputs, rows: Sequence[int]) -> dict[int, tuple[dict[str, Any], Markup]]:
    """Row -> what is known of it and its HTML, of the first rows that fit the page."""
    rows = rows[: MAX_CARD_BYTES // _LEAST_CARD_BYTES]
    data = inputs.data
    num_images = sum(min(_MAX_THUMBNAILS, len(data[row]["images"])) for row in rows) if data else 0
    limit = min(_MAX_BYTES, max(_MIN_BYTES, _IMAGE_BYTES // max(1, num_images)))
    cards: dict[int, tuple[dict[str, Any], Markup]] = {}
    num_bytes = 0
    outside = _unopened(inputs)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(rows), 64):
            some = rows[start : start + 64]  # their images are held
            examples = [data[row] if data else None for row in some]
            unopened = [outside.get(row) for row in some]
            thumbnails = pool.map(_thumbnails, examples, unopened, [limit] * len(some))
            for row, example, images in zip(some, examples, thumbnails, strict=True):
                facts = _facts(inputs, row, example)
                html = Markup(render("report_card.html.j2", row=facts, images=images))
                num_bytes += len(html.encode()) + 200  # and the tag around it
                if num_bytes > MAX_CARD_BYTES:
                    return cards
                cards[row] = facts, html
    return cards


def _unopened(inputs: Inputs) -> dict[int, str]:
    """Row -> why its images are not opened. What lies outside of the image folder is not shown to whoever gets the
    page."""
    if inputs.data is None:
        return {}
    found: dict[tuple[int, int], str] = {}
    for source, loaded in enumerate(inputs.data.sources):
        for kind in IMAGES:
            found |= dict.fromkeys(((source, number) for _, number in loaded.problems.found(kind)), KINDS[kind].what)
    numbers = ((row, inputs.data.number(row)) for row in range(len(inputs.ids))) if found else ()
    return {row: found[number] for row, number in numbers if number in found}


def _facts(inputs: Inputs, row: int, example: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a card shows beside the images."""
    answer, first = int(inputs.answers[row]), inputs.inputs[0]
    probs = [one.probs[row] for one in inputs.inputs[:_SHOWN_INPUTS]]
    texts = example["choices"] if example else []
    choices = [
        {
            "letter": letter,
            "text": texts[i] if i < len(texts) else "",
            "probs": [float(of_input[i]) for of_input in probs],
            "is_answer": i == answer,
            "is_best": [int(one.best[row]) == i for one in inputs.inputs[:_SHOWN_INPUTS]],
        }
        for i, letter in enumerate(LETTERS[: len(probs[0])])
    ]
    shares = [one.agreement[row] for one in inputs.inputs[:_SHOWN_INPUTS]]
    blanked = first.predictions.blanked
    return {
        "id": inputs.ids[row],
        "type": example["question_type"] if example else "",
        "results": ["correct" if one.best[row] == answer else "wrong" for one in inputs.inputs if answer >= 0],
        "question": example["question"] if example else None,
        "context": example["context"] if example else "",
        "num_more": max(0, len(example["images"]) - _MAX_THUMBNAILS) if example else 0,
        "choices": choices,
        "num_inputs": len(inputs.inputs),
        "others": [LETTERS[one.best[row]] for one in inputs.inputs[_SHOWN_INPUTS:]],
        "agreement": [float(share) for share in shares] if min(shares) < 1 - 1e-6 else [],
        "in_training": inputs.in_training.get(row),
        "is_blanked": bool(blanked and blanked[row]),
    }


def _thumbnails(example: Mapping[str, Any] | None, unopened: str | None, limit: int) -> list[tuple[str | None, str]]:
    """Data address and size of each image, or None and why there is none."""
    if example is None:
        return []
    if unopened:
        return [(None, unopened)]
    return [_thumbnail(image, limit) for image in example["images"][:_MAX_THUMBNAILS]] or [(None, "no image")]


def _thumbnail(image: dict, limit: int) -> tuple[str | None, str]:
    try:
        decoded = open_image(image, least_px=_STEPS[0][0])
        sides = size_of(image)
    except Exception:  # Pillow raises many kinds; `examine` has a name for each
        return None, KINDS[examine(image, miniature=False).problem or "broken_image"].what
    # As it is shown: a phone's image may be turned.
    width, height = sides if (sides[0] < sides[1]) == (decoded.width < decoded.height) else sides[::-1]
    data = _as_jpeg(decoded, limit)
    address = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return address, f"{width} x {height}"


def _as_jpeg(decoded: Image.Image, limit: int) -> bytes:
    """The first of _STEPS that takes at most `limit` bytes, or the last."""
    for side, quality in _STEPS:
        decoded.thumbnail((side, side))
        file = io.BytesIO()
        decoded.save(file, format="JPEG", quality=quality, optimize=True)
        if file.tell() <= limit:
            break
    return file.getvalue()
