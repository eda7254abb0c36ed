"""The network: an encoder that turns pictures into annotations, and a decoder that writes while looking at them.

Shapes are written with these letters throughout:

    B images · N rows being decoded · L locations of the grid · D annotation size · T words · H hidden size ·
    E embedding size · A attention size · V vocabulary size · K beams, or captions, an image

This module knows tensors only; `captioner.captioning` adds pictures and words.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from captioner.attention import AttentionSettings
from captioner.decoder import DecoderSettings, LSTMDecoder, build_decoder
from captioner.encoder import Encoder, EncoderSettings


@dataclass(frozen=True)
class ModelSettings:
    """Everything that decides the network's shape, but for the size of its vocabulary."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)


class CaptioningNetwork(nn.Module):
    """Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044)."""

    def __init__(self, encoder: Encoder, decoder: LSTMDecoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each next word of captions (B, K, T) of images (B, 3, H, W); see `LSTMDecoder.forward`."""
        annotations, _ = self.encoder(images)
        return self.decoder(annotations, captions)


def build_network(settings: ModelSettings, vocabulary_size: int) -> CaptioningNetwork:
    """Return the network of these settings, with random weights."""
    encoder = Encoder(settings.encoder)
    decoder = build_decoder(settings.decoder, settings.attention, encoder.size, vocabulary_size)
    return CaptioningNetwork(encoder, decoder)
