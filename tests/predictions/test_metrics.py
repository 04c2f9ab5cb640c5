import math
import time

import numpy as np
import pytest

from vqa_sft.predictions import metrics

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


def test_brier_is_the_squared_distance_to_the_answer():
    expected = [0.3**2 + 0.3**2, 0.2**2 + 0.5**2 + 0.7**2, 0.1**2 + 0.1**2]
    assert metrics.brier(PROBS, ANSWERS) == pytest.approx(sum(expected) / 3)
    assert metrics.brier([[1.0, 0.0]], [1]) == 2 and metrics.brier([[1.0, 0.0]], [0]) == 0


def simulated(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(4), size=num_rows), rng.integers(4, size=num_rows)


@pytest.mark.parametrize("num_rows", [7, 15, 100, 503])
def test_ece_of_equal_mass_equals_a_loop_over_bins(num_rows):
    probs, answers = simulated(num_rows)
    rows = sorted(range(num_rows), key=lambda i: probs[i].max())
    expected, sizes = 0.0, set()
    for i in range(15):
        inside = rows[i * num_rows // 15 : (i + 1) * num_rows // 15]
        if inside:
            confidence = sum(probs[row].max() for row in inside) / len(inside)
            correct = sum(probs[row].argmax() == answers[row] for row in inside) / len(inside)
            expected += len(inside) / num_rows * abs(confidence - correct)
            sizes.add(len(inside))
    assert metrics.ece_equal_mass(probs, answers) == pytest.approx(expected)
    assert max(sizes) - min(sizes) <= 1


def test_intervals_are_those_of_metrics_computed_one_resample_at_a_time():
    probs, answers = simulated(60)
    drawn = np.random.default_rng(0).integers(60, size=(200, 60))
    slow = [metrics.full_metrics(probs[rows], answers[rows]) for rows in drawn]
    fast = metrics.bootstrap(probs, answers, num_resamples=200, seed=0)
    assert [*fast] == [*slow[0]] == ["accuracy", "nll", "brier", "ece", "ece_equal_mass"]
    for name, interval in fast.items():
        assert interval == pytest.approx(np.percentile([found[name] for found in slow], [2.5, 97.5]), abs=1e-12)


def test_differences_are_those_of_the_same_resamples():
    before, answers = simulated(60)
    after = np.roll(before, 1, axis=0)
    drawn = np.random.default_rng(0).integers(60, size=(200, 60))
    slow = [[metrics.full_metrics(probs[rows], answers[rows]) for probs in (before, after)] for rows in drawn]
    found = metrics.differences(before, after, answers, num_resamples=200, seed=0)
    for name, value in metrics.full_metrics(after, answers).items():
        assert found[name] == value - metrics.full_metrics(before, answers)[name]
        falls = [now[name] - was[name] for was, now in slow]
        assert found[f"{name}_95"] == pytest.approx(np.percentile(falls, [2.5, 97.5]), abs=1e-12)
    same = metrics.differences(before, before, answers, num_resamples=20)
    assert all(np.all(np.asarray(value) == 0) for value in same.values())


def test_five_thousand_rows_are_resampled_in_seconds():
    probs, answers = simulated(5_000)
    start_s = time.process_time()
    metrics.bootstrap(probs, answers)
    assert time.process_time() - start_s < 10


def test_softmax_takes_a_temperature_and_a_bias():
    (row,) = metrics.softmax([[0.0, 2.0]], temperature=2.0, bias=[1.0, 0.5, 7.0])
    assert row.tolist() == pytest.approx([math.exp(1) / (math.exp(1) + math.exp(1.5)), 1 - row[0]])
