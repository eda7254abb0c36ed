"""Attention mechanisms: where the decoder looks before it writes a word.

All share one shape. `prepare` does what depends on the image alone, once an image. `forward` scores the locations
for each of the N rows being decoded and returns the context, the weighted mean of the annotations, with the
weights that made it. Rows of one image are neighbours, K = N / B for each image, and share its annotations
without a copy.

To add a mechanism: write a class here and name it in `KINDS` and in `AttentionSettings.kind`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

_CACHED = 1 << 18  # numbers that a processor keeps at hand


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
        query = self.from_state(hidden).unflatten(0, (len(annotations), -1))  # (B, K, A)
        weights = _AdditiveScores.apply(keys, query, self.score.weight[0]).softmax(dim=-1)  # (B, K, L)
        context = torch.bmm(weights, annotations)  # (B, K, D)
        return context.flatten(0, 1), weights.flatten(0, 1)


class _AdditiveScores(torch.autograd.Function):
    """score . tanh(keys + query), keys (B, L, A) and query (B, K, A) -> (B, K, L).

    The sum and its tanh are by far the largest values of a step. They are made a few images at a time, which stay
    in the processor's cache, and made again in backward: training keeps none of them, where autograd would keep
    one for every word.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, score)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])
        for part, tanh in _tanh_of_sums(keys, query):
            torch.matmul(tanh, score, out=scores[part])
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, score = ctx.saved_tensors
        keys_gradient, query_gradient = torch.empty_like(keys), torch.empty_like(query)
        score_gradient = torch.zeros_like(score)
        for part, tanh in _tanh_of_sums(keys, query):
            score_gradient += gradient[part].flatten() @ tanh.flatten(0, 2)
            slope = torch.ops.aten.tanh_backward(gradient[part].unsqueeze(-1).expand_as(tanh), tanh)
            torch.sum(slope, dim=1, out=keys_gradient[part])
            torch.sum(slope, dim=2, out=query_gradient[part])
        return keys_gradient.mul_(score), query_gradient.mul_(score), score_gradient


def _tanh_of_sums(keys: Tensor, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield tanh(keys + query) (b, K, L, A) of some images after others, always in the same memory."""
    images, columns, _ = query.shape
    count = images if keys.is_cuda else max(1, _CACHED // (columns * keys[0].numel()))
    memory = keys.new_empty(min(count, images), columns, *keys.shape[1:])
    for start in range(0, images, count):
        part = slice(start, start + count)
        tanh = torch.add(keys[part, None], query[part, :, None], out=memory[: len(keys[part])])
        yield part, tanh.tanh_()


KINDS = {"additive": AdditiveAttention}


def build_attention(settings: AttentionSettings, annotation_size: int, hidden_size: int) -> AdditiveAttention:
    """Return the mechanism that `settings.kind` names, with random weights."""
    return KINDS[settings.kind](settings, annotation_size, hidden_size)
