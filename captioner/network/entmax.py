"""1.5-entmax: a sparse softmax, which gives low scores a probability of exactly zero."""

from typing import Any

import torch
from torch import Tensor


def entmax15(scores: Tensor) -> Tensor:
    """Return the 1.5-entmax of scores (..., L) over the last axis: which sums to 1; some elements are zero.

    Peters et al. 2019, "Sparse Sequence-to-Sequence Models" (arXiv 1905.05702), equation 6 with alpha = 1.5, by the
    exact algorithm of their section 3.2: p = max(z / 2 - tau, 0)^2, with the tau at which p sums to 1.
    """
    if torch.is_grad_enabled() and scores.requires_grad:
        weights: Tensor = _Entmax15.apply(scores)
        return weights
    return _entmax15(scores)


def _entmax15(scores: Tensor) -> Tensor:
    halves = (scores - scores.amax(dim=-1, keepdim=True)) / 2
    ordered = halves.sort(dim=-1, descending=True).values
    # The tau of the k largest alone, for every k: p sums to 1 if k * (variance + (mean - tau)^2) = 1.
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    mean = ordered.cumsum(dim=-1) / count
    variance = (ordered.square().cumsum(dim=-1) / count - mean.square()).relu()
    tau = mean - (1 / count - variance).relu().sqrt()
    # It rises with k as long as the k-th is above it, so the highest of these is that of all that are above.
    tau = torch.where(tau <= ordered, tau, torch.full_like(tau, -1.0)).amax(dim=-1, keepdim=True)
    return (halves - tau).relu().square()


class _Entmax15(torch.autograd.Function):
    """`_entmax15` with its gradient, which needs the probabilities alone: Peters et al. 2019, proposition 2."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = _entmax15(scores)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        slope = weights.sqrt()
        product = gradient * slope
        return product - slope * product.sum(dim=-1, keepdim=True) / slope.sum(dim=-1, keepdim=True)
