"""The network: an encoder that turns pictures into annotations, and a decoder that writes while looking at them.

Shapes are written with these letters throughout:

    B images · N rows being decoded · L locations of the grid · D annotation size · T words · H hidden size ·
    E embedding size · A attention size · V vocabulary size · K beams, or captions, an image

This module knows tensors only; `captioner.captioning` adds pictures and words.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from captioner.attention import AttentionSettings, Look
from captioner.decoder import Decoder, DecoderSettings, build_decoder
from captioner.encoder import Encoder, EncoderSettings


@dataclass(frozen=True)
class ModelSettings:
    """Everything that decides the network's shape, but for the size of its vocabulary."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)

    def __post_init__(self) -> None:
        attention, decoder = self.attention, self.decoder
        if decoder.kind == "transformer" and (attention.kind != "multi_head" or attention.coverage):
            raise ValueError(
                "attention.kind: the 'transformer' decoder looks with 'multi_head', without coverage (it reads all "
                f"words of a caption at once, and none knows where the others looked); got {attention.kind!r}"
                f"{' with coverage' if attention.coverage else ''}"
            )
        if decoder.kind == "transformer" and decoder.hidden_size % attention.heads:
            raise ValueError(
                f"attention.heads: {attention.heads} heads cannot share decoder.hidden_size, "
                f"{decoder.hidden_size}, evenly"
            )
        if decoder.kind == "top_down" and attention.kind in ("none", "mean"):
            raise ValueError(
                f"attention.kind: 'top_down' reads the mean annotation at every word, so {attention.kind!r} would "
                "change nothing that it seems to; use decoder.kind 'lstm'"
            )


class CaptioningNetwork(nn.Module):
    """Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044)."""

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Look]:
        """Predict each next word of captions (B, K, T) of images (B, 3, H, W); see `Decoder.forward`."""
        annotations, _ = self.encoder(images)
        return self.decoder(annotations, captions)


def build_network(settings: ModelSettings, vocabulary_size: int, image_size: int) -> CaptioningNetwork:
    """Return the network of these settings, with random weights, for square frames of `image_size` pixels.

    Raises:
        ConfigError: when its parts do not fit together.
    """
    encoder = Encoder(settings.encoder)
    grid = encoder.grid(image_size)
    return CaptioningNetwork(
        encoder, build_decoder(settings.decoder, settings.attention, encoder.size, grid, vocabulary_size)
    )
