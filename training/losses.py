"""Loss of reference captions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.network.attention import Attended
from captioner.network.decoder import Decoder
from captioner.vocabulary import PAD
from training.batches import Batch, Share
from training.config import LossSettings

RARE = -7.0
"""Initial logit of the detectors: a probability of 0.001."""


class CaptionLoss(nn.Module):
    """Show, Attend and Tell, equation 14, and additional terms.

    Every term is a mean over the words or captions of a step. A step may be computed in parts, in sequence or by
    several processes: weighted by their shares, losses and gradients add up to those of the whole step.

    `baseline` of REINFORCE is a moving average of the log-likelihoods of captions. It is constant within a step;
    `likelihood` accumulates those of the parts, and `end_step` updates it.

    Attention can be supervised by boxes of persons and by word detectors. The detectors are a linear layer on
    normalised annotations with one output per word. They learn from captions only: P(word) = 1 - prod(1 - p) over
    the p of the cells (noisy-OR: Fang et al. 2015, arXiv 1411.4952, section 3).
    """

    person_words: Tensor
    detected_words: Tensor
    baseline: Tensor
    begun: Tensor
    likelihood: Tensor

    def __init__(
        self,
        settings: LossSettings,
        persons: Sequence[int] = (),
        words: Sequence[int] = (),
        annotation_size: int = 0,
    ):
        """Prepare the loss.

        Args:
            settings: weights of the terms.
            persons: token ids of words that name a person.
            words: token ids, ascending, of words with detectors, if `settings.detectors` is above 0.
            annotation_size: D.
        """
        super().__init__()
        self.settings = settings
        self.register_buffer("person_words", torch.tensor(persons, dtype=torch.long), persistent=False)
        self.register_buffer("detected_words", torch.tensor(words, dtype=torch.long), persistent=False)
        self.detectors = nn.Linear(annotation_size, len(words)) if settings.detectors else None
        if self.detectors is not None:
            nn.init.zeros_(self.detectors.weight)
            nn.init.constant_(self.detectors.bias, RARE)
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self.register_buffer("likelihood", torch.zeros(()), persistent=False)

    def forward(
        self, decoder: Decoder, annotations: Tensor, batch: Batch, progress: float = 1.0, sampled: float = 0.0
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a decoder on a batch, to minimize, and its terms for the log; computed in float32.

        Args:
            decoder: in training mode.
            annotations: (B, L, D) of the pictures of the batch.
            batch: on the device of the decoder.
            progress: share of the run that is done, 0..1.
            sampled: share of scheduled sampling; above 0 for recurrent decoders only.
        """
        own = [sampled] if sampled else []  # not a parameter of every decoder
        logits, look = decoder(annotations, batch.captions, *own)
        logits = logits.float()
        look = Attended._make(None if seen is None else seen.float() for seen in look)
        captions, targets, persons, share = batch.captions, batch.targets, batch.persons, batch.share
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
        if self.settings.sharpness:
            rise = self.settings.sharpness_rise
            weight = self.settings.sharpness * (min(1.0, progress / rise) if rise else 1.0)
            terms["sharpness"] = share.words * weight * mean_entropy(look.weights)
        image = (captions != PAD).nonzero(as_tuple=True)[0]  # (M,)
        taught = torch.zeros_like(targets, dtype=torch.bool)
        if self.settings.persons and persons is not None:
            inside = (look.weights * persons[image]).sum(dim=1)
            taught = torch.isin(targets, self.person_words) & (persons.sum(dim=1) > 0)[image]
            terms["persons"] = share.words * self.settings.persons * (_surprise(inside) * taught).mean()
        if self.detectors is not None:
            scores = self.detectors(F.layer_norm(annotations.float(), annotations.shape[-1:]))
            terms |= self._detect(scores, batch, image, look.weights, ~taught)
        return torch.stack(list(terms.values())).sum(), {name: term.item() for name, term in terms.items()}

    def _detect(
        self, scores: Tensor, batch: Batch, image: Tensor, weights: Tensor, teach: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss of word detectors, and that of attention supervised by them.

        Args:
            scores: logits of the N detectors in each cell (B, L, N).
            batch: of M targets.
            image: image index of each target (M,).
            weights: attention of each target (M, L).
            teach: bool (M,), whether the detector supervises the attention of a target.
        """
        captions, targets, share = batch.captions, batch.targets, batch.share
        absent = -F.softplus(scores).sum(dim=1)  # (B, N), log of 1 - P
        present = (captions.flatten(1)[:, :, None] == self.detected_words).any(dim=1)  # (B, N)
        likelihood = torch.where(present, log_of_complement(absent), absent)
        terms = {"detectors": -share.pictures * self.settings.detectors * likelihood.sum(dim=1).mean()}
        if self.settings.detected:
            detector = torch.searchsorted(self.detected_words, targets).clamp(max=len(self.detected_words) - 1)
            row = ((self.detected_words[detector] == targets) & teach).nonzero(as_tuple=True)[0]
            image, detector = image[row], detector[row]
            with torch.no_grad():
                response = scores[image, :, detector].sigmoid()  # (M', L)
                response /= response.amax(dim=1, keepdim=True)
                certainty = -absent[image, detector].expm1()
            surprise = _surprise((weights[row] * response).sum(dim=1))
            scale = share.words * self.settings.detected / len(targets)
            terms["detected"] = scale * (certainty * surprise).sum()
        return terms

    def end_step(self) -> None:
        """Update the baseline from `likelihood`, at the end of a step."""
        self.baseline.copy_(0.9 * self._present_baseline(self.likelihood) + 0.1 * self.likelihood)
        self.begun.fill_(True)
        self.likelihood.zero_()

    def _present_baseline(self, mean: Tensor) -> Tensor:
        """Return the baseline; in the first step, the mean of the part."""
        return torch.where(self.begun, self.baseline, mean)

    def _reinforce(self, likelihood: Tensor, choice: Tensor, owners: Tensor, share: Share) -> Tensor:
        """Return the REINFORCE loss of the locations that `hard` attention sampled.

        Show, Attend and Tell, section 4.1: the log-likelihood of a caption minus a moving baseline
        (b = 0.9 b + 0.1 log p) rewards all of its choices. Here it is the mean over the words of a caption, in the
        paper the sum, so that long captions are not worse.

        Args:
            likelihood: log-probability of each word (M,).
            choice: log-probability of its location (M,).
            owners: caption index of each word (M,).
        """
        counts = owners.bincount().to(likelihood)
        reward = likelihood.new_zeros(len(counts)).index_add(0, owners, likelihood) / counts
        mean = reward.mean()
        self.likelihood += share.captions * mean
        return -((reward - self._present_baseline(mean))[owners] * choice).mean()


def caption_numbers(captions: Tensor) -> Tensor:
    """Return the caption index (M,) of each word of `captions` (B, K, T) that is not PAD."""
    real = captions != PAD
    written = real.any(dim=2)  # (B, K): captions that are not padding
    image, column, _ = real.nonzero(as_tuple=True)
    return (written.flatten().cumsum(0) - 1).view_as(written)[image, column]


def mean_entropy(weights: Tensor) -> Tensor:
    """Return the mean entropy of attention (M, L), in nats; its gradient is finite at zero weights."""
    return -(weights * weights.clamp(min=1e-6).log()).sum(dim=1).mean()


def log_of_complement(log_probs: Tensor) -> Tensor:
    """Return log(1 - p) of log(p), accurate for p near 0 and near 1."""
    return (-log_probs.clamp(max=-1e-6).expm1()).log()


def _surprise(mass: Tensor) -> Tensor:
    """Return -log of an attention mass, with a gradient of at most 100."""
    return -(0.99 * mass + 0.01).log()


def doubly_stochastic_penalty(attention: Tensor, owners: Tensor) -> Tensor:
    """Return the mean over captions and locations of (1 - the attention summed over the words)^2.

    Show, Attend and Tell, section 4.2.1: it encourages attention to every part of the picture.

    Args:
        attention: (M, L) of each word.
        owners: caption index of each word (M,).
    """
    captions = int(owners[-1]) + 1
    sums = attention.new_zeros(captions, attention.shape[1]).index_add(0, owners, attention)
    return (1 - sums).square().mean()
