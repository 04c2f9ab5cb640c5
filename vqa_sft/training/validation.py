"""The validation rows at the end of a training, and with which weights it ends: raw or averaged."""

import datasets
import torch

from vqa_sft.console import note
from vqa_sft.data.digests import digests_of
from vqa_sft.data.options import CANDIDATES, CLASS
from vqa_sft.models.scoring import to_choice_logits
from vqa_sft.predictions.file import Predictions
from vqa_sft.training.averaging import put, swapped
from vqa_sft.training.metrics import METRICS
from vqa_sft.training.trainer import AnswerTrainer


def predict_examples(trainer: AnswerTrainer, examples: datasets.Dataset) -> tuple[Predictions, dict[str, float]]:
    """Predictions for the examples, in their order, and their metrics. Called by every process."""
    output = trainer.predict(examples, metric_key_prefix="validation")
    trainer.check_losses()
    num_choices = torch.from_numpy(output.label_ids[:, 1])
    letter_logits = torch.from_numpy(output.predictions[0])
    identity = torch.arange(letter_logits.shape[1]).expand_as(letter_logits)
    choice_logits = to_choice_logits(letter_logits, identity, num_choices)
    predictions = Predictions(examples["id"][:], choice_logits, examples["answer"][:], digests=digests_of(examples))
    if CANDIDATES in examples.column_names:
        predictions.candidates, predictions.labels = examples[CANDIDATES][:], examples[CLASS][:]
    given = {name.removeprefix("validation_"): value for name, value in output.metrics.items()}
    return predictions, {name: given[name] for name in (*METRICS, "answerable") if name in given}


def choose_weights(
    trainer: AnswerTrainer, validation: datasets.Dataset | None
) -> tuple[Predictions | None, dict[str, float]]:
    """The validation predictions and metrics of the weights that the trainer's model is left with: its own or their
    average, whichever has the lower validation NLL at the best temperature; without validation rows the average.
    Called by every process."""
    average = trainer.average
    if validation is None:
        if average is not None:
            put(trainer.model, average.weights)
        return None, {}
    predictions, metrics = predict_examples(trainer, validation)
    if average is None:
        return predictions, metrics
    average.best = average.best or average.weights  # there may have been no evaluation of it
    if not average.best:
        note("There is no average: the training ended before it began. The raw weights are kept.")
        return predictions, metrics
    with swapped(trainer.model, average.best):
        averaged_predictions, averaged_metrics = predict_examples(trainer, validation)
    nlls = {"raw": metrics["nll_calibrated"], "average": averaged_metrics["nll_calibrated"]}
    if nlls["average"] < nlls["raw"]:
        put(trainer.model, average.best)
        predictions, metrics = averaged_predictions, averaged_metrics
    return predictions, {f"nll_calibrated_{name}": value for name, value in nlls.items()} | metrics
