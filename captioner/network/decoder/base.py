"""The state of a decoder, and the base class of all decoders."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.network.attention import Attended, Attention
from captioner.settings import DecoderSettings


class ImageState(NamedTuple):
    """State of each image, computed once."""

    annotations: Tensor  # (B, L, D), a
    keys: Tensor  # (B, ...), from `Attention.prepare`
    gates: Tensor  # (B, 1, ...), contribution of the image to the gates at every word


class State(NamedTuple):
    """The state of a decoder between two words, for B images of K rows each. Immutable."""

    rows: Any  # state of each row, a NamedTuple of tensors (B, K, ...)
    images: ImageState

    def select(self, images: Tensor, rows: Tensor) -> "State":
        """Return the state of some images (B',) and rows (B', K'); see `captioner.engine.State`. If all images are
        kept, their state is shared, not copied.
        """
        kept = self.images
        if len(images) != len(kept.annotations):  # indices are distinct, so these are all
            kept = ImageState(*(tensor[images] for tensor in kept))
        return State(type(self.rows)(*(tensor[images[:, None], rows] for tensor in self.rows)), kept)

    def replace_cells(self, cells: Tensor) -> "State":
        """Return the state with the content of some cells (B, L) removed; see `captioner.engine.State`."""

        def replace(tensor: Tensor) -> Tensor:  # (B, ..., L, size) if it has a value for each cell
            if tensor.shape[-2] != cells.shape[1]:
                return tensor
            where = cells.view(len(cells), *(1,) * (tensor.ndim - 3), -1, 1)
            return torch.where(where, tensor.mean(dim=-2, keepdim=True), tensor)

        return self._replace(images=ImageState(*map(replace, self.images)))

    def expand(self, count: int) -> "State":
        """Return a state with `count` equal rows for every image, without a copy, from a state with K = 1."""
        return self._replace(
            rows=type(self.rows)(*(tensor.expand(-1, count, *tensor.shape[2:]) for tensor in self.rows))
        )


class Decoder(nn.Module):
    """Base class of all decoders: embedded words, attention, and logits of the next word."""

    attention: Attention
    """The attention mechanism."""

    def __init__(self, settings: DecoderSettings, annotation_size: int, vocabulary_size: int):
        super().__init__()
        embedding = settings.embedding_size
        self.settings = settings
        self.embedding = nn.Embedding.from_pretrained(_word_vectors(vocabulary_size, embedding), freeze=False)  # E
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.output_weight = None  # L_o; None: tied to the embedding
        if not settings.tied_output:
            self.output_weight = nn.Parameter(_word_vectors(vocabulary_size, embedding))
        self.dropout = nn.Dropout(settings.dropout)

    def start(self, annotations: Tensor) -> State:
        """Return the state before the first word, of B images with K = 1, from annotations (B, L, D).

        With `normalize`, every annotation is normalised to mean 0 and variance 1. Different norms of annotations
        act as implicit attention: on Flickr8k, those of EfficientNetV2-B0 are on average 2.5 times larger in the
        middle of the image than at its sides, so that their mean favours the middle whatever the weights are.
        """
        if self.settings.normalize:
            annotations = F.layer_norm(annotations, annotations.shape[-1:])
        return self.begin(F.dropout(annotations, self.settings.annotation_dropout, self.training))

    def begin(self, annotations: Tensor) -> State:
        """Return the state before the first word, from normalised annotations (B, L, D)."""
        raise NotImplementedError

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State, Attended]:
        """Read the previous words (B, K) and predict the next.

        Returns:
            The log-probabilities of the next word (B, K, V), the new state, and the attention.
        """
        raise NotImplementedError

    def forward(self, annotations: Tensor, captions: Tensor) -> tuple[Tensor, Attended]:
        """Read whole captions and predict the word after each of their words (teacher forcing).

        Captions of an image should be sorted by length, longest first: each step computes only the rows up to the
        last one that still has a word in any image.

        Args:
            annotations: (B, L, D).
            captions: token ids (B, K, T), K captions of each image, each starting with START, and PAD after its
                end. Missing captions are PAD only.

        Returns:
            Logits (M, V) and attention (M, ...) of the M words that are not PAD, in the order of
            `captions[captions != PAD]`.
        """
        raise NotImplementedError

    def _logits(self, combined: Tensor) -> Tensor:
        """Return the logits (..., V) of the next word from the input of the output layer (..., E)."""
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return F.linear(self.dropout(combined), weight, self.output_bias)


def _word_vectors(count: int, size: int) -> Tensor:
    """Return random vectors (count, size) of length about 1.

    This is one call because arithmetic on the meta device, where model files are loaded, makes torch import its
    compiler, which takes longer than importing torch.
    """
    bound = (3 / size) ** 0.5
    return torch.empty(count, size).uniform_(-bound, bound)
