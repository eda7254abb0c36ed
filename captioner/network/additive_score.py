"""A memory-efficient additive attention score for training."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements of a block of tanh(keys + query); as float32 it fits the cache of a CPU core


class AdditiveScore(torch.autograd.Function):
    """Compute score . tanh(keys + query), and recompute the tanh in the backward pass.

    The sum and its tanh (B, K, L, A) are by far the largest tensors of a decoder step. Autograd would store one for
    each word; this function stores none. On a CPU it computes blocks of a few images, which fit the cache.

    `AdditiveScore.apply(keys, query, score)` takes keys (B, L, A), query (B, K, A) and score (A,), and returns
    (B, K, L).
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, score)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])
        for images, tanh in _blocks(keys, query):
            torch.matmul(tanh, score, out=scores[images])
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, score = ctx.saved_tensors
        keys_gradient, query_gradient = torch.empty_like(keys), torch.empty_like(query)
        score_gradient = torch.zeros_like(score)
        for images, tanh in _blocks(keys, query):
            score_gradient += gradient[images].flatten() @ tanh.flatten(0, 2)
            slope = torch.ops.aten.tanh_backward(gradient[images].unsqueeze(-1).expand_as(tanh), tanh)
            torch.sum(slope, dim=1, out=keys_gradient[images])
            torch.sum(slope, dim=2, out=query_gradient[images])
        return keys_gradient.mul_(score), query_gradient.mul_(score), score_gradient


def _blocks(keys: Tensor, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the images and their tanh(keys + query) (b, K, L, A), in the same memory."""
    images, rows, _ = query.shape
    size = images if keys.is_cuda else max(1, _BLOCK // max(1, rows * keys[0].numel()))
    memory = keys.new_empty(min(size, images), rows, *keys.shape[1:])
    for start in range(0, images, size):
        block = slice(start, start + size)
        tanh = torch.add(keys[block, None], query[block, :, None], out=memory[: len(keys[block])])
        yield block, tanh.tanh_()
