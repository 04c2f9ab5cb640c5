"""Candidates as a classifier that is often wrong would give them."""

import numpy as np

from vqa_sft.data.class_probs import UNKNOWN_LABEL, keep_likely, write_class_probs
from vqa_sft.data.digests import digests_of


def write_candidates(path, ids, names, labels, *, strength=1.5, seed=0, num_kept=50, digests=(), **metadata):
    """A file of class probabilities for rows with these ids and classes (None: not known); the probabilities (N, C)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(ids), len(names)))
    for row, label in enumerate(labels):
        logits[row, rng.integers(len(names)) if label is None else label] += strength
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = keep_likely(ids, names, probs, num_kept=num_kept)
    found.labels = np.array([UNKNOWN_LABEL if label is None else label for label in labels], np.int32)
    found.digests, found.metadata = [*digests], {"source": "a noisy classifier", "out_of_fold": True} | metadata
    write_class_probs(path, found)
    return probs


def candidates_of(path, loaded, **how):
    """`write_candidates` for rows that were read, with their digests."""
    labels, digests = loaded.examples["class_index"][:], digests_of(loaded.examples)
    return write_candidates(path, loaded.examples["id"][:], loaded.classes.names, labels, digests=digests, **how)
