"""What tests of the lab share."""

import pytest

from vqa_sft.lab import random_models


@pytest.fixture
def as_it_loads(monkeypatch):
    """Gives back after the test what `draw_weights` replaces."""
    for owner, name in (
        (random_models.modeling_utils, "_get_resolved_checkpoint_files"),
        (random_models.PreTrainedModel, "_load_pretrained_model"),
        (random_models.PreTrainedModel, "_finalize_model_loading"),
    ):
        monkeypatch.setattr(owner, name, owner.__dict__[name])
