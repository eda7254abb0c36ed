"""What training makes small."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.network.attention import Look
from captioner.vocabulary import PAD
from training.config import LossSettings


class Share(NamedTuple):
    """How much of a step's pictures are in one part of it, 0 to 1."""

    words: float = 1.0
    captions: float = 1.0
    pictures: float = 1.0


class CaptionLoss(nn.Module):
    """Show, Attend and Tell's equation 14, and what further mechanisms add to it.

    Every term is a mean over the words or the captions of a step. A step may be computed in parts, one after
    another or by several processes: each weighed by its share, losses and gradients add up to those of the whole.

    `baseline`, of REINFORCE, is a moving average of captions' log-likelihoods. It stays the same for all parts of a
    step; `likelihood` collects theirs, and `end_step` moves it.
    """

    baseline: Tensor
    begun: Tensor
    likelihood: Tensor

    def __init__(self, settings: LossSettings):
        super().__init__()
        self.settings = settings
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self.register_buffer("likelihood", torch.zeros(()), persistent=False)

    def forward(
        self,
        logits: Tensor,
        look: Look,
        captions: Tensor,
        targets: Tensor,
        share: Share = Share(),  # noqa: B008 (frozen)
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimise, and its terms for the log.

        Args:
            logits: (M, V), and
            look: (M, ...), both for the words of `captions` that are not PAD, as `Decoder.forward` gives them; of
                any precision: all is computed in float32.
            captions: (B, K, T).
            targets: (M,), the word that follows each.
            share: of the step, that these captions are.
        """
        logits = logits.float()
        look = Look._make(None if seen is None else seen.float() for seen in look)
        words = F.cross_entropy(logits, targets, label_smoothing=self.settings.label_smoothing)
        owners = caption_numbers(captions)
        penalty = doubly_stochastic_penalty(look.weights, owners)
        terms = {
            "words": share.words * words,
            "attention": share.captions * self.settings.doubly_stochastic * penalty,
        }
        if look.overlap is not None:
            terms["coverage"] = share.words * self.settings.coverage * look.overlap.mean()
        if look.choice is not None:
            likelihood = -F.cross_entropy(logits.detach(), targets, reduction="none")
            reinforce = self._reinforce(likelihood, look.choice, owners, share)
            terms["choice"] = share.words * self.settings.reinforce * reinforce
            entropy = torch.special.entr(look.weights).sum(dim=1).mean()
            terms["entropy"] = -share.words * self.settings.entropy * entropy
        return torch.stack(list(terms.values())).sum(), {name: term.item() for name, term in terms.items()}

    def end_step(self) -> None:
        """Move the baseline, once `likelihood` is that of all captions of a step."""
        self.baseline.copy_(0.9 * self._present_baseline(self.likelihood) + 0.1 * self.likelihood)
        self.begun.fill_(True)
        self.likelihood.zero_()

    def _present_baseline(self, mean: Tensor) -> Tensor:
        """Return the baseline, which in the first step is the mean itself, of the part that asks."""
        return torch.where(self.begun, self.baseline, mean)

    def _reinforce(self, likelihood: Tensor, choice: Tensor, owners: Tensor, share: Share) -> Tensor:
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
        self.likelihood += share.captions * mean
        return -((reward - self._present_baseline(mean))[owners] * choice).mean()


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
