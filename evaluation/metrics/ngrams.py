"""N-grams of many captions as arrays, for BLEU and CIDEr-D.

    >>> table = NgramTable(references, images)            # word ids; image index of each reference
    >>> reference_vectors = table.weigh(references, images)
    >>> vectors = table.weigh(captions, images_of_captions)
    >>> cider_d(vectors, reference_vectors), count_matches(vectors, reference_vectors)

Word ids are above 0, and captions are rows (N, T) with 0 after the last word, as of `pad`.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

LONGEST_NGRAM = 4

_BITS = 32  # of the id of an n-gram
_NONE = np.iinfo(np.int64).max
_SIGMA = 6.0  # words, of the length penalty of CIDEr-D


class Vectors(NamedTuple):
    """N captions as M n-grams, distinct within each caption; a caption has one vector per order."""

    keys: np.ndarray  # (M,), ascending; equal for equal n-grams of the same image; -1: in no reference
    counts: np.ndarray  # (M,), of the n-gram in the caption
    weights: np.ndarray  # (M,), g in the paper: count times inverse document frequency
    vectors: np.ndarray  # (M,), index of the vector: LONGEST_NGRAM * caption + order, from 0
    norms: np.ndarray  # (LONGEST_NGRAM * N,), of the vectors
    lengths: np.ndarray  # (N,), in words
    images: np.ndarray  # (N,), image index of each caption


class NgramTable:
    """The n-grams of one to four words of references, and their inverse document frequencies.

    log(images / images with the n-gram in a reference), Vedantam et al. 2015 (arXiv 1411.5726), equation 1; an
    unknown n-gram counts as in one image.
    """

    def __init__(self, references: np.ndarray, images: np.ndarray):
        """Assign ids to the n-grams of captions (N, T), and count their images (N,), which ascend."""
        # The id of an n-gram is its index among all of its order, sorted by the id of all words but the last, and
        # the last.
        self._known: list[np.ndarray] = []
        at, numbers, words = _unigrams(references)
        total = images[-1] + 1
        rarity = []
        for order in range(LONGEST_NGRAM):
            if order:
                at, numbers = _lengthen(at, numbers, words, order)
            known, numbers = np.unique(numbers, return_inverse=True)
            self._known.append(np.append(known, _NONE))
            held = _distinct(images[at // words.shape[1]] * len(self._known[-1]) + numbers)  # once per image
            frequencies = np.bincount(held % len(self._known[-1]), minlength=len(self._known[-1]))
            rarity.append(np.log(total) - np.log(np.maximum(frequencies, 1)))
        self._rarity = np.concatenate(rarity)
        sizes = np.array([len(known) for known in self._known])
        self._unknown = sizes - 1  # first id of unknown n-grams, by order
        self._starts = np.cumsum(sizes) - sizes  # row of the first n-gram of each order

    def weigh(self, captions: np.ndarray, images: np.ndarray) -> Vectors:
        """Return the vectors of captions (N, T) of the images (N,).

        Image indices may differ from those of the table, but must be the same in vectors that are compared.
        """
        caption, rows, orders, counts = self._count(captions)
        is_known = rows < (self._starts + self._unknown)[orders]
        keys = np.where(is_known, images[caption] * len(self._rarity) + rows, -1)
        weights = counts * self._rarity[rows]
        vectors = LONGEST_NGRAM * caption + orders
        norms = np.sqrt(np.bincount(vectors, weights**2, minlength=LONGEST_NGRAM * len(captions)))
        by_key = np.argsort(keys, kind="stable")
        return Vectors(
            keys=keys[by_key],
            counts=counts[by_key],
            weights=weights[by_key],
            vectors=vectors[by_key],
            norms=norms,
            lengths=np.count_nonzero(captions, axis=1),
            images=images,
        )

    def _count(self, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the distinct n-grams of each caption: caption, row of the table, order and count."""
        at, numbers, words = _unigrams(captions)
        seen = []
        for order in range(LONGEST_NGRAM):
            if order:
                at, numbers = _lengthen(at, numbers, words, order)
            numbers = _find(self._known[order], numbers)
            # One number of caption, order and id.
            seen.append((at // words.shape[1] * LONGEST_NGRAM + order) << _BITS | numbers)
        found, counts = np.unique(np.concatenate(seen), return_counts=True)
        caption, orders = np.divmod(found >> _BITS, LONGEST_NGRAM)
        rows = self._starts[orders] + np.minimum(found & ((1 << _BITS) - 1), self._unknown[orders])
        return caption, rows, orders, counts


def pad(captions: Sequence[Sequence[int]]) -> np.ndarray:
    """Return captions as an array (N, T), padded with 0."""
    lengths = np.array([len(caption) for caption in captions])
    padded = np.zeros((len(captions), lengths.max()), dtype=np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(captions), np.int32)
    return padded


def cider_d(candidates: Vectors, references: Vectors) -> np.ndarray:
    """Return the CIDEr-D (N,) of captions, with at least one reference per image.

    10 times the mean over references and orders of the clipped cosine similarity: Vedantam et al. 2015 (arXiv
    1411.5726), equations 5 and 6. Weights of a caption are clipped to those of the reference, with a Gaussian
    length penalty.
    """
    left, right = _meet(candidates, references)
    product = np.minimum(candidates.weights[left], references.weights[right]) * references.weights[right]
    norm = candidates.norms[candidates.vectors[left]] * references.norms[references.vectors[right]]
    cosine = np.divide(product, norm, out=np.zeros_like(product), where=product > 0)
    caption = candidates.vectors[left] // LONGEST_NGRAM
    gap = candidates.lengths[caption] - references.lengths[references.vectors[right] // LONGEST_NGRAM]
    similarity = cosine * np.exp(-(gap**2) / (2 * _SIGMA**2))
    total = np.bincount(caption, similarity, minlength=len(candidates.lengths))
    return 10 * total / (LONGEST_NGRAM * _references_of(candidates, references)[1])


def count_matches(candidates: Vectors, references: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of matching n-grams and of all n-grams, both (N, LONGEST_NGRAM).

    Matches are clipped to the maximum count in a reference: Papineni et al. 2002, "BLEU", section 2.1.1.
    """
    left, right = _meet(candidates, references)
    most = np.zeros_like(candidates.counts)
    np.maximum.at(most, left, references.counts[right])
    matches, possible = (
        np.bincount(candidates.vectors, weights, minlength=len(candidates.norms))
        .reshape(-1, LONGEST_NGRAM)
        .astype(np.int64)
        for weights in (np.minimum(candidates.counts, most), candidates.counts)
    )
    return matches, possible


def closest_lengths(candidates: Vectors, references: Vectors) -> np.ndarray:
    """Return the reference length (N,) closest to that of each caption, the shorter on a tie.

    References must be sorted by image.
    """
    starts, counts = _references_of(candidates, references)
    lengths = references.lengths[ranges(starts, counts)]
    gaps = np.abs(lengths - np.repeat(candidates.lengths, counts))
    closest = np.minimum.reduceat(gaps << _BITS | lengths, np.cumsum(counts) - counts)
    return closest & ((1 << _BITS) - 1)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenated ranges from each start, of each length."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _meet(candidates: Vectors, references: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of indices of equal n-grams of captions and of references of their images."""
    first, end = (np.searchsorted(references.keys, candidates.keys, side) for side in ("left", "right"))
    return np.repeat(np.arange(len(candidates.keys)), end - first), ranges(first, end - first)


def _references_of(candidates: Vectors, references: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first reference of the image of each caption, and their number."""
    first, end = (np.searchsorted(references.images, candidates.images, side) for side in ("left", "right"))
    return first, end - first


def _unigrams(captions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the position and id of each word, and captions (N, T + 3) padded for `_lengthen`."""
    words = np.pad(captions.astype(np.int64), ((0, 0), (0, LONGEST_NGRAM - 1)))
    at = np.flatnonzero(words)
    return at, words.ravel()[at], words


def _lengthen(at: np.ndarray, numbers: np.ndarray, words: np.ndarray, by: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n-grams that start at `at`, extended by the word at offset `by`, if there is one."""
    last = words.ravel()[at + by]
    longer = last > 0
    return at[longer], numbers[longer] << _BITS | last[longer]


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Return the distinct numbers, ascending; faster than `np.unique`, which hashes."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) > 0]


def _find(known: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the index of each number in `known`; unknown numbers get indices after them."""
    indices = np.empty_like(numbers)
    order = np.argsort(numbers)  # sorted searches are faster (cache locality)
    indices[order] = np.searchsorted(known, numbers[order])
    unknown = np.flatnonzero(known[indices] != numbers)
    indices[unknown] = len(known) - 1 + np.unique(numbers[unknown], return_inverse=True)[1]
    return indices
