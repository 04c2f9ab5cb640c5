"""What plain transformers and PEFT make of a tiny model of any family: a prompt written here, one row at a time, no
padding, logits of the whole sequence, SGD in a loop of its own."""

import json

import pytest
import torch
from contest import noise
from families import QUICK, TINY
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from trl import ModelConfig

from vqa_sft.batch.prompts import Prompts
from vqa_sft.models.load import load_model
from vqa_sft.models.lora import lora_config

LEARNING_RATE = 0.001
TOLERANCE = 1e-4  # of log-probabilities and losses
QUESTIONS = ("What is it?", "Which of these things can be seen in the second image?", "Which word is the longest?")
WORDS = ["a cat", "two dogs", "the fox that jumps", "an owl"]
NUM_IMAGES = (1, 2, 0, 3)  # of the rows
SIZES = ((84, 84), (120, 60), (70, 100), (90, 90), (64, 96), (100, 70))


class Reference:
    """What the libraries themselves make of a base and an adapter."""

    def __init__(self, family: str, base: str, adapter: str, model: PreTrainedModel | None = None) -> None:
        """`model`: another one, in the place of what transformers makes of `base`."""
        self.tiny, self.processor = TINY[family], AutoProcessor.from_pretrained(base)
        model = model or AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
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

    def gradients(self, row: dict) -> dict[str, torch.Tensor]:
        """Of the loss, by name; raises where a weight of the adapter gets none."""
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        found = torch.autograd.grad(-self.choice_log_probs(row)[row["answer"]], [*trained.values()])
        return dict(zip(trained, found, strict=True))

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
