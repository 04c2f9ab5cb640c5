"""Recall of candidates against slow loops, and the number of candidates that follows from it."""

import numpy as np
import pytest

from vqa_sft.data.class_probs import keep_likely
from vqa_sft.predictions.recall import MAX_CANDIDATES, Recall, choose_num_candidates, describe_recall, measure_recall


def drawn(num_rows=60, num_classes=40, num_kept=30, seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(num_classes, 0.3), num_rows)
    kept = keep_likely(
        [f"r{i}" for i in range(num_rows)], [f"c{i}" for i in range(num_classes)], probs, num_kept=num_kept
    )
    kept.labels[:] = [rng.choice(num_classes, p=row) for row in probs]
    return kept, probs


def test_recall_is_that_of_a_slow_loop_over_the_full_table():
    kept, probs = drawn()
    recall = measure_recall(kept)
    for k in (1, 5, 10, 25, 30):
        found = [label in np.argsort(-row, kind="stable")[:k] for row, label in zip(probs, kept.labels, strict=True)]
        assert recall.at(k) == pytest.approx(np.mean(found))
    dense = kept.dense()
    assert recall.log_loss == pytest.approx(
        -np.mean([np.log(dense[i, y]) for i, y in enumerate(kept.labels)]), rel=1e-5
    )
    low, high = recall.interval(5)
    p, n, z = recall.at(5), 60, 1.959964
    middle, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n),
    )
    assert (low, high) == (pytest.approx(middle - half, abs=1e-6), pytest.approx(middle + half, abs=1e-6))


def test_rows_without_a_known_class_do_not_count():
    kept, _ = drawn()
    kept.labels[10:] = -1
    assert measure_recall(kept).num_rows == 10
    kept.labels[:] = -1
    assert measure_recall(kept) is None and "no known classes" in describe_recall([("test", None)])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([0.5, 0.7, 0.8, 0.9, 0.991], 5),  # 99%
        ([0.5, 0.7, 0.8, 0.896, 0.9], 4),  # within half a point
        ([0.999, 1.0], 2),  # never one alone
        (list(np.linspace(0.02, 0.5, 25)), 25),
        ([*np.linspace(0.02, 0.5, 25), 0.9, 0.99], 25),  # what lies beyond is not asked for
    ],
)
def test_as_many_candidates_are_chosen_as_reach_nearly_all_that_can_be_reached(found, expected):
    recall = Recall(100, np.array([0, *found]), 1.0)
    assert choose_num_candidates(recall) == expected <= MAX_CANDIDATES


def test_the_table_leaves_out_what_there_are_too_few_classes_for():
    kept, _ = drawn(num_classes=10)
    said = describe_recall([("train", measure_recall(kept))])
    assert (
        "100.0%" in said
        and said.splitlines()[1].split()[:2] == ["train", "60"]
        and len(measure_recall(kept).as_dict()) == 3
    )
