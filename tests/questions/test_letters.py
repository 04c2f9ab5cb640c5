import itertools

import pytest

from vqa_sft.questions.letters import choice_to_letter, choices_to_letters, draw_order, identity_order, view_orders


def test_an_order_says_which_choice_stands_under_which_letter():
    assert choices_to_letters(["cat", "dog", "fox"], (2, 0, 1)) == ["fox", "cat", "dog"]
    assert choice_to_letter(0, (2, 0, 1)) == 1


def test_a_drawn_order_depends_on_seed_epoch_and_row_alone():
    assert draw_order(6, 0, 1, "row") == draw_order(6, 0, 1, "row")
    orders = {draw_order(6, *key) for key in [(0, 0, "row"), (1, 0, "row"), (0, 1, "row"), (0, 0, "other")]}
    assert len(orders) == 4
    # Literal, so that another Python or another process would be noticed: hash() differs between processes.
    assert draw_order(4, 42, 0, "row_000") == (2, 3, 1, 0)


def test_drawn_orders_are_spread_evenly():
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for row in range(3000):
        counts[draw_order(3, 0, 0, str(row))] += 1
    assert all(400 < count < 600 for count in counts.values())


def test_the_identity_order_leaves_everything_in_place():
    assert identity_order(3) == (0, 1, 2)


@pytest.mark.parametrize("num_choices", [2, 3, 5])
def test_rotations_show_every_choice_once_under_every_letter(num_choices):
    orders = view_orders(num_choices, "rotations")
    assert orders[0] == identity_order(num_choices) and len(orders) == num_choices
    for letter in range(num_choices):
        assert {order[letter] for order in orders} == set(range(num_choices))


def test_all_orders_are_all_and_a_number_of_them_are_different_ones():
    assert sorted(view_orders(3, "all")) == sorted(itertools.permutations(range(3)))
    drawn = view_orders(4, 5, "row_1")
    assert drawn[0] == (0, 1, 2, 3) and len(set(drawn)) == 5
    assert drawn == view_orders(4, 5, "row_1") != view_orders(4, 5, "row_2")
    assert len(view_orders(3, 10, "row_1")) == 6  # there are no more
    assert view_orders(4, 1, "row_1") == view_orders(4, "identity") == [(0, 1, 2, 3)]


@pytest.mark.parametrize(("num_choices", "num_free"), [(4, 0), (4, 1), (4, 3), (5, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("views", ["identity", "rotations", "all", 1, 5, 100])
def test_choices_that_are_not_free_stay_in_every_order_and_the_others_take_all_free_places(
    num_choices, num_free, views
):
    orders = view_orders(num_choices, views, "row", num_free)
    drawn = [draw_order(num_choices, 0, epoch, "row", num_free) for epoch in range(20)]
    fixed = tuple(range(num_free, num_choices)) if num_free > 1 else tuple(range(num_choices))
    values = [f"choice {i}" for i in range(num_choices)]
    for order in orders + drawn:
        assert order[num_choices - len(fixed) :] == fixed and sorted(order) == list(range(num_choices))
        shown = choices_to_letters(values, order)
        assert [shown[choice_to_letter(choice, order)] for choice in range(num_choices)] == values  # undone
    # What the free choices alone would be shown in, and the others after them.
    alone = view_orders(max(num_free, 1), views, "row")
    assert len(orders) == len(alone) == len(set(orders)) and orders[0] == identity_order(num_choices)
    if views in ("rotations", "all"):
        assert [order[: max(num_free, 1)] for order in orders] == alone
    if views == "rotations":
        for letter in range(num_free if num_free > 1 else 0):
            assert sorted(order[letter] for order in orders) == list(range(num_free))


def test_where_all_choices_are_free_orders_are_those_that_were_always_drawn():
    for num_free in (None, 4):
        assert draw_order(4, 42, 0, "row_000", num_free) == (2, 3, 1, 0)
        assert view_orders(4, 5, "row_1", num_free) == view_orders(4, 5, "row_1")
