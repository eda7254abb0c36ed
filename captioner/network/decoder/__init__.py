"""Decoders: they write a caption word by word, and attend to the image before each word.

A decoder has three methods. `start` returns the state before the first word from annotations, and `step` predicts
the next word; a search calls these. `forward` reads whole captions at once; training calls it. It computes for all
words together what does not depend on the previous step: the contribution of the words to the gates, and the output
layer.

Rows are an axis: a state holds B images and K rows (hypotheses or captions) of each.

To add a decoder: write its class in a module of this package, and add it to `KINDS` and to `DecoderSettings.kind`.
"""

from collections.abc import Callable

from captioner.network.attention import Sizes
from captioner.network.decoder.base import Decoder, ImageState, State
from captioner.network.decoder.recurrent import CELLS, RecurrentDecoder
from captioner.network.decoder.top_down import TopDownDecoder
from captioner.network.decoder.transformer import TransformerDecoder
from captioner.settings import AttentionSettings, DecoderSettings

__all__ = ["KINDS", "Decoder", "ImageState", "State", "build_decoder"]

KINDS: dict[str, Callable[..., Decoder]] = {
    **dict.fromkeys(CELLS, RecurrentDecoder),
    "top_down": TopDownDecoder,
    "transformer": TransformerDecoder,
}
"""The decoders by name."""


def build_decoder(
    settings: DecoderSettings,
    attention: AttentionSettings,
    annotation_size: int,
    grid: tuple[int, int],
    vocabulary_size: int,
) -> Decoder:
    """Return the decoder `settings.kind` with random weights.

    Raises:
        ConfigError: if the attention does not match these sizes.
    """
    sizes = Sizes(annotation_size, settings.hidden_size, settings.embedding_size, grid)
    return KINDS[settings.kind](settings, attention, sizes, vocabulary_size)
