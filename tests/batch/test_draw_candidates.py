"""Candidates that are drawn anew in every epoch."""

import re
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from vqa_sft.batch.collator import Augmentation, TrainCollator, free_choices
from vqa_sft.batch.draw_candidates import draw_candidates, show_longest
from vqa_sft.batch.prompts import Prompts
from vqa_sft.models.load import load_processor
from vqa_sft.tiny import TINY_PATH

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


WORDS = [*"abcdefghijklmnopqrst"]


def shown(processor, batch):
    """(name under the right letter, names under all letters) of every row of a batch, as the prompts say."""
    for ids, answer, count in zip(batch["input_ids"], batch["answers"].tolist(), batch["num_choices"], strict=True):
        lines = re.findall(r"^([A-Z])\. (.+)$", processor.tokenizer.decode(ids, skip_special_tokens=True), flags=re.M)
        assert [letter for letter, _ in lines] == [*"ABCDE"[: int(count)]]
        names = [name for _, name in lines]
        yield names[answer], names


@pytest.mark.parametrize("none", [False, True])
def test_a_batch_shows_the_drawn_candidates_in_a_drawn_order_with_the_right_letter(none):
    processor, rows = load_processor(str(TINY_PATH)), []
    for number in range(12):
        row = row_of(number % 7, none=none, row_id=f"r{number}") | {"images": [], "context": ""}
        rows.append(row | {"choices": [WORDS[of] if of >= 0 else "None of these" for of in row["candidates"]]})
    collate = TrainCollator(processor, Prompts(), 4 + none, seed=5, classes=WORDS)
    seen = []
    for epoch in range(3):
        collate.epoch.fill_(epoch)
        seen.append([*shown(processor, collate(rows))])
        for row, (right, names) in zip(rows, seen[-1], strict=True):
            drawn = draw_candidates(row, WORDS, 5, epoch)
            assert right == drawn["choices"][drawn["answer"]] and sorted(names) == sorted(drawn["choices"])
            assert not none or names[-1] == "None of these"
        loaders = [DataLoader(rows, 4, num_workers=workers, collate_fn=collate) for workers in (0, 2)]
        for loader in loaders:  # whichever worker it is that draws, in whatever batch
            assert [one for batch in loader for one in shown(processor, batch)] == seen[-1]
    assert seen[0] != seen[1] != seen[2]
    again = [row | {"repetition": number} for number in (0, 1, 2) for row in rows]
    collate.epoch.fill_(0)
    repeated = [*shown(processor, collate(again))]
    assert repeated[:12] == seen[0] and len({str(repeated[start : start + 12]) for start in (0, 12, 24)}) == 3
    assert {tuple(sorted(names)) for _, names in repeated[::12]} != {tuple(sorted(repeated[0][1]))}
    assert repeated[12:24] != seen[1] and repeated[24:] != seen[2]  # those of later epochs are others
    ordered = TrainCollator(processor, Prompts(), 4 + none, seed=5, classes=WORDS, augmentation=Augmentation(False))
    for _, names in shown(processor, ordered(rows)):
        names = names[:-1] if none else names
        assert names == sorted(names)  # the most likely first
