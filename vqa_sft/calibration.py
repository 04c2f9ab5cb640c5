"""The NLL that choice probabilities have once a temperature is fitted. numpy and scipy, no torch.

probabilities = softmax(choice logits / temperature) (Guo et al. 2017, arXiv 1706.04599, section 4.2). It changes no
answer. Above 1 where a model is too sure of itself.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

HIGHEST = 20.0  # temperature


def calibrated_nll(logits: Sequence[Sequence[float]], answers: Sequence[int]) -> float:
    """The lowest NLL, in nats, that a temperature of at least 1, fitted on the same rows, gives: what is lost in ways
    that a temperature cannot mend. Lower ones do not count: a few rows that are all right would ask for 0. Rows may
    differ in length."""
    lengths = np.array([len(row) for row in logits])
    is_own = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(is_own.shape, -np.inf)
    padded[is_own] = np.concatenate([np.asarray(row, dtype=np.float64) for row in logits])
    padded -= padded.max(axis=1, keepdims=True)
    of_answer = padded[np.arange(len(padded)), np.asarray(answers)]

    def nll(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(padded * inverse).sum(axis=1)) - of_answer * inverse))

    # Convex in 1 / temperature, so there is one lowest point in its logarithm too.
    return min(float(minimize_scalar(nll, bounds=(0.0, np.log(HIGHEST)), method="bounded").fun), nll(0.0))
