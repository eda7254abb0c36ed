"""The training objective: the loss of reference captions, or self-critical training."""

import torch
from torch import Tensor

from captioner.errors import ConfigError
from captioner.network.model import CaptioningNetwork
from captioner.vocabulary import Vocabulary
from training.batches import Batch, Examples
from training.config import TrainingSettings
from training.development import annotate
from training.losses import CaptionLoss
from training.regions import find_persons, frequent_words
from training.self_critical import SelfCriticalLoss

LEAST_PICTURES = 100
"""Minimum number of training pictures of a word with a detector."""

MOST_PICTURES = 0.25
"""Maximum share of the training pictures of a word with a detector: "a", "on" and "is" are not visible."""


class Objective:
    """The loss of batches, by the settings of a run."""

    def __init__(
        self,
        settings: TrainingSettings,
        examples: Examples,
        vocabulary: Vocabulary,
        size: int,
        device: torch.device,
    ):
        """Prepare the loss; `size` is that of an annotation, D.

        Raises:
            ConfigError: if no word can have a detector.
        """
        self.settings = settings
        self.device = device
        words: list[int] = []
        if settings.loss.detectors:
            words = frequent_words(examples.references(), LEAST_PICTURES, MOST_PICTURES)
            if not words:
                raise ConfigError(
                    f"loss.detectors: no word occurs in at least {LEAST_PICTURES} training pictures and at most "
                    f"{MOST_PICTURES:.0%} of them. Set it to 0, or use more pictures"
                )
        self.caption_loss = CaptionLoss(settings.loss, find_persons(vocabulary), words, size).to(device)
        self._critical = settings.self_critical and SelfCriticalLoss(
            settings.self_critical,
            examples.references(),
            self.caption_loss,
            settings.search.max_words,
            vocabulary.words,
        )

    def __call__(
        self, network: CaptioningNetwork, batch: Batch, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimize, and its terms for the log.

        Args:
            network: in training mode.
            batch: on the device of the network.
            progress: share of the run that is done, 0..1, for scheduled sampling.
        """
        decoder = network.decoder
        precision = self.settings.precision
        with torch.autocast(self.device.type, getattr(torch, precision), enabled=precision != "float32"):
            annotations = annotate(network.encoder, batch.pictures).float()
            if self._critical:
                return self._critical(decoder, annotations, batch, progress)
            sampled = self.settings.scheduled_sampling * progress
            return self.caption_loss(decoder, annotations, batch, progress, sampled)
