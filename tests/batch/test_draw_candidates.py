"""Candidates that are drawn anew in every epoch."""

from collections import Counter

import pytest

from vqa_sft.batch.collator import free_choices
from vqa_sft.batch.draw_candidates import draw_candidates, show_longest

NAMES = [f"class {number}" for number in range(20)]


def row_of(label, *, pool=range(8), num=4, none=False, row_id="r"):
    """A training row whose class is the label; with `none` and a label beyond the first ones, none of these answers."""
    pool, last = [*pool], [-1] if none else []
    shown = pool[:num]
    if label not in shown and not none:
        shown[-1] = label
    answer = shown.index(label) if label in shown else num
    choices = [NAMES[number] for number in shown] + ["None of these"] * none
    row = {"id": row_id, "question": "?", "candidates": shown + last, "pool": pool, "class_index": label}
    return row | {"choices": choices, "answer": answer}


@pytest.mark.parametrize("label", [0, 3, 6])
def test_the_right_class_is_always_there_and_each_other_equally_often(label):
    row, counted, num = row_of(label), Counter(), 4_000
    for epoch in range(num):
        drawn = draw_candidates(row, NAMES, 1, epoch)
        assert drawn["candidates"][drawn["answer"]] == label and drawn["choices"][drawn["answer"]] == NAMES[label]
        assert drawn["choices"] == [NAMES[number] for number in drawn["candidates"]]
        assert drawn["candidates"] == sorted(drawn["candidates"])  # this pool's order
        counted.update(drawn["candidates"])
    assert counted.pop(label) == num and {*counted} == {*range(8)} - {label}
    # Each of seven is one of three drawn: 3/7, give or take five standard deviations of 4,000 draws.
    assert all(abs(count / num - 3 / 7) < 0.04 for count in counted.values())


def test_a_draw_depends_on_seed_epoch_and_id_alone():
    row = row_of(2)
    draws = {
        (seed, epoch): draw_candidates(row, NAMES, seed, epoch)["candidates"] for seed in (1, 2) for epoch in range(9)
    }
    again = {key: draw_candidates(row, NAMES, *key)["candidates"] for key in draws}
    assert draws == again and len({tuple(draw) for draw in draws.values()}) > 5
    assert [draws[1, epoch] for epoch in range(9)] != [draws[2, epoch] for epoch in range(9)]
    other = [draw_candidates(row_of(2, row_id="s"), NAMES, 1, epoch)["candidates"] for epoch in range(9)]
    assert other != [draws[1, epoch] for epoch in range(9)]


def test_a_pool_of_as_many_as_are_shown_is_shown_as_it_is():
    row = row_of(2, pool=[5, 2, 9, 4])
    assert all(draw_candidates(row, NAMES, 1, epoch) == row for epoch in range(5))


@pytest.mark.parametrize("label", [6, 15])  # in the pool, and not
def test_none_of_these_stays_the_answer_and_the_right_class_is_then_not_shown(label):
    row = row_of(label, none=True)
    assert row["answer"] == 4
    for epoch in range(200):
        drawn = draw_candidates(row, NAMES, 1, epoch)
        assert drawn["answer"] == 4 and drawn["candidates"][4] == -1 and drawn["choices"][4] == "None of these"
        assert label not in drawn["candidates"] and len({*drawn["candidates"]}) == 5
    there = draw_candidates(row_of(1, none=True), NAMES, 1, 0)
    assert there["candidates"][there["answer"]] == 1 and there["candidates"][4] == -1


def test_names_of_classes_may_all_move_whatever_they_look_like_and_none_of_these_stays_last():
    letters = row_of(1) | {"choices": ["A", "B", "C", "D"]}
    assert free_choices(letters) == 4 and free_choices(row_of(1, none=True)) == 4
    usual = {"question": "?", "choices": ["A", "B", "C", "D"]}
    assert free_choices(usual) == 0


def test_the_longest_row_has_the_longest_names_of_the_pool():
    names = ["x" * (number % 7) for number in range(20)]
    row = row_of(0, none=True)
    assert show_longest(row, names)["choices"] == ["x" * 6, "x" * 5, "x" * 4, "x" * 3, "None of these"]
