"""What training makes small."""

import torch.nn.functional as F
from torch import Tensor

from captioner.vocabulary import PAD
from training.config import LossSettings


def caption_loss(
    logits: Tensor, attention: Tensor, captions: Tensor, targets: Tensor, settings: LossSettings
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss to minimise, Show, Attend and Tell's equation 14, and its parts for the log.

    Args:
        logits: (M, V), and
        attention: (M, L), both for the words of `captions` that are not PAD, as `LSTMDecoder.forward` gives them.
        captions: (B, K, T).
        targets: (M,), the word that follows each.
        settings: the weights of the parts.
    """
    words = F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
    penalty = doubly_stochastic_penalty(attention, captions)
    loss = words + settings.doubly_stochastic * penalty
    return loss, {"words": words.item(), "attention": penalty.item()}


def doubly_stochastic_penalty(attention: Tensor, captions: Tensor) -> Tensor:
    """Return how far each location's attention, summed over a caption's words, is from 1: the mean square.

    Show, Attend and Tell, section 4.2.1: it asks the network to look at every part of the picture. The mean is
    over captions and locations.
    """
    real = captions != PAD
    image, column, _ = real.nonzero(as_tuple=True)
    written = real.any(dim=2)  # (B, K): captions that are there at all
    numbers = (written.flatten().cumsum(0) - 1).view_as(written)[image, column]  # (M,)
    sums = attention.new_zeros(int(written.sum()), attention.shape[1]).index_add(0, numbers, attention)
    return (1 - sums).square().mean()
