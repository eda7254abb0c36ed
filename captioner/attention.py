"""Attention mechanisms: where the decoder looks before it writes a word.

All share one shape. `prepare` does what depends on the image alone, once an image. `forward` scores the locations
for each of the N rows being decoded and returns the context, the weighted mean of the annotations, with the
weights that made it. Rows of one image are neighbours, K = N / B for each image, and share its annotations
without a copy.

To add a mechanism: write a class here and name it in `KINDS` and in `AttentionSettings.kind`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSettings:
    """Which mechanism, and how wide."""

    kind: Literal["additive"] = "additive"
    size: int = 512  # A, width of the layer in which image and state meet

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: must be at least 1, got {self.size}")


class AdditiveAttention(nn.Module):
    """Score each location with a one-layer network of the image and the decoder's state.

    Bahdanau et al. 2015 (arXiv 1409.0473), section 3.1; the deterministic "soft" attention of Show, Attend and
    Tell (arXiv 1502.03044), equations 4-6 and section 4.2. Our `weights` are the papers' alpha.
    """

    def __init__(self, settings: AttentionSettings, annotation_size: int, hidden_size: int):
        super().__init__()
        self.from_image = nn.Linear(annotation_size, settings.size)
        self.from_state = nn.Linear(hidden_size, settings.size, bias=False)
        self.score = nn.Linear(settings.size, 1, bias=False)  # softmax cancels a bias

    def prepare(self, annotations: Tensor) -> Tensor:
        """Project the image once for all words: (B, L, D) -> keys (B, L, A)."""
        return self.from_image(annotations)

    def forward(self, hidden: Tensor, keys: Tensor, annotations: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context (N, D) and the weights (N, L) that made it; each row of weights sums to 1.

        Args:
            hidden: the decoder's state (N, H), K rows an image.
            keys: what `prepare` returned (B, L, A).
            annotations: the grid (B, L, D).
        """
        images = len(annotations)
        query = self.from_state(hidden).view(images, -1, 1, keys.shape[-1])  # (B, K, 1, A)
        scores = self.score((keys[:, None] + query).tanh_()).squeeze(-1)  # (B, K, L)
        weights = scores.softmax(dim=-1)
        context = torch.bmm(weights, annotations)  # (B, K, D)
        return context.flatten(0, 1), weights.flatten(0, 1)


KINDS = {"additive": AdditiveAttention}


def build_attention(settings: AttentionSettings, annotation_size: int, hidden_size: int) -> AdditiveAttention:
    """Return the mechanism that `settings.kind` names, with random weights."""
    return KINDS[settings.kind](settings, annotation_size, hidden_size)
