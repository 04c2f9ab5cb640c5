"""Loss at the answer position, one value a row.

    -sum over letters of q log p        p over the row's own letters, q what they should be
    - w log(share)                      the share of the whole vocabulary's probability that those letters have

With w = 0 nothing but the letters is trained; with w = 1 and one right answer it is the usual supervised loss over the
full sequence with everything masked but the letter.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LossSettings:
    """`letter_ids` (L,) are the tokens of the run's letters. Rows that carry their letter need `end_of_turn`, the id of
    the token after it."""

    letter_ids: torch.Tensor
    vocabulary_weight: float = 0.0
    letter_smoothing: float = 0.0
    end_of_turn: int | None = None


def letter_targets(
    answers: torch.Tensor, num_choices: torch.Tensor, num_letters: int, smoothing: float = 0.0
) -> torch.Tensor:
    """What the letters should be, (B, L), from the index of the right one: 1 for it and 0 for the others, of which
    `smoothing` is spread over all of the row's own letters (Szegedy et al. 2016, section 7)."""
    return smooth(F.one_hot(answers, num_letters).float(), num_choices, smoothing)


def smooth(targets: torch.Tensor, num_choices: torch.Tensor, smoothing: float) -> torch.Tensor:
    """`targets` (B, L) mixed with the uniform distribution over the row's own letters."""
    uniform = is_own(num_choices, targets.shape[1]) / num_choices[:, None]
    return (1 - smoothing) * targets + smoothing * uniform


def is_own(num_choices: torch.Tensor, num_letters: int) -> torch.Tensor:
    """Whether a row uses a letter, (B, L)."""
    return torch.arange(num_letters, device=num_choices.device) < num_choices[:, None]


def own_logits(letter_logits: torch.Tensor, num_choices: torch.Tensor) -> torch.Tensor:
    """Logits (B, L) in which letters that a row does not use count for nothing."""
    # The smallest float, not -inf: -inf times a zero weight is NaN.
    lowest = torch.finfo(letter_logits.dtype).min
    return letter_logits.masked_fill(~is_own(num_choices, letter_logits.shape[1]), lowest)


def answer_loss(
    logits: torch.Tensor,
    letter_logits: torch.Tensor,
    targets: torch.Tensor,
    num_choices: torch.Tensor,
    vocabulary_weight: float = 0.0,
) -> torch.Tensor:
    """Loss (B,) of `logits` (B, V) with `letter_logits` (B, L) among them, against `targets` (B, L)."""
    own = own_logits(letter_logits, num_choices)
    losses = F.cross_entropy(own, targets, reduction="none")
    if vocabulary_weight:
        losses = losses + vocabulary_weight * (logits.logsumexp(dim=1) - own.logsumexp(dim=1))
    return losses


def end_of_turn_loss(logits: torch.Tensor, token_id: int) -> torch.Tensor:
    """-log p (B,) of the token that ends the turn, over the whole vocabulary, from the logits (B, V) at the letter."""
    return logits.logsumexp(dim=1) - logits[:, token_id]
