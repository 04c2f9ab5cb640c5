"""Validation metrics of the letters, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from vqa_sft.predictions import metrics
from vqa_sft.predictions.fit_calibration import calibrated_nll

METRICS = ("accuracy", "nll", "nll_calibrated", "ece")


class ChoiceMetrics(evaluate.Metric):
    """Of choice probabilities: accuracy, NLL in nats, NLL at the best temperature (which chooses between weights), and
    expected calibration error. Made from our modules, because `evaluate.load` would ask the Hub."""

    def __init__(self) -> None:
        # In memory: evaluate's cache files would be shared by processes and runs.
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__class__.__doc__, citation="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        logits = [np.log(np.maximum(row, np.finfo(np.float32).tiny)) for row in predictions]
        values = (
            metrics.accuracy(predictions, references),
            metrics.nll(predictions, references),
            calibrated_nll(logits, references),
            metrics.ece(predictions, references),
        )
        return dict(zip(METRICS, values, strict=True))


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
    found |= ChoiceMetrics().compute(**own)
    if len(known) < len(answers):
        found["answerable"] = len(known) / len(answers)
    return found
