"""BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, equal to coco-caption's (pycocoevalcap 1.2) to 1e-9.

    >>> scorer = Scorer({"dog.jpg": ["A dog runs.", "A brown dog."], "cat.jpg": ["A cat sleeps on a mat."]})
    >>> scores = scorer.score({"dog.jpg": "a brown dog runs", "cat.jpg": "a cat"})
    >>> scores.corpus["CIDEr-D"], scores.per_image["BLEU-1"]["dog.jpg"]

All scores are fractions as coco-caption returns them: BLEU and ROUGE-L lie in 0..1, CIDEr-D in 0..10.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from captioner.errors import DataError
from evaluation.tokenize import tokenize

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
LONGEST_NGRAM = 4

Key = TypeVar("Key", bound=Hashable)
Ngram = tuple[str, ...]


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
        words = {key: [tokenize(caption) for caption in captions] for key, captions in references.items()}
        counts = {key: [count_ngrams(caption) for caption in captions] for key, captions in words.items()}
        self._rarity = inverse_document_frequencies(counts.values())
        self._rarity_of_unseen = math.log(len(references))
        self._references = {key: self._prepare(words[key], counts[key]) for key in references}

    def _prepare(self, words: list[list[str]], counts: list[Counter[Ngram]]) -> "_References":
        vectors = [tf_idf(caption, self._rarity, self._rarity_of_unseen) for caption in counts]
        return _References(words, [vector.length for vector in vectors], most_counts(counts), vectors)

    def tokenize(self, candidates: Mapping[Key, str]) -> dict[Key, tuple[list[str], list[list[str]]]]:
        """Return by image the words of its caption, and those of each of its references.

        Raises:
            DataError: as `score`.
        """
        if missing := self._references.keys() - candidates.keys():
            raise DataError(f"candidates: no caption for {name_images(missing)}; every image needs one")
        if unknown := candidates.keys() - self._references.keys():
            raise DataError(f"candidates: {name_images(unknown)} not among the references; leave them out")
        return {key: (tokenize(candidates[key]), references.words) for key, references in self._references.items()}

    def score(self, candidates: Mapping[Key, str]) -> Scores[Key]:
        """Score one raw caption for each image of the references.

        Raises:
            DataError: naming the images that have no caption here, or that the references do not know.
        """
        per_image: dict[str, dict[Key, float]] = {metric: {} for metric in METRICS}
        bleu_counts = {}
        for key, (words, reference_words) in self.tokenize(candidates).items():
            references = self._references[key]
            counts = count_ngrams(words)
            vector = tf_idf(counts, self._rarity, self._rarity_of_unseen)
            bleu_counts[key] = count_matches(counts, references.most, references.lengths)
            for order, value in enumerate(bleu(bleu_counts[key]), start=1):
                per_image[f"BLEU-{order}"][key] = value
            per_image["ROUGE-L"][key] = rouge_l(words, reference_words)
            per_image["CIDEr-D"][key] = cider_d(vector, references.vectors)
        corpus = {metric: math.fsum(values.values()) / len(values) for metric, values in per_image.items()}
        for order, value in enumerate(bleu(sum_counts(list(bleu_counts.values()))), start=1):
            corpus[f"BLEU-{order}"] = value
        return Scores(corpus, per_image, bleu_counts)


def count_ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    """Count the n-grams of one to four words.

    The rare token that holds a no-break space, such as "1 1/2", is two words here and one to ROUGE-L, because
    coco-caption has it so.
    """
    words = " ".join(tokens).split()
    counts: Counter[Ngram] = Counter()
    for order in range(1, LONGEST_NGRAM + 1):
        counts.update(zip(*(words[start:] for start in range(order)), strict=False))
    return counts


class BleuCounts(NamedTuple):
    """All that BLEU asks of one image, or of many when summed: order 1 to 4 in `matches` and `possible`."""

    matches: tuple[int, ...]
    possible: tuple[int, ...]
    length: int
    reference_length: int


def most_counts(references: Iterable[Counter[Ngram]]) -> Counter[Ngram]:
    """For each n-gram, how often the reference holds it that holds it most."""
    most: Counter[Ngram] = Counter()
    for counts in references:
        for ngram, count in counts.items():
            if count > most[ngram]:
                most[ngram] = count
    return most


def count_matches(candidate: Counter[Ngram], most: Counter[Ngram], reference_lengths: Iterable[int]) -> BleuCounts:
    """Count the n-grams of a candidate that its references hold, each at most as often as one of them does.

    Papineni et al. 2002, "BLEU", section 2.1.1. The reference length is the one closest to the candidate's,
    and the shorter of two equally close.
    """
    matches = [0] * LONGEST_NGRAM
    possible = [0] * LONGEST_NGRAM
    for ngram, count in candidate.items():
        matches[len(ngram) - 1] += min(count, most[ngram])
        possible[len(ngram) - 1] += count
    length = possible[0]
    closest = min(reference_lengths, key=lambda other: (abs(other - length), other))
    return BleuCounts(tuple(matches), tuple(possible), length, closest)


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


class TfIdf(NamedTuple):
    """A caption as CIDEr sees it: the weight g of each n-gram, the norm of each order, the word count."""

    weights: dict[Ngram, float]
    norms: tuple[float, ...]
    length: int


def inverse_document_frequencies(images: Iterable[Iterable[Counter[Ngram]]]) -> dict[Ngram, float]:
    """Return log(images / images whose references hold the n-gram), for every n-gram of the references."""
    frequencies: Counter[Ngram] = Counter()
    total = 0
    for references in images:
        total += 1
        frequencies.update(set().union(*references))
    return {ngram: math.log(total) - math.log(count) for ngram, count in frequencies.items()}


def tf_idf(counts: Counter[Ngram], rarity: Mapping[Ngram, float], rarity_of_unseen: float) -> TfIdf:
    """Weigh each n-gram by how often the caption holds it and how rare it is among images."""
    weights = {ngram: count * rarity.get(ngram, rarity_of_unseen) for ngram, count in counts.items()}
    squares = [0.0] * LONGEST_NGRAM
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight * weight
    length = sum(count for ngram, count in counts.items() if len(ngram) == 1)
    return TfIdf(weights, tuple(map(math.sqrt, squares)), length)


def cider_d(candidate: TfIdf, references: Sequence[TfIdf], sigma: float = 6.0) -> float:
    """CIDEr-D of one image: 10 times the mean over references and orders of the clipped cosine similarity.

    Vedantam et al. 2015 (arXiv 1411.5726), equations 5 and 6: weights of the candidate are clipped to the
    reference's, and a difference in length costs a Gaussian of width `sigma`.
    """
    total = 0.0
    for reference in references:
        products = [0.0] * LONGEST_NGRAM
        for ngram, weight in candidate.weights.items():
            if other := reference.weights.get(ngram):
                products[len(ngram) - 1] += min(weight, other) * other
        norms = zip(candidate.norms, reference.norms, strict=True)
        similarity = sum(
            product / (ours * theirs) for product, (ours, theirs) in zip(products, norms, strict=True) if product
        )
        total += similarity * math.exp(-((candidate.length - reference.length) ** 2) / (2 * sigma**2))
    return 10 * total / (LONGEST_NGRAM * len(references))


def name_images(images: Iterable[Hashable]) -> str:
    """Return the first few ids and the number of the others, for messages."""
    names = sorted(map(str, images))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class _References(NamedTuple):
    words: list[list[str]]
    lengths: list[int]
    most: Counter[Ngram]
    vectors: list[TfIdf]
