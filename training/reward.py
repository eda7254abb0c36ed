"""The reward of self-critical training: CIDEr-D of many captions, optionally with BLEU-4 and a penalty."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from evaluation.confirmed import confirming, forms, kind_of
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
        if unconfirmed:
            self._columns, self._confirms = _confirmations(words)
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
            confirms = self._confirms[references].any(axis=1)
            confirmed = np.logical_or.reduceat(confirms, np.cumsum(counts) - counts)  # (pictures, things + 1)
            is_confirmed = confirmed[picture[:, None], self._columns[captions]]
            reward -= self._unconfirmed * (~is_confirmed).sum(axis=1)
        return reward


def _confirmations(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return which words confirm which things.

    Returns:
        int64 (V,), the column of each thing, and 0 for other words; bool (V, things + 1), whether a word confirms
        the thing of a column. Every word confirms column 0.
    """
    things = [index for index, word in enumerate(words) if kind_of(word) == "thing"]
    columns = np.zeros(len(words), dtype=np.int64)
    columns[things] = np.arange(1, len(things) + 1)
    confirmed_by: dict[str, list[int]] = {}
    for index in things:
        for form in confirming(words[index]):
            confirmed_by.setdefault(form, []).append(index)
    confirms = np.zeros((len(words), len(things) + 1), dtype=bool)
    confirms[:, 0] = True
    for index, word in enumerate(words):
        for form in forms(word):
            confirms[index, columns[confirmed_by.get(form, [])]] = True
    return columns, confirms


def _bleu_4(captions: Vectors, references: Vectors) -> np.ndarray:
    """Return BLEU-4 (N,) of each caption; see `evaluation.metrics.bleu.bleu`."""
    tiny, small = 1e-15, 1e-9
    matches, possible = count_matches(captions, references)
    precision = ((matches + tiny) / (possible + small)).prod(axis=1) ** (1 / LONGEST_NGRAM)
    closest = closest_lengths(captions, references)
    return precision * np.exp(np.minimum(1 - (closest + small) / (captions.lengths + tiny), 0))
