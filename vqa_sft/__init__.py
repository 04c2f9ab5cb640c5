"""vqa-sft: fine-tune vision-language models on visual multiple-choice questions."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Predictor"]

if TYPE_CHECKING:
    from vqa_sft.inference.predictor import Predictor


def __getattr__(name: str) -> Any:
    # Only who asks for it waits for torch.
    if name == "Predictor":
        from vqa_sft.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
