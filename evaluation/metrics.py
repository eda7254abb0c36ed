"""BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, equal to coco-caption's (pycocoevalcap 1.2) to 1e-9.

    >>> scorer = Scorer({"dog.jpg": ["A dog runs.", "A brown dog."], "cat.jpg": ["A cat sleeps on a mat."]})
    >>> scores = scorer.score({"dog.jpg": "a brown dog runs", "cat.jpg": "a cat"})
    >>> scores.corpus["CIDEr-D"], scores.per_image["BLEU-1"]["dog.jpg"]

All scores are fractions as coco-caption returns them: BLEU and ROUGE-L lie in 0..1, CIDEr-D in 0..10.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from captioner.errors import DataError
from evaluation.ngrams import NgramTable, cider_d, closest_lengths, count_matches, pad
from evaluation.tokenize import tokenize

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Scores(Generic[Key]):
    """What a set of captions scores: `corpus` by metric, and `per_image` by metric and image id.

    Corpus ROUGE-L, CIDEr-D and SPICE are the means of the images'; corpus BLEU and METEOR are of summed counts,
    which no mean of images gives.
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[Key, float]]
    bleu_counts: "dict[Key, BleuCounts]"
    """What corpus BLEU is made of, by image id."""
    meteor_counts: dict[Key, list[float]] = field(default_factory=dict)
    """The same of METEOR, if it was computed."""

    @property
    def precisions(self) -> dict[str, float]:
        """Corpus BLEU-1 to BLEU-4 without brevity penalty, as Show, Attend and Tell reports it (section 5.4.1)."""
        total = sum_counts(list(self.bleu_counts.values()))
        values = bleu(total._replace(reference_length=0))
        return {f"BLEU-{order}": value for order, value in enumerate(values, start=1)}


class Scorer(Generic[Key]):
    """Score captions against one set of references, as often as wanted.

    Tokens, counts and document frequencies of the references are computed once, here, so that scoring after
    every training epoch costs little more than reading the candidates.

    Args:
        references: raw captions by image id, at least one an image. CIDEr-D takes its document frequencies
            from exactly these, so its scores are of this set of images, and a single image scores 0.

    Raises:
        DataError: without any image, or when an image has no caption.
    """

    def __init__(self, references: Mapping[Key, Sequence[str]]):
        if not references:
            raise DataError("references: no image to score against; expected at least one")
        if empty := [key for key, captions in references.items() if not captions]:
            raise DataError(f"references: no caption for {name_images(empty)}; every image needs one")
        self._words = {key: [tokenize(caption) for caption in captions] for key, captions in references.items()}
        numbers: dict[str, int] = defaultdict(count(1).__next__)
        captions = _encode(chain.from_iterable(self._words.values()), numbers)
        pictures = np.repeat(np.arange(len(references)), [len(each) for each in self._words.values()])
        self._numbers = dict(numbers)
        self._table = NgramTable(captions, pictures)
        self._references = self._table.weigh(captions, pictures)

    def tokenize(self, candidates: Mapping[Key, str]) -> dict[Key, tuple[list[str], list[list[str]]]]:
        """Return by image the words of its caption, and those of each of its references.

        Raises:
            DataError: as `score`.
        """
        problems = []
        if missing := self._words.keys() - candidates.keys():
            problems.append(f"no caption for {name_images(missing)}; every image needs one")
        if unknown := candidates.keys() - self._words.keys():
            problems.append(f"{name_images(unknown)} not among the references; leave them out")
        if problems:
            raise DataError(f"candidates: {'. '.join(problems)}")
        return {key: (tokenize(candidates[key]), references) for key, references in self._words.items()}

    def score(self, candidates: Mapping[Key, str]) -> Scores[Key]:
        """Score one raw caption for each image of the references.

        Raises:
            DataError: naming the images that have no caption here, or that the references do not know.
        """
        tokens = self.tokenize(candidates)
        bleu_counts, ciders = self._count({key: words for key, (words, _) in tokens.items()})
        per_image: dict[str, dict[Key, float]] = {metric: {} for metric in METRICS}
        for key, (words, references) in tokens.items():
            for order, value in enumerate(bleu(bleu_counts[key]), start=1):
                per_image[f"BLEU-{order}"][key] = value
            per_image["ROUGE-L"][key] = rouge_l(words, references)
        per_image["CIDEr-D"] = ciders
        corpus = {metric: math.fsum(values.values()) / len(values) for metric, values in per_image.items()}
        for order, value in enumerate(bleu(sum_counts(list(bleu_counts.values()))), start=1):
            corpus[f"BLEU-{order}"] = value
        return Scores(corpus, per_image, bleu_counts)

    def _count(self, words: dict[Key, list[str]]) -> tuple["dict[Key, BleuCounts]", dict[Key, float]]:
        """Return what comes of n-grams: BLEU's counts, and CIDEr-D."""
        captions = _encode(words.values(), defaultdict(count(len(self._numbers) + 1).__next__, self._numbers))
        vectors = self._table.weigh(captions, np.arange(len(captions)))
        closest = closest_lengths(vectors, self._references)
        columns = (*count_matches(vectors, self._references), vectors.lengths, closest)
        rows = zip(words, *(column.tolist() for column in columns), strict=True)
        bleu_counts = {key: BleuCounts(tuple(matches), tuple(all_), *both) for key, matches, all_, *both in rows}
        return bleu_counts, dict(zip(words, cider_d(vectors, self._references).tolist(), strict=True))


def _encode(captions: Iterable[Sequence[str]], numbers: Mapping[str, int]) -> np.ndarray:
    """Return captions as numbers, padded; `numbers` has one for every word.

    The rare token that holds a no-break space, such as "1 1/2", is two words to n-grams and one to ROUGE-L, because
    coco-caption has it so.
    """
    return pad([[numbers[word] for word in " ".join(tokens).split()] for tokens in captions])


class BleuCounts(NamedTuple):
    """All that BLEU asks of one image, or of many when summed: order 1 to 4 in `matches` and `possible`."""

    matches: tuple[int, ...]
    possible: tuple[int, ...]
    length: int
    reference_length: int


def sum_counts(images: Sequence[BleuCounts]) -> BleuCounts:
    """Add the counts of images: BLEU of the sum is the corpus's BLEU."""
    return BleuCounts(
        matches=tuple(map(sum, zip(*(image.matches for image in images), strict=True))),
        possible=tuple(map(sum, zip(*(image.possible for image in images), strict=True))),
        length=sum(image.length for image in images),
        reference_length=sum(image.reference_length for image in images),
    )


def bleu(counts: BleuCounts) -> list[float]:
    """BLEU-1 to BLEU-4: the geometric mean of the precisions p_1..p_n, times the brevity penalty.

    Papineni et al. 2002, section 2.3, with weights 1/n. The two small numbers are coco-caption's: they give
    a score near 0 instead of a division by 0 to captions without a match or without words.
    """
    tiny, small = 1e-15, 1e-9
    ratio = (counts.length + tiny) / (counts.reference_length + small)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, (matches, possible) in enumerate(zip(counts.matches, counts.possible, strict=True), start=1):
        product *= (matches + tiny) / (possible + small)
        scores.append(brevity_penalty * product ** (1 / order))
    return scores


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """ROUGE-L: the F-score of the longest common subsequence, with recall weighted `beta` times precision.

    Lin 2004, "ROUGE", section 3, and as coco-caption has it: the best precision and the best recall over the
    references, not necessarily of the same one; a caption without words counts as one empty word, so that
    two empty captions score 1.
    """
    candidate = candidate or [""]
    references = [words or [""] for words in references]
    common = [longest_common_subsequence(candidate, words) for words in references]
    precision = max(common) / len(candidate)
    recall = max(length / len(words) for length, words in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the number of words in the longest subsequence of both.

    Hyyro 2004, "Bit-parallel LCS-length computation revisited": one integer holds a whole row of the usual
    table, as a 0 bit wherever the length grows by one.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    row = all_ones = (1 << len(first)) - 1
    for word in second:
        matched = row & positions.get(word, 0)
        row = (row + matched) | (row - matched)
    return len(first) - (row & all_ones).bit_count()


def name_images(images: Iterable[Hashable]) -> str:
    """Return the first few ids and the number of the others, for messages."""
    names = sorted(map(str, images))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
