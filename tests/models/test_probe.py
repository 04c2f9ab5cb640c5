"""Classifiers on features against scikit-learn and slow loops; nothing that predicts a row has seen its label."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vqa_sft.models.probe import (
    PRIOR_SHARE,
    LinearProbe,
    NearestNeighbours,
    ZeroShot,
    average_texts,
    class_texts,
    cross_fit,
    fit_temperature,
)


def clusters(num_classes=5, per_class=12, width=8, spread=1.5, seed=0):
    """(features, labels): every class around its own mean."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    features = rng.normal(size=(num_classes, width))[labels] + spread * rng.normal(size=(len(labels), width))
    return features.astype(np.float32), labels


def fitted(classifier, features, labels, num_classes, setting):
    (score,) = classifier.fit(torch.tensor(features), torch.tensor(labels), num_classes, [setting])
    return score(torch.tensor(features)).softmax(dim=1).numpy()


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_linear_probe_is_scikit_learns_logistic_regression(penalty):
    features, labels = clusters()
    inputs = (features - features.mean(axis=0)) / features.std(axis=0) / math.sqrt(8)
    reference = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000).fit(inputs, labels).predict_proba(inputs)
    np.testing.assert_allclose(fitted(LinearProbe(), features, labels, 5, penalty), reference, atol=2e-3)


def test_penalties_that_are_fitted_one_after_the_other_end_where_each_ends_alone():
    features, labels = clusters()
    together = LinearProbe().fit(torch.tensor(features), torch.tensor(labels), 5, [10.0, 0.1])[1](
        torch.tensor(features)
    )
    np.testing.assert_allclose(together.softmax(dim=1), fitted(LinearProbe(), features, labels, 5, 0.1), atol=2e-3)


def test_a_class_without_rows_has_the_probability_of_about_one_row_in_all():
    features, labels = clusters()
    probs = fitted(LinearProbe(), features, labels, 7, 1.0)
    np.testing.assert_allclose(probs[:, 5:], 1 / (len(labels) + 2), rtol=1e-4)
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)


def test_nearest_neighbours_vote_as_a_slow_loop_counts():
    features, labels = clusters()
    k, sharpness = 4, 0.1
    centred = features - features.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    expected = []
    for row in unit:
        cosines = sorted(((float(row @ other), label) for other, label in zip(unit, labels, strict=True)), reverse=True)
        weights = [math.exp(cosine / sharpness) for cosine, _ in cosines[:k]]
        probs = PRIOR_SHARE * (np.bincount(labels, minlength=6) + 1) / (len(labels) + 6)
        for weight, (_, label) in zip(weights, cosines[:k], strict=True):
            probs[label] += (1 - PRIOR_SHARE) * weight / sum(weights)
        expected.append(probs)
    np.testing.assert_allclose(fitted(NearestNeighbours(), features, labels, 6, (k, sharpness)), expected, atol=1e-5)


def test_a_class_is_compared_by_the_mean_of_its_texts():
    texts = class_texts(["A4", "K5"], [("Audi A4",), ()], ["a saloon", ""])
    assert texts == [["a photo of A4.", "a photo of Audi A4.", "a saloon"], ["a photo of K5."]]
    means = average_texts(lambda given: torch.eye(4)[: len(given)], texts)
    np.testing.assert_allclose(means, [[3**-0.5] * 3 + [0], [0, 0, 0, 1]], atol=1e-6)
    probs = fitted(ZeroShot(means), np.eye(4, dtype=np.float32)[2:], [0, 1], 2, 100.0)
    assert probs[0, 0] > 0.99 and probs[1, 1] > 0.99


def test_the_temperature_is_the_best_of_a_grid_for_the_rows_and_one_more_whose_label_is_the_runner_up():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)) * 5, rng.integers(0, 4, 50)
    labels = np.where(rng.random(50) < 0.7, logits.argmax(axis=1), labels)
    grid = np.exp(np.linspace(-3, 3, 301))
    slow = []
    for temperature in grid:
        log_probs = [row / temperature - np.log(np.exp(row / temperature).sum()) for row in logits]
        losses = [-row[label] for row, label in zip(log_probs, labels, strict=True)]
        slow.append((sum(losses) - np.mean([sorted(row)[-2] for row in log_probs])) / 51)
    temperature, nll = fit_temperature(torch.tensor(logits), torch.tensor(labels))
    assert nll == pytest.approx(min(slow), abs=1e-3)
    assert temperature == pytest.approx(grid[int(np.argmin(slow))], rel=0.03)


def test_a_few_rows_that_are_all_right_are_no_certainty():
    temperature, _ = fit_temperature(10 * torch.eye(5), torch.arange(5))
    assert (10 * torch.eye(5) / temperature).softmax(dim=1).max() < 0.9


CLASSIFIERS = {"linear": LinearProbe(), "knn": NearestNeighbours(), "zero_shot": ZeroShot(torch.eye(5, 8))}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_row_is_predicted_by_what_has_not_seen_its_label(name):
    features, labels = clusters()
    folds = np.arange(len(labels)) % 4
    before = cross_fit(CLASSIFIERS[name], features, labels, folds, 5).out_of_fold
    for row in (0, 29, 59):
        other = labels.copy()
        other[row] = (labels[row] + 1) % 5
        after = cross_fit(CLASSIFIERS[name], features, other, folds, 5).out_of_fold
        assert (after[folds == folds[row]] == before[folds == folds[row]]).all()
        assert not np.allclose(after[folds != folds[row]], before[folds != folds[row]], atol=1e-7)  # the others have


@pytest.mark.parametrize("name", ["linear", "knn"])
def test_other_rows_are_predicted_by_all_training_rows_and_out_of_fold_ones_not_by_their_own(name):
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(120, 40)).astype(np.float32), rng.integers(0, 4, 120)  # nothing to be learned
    found = cross_fit(CLASSIFIERS[name], features, labels, np.arange(120) % 4, 4)
    assert (found.out_of_fold.argmax(axis=1) == labels).mean() < 0.45
    nll = -np.log(found.out_of_fold[np.arange(120), labels]).mean()
    assert nll < math.log(4) + 0.1  # as a temperature makes of it
    own = found.predict(features)
    assert own.shape == (120, 4) and -np.log(own[np.arange(120), labels]).mean() < nll
