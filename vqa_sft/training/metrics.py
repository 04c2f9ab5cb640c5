"""Validation metrics of the letters, as an `evaluate` metric."""

import numpy as np
from transformers import EvalPrediction

from vqa_sft.predictions import metrics

METRICS = ("accuracy", "nll", "nll_calibrated", "ece")  # of choice_metrics.py


def letter_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`METRICS`, the mean loss and the letters' mean share of the probability, from what `prediction_step` gives of N
    rows.

    A row of a classification whose class is not among its candidates has no answer (-1): all but the letters' share is
    of the other rows, and `answerable` is how large a part of all these are.
    """
    letter_logits, losses, letters_mass = prediction.predictions
    answers, num_choices = prediction.label_ids.T
    probs = metrics.softmax([row[:count] for row, count in zip(letter_logits, num_choices, strict=True)])
    known = np.flatnonzero(answers >= 0)
    means = {"loss": losses[known], "letters_mass": letters_mass}
    found = {name: float(np.mean(values, dtype=np.float64)) for name, values in means.items()}
    own = {"predictions": [probs[row].tolist() for row in known], "references": answers[known].tolist()}
    from vqa_sft.training.choice_metrics import ChoiceMetrics  # 0.4 s that a first step need not wait for

    found |= ChoiceMetrics().compute(**own)
    if len(known) < len(answers):
        found["answerable"] = len(known) / len(answers)
    return found
