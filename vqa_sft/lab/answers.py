"""What a server answers, and how far probabilities are from others. No torch."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import numpy as np

from vqa_sft.errors import InputError, printable

TIMEOUT_S = 600  # the first request may wait for a compilation


def ask_server(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON that a server answers, to a GET where there is no body. Raises InputError with what it says."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        said = printable(error.read().decode(errors="replace"), 300)
        raise InputError(f"{url} answers {error.code}: {said}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(f"{url} cannot be asked: {error}. Is the server up?") from error


@dataclass(frozen=True)
class Difference:
    """Of the probabilities of the same rows by two ways."""

    largest: float
    mean: float  # over all choices of all rows
    mean_largest: float  # over rows, of the largest of each
    num_answers: int  # whose most probable choice differs


def difference(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Difference:
    """Of probabilities (C,) of each row."""
    gaps = [np.abs(a - b) for a, b in zip(one, other, strict=True)]
    largest = [float(gap.max()) for gap in gaps]
    answers = sum(int(a.argmax() != b.argmax()) for a, b in zip(one, other, strict=True))
    return Difference(max(largest), float(np.concatenate(gaps).mean()), float(np.mean(largest)), answers)
