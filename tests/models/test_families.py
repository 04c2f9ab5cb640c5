"""Every family through the whole road, against plain transformers and PEFT: a prompt written here, one row at a time,
no padding, logits of the whole sequence, SGD in a loop of its own. In fp32 nothing may differ by more than 1e-4."""

import csv
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from contest import noise
from families import QUICK, ROADS, TINY, skeleton
from models_page import PAGE, can_adapt, write_table
from peft import PeftModel, get_peft_model
from PIL import Image
from scripts import train
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig

from vqa_sft.batch.prompts import Prompts
from vqa_sft.inference.predictor import Predictor
from vqa_sft.models.families import FAMILIES
from vqa_sft.models.load import load_model
from vqa_sft.models.lora import lora_config
from vqa_sft.models.parts import vision_layers
from vqa_sft.runs.merge import merge_run

LEARNING_RATE = 0.001
TOLERANCE = 1e-4  # of log-probabilities and losses
QUESTIONS = ("What is it?", "Which of these things can be seen in the second image?", "Which word is the longest?")
WORDS = ["a cat", "two dogs", "the fox that jumps", "an owl"]
NUM_IMAGES = (1, 2, 0, 3)  # of the rows
SIZES = ((84, 84), (120, 60), (70, 100), (90, 90), (64, 96), (100, 70))


class Reference:
    """What the libraries themselves make of a base and an adapter."""

    def __init__(self, family: str, base: str, adapter: str) -> None:
        self.tiny, self.processor = TINY[family], AutoProcessor.from_pretrained(base)
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
        space = "Ġ" if self.tiny.is_plain else ""
        self.letter_ids = self.processor.tokenizer.convert_tokens_to_ids([f"{space}{letter}" for letter in "ABCD"])

    def prompt(self, row: dict, order: list[int]) -> str:
        choices = "\n".join(f"{letter}. {row['choices'][i]}" for letter, i in zip("ABCD", order, strict=False))
        labels = [f"Image {i + 1}: " for i in range(len(row["images"]))] if len(row["images"]) > 1 else [""]
        text, image = f"{row['question']}\n{choices}", self.tiny.image
        if self.tiny.is_plain:
            shown = "".join(f" {label}{image}" if label else image for label in labels) if row["images"] else ""
            return f"System: {Prompts.system}<|im_end|>\nUser:{shown} {text}<|im_end|>\nAssistant:"
        shown = "".join(label + image for label in labels) if row["images"] else ""
        turns = f"<|im_start|>system\n{Prompts.system}<|im_end|>\n<|im_start|>user\n{shown}{text}<|im_end|>\n"
        return f"{turns}<|im_start|>assistant\n"

    def choice_log_probs(self, row: dict, order: list[int] | None = None) -> torch.Tensor:
        """(C,), in the order of the row."""
        order = order or [*range(len(row["choices"]))]
        images = [Image.open(path).convert("RGB") for path in row["images"]]
        inputs = self.processor(
            text=[self.prompt(row, order)], images=[images] if images else None, return_tensors="pt"
        )
        # Llama 4's processor gives pixels in bf16, which its model in fp32 refuses.
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        logits = self.model(**inputs).logits[0, -1, self.letter_ids[: len(order)]]
        return logits.log_softmax(dim=0)[torch.tensor(order).argsort()]

    def train(self, rows: list[dict], num_steps: int) -> list[float]:
        """The loss before each step."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        losses = []
        for _ in range(num_steps):
            loss = sum(-self.choice_log_probs(row)[row["answer"]] for row in rows) / len(rows)
            gradients = torch.autograd.grad(loss, trained)  # raises where a weight of the adapter gets none
            with torch.no_grad():
                for weight, gradient in zip(trained, gradients, strict=True):
                    weight -= LEARNING_RATE * gradient
            losses.append(loss.item())
        return losses


@dataclass
class Road:
    rows: list[dict]
    run: str
    reference: Reference
    losses: tuple[list[float], list[float]]  # ours, and the reference's


def write_rows(folder):
    """Rows with 1, 2, 0 and 3 images of many sizes and 4, 3, 2 and 4 choices."""
    rows, sizes = [], iter(SIZES)
    for number, count in enumerate(NUM_IMAGES):
        images = [f"{folder}/{number}_{i}.png" for i in range(count)]
        for path in images:
            noise(path, seed=len(path) + number, size=next(sizes))
        row = {"id": str(number), "images": images, "question": QUESTIONS[number % 3]}
        rows.append(row | {"choices": WORDS[: (4, 3, 2, 4)[number]], "answer": number % 2})
    lines = [json.dumps(row | {"images": [path.rpartition("/")[2] for path in row["images"]]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return rows


def write_adapter(base, folder, **asked):
    """An adapter of ours with random weights on both sides."""
    args = ModelConfig(model_name_or_path=base, dtype=None, use_peft=True, lora_r=4, lora_dropout=0.0)
    model = load_model(args, "fp32")
    torch.manual_seed(1)
    adapted = get_peft_model(model, lora_config(args, model, **asked))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return str(folder)


def quick_or_slow(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


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
    merge_run(road.run, str(tmp_path / "merged"), dtype="fp32")
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


def test_the_page_of_models_is_that_of_the_table_and_of_the_tiny_models(families):
    table = write_table(families)
    assert table in PAGE.read_text(encoding="utf-8"), "python tests/models_page.py writes it"
    for page in ("README.md", "CHANGELOG.md"):
        assert f" {len(FAMILIES)} " in (PAGE.parent.parent / page).read_text(encoding="utf-8")
