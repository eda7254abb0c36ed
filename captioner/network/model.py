"""The network: an encoder that turns images into annotations, and a decoder with attention.

Shapes are written with these letters:

    B images · K rows (hypotheses or captions) of each image · L grid locations · D annotation size ·
    T words · H hidden size · E embedding size · A attention size · V vocabulary size · M words of all captions

This module handles tensors only; `captioner.captioning` adds pictures and words.
"""

from torch import Tensor, nn

from captioner.network.attention import Attended
from captioner.network.decoder import Decoder, build_decoder
from captioner.network.encoder import Encoder
from captioner.settings import ModelSettings


class CaptioningNetwork(nn.Module):
    """Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044)."""

    def __init__(self, encoder: Encoder, decoder: Decoder, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Attended]:
        """Predict each next word of captions (B, K, T) of images (B, 3, H, W); see `Decoder.forward`."""
        annotations, _ = self.encoder(images)
        return self.decoder(annotations, captions)


def build_network(settings: ModelSettings, vocabulary_size: int, image_size: int) -> CaptioningNetwork:
    """Return a network with random weights, for square images of `image_size` pixels.

    Raises:
        ConfigError: if its parts do not fit together.
    """
    encoder = Encoder(settings.encoder)
    grid = encoder.grid(image_size)
    return CaptioningNetwork(
        encoder, build_decoder(settings.decoder, settings.attention, encoder.size, grid, vocabulary_size), grid
    )
