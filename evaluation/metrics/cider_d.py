"""CIDEr-D, equal to coco-caption's (pycocoevalcap 1.2) to 1e-9."""

from evaluation.metrics.base import Captions, MeanMetric
from evaluation.metrics.ngrams import cider_d


class CiderD(MeanMetric):
    """CIDEr-D, 0..10, with the document frequencies of the references: a single image scores 0."""

    names = ("CIDEr-D",)

    def values(self, captions: Captions) -> list[float]:
        """Return the score of each image."""
        return cider_d(captions.vectors, captions.references.vectors).tolist()
