"""A System One request, as transformers' pipeline("decision") takes it, as questions to a Predictor.

    {"state": {"images": ["image-1"]}, "questions": {"animal": {"type": "choice", "instructions": "Which animal is it?",
     "criteria": {"cat": None, "dog": None}}}, "assets": {"image-1": "photo.jpg"}}

What is refused here is what the template of an exported run refuses (batch/decision_template.py).
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import DecisionConfig
from transformers.decision import parse_questions
from transformers.decision.template_utils import Question

from vqa_sft.batch.decision_template import MOST_CHARS, MOST_IMAGES, NOUL
from vqa_sft.errors import InputError, explains
from vqa_sft.questions.letters import LETTERS, describe_value


@dataclass(frozen=True)
class Asked:
    """One question of a request, with what a Predictor is asked."""

    question: Question  # knows its name, its options, and how an answer is written
    images: list[Any]
    text: str
    choices: list[str]
    context: str | None


def read_request(request: Any, num_choices: int, *, has_images: bool, has_context: bool) -> list[Asked]:
    """The questions of a request to a run of so many letters, trained with images, with contexts. Raises InputError."""
    if isinstance(request, str | bytes):
        with explains(ValueError, "the request is no JSON"):
            request = json.loads(request)
    if not isinstance(request, Mapping) or not {"state", "questions"} <= request.keys():
        raise InputError(
            'a request is {"state": ..., "questions": {name: question}, "assets": {name: image}}; got '
            f"{describe_value(request)}."
        )
    config = DecisionConfig(labels={kind: [*LETTERS[:num_choices]] for kind in Question.questions_types})
    with explains((ValueError, TypeError), "the questions cannot be asked"):
        questions = parse_questions(request["questions"], config)
    assets = request.get("assets") or {}
    if not isinstance(assets, Mapping) or not all(isinstance(name, str) and name for name in assets):
        raise InputError(f"assets map names to images; got {describe_value(assets)}.")
    images, context = _read_state(request["state"], assets, has_images, has_context)
    return [_read_question(question, images, context, assets) for question in questions]


def _read_state(state: Any, assets: Mapping, has_images: bool, has_context: bool) -> tuple[list, str | None]:
    """The images and the context, None for a run without."""
    if isinstance(state, Mapping):
        if unknown := state.keys() - {"images", "context"}:
            raise InputError(f"state may hold images and context, and nothing else; got {sorted(map(str, unknown))}.")
        names, text = _split(state.get("images", []), assets)
        if text.strip():
            raise InputError(f"state.images holds a text that names no image of assets: {describe_value(text)}.")
        if has_images and "images" not in state:
            raise InputError("state needs images that assets hold; images [] asks without one.")
        if has_context and "context" not in state:
            raise InputError("state needs a context, empty for no text, for the run was trained with contexts.")
        text = _text(state.get("context", ""), "state.context", assets)
    else:
        names, text = _split(state, assets)
        if has_images and not names:
            raise InputError("state names no image of assets.")
    if names and not has_images:
        raise InputError("state names an image, and the run was trained without images.")
    if text.strip() and not has_context:
        raise InputError(
            "state holds a text that names no image of assets, and the run was trained without contexts: "
            f"{describe_value(text)}."
        )
    if len(names) > MOST_IMAGES:
        raise InputError(f"state names more than {MOST_IMAGES} images; got {len(names):,}.")
    return [_image(assets[name], name) for name in names], text if has_context else None


def _split(value: Any, assets: Mapping) -> tuple[list[str], str]:
    """The names of assets in a text, or in a list of texts, and what else it says."""
    if isinstance(value, str):
        pattern = "|".join(re.escape(name) for name in sorted(assets, key=len, reverse=True)) or r"(?!)"
        return re.findall(pattern, value), re.sub(pattern, "", value)
    if not isinstance(value, list | tuple):
        raise InputError(f"state holds what is neither a text nor an image of assets: {describe_value(value)}.")
    parts = [_split(part, assets) for part in value]
    return [name for names, _ in parts for name in names], "".join(text for _, text in parts)


def _read_question(question: Question, images: list, context: str | None, assets: Mapping) -> Asked:
    choices = []
    for option, described in zip(question.options, question.descriptions, strict=True):
        shown = NOUL[option] if question.type == "noul" else option
        text = _text(shown if described is None or described == "" else described, "an option", assets)
        if not text.strip():
            raise InputError(f"an option of question {question.name!r} is empty.")
        choices.append(text)
    instructions = _text(question.instructions, "instructions", assets)
    if (num_chars := sum(map(len, (instructions, context or "", *choices)))) > MOST_CHARS:
        raise InputError(f"the texts of a question have more than {MOST_CHARS:,} characters; got {num_chars:,}.")
    return Asked(question, images, instructions, choices, context)


def _text(value: Any, what: str, assets: Mapping) -> str:
    if not isinstance(value, str) or any(name in value for name in assets):
        raise InputError(f"{what} must be a text without images; got {describe_value(value)}.")
    return value


def _image(asset: Any, name: str) -> Any:
    """What a Predictor takes: a path, the bytes of a file, or an image. A System One asset holds them in base64."""
    if isinstance(asset, str) and re.match(r"https?://", asset):
        raise InputError(f"the asset {name!r} is an address, and nothing is downloaded here. Give the image.")
    if not isinstance(asset, Mapping):
        return asset
    data = asset.get("data_base64")
    if not isinstance(data, str):
        raise InputError(f"the asset {name!r} has no data_base64 with the file of an image.")
    with explains(ValueError, f"the asset {name!r} is no base64"):
        return base64.b64decode(re.sub(r"^data:image/[^,]*,|\s", "", data), validate=True)
