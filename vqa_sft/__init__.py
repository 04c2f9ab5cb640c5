"""vqa-sft: fine-tune vision-language models on visual multiple-choice questions."""

__version__ = "0.1.0"
