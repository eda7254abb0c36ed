"""The reward of captions that a network wrote, many at once: CIDEr-D, perhaps with BLEU-4."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from evaluation.metrics.ngrams import (
    LONGEST_NGRAM,
    NgramTable,
    Vectors,
    cider_d,
    closest_lengths,
    count_matches,
    pad,
    ranges,
)


class CaptionReward:
    """CIDEr-D of captions, by what people said of the same pictures.

    Document frequencies are those of the references. Self-critical training counts the end as a word (Rennie et
    al. 2017, arXiv 1612.00563): when references and captions hold it, a caption that stops too early ("a man on a")
    loses by the rare n-grams that its end makes. Where a vocabulary holds pieces of words, n-grams are of pieces.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]], bleu: float = 0.0):
        """Count in how many pictures each n-gram occurs.

        Args:
            references: word numbers, above 0, of each caption of each picture; at least one caption a picture.
            bleu: how many times BLEU-4 of the caption, which is 0 to 1, is added to CIDEr-D, which is 0 to 10.
        """
        self._bleu = bleu
        self._captions = pad(list(chain.from_iterable(references)))
        self._counts = np.array([len(captions) for captions in references])  # of captions, by picture
        self._starts = np.cumsum(self._counts) - self._counts  # the first of each picture
        self._table = NgramTable(self._captions, np.repeat(np.arange(len(references)), self._counts))

    def score(self, pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Return the reward (N,) of each caption.

        Args:
            pictures: (N,), the place of each caption's picture among the references.
            captions: word numbers (N, T), PAD after the last.
        """
        shown, picture = np.unique(pictures, return_inverse=True)
        counts = self._counts[shown]
        references = self._captions[ranges(self._starts[shown], counts)]
        theirs = self._table.weigh(references, np.repeat(np.arange(len(shown)), counts))
        ours = self._table.weigh(captions, picture)
        reward = cider_d(ours, theirs)
        if self._bleu:
            reward += self._bleu * _bleu_4(ours, theirs)
        return reward


def _bleu_4(captions: Vectors, references: Vectors) -> np.ndarray:
    """Return BLEU-4 (N,) of each caption; see `evaluation.metrics.bleu.bleu`."""
    tiny, small = 1e-15, 1e-9
    matches, possible = count_matches(captions, references)
    precision = ((matches + tiny) / (possible + small)).prod(axis=1) ** (1 / LONGEST_NGRAM)
    closest = closest_lengths(captions, references)
    return precision * np.exp(np.minimum(1 - (closest + small) / (captions.lengths + tiny), 0))
