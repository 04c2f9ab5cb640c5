import math

import numpy as np
import pytest

from vqa_sft import metrics

PROBS = [[0.7, 0.3], [0.2, 0.5, 0.3], [0.1, 0.9]]
ANSWERS = [0, 2, 1]


def test_accuracy_counts_the_likeliest_choice():
    assert metrics.accuracy(PROBS, ANSWERS) == pytest.approx(2 / 3)


def test_nll_is_the_mean_of_minus_log_p():
    assert metrics.nll(PROBS, ANSWERS) == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.9)) / 3)


def test_nll_of_an_impossible_answer_stays_finite():
    assert 80 < metrics.nll([[1.0, 0.0]], [1]) < 90


def test_ece_equals_a_loop_over_bins():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=500)
    answers = rng.integers(4, size=500)
    expected = 0.0
    for low in range(15):
        inside = [i for i in range(500) if low / 15 < probs[i].max() <= (low + 1) / 15]
        if inside:
            confidence = sum(probs[i].max() for i in inside) / len(inside)
            correct = sum(probs[i].argmax() == answers[i] for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(confidence - correct)
    assert metrics.ece(probs, answers) == pytest.approx(expected)


def test_softmax_takes_rows_of_different_length_and_large_logits():
    rows = metrics.softmax([[1000.0, 1000.0], [0.0, math.log(3), 0.0]])
    assert rows[0].tolist() == [0.5, 0.5]
    assert rows[1].tolist() == pytest.approx([0.2, 0.6, 0.2])
