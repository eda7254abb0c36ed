"""What a step of training minimises: to write people's captions, or self-critical training."""

import torch
from torch import Tensor

from captioner.network.model import CaptioningNetwork
from training.batches import Batch, Examples
from training.config import TrainingSettings
from training.development import annotate
from training.losses import CaptionLoss
from training.self_critical import SelfCriticalLoss
from training.setup import precision


class Objective:
    """The loss of a run's batches, as its settings say."""

    def __init__(self, settings: TrainingSettings, examples: Examples, device: torch.device):
        self.settings = settings
        self.device = device
        self.of_captions = CaptionLoss(settings.loss).to(device)
        self._critical = settings.self_critical and SelfCriticalLoss(
            settings.self_critical, examples.references(), self.of_captions, settings.search.max_words
        )

    def __call__(
        self, network: CaptioningNetwork, batch: Batch, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss to minimise, and its terms for the log.

        Args:
            network: in training mode.
            batch: on the device.
            progress: the share of the run that is done, 0 to 1; it tells how many words are the network's own.
        """
        decoder = network.decoder
        with precision(self.settings, self.device):
            annotations = annotate(network.encoder, batch.pictures).float()
            if self._critical:
                return self._critical(decoder, annotations, batch)
            sampling = self.settings.scheduled_sampling
            own = [sampling * progress] if sampling else []  # not every decoder can
            logits, look = decoder(annotations, batch.captions, *own)
            return self.of_captions(logits, look, batch.captions, batch.targets, batch.share)
