"""Letters and orders; `scoring.to_choice_logits` undoes an order. Standard library only.

An order says which choice stands under which letter: ``order[i]`` is the index of the choice shown under
letter ``i``. With the choices ``["cat", "dog", "fox"]`` and the order ``(2, 0, 1)`` the model reads

    A. fox      order[0] = 2
    B. cat      order[1] = 0
    C. dog      order[2] = 1

Everything on disk is in choice space; letters exist only between the collator and scoring.

Choices that refer to others keep their places (references.py): with `num_free` only so many choices, from the first one
on, are permuted, and the order is the identity beyond them. None means all of them.
"""

import itertools
import math
import random
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
MOST_ORDERS = 120  # in which a row is scored; all of five choices


def identity_order(num_choices: int) -> tuple[int, ...]:
    """The order of the data itself: choice ``i`` under letter ``i``."""
    return tuple(range(num_choices))


def draw_order(num_choices: int, seed: int, epoch: int, row_id: str, num_free: int | None = None) -> tuple[int, ...]:
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
