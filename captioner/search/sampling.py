"""Sampling: draw words at random."""

import numpy as np

from captioner.search.beam import Continuations
from captioner.search.settings import SearchSettings
from captioner.search.top_k import check_not_nan


class Sampling:
    """Draw sentences independently: each is a beam of one row.

    All images share the random numbers, so that the sentences of an image do not depend on its batch.
    """

    def __init__(self, settings: SearchSettings):
        self.settings = settings
        self.size = 1
        self.groups = settings.candidates
        self.start = np.zeros((settings.candidates, 1), dtype=np.float32)
        generator = np.random.Generator(np.random.PCG64(settings.seed))
        self._numbers = iter(generator.random((settings.max_words + 1, settings.candidates)))

    def choose(self, totals: np.ndarray, log_probs: np.ndarray) -> Continuations:
        """Return one continuation of each row; see `Beam.choose`, with K = 1."""
        numbers = next(self._numbers)
        words = np.stack([draw_words(image[:, 0], numbers, self.settings) for image in log_probs])[:, :, None]
        values = np.take_along_axis(log_probs[:, :, 0], words, axis=2)
        rows = np.broadcast_to(np.arange(self.groups)[:, None], words.shape)
        return Continuations(rows, words, values, totals + values)


def draw_words(log_probs: np.ndarray, numbers: np.ndarray, settings: SearchSettings) -> np.ndarray:
    """Draw a word for each row by inverting its cumulative distribution.

    `temperature` applies first, then `top_k`, then `top_p`, or nucleus sampling (Holtzman et al. 2020, arXiv
    1904.09751, section 3.1). Words as likely as the last one that is kept are kept too.

    Args:
        log_probs: float (N, V).
        numbers: float64 (N,), uniform random numbers in [0, 1).
        settings: temperature, top_k and top_p.

    Returns:
        Token ids, int64 (N,). If all words of a row are forbidden, any id.

    Raises:
        CheckpointError: if a log-probability is NaN.
    """
    best = np.maximum(log_probs.max(axis=1, keepdims=True), np.finfo(log_probs.dtype).min)
    check_not_nan(best)
    weights = np.exp((log_probs - best) / settings.temperature)  # 1 for the likeliest word, 0 for forbidden words
    if settings.top_k or settings.top_p < 1:
        ranked = -np.sort(-weights, axis=1)[:, : settings.top_k or None]
        # A word is kept if the likelier words do not reach top_p; the likeliest is always kept.
        reached = np.cumsum(ranked, axis=1, dtype=np.float64)
        kept = (reached - ranked < settings.top_p * reached[:, -1:]).sum(axis=1, keepdims=True)
        smallest = np.take_along_axis(ranked, np.maximum(kept - 1, 0), axis=1)
        weights[weights < smallest] = 0
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    return (cumulative > numbers[:, None] * cumulative[:, -1:]).argmax(axis=1)
