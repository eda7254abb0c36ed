"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): reinforcement learning of the reward of captions.

Captions are sampled from the network; the probability of each increases with its reward above a baseline.
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
    """REINFORCE (Williams 1992) with a baseline, mixed with the loss of the reference captions."""

    def __init__(
        self,
        settings: SelfCriticalSettings,
        references: Sequence[Sequence[Sequence[int]]],
        caption_loss: CaptionLoss,
        max_words: int,
        words: Sequence[str] = (),
    ):
        """Prepare the rewards.

        Args:
            settings: numbers of samples, baseline and weights.
            references: token ids of the captions of each picture, with END, by `Batch.indices`.
            caption_loss: the loss with the share `settings.cross_entropy`.
            max_words: maximum length of sampled captions.
            words: the word of each token id, for `settings.unconfirmed`.
        """
        self._settings = settings
        self._reward = CaptionReward(references, settings.bleu, settings.unconfirmed, words)
        self._caption_loss = caption_loss
        self._max_words = max_words

    def __call__(
        self, decoder: Decoder, annotations: Tensor, batch: Batch, progress: float = 1.0
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimize, and for the log its terms, mean rewards and the mean length in words.

        As for `CaptionLoss`, the losses of the parts of a step add up, but each part divides by its own number of
        sampled words.

        Args:
            decoder: in training mode.
            annotations: (B, L, D).
            batch: the batch of these pictures, on the device of the decoder.
            progress: share of the run that is done, 0..1.
        """
        samples, greedy = self._settings.samples, self._settings.baseline == "greedy"
        written = write_captions(decoder, annotations, samples, self._max_words, greedy=greedy)
        pictures = batch.indices.repeat_interleave(written.shape[1]).cpu().numpy()
        found = self._reward.score(pictures, written.flatten(0, 1).cpu().numpy())
        rewards = torch.from_numpy(found).to(written.device, torch.float32).view(written.shape[:2])  # (B, K)
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
            caption_loss, caption_terms = self._caption_loss(decoder, annotations, batch, progress)
            loss = (1 - mixed) * loss + mixed * caption_loss
            terms |= caption_terms
        return loss, terms


@torch.no_grad()
def write_captions(
    decoder: Decoder, annotations: Tensor, samples: int, max_words: int, *, greedy: bool = False
) -> Tensor:
    """Sample captions, and append the greedy caption if `greedy`.

    The decoder is in inference mode, as the reward is for inference: without dropout, and `hard` attention does not
    sample locations.

    Args:
        decoder: in any mode.
        annotations: (B, L, D).
        samples: K, number of samples per picture.
        max_words: maximum length; truncated captions have no END.
        greedy: whether to append the greedy caption, as the last of K + 1.

    Returns:
        Token ids (B, K, T), with END and padding.
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
        # Inverse transform sampling: `multinomial` would use a random number for every word of the vocabulary.
        cumulative = odds[:, :samples].cumsum(dim=2)
        targets = cumulative[:, :, -1:] * torch.rand(images, samples, 1, device=words.device)
        drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(2).clamp(max=odds.shape[2] - 1)
        words = torch.cat([drawn, odds[:, samples:].argmax(dim=2)], dim=1).masked_fill(ended, PAD)
        written.append(words)
        ended |= words == END
    decoder.train(was_training)
    return torch.stack(written, dim=2)


def policy_loss(decoder: Decoder, annotations: Tensor, written: Tensor, advantages: Tensor) -> Tensor:
    """Return minus the log-probabilities of captions times their advantages, averaged over all words.

    The divisor is the number of words of all captions, because their own lengths would favour short ones. Words
    that are never written have no probability here either.

    Log-probabilities are those of the decoder in training mode, while the captions were sampled without dropout.
    Dropout regularizes as on reference captions, and the gradient is that of a slightly different network. What it
    adds to all samples of a picture equally cancels with the `others` baseline, whose advantages sum to 0.
    Locations that `hard` attention samples here did not produce the captions, so their choice is not rewarded.

    Args:
        decoder: in training mode.
        annotations: (B, L, D).
        written: token ids (B, K, T), with END and padding.
        advantages: (B, K).
    """
    # Longest first, which costs `forward` least.
    lengths, order = (written != PAD).sum(dim=2).sort(dim=1, descending=True)
    written = written.gather(1, order.unsqueeze(2).expand_as(written))[:, :, : lengths.max()]
    real = written != PAD
    before = F.pad(written[:, :, :-1], (1, 0), value=START).masked_fill(~real, PAD)
    logits, _ = decoder(annotations, before)
    logits = logits.float().index_fill(1, _NEVER_WRITTEN.to(logits.device), -torch.inf)
    losses = F.cross_entropy(logits, written[real], reduction="none")
    return (losses * advantages.gather(1, order).unsqueeze(2).expand_as(written)[real]).mean()
