"""The reward of captions that a network wrote, many at once: CIDEr-D, perhaps with BLEU-4.

The scores are those of `evaluation.metrics`, which says what they mean, of word numbers instead of words.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from captioner.errors import ConfigError
from captioner.vocabulary import PAD
from evaluation.metrics import LONGEST_NGRAM

_BITS = 16  # of a word: an n-gram of four is one 64-bit number
_TOGETHER = 2000  # pictures counted together
_SIGMA = 6.0  # words, of CIDEr-D's penalty of a length unlike the reference's


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

        Raises:
            ConfigError: when a word's number does not fit in 16 bits.
        """
        self._bleu = bleu
        self._captions = _pad(list(chain.from_iterable(references)))
        self._counts = np.array([len(captions) for captions in references])  # of captions, by picture
        self._starts = np.cumsum(self._counts) - self._counts  # the first of each picture
        seen = []  # each n-gram of a picture, once a picture
        for at in range(0, len(references), _TOGETHER):
            counts = self._counts[at : at + _TOGETHER]
            start = self._starts[at]
            caption, ngrams, _ = _count_ngrams(self._captions[start : start + counts.sum()])
            picture = np.repeat(np.arange(len(counts)), counts)[caption]
            values, places = np.unique(ngrams, return_inverse=True)
            pairs = np.sort(picture * len(values) + places)
            seen.append(values[pairs[np.diff(pairs, prepend=-1) > 0] % len(values)])
        self._ngrams, frequencies = np.unique(np.concatenate(seen), return_counts=True)
        self._rarity_of_unseen = np.log(len(references))
        self._rarity = self._rarity_of_unseen - np.log(frequencies)

    def score(self, pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Return the reward (N,) of each caption.

        Args:
            pictures: (N,), the place of each caption's picture among the references.
            captions: word numbers (N, T), PAD after the last.
        """
        shown, picture = np.unique(pictures, return_inverse=True)
        counts = self._counts[shown]
        ours = self._weigh(captions, picture)
        theirs = self._weigh(
            self._captions[_ranges(self._starts[shown], counts)], np.repeat(np.arange(len(shown)), counts)
        )
        # Each n-gram of a caption meets the same one of every reference of its picture: at `left` and `right`.
        by_key = np.argsort(theirs.keys, kind="stable")
        first, end = (np.searchsorted(theirs.keys[by_key], ours.keys, side) for side in ("left", "right"))
        left = np.repeat(np.arange(len(ours.keys)), end - first)
        right = by_key[_ranges(first, end - first)]

        product = np.minimum(ours.weights[left], theirs.weights[right]) * theirs.weights[right]
        norm = ours.norms[ours.vectors[left]] * theirs.norms[theirs.vectors[right]]
        cosine = np.divide(product, norm, out=np.zeros_like(product), where=product > 0)
        caption = ours.vectors[left] // LONGEST_NGRAM
        gap = ours.lengths[caption] - theirs.lengths[theirs.vectors[right] // LONGEST_NGRAM]
        similarity = np.bincount(caption, cosine * np.exp(-(gap**2) / (2 * _SIGMA**2)), minlength=len(captions))
        reward = 10 * similarity / (LONGEST_NGRAM * self._counts[pictures])
        if self._bleu:
            most = np.zeros_like(ours.counts)
            np.maximum.at(most, left, theirs.counts[right])
            reference_lengths = np.split(theirs.lengths, np.cumsum(counts)[:-1])
            closest = [
                min(reference_lengths[number].tolist(), key=lambda other: (abs(other - length), other))
                for number, length in zip(picture, ours.lengths, strict=True)
            ]
            reward += self._bleu * _bleu_4(ours, most, np.array(closest))
        return reward

    def _weigh(self, captions: np.ndarray, pictures: np.ndarray) -> "_TfIdf":
        """Return what CIDEr-D knows of captions (N, T) of some pictures (N,)."""
        caption, ngrams, counts = _count_ngrams(captions)
        places = np.minimum(np.searchsorted(self._ngrams, ngrams), len(self._ngrams) - 1)
        known = self._ngrams[places] == ngrams
        weights = counts * np.where(known, self._rarity[places], self._rarity_of_unseen)
        vectors = caption * LONGEST_NGRAM + _orders(ngrams)
        return _TfIdf(
            keys=np.where(known, pictures[caption] * len(self._ngrams) + places, -1),
            counts=counts,
            weights=weights,
            vectors=vectors,
            norms=np.sqrt(np.bincount(vectors, weights**2, minlength=LONGEST_NGRAM * len(captions))),
            lengths=(captions != PAD).sum(axis=1),
        )


class _TfIdf(NamedTuple):
    """N captions as CIDEr-D sees them: M n-grams, and a vector for each order of each caption."""

    keys: np.ndarray  # (M,), the same for the same n-gram of the same picture; -1: no reference at all holds it
    counts: np.ndarray  # (M,)
    weights: np.ndarray  # (M,)
    vectors: np.ndarray  # (M,), which vector it is part of
    norms: np.ndarray  # (4 N,), of the vectors
    lengths: np.ndarray  # (N,), in words


def _pad(captions: Sequence[Sequence[int]]) -> np.ndarray:
    """Return captions as one array (N, T), PAD after the last word of each."""
    lengths = np.array([len(caption) for caption in captions])
    padded = np.full((len(captions), lengths.max()), PAD, dtype=np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(captions), np.int32)
    return padded


def _count_ngrams(captions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the n-grams of captions (N, T), each once a caption: the caption, the n-gram, how often it is there.

    An n-gram is one number: its words in 16 bits each, the first in the lowest.
    """
    if captions.max(initial=0) >> _BITS:
        raise ConfigError(
            f"self_critical: a vocabulary may hold up to {1 << _BITS:,} words, got number {captions.max():,}; "
            "raise min_count"
        )
    count, steps = captions.shape
    words = np.pad(captions.astype(np.uint64), ((0, 0), (0, LONGEST_NGRAM - 1)))
    ngrams = np.zeros((count, LONGEST_NGRAM, steps), dtype=np.uint64)
    ngrams[:, 0] = words[:, :steps]
    for order in range(1, LONGEST_NGRAM):
        last = words[:, order : order + steps]
        longer = ngrams[:, order - 1] | last << np.uint64(_BITS * order)
        ngrams[:, order] = np.where(last == PAD, 0, longer)
    values = np.sort(ngrams.reshape(count, -1), axis=1)
    is_first = np.ones_like(values, dtype=bool)
    is_first[:, 1:] = values[:, 1:] != values[:, :-1]
    first = np.flatnonzero(is_first)
    repeats = np.diff(first, append=values.size)
    real = values.flat[first] > 0
    return first[real] // values.shape[1], values.flat[first[real]], repeats[real]


def _orders(ngrams: np.ndarray) -> np.ndarray:
    """Return how many words each n-gram has, less one."""
    shortest = np.array([1 << _BITS * order for order in range(1, LONGEST_NGRAM)], dtype=np.uint64)
    return np.searchsorted(shortest, ngrams, side="right")


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers from each start on, as many as its length, one range after another."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _bleu_4(captions: _TfIdf, most: np.ndarray, closest: np.ndarray) -> np.ndarray:
    """Return BLEU-4 (N,) of each caption; see `evaluation.metrics.bleu`.

    Args:
        captions: N captions of M n-grams.
        most: how often (M,) the reference holds each n-gram that holds it most.
        closest: the reference length (N,) that counts.
    """
    tiny, small = 1e-15, 1e-9
    matches, possible = (
        np.bincount(captions.vectors, each, minlength=len(captions.norms)).reshape(-1, LONGEST_NGRAM)
        for each in (np.minimum(captions.counts, most), captions.counts)
    )
    precision = ((matches + tiny) / (possible + small)).prod(axis=1) ** (1 / LONGEST_NGRAM)
    return precision * np.exp(np.minimum(1 - (closest + small) / (captions.lengths + tiny), 0))
