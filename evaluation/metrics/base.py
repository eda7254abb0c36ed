"""What metrics have in common: their interface, and the tokenized captions that they read."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, count
from typing import ClassVar

import numpy as np

from evaluation.metrics.ngrams import NgramTable, Vectors, pad


class References:
    """The tokenized references of a set of images, with their n-grams, computed once."""

    def __init__(self, words: Sequence[Sequence[list[str]]]):
        self.words = words
        ids: dict[str, int] = defaultdict(count(1).__next__)
        captions = encode(chain.from_iterable(words), ids)
        images = np.repeat(np.arange(len(words)), [len(references) for references in words])
        self.ids = dict(ids)
        self.table = NgramTable(captions, images)
        self.vectors = self.table.weigh(captions, images)


class Captions:
    """One tokenized caption of each image, with its references, in the same order."""

    def __init__(self, words: Sequence[list[str]], references: References):
        self.words = words
        self.references = references

    @cached_property
    def vectors(self) -> Vectors:
        """The n-grams of the captions."""
        ids = defaultdict(count(len(self.references.ids) + 1).__next__, self.references.ids)
        return self.references.table.weigh(encode(self.words, ids), np.arange(len(self.words)))


class Metric(ABC):
    """A corpus metric: counts of each image that add up, and the score of their sum.

    The sum over all images gives the score of the corpus, the counts of one image give its own score, and the sum
    over a bootstrap sample gives the score of the sample.
    """

    names: tuple[str, ...]
    """The scores that it computes, such as BLEU-1 to BLEU-4."""

    @abstractmethod
    def score(self, counts: np.ndarray) -> np.ndarray:
        """Return the scores, float64 (N, len(names)), of N sums of counts (N, n)."""


class CaptionMetric(Metric):
    """A metric of captions and their references."""

    needs_java: ClassVar[bool] = False
    """Whether it runs a Java program, which may be missing."""

    @abstractmethod
    def counts(self, captions: Captions) -> np.ndarray:
        """Return the counts of each image, float64 (images, n).

        Raises:
            UnavailableError: if the metric cannot be computed on this machine.
        """


class MeanMetric(CaptionMetric):
    """A metric whose corpus score is the mean of the images' scores."""

    @abstractmethod
    def values(self, captions: Captions) -> Sequence[float]:
        """Return the score of each image."""

    def counts(self, captions: Captions) -> np.ndarray:
        """Return the score of each image, and 1: (images, 2)."""
        values = np.array(self.values(captions), float)
        return np.column_stack([values, np.ones_like(values)])

    def score(self, counts: np.ndarray) -> np.ndarray:
        """Return the means."""
        return counts[:, :1] / counts[:, 1:]


class Ratio(Metric):
    """A part of a whole, which are the two counts of an image; NaN if the wholes sum to 0."""

    def __init__(self, name: str, unit: str):
        self.names = (name,)
        self.unit = unit
        """What the whole counts, such as nouns."""

    def score(self, counts: np.ndarray) -> np.ndarray:
        """Return the ratios."""
        return counts[:, :1] / np.where(counts[:, 1:] > 0, counts[:, 1:], np.nan)


def encode(captions: Iterable[Sequence[str]], ids: Mapping[str, int]) -> np.ndarray:
    """Return captions as padded word ids; `ids` has one for every word.

    The rare token that contains a no-break space, such as "1 1/2", is two words in n-grams and one in ROUGE-L, as
    in coco-caption.
    """
    return pad([[ids[word] for word in " ".join(tokens).split()] for tokens in captions])
