"""What BLEU and CIDEr-D ask of captions: their n-grams, of many captions at once, as arrays.

    >>> table = NgramTable(references, pictures)            # numbers of words; the picture of each reference
    >>> theirs = table.weigh(references, pictures)
    >>> ours = table.weigh(captions, pictures_of_captions)
    >>> cider_d(ours, theirs), count_matches(ours, theirs)

A word is any number above 0, and captions are rows (N, T) with 0 after the last word; `pad` makes them.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

LONGEST_NGRAM = 4

_BITS = 32  # of an n-gram's number
_NONE = np.iinfo(np.int64).max
_SIGMA = 6.0  # words, of CIDEr-D's penalty of a length unlike the reference's


class Vectors(NamedTuple):
    """N captions as CIDEr-D sees them: M n-grams, each once a caption; each caption has a vector of each order."""

    keys: np.ndarray  # (M,), ascending; the same for the same n-gram of the same picture; -1: no reference holds it
    counts: np.ndarray  # (M,), how often the caption holds the n-gram
    weights: np.ndarray  # (M,), the paper's g: the count times how rare the n-gram is among pictures
    vectors: np.ndarray  # (M,), the vector that it is part of: LONGEST_NGRAM * caption + order, from 0
    norms: np.ndarray  # (LONGEST_NGRAM * N,), of the vectors
    lengths: np.ndarray  # (N,), in words
    pictures: np.ndarray  # (N,), the picture of each caption


class NgramTable:
    """The n-grams of one to four words that references hold, and how rare each is among their pictures.

    How rare: log(pictures / pictures whose references hold it), Vedantam et al. 2015 (arXiv 1411.5726), equation 1;
    what no reference holds counts as held by one picture.
    """

    def __init__(self, references: np.ndarray, pictures: np.ndarray):
        """Number the n-grams, and count the pictures of each.

        Args:
            references: (N, T), captions.
            pictures: (N,), ascending: the picture of each, counted from 0.
        """
        # An n-gram is known by its own number: its place among all of its order, each of which is found by the
        # number of its words but the last, and the last.
        self._known: list[np.ndarray] = []
        at, numbers, words = _unigrams(references)
        total = pictures[-1] + 1
        rarity = []
        for order in range(LONGEST_NGRAM):
            if order:
                at, numbers = _lengthen(at, numbers, words, order)
            known, numbers = np.unique(numbers, return_inverse=True)
            self._known.append(np.append(known, _NONE))
            held = _distinct(pictures[at // words.shape[1]] * len(self._known[-1]) + numbers)  # once a picture
            frequencies = np.bincount(held % len(self._known[-1]), minlength=len(self._known[-1]))
            rarity.append(np.log(total) - np.log(np.maximum(frequencies, 1)))
        self._rarity = np.concatenate(rarity)
        sizes = np.array([len(known) for known in self._known])
        self._unknown = sizes - 1  # the first number, by order, of what no reference holds
        self._starts = np.cumsum(sizes) - sizes  # the row of the first n-gram of each order

    def weigh(self, captions: np.ndarray, pictures: np.ndarray) -> Vectors:
        """Return captions (N, T) of the pictures (N,) as vectors.

        Pictures may be counted otherwise than they were in the table, but alike in vectors that meet.
        """
        caption, rows, orders, counts = self._count(captions)
        is_known = rows < (self._starts + self._unknown)[orders]
        keys = np.where(is_known, pictures[caption] * len(self._rarity) + rows, -1)
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
            pictures=pictures,
        )

    def _count(self, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the n-grams of captions, each once a caption: caption, row of the table, order and count."""
        at, numbers, words = _unigrams(captions)
        seen = []
        for order in range(LONGEST_NGRAM):
            if order:
                at, numbers = _lengthen(at, numbers, words, order)
            numbers = _find(self._known[order], numbers)
            # One number that holds the caption, the order and the n-gram's own.
            seen.append((at // words.shape[1] * LONGEST_NGRAM + order) << _BITS | numbers)
        found, counts = np.unique(np.concatenate(seen), return_counts=True)
        caption, orders = np.divmod(found >> _BITS, LONGEST_NGRAM)
        rows = self._starts[orders] + np.minimum(found & ((1 << _BITS) - 1), self._unknown[orders])
        return caption, rows, orders, counts


def pad(captions: Sequence[Sequence[int]]) -> np.ndarray:
    """Return captions as one array (N, T), 0 after the last word of each."""
    lengths = np.array([len(caption) for caption in captions])
    padded = np.zeros((len(captions), lengths.max()), dtype=np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(captions), np.int32)
    return padded


def cider_d(ours: Vectors, theirs: Vectors) -> np.ndarray:
    """Return the CIDEr-D (N,) of captions among references of the same pictures, at least one of each.

    10 times the mean over references and orders of the clipped cosine similarity: Vedantam et al. 2015
    (arXiv 1411.5726), equations 5 and 6. Weights of a caption are clipped to the reference's, and a difference in
    length costs a Gaussian.
    """
    left, right = _meet(ours, theirs)
    product = np.minimum(ours.weights[left], theirs.weights[right]) * theirs.weights[right]
    norm = ours.norms[ours.vectors[left]] * theirs.norms[theirs.vectors[right]]
    cosine = np.divide(product, norm, out=np.zeros_like(product), where=product > 0)
    caption = ours.vectors[left] // LONGEST_NGRAM
    gap = ours.lengths[caption] - theirs.lengths[theirs.vectors[right] // LONGEST_NGRAM]
    similarity = cosine * np.exp(-(gap**2) / (2 * _SIGMA**2))
    total = np.bincount(caption, similarity, minlength=len(ours.lengths))
    return 10 * total / (LONGEST_NGRAM * _references_of(ours, theirs)[1])


def count_matches(ours: Vectors, theirs: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Return what BLEU counts of captions: the n-grams that references hold, and all, both (N, LONGEST_NGRAM).

    An n-gram matches at most as often as one of the references of its picture holds it: Papineni et al. 2002,
    "BLEU", section 2.1.1.
    """
    left, right = _meet(ours, theirs)
    most = np.zeros_like(ours.counts)
    np.maximum.at(most, left, theirs.counts[right])
    matches, possible = (
        np.bincount(ours.vectors, each, minlength=len(ours.norms)).reshape(-1, LONGEST_NGRAM).astype(np.int64)
        for each in (np.minimum(ours.counts, most), ours.counts)
    )
    return matches, possible


def closest_lengths(ours: Vectors, theirs: Vectors) -> np.ndarray:
    """Return the reference length (N,) closest to that of each caption, the shorter on a tie.

    The references of a picture must be neighbours, in the order of pictures.
    """
    starts, counts = _references_of(ours, theirs)
    lengths = theirs.lengths[ranges(starts, counts)]
    gaps = np.abs(lengths - np.repeat(ours.lengths, counts))
    closest = np.minimum.reduceat(gaps << _BITS | lengths, np.cumsum(counts) - counts)
    return closest & ((1 << _BITS) - 1)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers from each start on, as many as its length, one range after another."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _meet(ours: Vectors, theirs: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Return the places where an n-gram of a caption meets the same one of a reference of its picture, in pairs."""
    first, end = (np.searchsorted(theirs.keys, ours.keys, side) for side in ("left", "right"))
    return np.repeat(np.arange(len(ours.keys)), end - first), ranges(first, end - first)


def _references_of(ours: Vectors, theirs: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """Return where the references of each caption's picture begin, and how many they are."""
    first, end = (np.searchsorted(theirs.pictures, ours.pictures, side) for side in ("left", "right"))
    return first, end - first


def _unigrams(captions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the place and the number of each word, and captions (N, T + 3) with room for `_lengthen`."""
    words = np.pad(captions.astype(np.int64), ((0, 0), (0, LONGEST_NGRAM - 1)))
    at = np.flatnonzero(words)
    return at, words.ravel()[at], words


def _lengthen(at: np.ndarray, numbers: np.ndarray, words: np.ndarray, by: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n-grams that begin at `at`, longer by the word `by` words further on, where there is one."""
    last = words.ravel()[at + by]
    longer = last > 0
    return at[longer], numbers[longer] << _BITS | last[longer]


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Return each number once, ascending, in a fraction of the time of `np.unique`, which hashes them."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) > 0]


def _find(known: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the place of each number among those known; numbers not among them get places after them."""
    places = np.empty_like(numbers)
    order = np.argsort(numbers)  # so that each search begins near where the last one ended, in memory
    places[order] = np.searchsorted(known, numbers[order])
    unknown = np.flatnonzero(known[places] != numbers)
    places[unknown] = len(known) - 1 + np.unique(numbers[unknown], return_inverse=True)[1]
    return places
