import math

import torch

from vqa_sft.loss import letters_loss, vocabulary_loss


def test_the_letters_loss_looks_at_the_rows_own_letters_only():
    logits = torch.tensor([[1.0, 2.0, 50.0], [0.5, 0.0, 1.0]])
    losses = letters_loss(logits, answers=torch.tensor([0, 2]), num_choices=torch.tensor([2, 3]))
    first = -math.log(math.exp(1) / (math.exp(1) + math.exp(2)))
    second = -math.log(math.exp(1) / (math.exp(0.5) + 1 + math.exp(1)))
    torch.testing.assert_close(losses, torch.tensor([first, second]))


def test_letters_that_a_row_does_not_use_get_no_gradient():
    logits = torch.randn(2, 4, requires_grad=True)
    letters_loss(logits, torch.tensor([0, 1]), torch.tensor([2, 4])).sum().backward()
    assert logits.grad[0, 2:].tolist() == [0.0, 0.0]
    assert logits.grad.isfinite().all()


def test_the_vocabulary_loss_counts_every_token():
    logits = torch.randn(3, 11)
    letter_ids, answers = torch.tensor([4, 9]), torch.tensor([0, 1, 0])
    expected = [-logits[i].log_softmax(0)[token] for i, token in enumerate([4, 9, 4])]
    torch.testing.assert_close(vocabulary_loss(logits, answers, letter_ids), torch.stack(expected))
