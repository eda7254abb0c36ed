"""What training makes small."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.attention import Look
from captioner.vocabulary import PAD
from training.config import LossSettings


class CaptionLoss(nn.Module):
    """Show, Attend and Tell's equation 14, and what further mechanisms add to it.

    Its one buffer is the moving average of captions' log-likelihoods, the baseline of REINFORCE.
    """

    baseline: Tensor
    begun: Tensor

    def __init__(self, settings: LossSettings):
        super().__init__()
        self.settings = settings
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def forward(
        self, logits: Tensor, look: Look, captions: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimise, and its parts for the log.

        Args:
            logits: (M, V), and
            look: (M, ...), both for the words of `captions` that are not PAD, as `Decoder.forward` gives them.
            captions: (B, K, T).
            targets: (M,), the word that follows each.
        """
        words = F.cross_entropy(logits, targets, label_smoothing=self.settings.label_smoothing)
        owners = caption_numbers(captions)
        penalty = doubly_stochastic_penalty(look.weights, owners)
        parts = {"words": words, "attention": self.settings.doubly_stochastic * penalty}
        if look.overlap is not None:
            parts["coverage"] = self.settings.coverage * look.overlap.mean()
        if look.choice is not None:
            likelihood = -F.cross_entropy(logits.detach(), targets, reduction="none")
            parts["choice"] = self.settings.reinforce * self._reinforce(likelihood, look.choice, owners)
            entropy = torch.special.entr(look.weights).sum(dim=1).mean()
            parts["entropy"] = -self.settings.entropy * entropy
        return torch.stack(list(parts.values())).sum(), {name: part.item() for name, part in parts.items()}

    def _reinforce(self, likelihood: Tensor, choice: Tensor, owners: Tensor) -> Tensor:
        """Return what to minimise so that locations are chosen after which captions become likely.

        Show, Attend and Tell, section 4.1: the log-likelihood of a caption, less a baseline that follows it
        (b = 0.9 b + 0.1 log p), rewards all of its choices. Ours is the mean over a caption's words where theirs is
        the sum, so that long captions do not seem worse.

        Args:
            likelihood: log-probability (M,) of each word, and
            choice: of the location before it (M,).
            owners: the caption (M,) that each word belongs to.
        """
        counts = owners.bincount().to(likelihood)
        reward = likelihood.new_zeros(len(counts)).index_add(0, owners, likelihood) / counts
        mean = reward.mean()
        baseline = torch.where(self.begun, self.baseline, mean)
        self.baseline.copy_(0.9 * baseline + 0.1 * mean)
        self.begun.fill_(True)
        return -((reward - baseline)[owners] * choice).mean()


def caption_numbers(captions: Tensor) -> Tensor:
    """Return which caption (M,) each word of `captions` (B, K, T) that is not PAD belongs to, counted from 0."""
    real = captions != PAD
    written = real.any(dim=2)  # (B, K): captions that are there at all
    image, column, _ = real.nonzero(as_tuple=True)
    return (written.flatten().cumsum(0) - 1).view_as(written)[image, column]


def doubly_stochastic_penalty(attention: Tensor, owners: Tensor) -> Tensor:
    """Return how far each location's attention, summed over a caption's words, is from 1: the mean square.

    Show, Attend and Tell, section 4.2.1: it asks the network to look at every part of the picture. The mean is
    over captions and locations.

    Args:
        attention: (M, L) of each word.
        owners: the caption (M,) that each word belongs to.
    """
    captions = int(owners[-1]) + 1
    sums = attention.new_zeros(captions, attention.shape[1]).index_add(0, owners, attention)
    return (1 - sums).square().mean()
