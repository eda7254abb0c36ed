import pytest
import torch

from captioner.vocabulary import PAD
from training.config import LossSettings
from training.losses import caption_loss, doubly_stochastic_penalty


def test_the_penalty_equals_the_papers_sum_divided_by_the_locations():
    torch.manual_seed(0)
    captions = torch.tensor([[[1, 4, 5], [1, 6, PAD]], [[1, PAD, PAD], [PAD, PAD, PAD]]])
    lengths = [3, 2, 1]
    attention = torch.rand(sum(lengths), 7).softmax(dim=-1)
    expected = []
    for one in attention.split(lengths):
        expected.append(sum((1 - sum(float(alpha[i]) for alpha in one)) ** 2 for i in range(7)) / 7)
    assert doubly_stochastic_penalty(attention, captions).item() == pytest.approx(sum(expected) / 3)


def test_looking_at_every_place_once_costs_nothing():
    captions = torch.full((1, 1, 5), 4)
    assert doubly_stochastic_penalty(torch.eye(5), captions).item() == 0


def test_the_loss_is_the_mean_over_words_plus_the_weighted_penalty():
    torch.manual_seed(0)
    captions = torch.tensor([[[1, 4, 5], [1, 6, PAD]]])
    targets = torch.tensor([4, 5, 2, 6, 2])
    logits, attention = torch.randn(5, 8), torch.rand(5, 3)
    loss, parts = caption_loss(logits, attention, captions, targets, LossSettings(0.2, 0.5))
    log_probs = logits.log_softmax(dim=-1)
    words = [
        0.8 * -log_probs[row, target] + 0.2 * -log_probs[row].mean() for row, target in enumerate(targets.tolist())
    ]
    assert parts["words"] == pytest.approx(float(sum(words)) / 5)
    assert loss.item() == pytest.approx(parts["words"] + 0.5 * parts["attention"])
