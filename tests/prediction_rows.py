"""Rows of prediction files: three that show all there is, and any number whose temperature is known."""

import numpy as np

from vqa_sft.predictions.file import Predictions
from vqa_sft.predictions.metrics import softmax

THREE = Predictions(
    ["x", "y", "z"],
    [[-0.5, -1.0], [-2.0, -0.25, -3.0], [-0.75, -0.75]],
    [0, None, 1],
    {"run": "r", "한": "글"},
    [False, False, False],
)


def drawn(num_rows, temperature, seed=0, bias=(0, 0, 0, 0, 0)):
    """Rows of 2 to 5 choices whose answers follow softmax(logits / temperature + bias)."""
    rng = np.random.default_rng(seed)
    logits = [rng.normal(scale=3, size=rng.integers(2, 6)) for _ in range(num_rows)]
    probs = [softmax([row / temperature + bias[: len(row)]])[0] for row in logits]
    return logits, [int(rng.choice(len(row), p=row)) for row in probs]
