"""Letters, orders and views; `scoring.to_choice_logits` undoes an order. Standard library only.

An order says which choice stands under which letter: ``order[i]`` is the index of the choice shown under
letter ``i``. With the choices ``["cat", "dog", "fox"]`` and the order ``(2, 0, 1)`` the model reads

    A. fox      order[0] = 2
    B. cat      order[1] = 0
    C. dog      order[2] = 1

Everything on disk is in choice space; letters exist only between the collator and scoring.

Choices that refer to others keep their places (questions/references.py): with `num_free` only so many choices, from the
first one on, are permuted, and the order is the identity beyond them. None means all of them.
"""

import itertools
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vqa_sft.errors import InputError, printable

LETTERS = string.ascii_uppercase
MOST_ORDERS = 120  # in which a row is scored; all of five choices


def identity_order(num_choices: int) -> tuple[int, ...]:
    """The order of the data itself: choice ``i`` under letter ``i``."""
    return tuple(range(num_choices))


def draw_order(
    num_choices: int, seed: int, epoch: int | str, row_id: str, num_free: int | None = None
) -> tuple[int, ...]:
    """A random order that depends on nothing but its arguments: any worker, process or resumed run draws the same."""
    identity = identity_order(num_choices)
    order = list(identity[:num_free])
    # A string seed goes through SHA-512, so it is the same in every process, unlike hash().
    random.Random(f"{seed}/{epoch}/{row_id}").shuffle(order)
    return (*order, *identity[len(order) :])


def view_orders(
    num_choices: int, views: str | int, row_id: str = "", num_free: int | None = None
) -> list[tuple[int, ...]]:
    """The orders in which a row is scored, the identity first.

    "identity": that alone. "rotations": every free choice once under every free letter, `num_choices` orders where all
    are free. "all": all of them, 24 of four choices. A number: so many different ones, or all where there are fewer,
    drawn by the row's id.
    """
    identity = identity_order(num_choices)
    free, fixed = identity[:num_free], identity[len(identity[:num_free]) :]
    if views == "identity" or len(free) < 2:
        return [identity]
    if views == "rotations":
        return [free[-shift:] + free[:-shift] + fixed for shift in range(len(free))]
    if views == "all":
        return [order + fixed for order in itertools.permutations(free)]
    orders, num_orders = {identity: None}, min(int(views), math.factorial(len(free)))
    number = 0
    while len(orders) < num_orders:
        orders[draw_order(num_choices, 0, number, row_id, num_free)] = None
        number += 1
    return [*orders]


def choices_to_letters(values: Sequence, order: Sequence[int]) -> list:
    """Values in choice space, put in the order of the letters: result ``[i]`` belongs to letter ``i``."""
    return [values[choice] for choice in order]


def choice_to_letter(choice: int, order: Sequence[int]) -> int:
    """The index of the letter under which ``choice`` is shown."""
    return list(order).index(choice)


@dataclass(frozen=True)
class Views:
    """The views of a row that are scored, each of `orders` (see `view_orders`) at each of `scales` of the images'
    sides, and how they are averaged: their probabilities ("mean"), or the logarithms of these ("log")."""

    orders: str | int = "identity"
    scales: Sequence[float] = (1.0,)
    average: str = "mean"

    def __post_init__(self) -> None:
        is_number = type(self.orders) is int and 1 <= self.orders <= MOST_ORDERS
        if not is_number and self.orders not in ("identity", "rotations", "all"):
            known = f"identity, rotations, all or a number from 1 to {MOST_ORDERS}"
            raise InputError(f"orders must be {known}; got {describe_value(self.orders)}.")
        scales = self.scales if isinstance(self.scales, list | tuple) else ()
        if not scales or not all(type(scale) in (int, float) and 0.25 <= scale <= 4 for scale in scales):
            known = "a list of numbers from 0.25 to 4, such as 0.9,1.0,1.1"
            raise InputError(f"scales must be {known}; got {describe_value(self.scales)}.")
        if len({*scales}) < len(scales):
            raise InputError(f"scales must be different numbers; got {describe_value(self.scales)}.")
        if self.average not in ("mean", "log"):
            raise InputError(f"average must be mean or log; got {describe_value(self.average)}.")

    @property
    def metadata(self) -> dict[str, Any]:
        """What a prediction file says of its views."""
        return {"orders": self.orders, "scales": [*self.scales], "average": self.average}

    def num_of(self, num_choices: int) -> int:
        """How many views a row of so many choices has."""
        return len(view_orders(num_choices, self.orders)) * len(self.scales)

    def check(self, num_choices: int) -> None:
        """Raises InputError where rows of so many choices have more orders than are scored."""
        num_orders = math.factorial(num_choices)
        if self.orders == "all" and num_orders > MOST_ORDERS:
            raise InputError(
                f"orders all: rows of {num_choices} choices have {num_orders:,} orders. Give rotations, or a number."
            )


def describe_value(value: Any) -> str:
    """A value of the wrong kind in a message."""
    return f"{printable(repr(value), 60)} ({type(value).__name__})"
