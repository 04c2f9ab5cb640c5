import math

import pytest
import torch
import torch.nn.functional as F

from vqa_sft.training.loss import answer_loss, letter_targets

LETTER_IDS = torch.tensor([4, 9, 2, 7])


def loss_of(logits, answers, num_choices, smoothing=0.0, **weight):
    answers, num_choices = torch.tensor(answers), torch.tensor(num_choices)
    targets = letter_targets(answers, num_choices, 4, smoothing)
    return answer_loss(logits, logits[:, LETTER_IDS], targets, num_choices, **weight)


def test_the_letters_alone_are_those_of_the_row():
    logits = torch.zeros(2, 11)
    logits[:, LETTER_IDS] = torch.tensor([[1.0, 2.0, 50.0, 60.0], [0.5, 0.0, 1.0, 70.0]])
    first = -math.log(math.exp(1) / (math.exp(1) + math.exp(2)))
    second = -math.log(math.exp(1) / (math.exp(0.5) + 1 + math.exp(1)))
    torch.testing.assert_close(loss_of(logits, [0, 2], [2, 3]), torch.tensor([first, second]))


def test_letters_that_a_row_does_not_use_get_no_gradient():
    for smoothing in (0.0, 0.2):
        logits = torch.randn(2, 11, requires_grad=True)
        loss_of(logits, [0, 1], [2, 4], smoothing).sum().backward()
        assert logits.grad[0, LETTER_IDS[2:]].tolist() == [0.0, 0.0]
        assert logits.grad.isfinite().all()


def test_with_a_weight_of_1_every_token_counts_as_in_the_usual_loss():
    logits = torch.randn(3, 11)
    expected = F.cross_entropy(logits, LETTER_IDS[torch.tensor([0, 1, 0])], reduction="none")
    torch.testing.assert_close(loss_of(logits, [0, 1, 0], [4, 2, 3], vocabulary_weight=1.0), expected)


def test_a_weight_between_is_between():
    logits = torch.randn(3, 11)
    letters, half, all_tokens = (loss_of(logits, [0, 1, 0], [4, 2, 3], vocabulary_weight=w) for w in (0, 0.5, 1))
    torch.testing.assert_close(half, (letters + all_tokens) / 2)


@pytest.mark.parametrize("num_choices", [2, 3, 4])
def test_smoothing_mixes_in_the_mean_over_the_rows_own_letters(num_choices):
    logits = torch.randn(1, 11)
    each = torch.cat([loss_of(logits, [i], [num_choices]) for i in range(num_choices)])
    torch.testing.assert_close(loss_of(logits, [1], [num_choices], 0.3), 0.7 * each[1:2] + 0.3 * each.mean()[None])
