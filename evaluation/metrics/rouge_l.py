"""ROUGE-L, equal to coco-caption's (pycocoevalcap 1.2) to 1e-9."""

from collections.abc import Sequence

from evaluation.metrics.base import Captions, MeanMetric


class RougeL(MeanMetric):
    """ROUGE-L, 0..1."""

    names = ("ROUGE-L",)

    def values(self, captions: Captions) -> list[float]:
        """Return the score of each image."""
        return [rouge_l(*pair) for pair in zip(captions.words, captions.references.words, strict=True)]


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """Return the F-score of the longest common subsequence, with recall weighted `beta` times precision.

    Lin 2004, "ROUGE", section 3, as in coco-caption: the best precision and the best recall over the references,
    not necessarily of the same one. A caption without words counts as one empty word, so two empty captions
    score 1.
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
    """Return the number of words of the longest common subsequence.

    Hyyro 2004, "Bit-parallel LCS-length computation revisited": one integer holds a whole row of the usual table,
    with a 0 bit where the length grows by one.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    row = all_ones = (1 << len(first)) - 1
    for word in second:
        matched = row & positions.get(word, 0)
        row = (row + matched) | (row - matched)
    return len(first) - (row & all_ones).bit_count()
