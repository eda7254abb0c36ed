"""BLEU-1 to BLEU-4, equal to coco-caption's (pycocoevalcap 1.2) to 1e-9."""

import math
from collections.abc import Sequence

import numpy as np

from evaluation.metrics.base import CaptionMetric, Captions
from evaluation.metrics.ngrams import LONGEST_NGRAM, closest_lengths, count_matches


class Bleu(CaptionMetric):
    """BLEU of 1 to 4-grams, 0..1.

    Counts: matching n-grams of each order, all n-grams of each order, words, and words of the closest reference.
    """

    names = tuple(f"BLEU-{order}" for order in range(1, LONGEST_NGRAM + 1))

    def counts(self, captions: Captions) -> np.ndarray:
        """Return the counts of each image (images, 10)."""
        candidates, references = captions.vectors, captions.references.vectors
        matches, possible = count_matches(candidates, references)
        closest = closest_lengths(candidates, references)
        return np.column_stack([matches, possible, candidates.lengths, closest]).astype(float)

    def score(self, counts: np.ndarray) -> np.ndarray:
        """Return BLEU-1 to BLEU-4 of each row of counts."""
        return np.array([bleu(row) for row in counts.tolist()])


def bleu(counts: Sequence[float]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of `Bleu.counts`: geometric means of the precisions, times the brevity penalty.

    Papineni et al. 2002, section 2.3, with weights 1/n. The two small numbers are coco-caption's: they avoid a
    division by 0 for captions without a match or without words, and give a score near 0.
    """
    matches, possible = counts[:LONGEST_NGRAM], counts[LONGEST_NGRAM : 2 * LONGEST_NGRAM]
    length, reference_length = counts[2 * LONGEST_NGRAM :]
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (reference_length + small)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order in range(LONGEST_NGRAM):
        product *= (matches[order] + tiny) / (possible[order] + small)
        scores.append(brevity_penalty * product ** (1 / (order + 1)))
    return scores


def without_brevity_penalty(counts: Sequence[float]) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4 as Show, Attend and Tell reports them (section 5.4.1)."""
    return dict(zip(Bleu.names, bleu([*counts[:-1], 0]), strict=True))
