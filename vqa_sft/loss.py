"""Loss at the answer position, one value a row."""

import torch
import torch.nn.functional as F


def letters_loss(letter_logits: torch.Tensor, answers: torch.Tensor, num_choices: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B,) over each row's own letters. `letter_logits` (B, L), `answers` and `num_choices` (B,)."""
    unused = torch.arange(letter_logits.shape[1], device=letter_logits.device) >= num_choices[:, None]  # (B, L)
    # The smallest float, not -inf: -inf times a zero weight is NaN.
    return F.cross_entropy(
        letter_logits.masked_fill(unused, torch.finfo(letter_logits.dtype).min), answers, reduction="none"
    )


def vocabulary_loss(logits: torch.Tensor, answers: torch.Tensor, letter_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B,) of the answer's token over the whole vocabulary; `logits` (B, V).

    The same number as the usual supervised loss over the full sequence with everything masked but the letter.
    """
    return F.cross_entropy(logits, letter_ids[answers], reduction="none")
