"""Which candidates a training row of a classification shows in an epoch. No torch."""

import random
from collections.abc import Sequence
from typing import Any

from vqa_sft.data.class_probs import NONE_OF_THESE
from vqa_sft.data.options import CANDIDATES, CLASS, POOL


def draw_candidates(row: dict[str, Any], names: Sequence[str], seed: int, epoch: int | str) -> dict[str, Any]:
    """The training row with as many candidates as it has, drawn from its pool, the most likely first; each but the
    right class equally often. `names` are those of all classes.

    The right class is among them, unless the answer is that none is. The draw depends on nothing but its arguments, as
    that of `letters.draw_order`.
    """
    shown, label = row[CANDIDATES], row[CLASS]
    after = [place for place, number in enumerate(shown) if number == NONE_OF_THESE]
    num = len(shown) - len(after)
    is_none = row["answer"] in after
    others = [number for number in row[POOL] if number != label]
    # A string seed goes through SHA-512, so it is the same in every process, unlike hash().
    drawn = {*random.Random(f"{seed}/{epoch}/{row['id']}/candidates").sample(others, num if is_none else num - 1)}
    drawn |= set() if is_none else {label}
    found = [number for number in row[POOL] if number in drawn]
    answer = row["answer"] if is_none else found.index(label)
    choices = [names[number] for number in found] + [row["choices"][place] for place in after]
    return row | {CANDIDATES: found + [NONE_OF_THESE] * len(after), "choices": choices, "answer": answer}


def show_longest(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The training row with the longest names of its pool, for whoever asks how long it may become."""
    after = [text for text, number in zip(row["choices"], row[CANDIDATES], strict=True) if number == NONE_OF_THESE]
    found = sorted((names[number] for number in row[POOL]), key=len, reverse=True)
    return row | {"choices": found[: len(row["choices"]) - len(after)] + after}
