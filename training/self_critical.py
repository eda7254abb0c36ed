"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): captions of the network's own, rewarded.

Captions are drawn from the network, and each becomes likelier by as much as its reward exceeds a baseline.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.network.decoder import Decoder
from captioner.vocabulary import END, PAD, START, UNKNOWN
from training.batches import Batch
from training.config import SelfCriticalSettings
from training.losses import CaptionLoss
from training.reward import CaptionReward

_NEVER_WRITTEN = torch.tensor([PAD, START, UNKNOWN])


class SelfCriticalLoss:
    """A loss whose gradient is that of REINFORCE (Williams 1992) with a baseline, mixed with people's captions."""

    def __init__(
        self,
        settings: SelfCriticalSettings,
        references: Sequence[Sequence[Sequence[int]]],
        caption_loss: CaptionLoss,
        max_words: int,
    ):
        """Prepare the rewards.

        Args:
            settings: how to draw and compare.
            references: the words of each picture's captions, END included, by `Batch.numbers`.
            caption_loss: what has the share `settings.cross_entropy`.
            max_words: of captions that are drawn.
        """
        self._settings = settings
        self._reward = CaptionReward(references, settings.bleu)
        self._caption_loss = caption_loss
        self._max_words = max_words

    def __call__(
        self, decoder: Decoder, annotations: Tensor, batch: Batch, progress: float = 1.0
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimise, and for the log its terms, mean rewards and the mean length in words.

        As for `CaptionLoss`, those of the parts of a step add up; but each part divides by its own drawn words.

        Args:
            decoder: in training mode.
            annotations: (B, L, D).
            batch: of these pictures, on the device of the decoder.
            progress: the share of the run that is done, 0 to 1.
        """
        samples, greedy = self._settings.samples, self._settings.baseline == "greedy"
        written = write_captions(decoder, annotations, samples, self._max_words, greedy=greedy)
        rewards = self._reward_of(written, batch.numbers)
        if greedy:
            written, rewards, baseline = written[:, :samples], rewards[:, :samples], rewards[:, samples:]
        else:
            baseline = (rewards.sum(dim=1, keepdim=True) - rewards) / (samples - 1)
        loss = policy_loss(decoder, annotations, written, rewards - baseline)
        means = {
            "critical": loss,
            "reward": rewards.mean(),
            "baseline": baseline.mean(),
            "length": (written > END).sum(dim=2).float().mean(),
        }
        terms = {name: batch.share.pictures * mean.item() for name, mean in means.items()}
        loss = batch.share.pictures * loss
        mixed = self._settings.cross_entropy
        if mixed:
            of_people, their_terms = self._caption_loss.of_batch(decoder, annotations, batch, progress)
            loss = (1 - mixed) * loss + mixed * of_people
            terms |= their_terms
        return loss, terms

    def _reward_of(self, written: Tensor, numbers: Tensor) -> Tensor:
        """Return the reward (B, K) of captions (B, K, T) of the pictures of these numbers (B,)."""
        pictures = numbers.repeat_interleave(written.shape[1]).cpu().numpy()
        rewards = self._reward.score(pictures, written.flatten(0, 1).cpu().numpy())
        return torch.from_numpy(rewards).to(written.device, torch.float32).view(written.shape[:2])


@torch.no_grad()
def write_captions(
    decoder: Decoder, annotations: Tensor, samples: int, max_words: int, *, greedy: bool = False
) -> Tensor:
    """Write captions of pictures: `samples` drawn at random, and if `greedy`, then the one of the likeliest words.

    They are captions of the decoder as it will be used, which is what the reward is for: dropout is off, and `hard`
    attention does not draw its locations as it does in training.

    Args:
        decoder: in either mode.
        annotations: (B, L, D).
        samples: K, drawn for a picture.
        max_words: a caption with more is cut, and has no END.
        greedy: whether to add the caption of the likeliest words, as the last of K + 1.

    Returns:
        Words (B, K, T), END included, PAD after it.
    """
    was_training = decoder.training
    decoder.eval()
    images, columns = len(annotations), samples + greedy
    state = decoder.start(annotations).expand(columns)
    words = torch.full((images, columns), START, device=annotations.device)
    ended = torch.zeros_like(words, dtype=torch.bool)
    written: list[Tensor] = []
    while len(written) <= max_words and not ended.all():
        log_probs, state, _ = decoder.step(words, state)
        odds = log_probs.float().index_fill(2, _NEVER_WRITTEN.to(words.device), -torch.inf).softmax(dim=2)
        # By the cumulative distribution: `multinomial` would take a random number for each word of the vocabulary.
        cumulative = odds[:, :samples].cumsum(dim=2)
        targets = cumulative[:, :, -1:] * torch.rand(images, samples, 1, device=words.device)
        drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(2).clamp(max=odds.shape[2] - 1)
        words = torch.cat([drawn, odds[:, samples:].argmax(dim=2)], dim=1).masked_fill(ended, PAD)
        written.append(words)
        ended |= words == END
    decoder.train(was_training)
    return torch.stack(written, dim=2)


def policy_loss(decoder: Decoder, annotations: Tensor, written: Tensor, advantages: Tensor) -> Tensor:
    """Return minus the captions' log-probabilities times their advantages, summed, and divided by all their words.

    One divisor for all captions, where each one's own length would favour short ones, gives the loss the scale of a
    mean cross-entropy. Words that are never written have no probability here either.

    Log-probabilities are those of the decoder in training, dropout on, while the captions were drawn without it. So
    it regularises as it does on people's captions, and the gradient is that of a slightly different network's. What
    this adds to all samples of a picture alike cancels with the baseline of the others, whose advantages sum to 0.
    Locations that `hard` attention draws here did not make the captions, so their choice gets no reward.

    Args:
        decoder: in training mode.
        annotations: (B, L, D).
        written: captions (B, K, T), END included, PAD after it.
        advantages: (B, K).
    """
    lengths, order = (
        (written != PAD).sum(dim=2).sort(dim=1, descending=True)
    )  # the order that costs `forward` least
    written = written.gather(1, order.unsqueeze(2).expand_as(written))[:, :, : lengths.max()]
    real = written != PAD
    before = F.pad(written[:, :, :-1], (1, 0), value=START).masked_fill(~real, PAD)
    logits, _ = decoder(annotations, before)
    logits = logits.float().index_fill(1, _NEVER_WRITTEN.to(logits.device), -torch.inf)
    losses = F.cross_entropy(logits, written[real], reduction="none")
    return (losses * advantages.gather(1, order).unsqueeze(2).expand_as(written)[real]).mean()
