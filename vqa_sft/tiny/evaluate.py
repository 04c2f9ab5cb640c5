"""Scores a base on held-out drawn pictures, from its saved files, as anyone would load them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from vqa_sft.batch.prompts import Prompts, render_messages
from vqa_sft.questions.letters import LETTERS, identity_order


def load_base(path: Path) -> tuple[ProcessorMixin, PreTrainedModel]:
    """Processor (padding on the left) and model in float32 on the CPU."""
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    return processor, AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def predict_answers(
    processor: ProcessorMixin, model: PreTrainedModel, examples: Sequence[dict], batch_size: int = 64
) -> list[int]:
    """The choice with the largest letter logit at the last prompt position, choices in the order of the data."""
    letter_ids = processor.tokenizer.convert_tokens_to_ids(list(LETTERS))
    answers = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        rows = [{"question": e["question"], "choices": e["choices"], "images": [e["image"]]} for e in batch]
        messages = [render_messages(row, identity_order(len(row["choices"])), Prompts()) for row in rows]
        texts = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=texts, images=[[e["image"]] for e in batch], padding=True, return_tensors="pt")
        logits = model(**inputs, logits_to_keep=1).logits[:, 0, letter_ids]  # (B, 26)
        answers += [int(row[: len(e["choices"])].argmax()) for row, e in zip(logits, batch, strict=True)]
    return answers


def accuracy_by_kind(examples: Sequence[dict], answers: Sequence[int]) -> dict[str, tuple[float, int]]:
    """Accuracy and number of examples, of each kind and of "all"."""
    groups: dict[str, list[bool]] = {"all": []}
    for example, answer in zip(examples, answers, strict=True):
        right = example["answer"] == answer
        groups["all"].append(right)
        groups.setdefault(example["question_type"], []).append(right)
    return {kind: (sum(group) / len(group), len(group)) for kind, group in groups.items()}


def format_table(columns: dict[str, dict[str, tuple[float, int]]]) -> str:
    """A Markdown table with one row per kind and one column per set."""
    kinds = sorted({kind for column in columns.values() for kind in column}, key=lambda kind: (kind == "all", kind))
    lines = ["| kind | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for kind in kinds:
        cells = [f"{column[kind][0]:.3f} ({column[kind][1]})" if kind in column else "" for column in columns.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
