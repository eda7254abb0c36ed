"""The reward of self-critical training: CIDEr-D of many captions, optionally with BLEU-4 and a penalty."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from evaluation.confirmed import forms, is_confirmed, kind_of
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
    """CIDEr-D of captions against the references of their pictures.

    Document frequencies are those of the references. Self-critical training counts END as a word (Rennie et al.
    2017, arXiv 1612.00563): unfinished captions ("a man on a") then lose reward by their rare last n-grams. For a
    subword vocabulary, n-grams are of subwords.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Sequence[int]]],
        bleu: float = 0.0,
        unconfirmed: float = 0.0,
        words: Sequence[str] = (),
    ):
        """Count document frequencies.

        Args:
            references: token ids, above 0, of each caption of each picture; at least one caption per picture.
            bleu: weight of BLEU-4 (0..1), which is added to CIDEr-D (0..10).
            unconfirmed: penalty for each thing in a caption that no reference of its picture confirms.
            words: the word of each token id, for `unconfirmed`.
        """
        self._bleu = bleu
        self._unconfirmed = unconfirmed
        self._words = words
        self._captions = pad(list(chain.from_iterable(references)))
        self._counts = np.array([len(captions) for captions in references])  # of captions, by picture
        self._starts = np.cumsum(self._counts) - self._counts  # the first of each picture
        self._table = NgramTable(self._captions, np.repeat(np.arange(len(references)), self._counts))

    def score(self, pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Return the reward (N,) of each caption.

        Args:
            pictures: (N,), index of the picture of each caption in the references.
            captions: token ids (N, T), padded.
        """
        shown, picture = np.unique(pictures, return_inverse=True)
        counts = self._counts[shown]
        references = self._captions[ranges(self._starts[shown], counts)]
        reference_vectors = self._table.weigh(references, np.repeat(np.arange(len(shown)), counts))
        vectors = self._table.weigh(captions, picture)
        reward = cider_d(vectors, reference_vectors)
        if self._bleu:
            reward += self._bleu * _bleu_4(vectors, reference_vectors)
        if self._unconfirmed:
            shown_references = np.split(references, np.cumsum(counts)[:-1])
            reward -= self._unconfirmed * self._count_unconfirmed(captions, picture, shown_references)
        return reward

    def _count_unconfirmed(
        self, captions: np.ndarray, picture: np.ndarray, references: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return the number (N,) of things of each caption that no reference of its picture confirms."""
        words = self._words
        seen = [frozenset().union(*(forms(words[token]) for token in np.unique(several))) for several in references]
        return np.array(
            [
                sum(
                    kind_of(words[token]) == "thing" and not is_confirmed(words[token], seen[index])
                    for token in caption
                )
                for caption, index in zip(captions.tolist(), picture.tolist(), strict=True)
            ]
        )


def _bleu_4(captions: Vectors, references: Vectors) -> np.ndarray:
    """Return BLEU-4 (N,) of each caption; see `evaluation.metrics.bleu.bleu`."""
    tiny, small = 1e-15, 1e-9
    matches, possible = count_matches(captions, references)
    precision = ((matches + tiny) / (possible + small)).prod(axis=1) ** (1 / LONGEST_NGRAM)
    closest = closest_lengths(captions, references)
    return precision * np.exp(np.minimum(1 - (closest + small) / (captions.lengths + tiny), 0))
