"""The metrics of choices as an `evaluate` metric, in a file of its own: a first evaluation imports that library."""

import datasets
import evaluate
import numpy as np

from vqa_sft.predictions import metrics
from vqa_sft.predictions.fit_calibration import calibrated_nll


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
        return {
            "accuracy": metrics.accuracy(predictions, references),
            "nll": metrics.nll(predictions, references),
            "nll_calibrated": calibrated_nll(logits, references),
            "ece": metrics.ece(predictions, references),
        }
