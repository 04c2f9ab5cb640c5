import math

import numpy as np
import pytest

from vqa_sft.calibration import calibrated_nll
from vqa_sft.metrics import nll, softmax


def drawn(num_rows, temperature, seed=0):
    """Rows of 2 to 5 choices whose answers follow softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = [rng.normal(scale=3, size=rng.integers(2, 6)) for _ in range(num_rows)]
    return logits, [int(rng.choice(len(row), p=softmax([row / temperature])[0])) for row in logits]


@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0])
def test_the_lowest_nll_is_that_of_a_search_over_all_temperatures(temperature):
    logits, answers = drawn(2000, temperature)
    grid = {t: nll(softmax([row / t for row in logits]), answers) for t in np.geomspace(1, 20, 200)}
    assert calibrated_nll(logits, answers) == pytest.approx(min(grid.values()), abs=1e-4)
    assert min(grid, key=grid.get) == pytest.approx(temperature, rel=0.2)  # the planted one
    assert calibrated_nll(logits, answers) < nll(softmax(logits), answers) - 0.02


def test_what_is_endlessly_wrong_is_finite():
    assert math.isfinite(calibrated_nll([[1e4, 0.0]], [1]))


def test_too_little_confidence_is_not_mended_by_the_calibrated_nll_and_too_much_is():
    timid, bold = [[0.2, 0.0], [0.0, 0.3]], [[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]
    assert calibrated_nll(timid, [0, 1]) == pytest.approx(nll(softmax(timid), [0, 1]))
    assert calibrated_nll(bold, [0, 1, 1]) < 0.65 < 3 == round(nll(softmax(bold), [0, 1, 1]))
