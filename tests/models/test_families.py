"""Every family through the whole road, against plain transformers and PEFT: a prompt written here, one row at a time,
no padding, logits of the whole sequence, SGD in a loop of its own. In fp32 nothing may differ by more than 1e-4."""

import csv
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from families import ROADS, TINY, skeleton
from models_page import PAGE, can_adapt, write_table
from old_layouts import RENAMED, save_layouts
from reference import LEARNING_RATE, TOLERANCE, Reference, quick_or_slow, write_adapter, write_rows
from scripts import train
from transformers import AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from trl import ModelConfig

from vqa_sft.inference.predictor import Predictor
from vqa_sft.models.families import FAMILIES
from vqa_sft.models.load import load_model
from vqa_sft.models.parts import vision_layers
from vqa_sft.runs.export import export_run


@dataclass
class Road:
    rows: list[dict]
    run: str
    reference: Reference
    losses: tuple[list[float], list[float]]  # ours, and the reference's


@pytest.fixture(scope="module", params=quick_or_slow(ROADS))
def road(request, families, tmp_path_factory):
    family, _, experts = request.param.partition(" + ")
    folder, base = tmp_path_factory.mktemp(family), families(family)
    rows, run = write_rows(folder), str(folder / "run")
    adapter = write_adapter(base, folder / "adapter", adapt_experts=bool(experts))
    values = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": LEARNING_RATE}
    values |= {
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "shuffle_choices": False,
        "answer_format": "index_from_0",
    }
    values |= {"use_cpu": True, "dataloader_num_workers": 0, "disable_tqdm": True, "gradient_checkpointing": False}
    train(model_name_or_path=base, train_data=folder / "rows.jsonl", output_dir=run, init_adapter=adapter, **values)
    with open(f"{run}/log.csv") as file:
        ours = [float(line["loss"]) for line in csv.DictReader(file) if line["loss"]]
    reference = Reference(family, base, adapter)
    return Road(rows, run, reference, (ours, reference.train(rows, num_steps=2)))


def assert_same(predicted, expected):
    for ours, theirs in zip(predicted, expected, strict=True):
        np.testing.assert_allclose(np.log(ours), theirs, atol=TOLERANCE, rtol=0)
        assert ours.argmax() == theirs.argmax()


def predict(road, folder=None, **options):
    predictor = Predictor(folder or road.run, use_cpu=True, **options)
    rows = [(row["images"], row["question"], row["choices"]) for row in road.rows]
    return [predictor(*row) for row in rows], predictor(*map(list, zip(*rows, strict=True)))


def test_each_step_has_the_loss_of_plain_transformers_and_peft(road):
    ours, theirs = road.losses
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    assert abs(theirs[1] - theirs[0]) > 10 * TOLERANCE


@torch.no_grad()
def test_a_row_is_scored_alone_and_in_a_batch_as_by_plain_transformers(road):
    expected = [road.reference.choice_log_probs(row).numpy() for row in road.rows]
    alone, together = predict(road)
    assert_same(alone, expected)
    assert_same(together, expected)


@torch.no_grad()
def test_rotations_are_averaged_as_by_plain_transformers(road):
    expected = []
    for row in road.rows:
        places = [*range(len(row["choices"]))]
        views = [road.reference.choice_log_probs(row, places[i:] + places[:i]) for i in places]
        expected.append(torch.stack(views).exp().mean(dim=0).log().numpy())
    alone, together = predict(road, orders="rotations")
    assert_same(alone, expected)
    assert_same(together, expected)


@torch.no_grad()
def test_merged_weights_answer_as_base_and_adapter(road, tmp_path):
    export_run(road.run, str(tmp_path / "merged"), dtype="fp32")
    expected = [road.reference.choice_log_probs(row).numpy() for row in road.rows]
    assert_same(predict(road, tmp_path / "merged")[1], expected)


@pytest.mark.parametrize("family", quick_or_slow(TINY))
def test_adapters_of_tower_and_merger_are_reached_by_a_row_with_images(families, tmp_path, family):
    model = skeleton(families(family))
    asked = {field: can_adapt(model, field) for field in ("adapt_tower", "adapt_merger")}
    reference = Reference(family, families(family), write_adapter(families(family), tmp_path / "adapter", **asked))
    reference.choice_log_probs(write_rows(tmp_path)[1])[0].backward()
    trained = {name: weight for name, weight in reference.model.named_parameters() if weight.requires_grad}
    layers = [
        layer for is_asked, of in zip(asked.values(), vision_layers(model), strict=True) if is_asked for layer in of
    ]
    assert all(any(f".{layer}.lora_" in name for name in trained) for layer in layers)
    bare = {name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()}
    # LLaVA shows the language model the last layer but one.
    last = "vision_tower.encoder.layers.1." if family in ("llava", "llava_next") else "none"
    assert bare == {name for name in trained if last in name}


@pytest.mark.parametrize("family", quick_or_slow(RENAMED))
def test_a_checkpoint_with_the_names_of_the_hub_has_the_same_weights_and_takes_the_same_adapter(
    families, tmp_path, one_thread, family
):
    new, old = save_layouts(family, families(family), tmp_path)
    adapter, row = write_adapter(new, tmp_path / "adapter"), write_rows(tmp_path)[1]
    expected = Reference(family, new, adapter)
    model = load_model(ModelConfig(model_name_or_path=old, dtype=None, use_peft=True), "fp32")
    plain = AutoModelForImageTextToText.from_pretrained(new, dtype=torch.float32).state_dict()
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())
    found = Reference(family, old, adapter, model).choice_log_probs(row)
    torch.testing.assert_close(found, expected.choice_log_probs(row), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", TINY)
def test_each_family_whose_weights_are_renamed_has_its_old_names_in_the_table(families, family):
    steps = get_model_conversion_mapping(skeleton(families(family)), add_legacy=False)
    # Language models that may stand alone have a step that takes away the prefix they have here.
    steps = [step for step in steps if not (isinstance(step, PrefixChange) and step.scope_prefix == "language_model")]
    assert bool(steps) == (family in RENAMED)


def test_the_page_of_models_is_that_of_the_table_and_of_the_tiny_models(families):
    table = write_table(families)
    assert table in PAGE.read_text(encoding="utf-8"), "python tests/models_page.py writes it"
    for page in ("README.md", "CHANGELOG.md"):
        assert f" {len(FAMILIES)} " in (PAGE.parent.parent / page).read_text(encoding="utf-8")
