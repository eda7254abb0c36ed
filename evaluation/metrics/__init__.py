"""Caption metrics: BLEU, ROUGE-L and CIDEr-D in Python, METEOR and SPICE by their authors' Java programs.

    >>> scorer = Scorer({"dog.jpg": ["A dog runs.", "A brown dog."], "cat.jpg": ["A cat sleeps on a mat."]})
    >>> scores = scorer.score({"dog.jpg": "a brown dog runs", "cat.jpg": "a cat"})
    >>> scores.corpus["CIDEr-D"], scores.per_image["BLEU-1"]["dog.jpg"]

All scores are fractions, as coco-caption returns them: 0..1, but for CIDEr-D, which is 0..10.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from captioner.errors import DataError
from evaluation.datasets.files import shorten_names
from evaluation.metrics.base import CaptionMetric, Captions, Metric, Ratio, References
from evaluation.metrics.bleu import Bleu, without_brevity_penalty
from evaluation.metrics.cider_d import CiderD
from evaluation.metrics.java import UnavailableError
from evaluation.metrics.meteor import Meteor
from evaluation.metrics.rouge_l import RougeL
from evaluation.metrics.spice import Spice
from evaluation.tokenize import tokenize

CAPTION_METRICS: dict[str, CaptionMetric] = {
    "BLEU": Bleu(),
    "ROUGE-L": RougeL(),
    "CIDEr-D": CiderD(),
    "METEOR": Meteor(),
    "SPICE": Spice(),
}
"""The metrics of captions and their references."""

OBJECT_METRICS = {
    name: Ratio(name, unit)
    for unit, names in {
        "captions": ("true", "true of three", "CHAIR-s"),
        "mentions": ("CHAIR-i",),
        "nouns": (
            *("attention mass", "mass, even attention", "mass, centre cell"),
            *("pointing", "pointing, any cell", "pointing, centre cell"),
            *("entropy", "largest weight"),
            *("fall without its cells, nats", "fall without random cells, nats", "faithfulness, nats"),
        ),
        "pairs": ("own map above other",),
    }.items()
    for name in names
}
"""The metrics of captions and the known objects of their pictures; `evaluation.grounding` counts them."""

METRICS: dict[str, Metric] = {**CAPTION_METRICS, **OBJECT_METRICS}
"""All metrics. Tables, JSON, intervals and comparison loop over the registries."""

PYTHON_SCORES = tuple(name for metric in CAPTION_METRICS.values() if not metric.needs_java for name in metric.names)
"""The names of the scores that need no Java."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Scores(Generic[Key]):
    """The scores of a set of captions, computed from the counts of their images."""

    counts: Mapping[str, Mapping[Key, Sequence[float]]]
    """By metric, a key of `METRICS`, and by image id."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """The reason by metric, for those that cannot be computed on this machine."""

    @property
    def images(self) -> list[Key]:
        """The ids of the images."""
        return list(next(iter(self.counts.values()), ()))

    @cached_property
    def corpus(self) -> dict[str, float]:
        """The scores of the whole set, by name."""
        return {
            name: score
            for metric in self.counts
            for name, score in zip(
                METRICS[metric].names,
                METRICS[metric].score(np.array([self._total(metric)]))[0].tolist(),
                strict=True,
            )
        }

    @cached_property
    def per_image(self) -> dict[str, dict[Key, float]]:
        """The scores of each image, by name and image id."""
        return {
            name: dict(zip(rows, column, strict=True))
            for metric, rows in self.counts.items()
            for name, column in zip(
                METRICS[metric].names, METRICS[metric].score(np.array([*rows.values()])).T.tolist(), strict=True
            )
        }

    @property
    def without_brevity_penalty(self) -> dict[str, float]:
        """BLEU-1 to BLEU-4 of the whole set without brevity penalty."""
        return without_brevity_penalty(self._total("BLEU"))

    def _total(self, metric: str) -> list[float]:
        return [math.fsum(column) for column in zip(*self.counts[metric].values(), strict=True)]


class Scorer(Generic[Key]):
    """Score captions against one set of references, as often as needed.

    The references are tokenized and counted once, so that scoring after every training epoch is fast.

    Args:
        references: raw captions by image id, at least one for each image. CIDEr-D takes its document frequencies
            from them.

    Raises:
        DataError: if there is no image, or an image has no caption.
    """

    def __init__(self, references: Mapping[Key, Sequence[str]]):
        if not references:
            raise DataError("references: expected at least one image")
        if empty := [key for key, captions in references.items() if not captions]:
            raise DataError(f"references: no caption for {shorten_names(empty)}; every image needs one")
        self._images = list(references)
        self._references = References(
            [[tokenize(caption) for caption in captions] for captions in references.values()]
        )

    def score(self, candidates: Mapping[Key, str], java: bool = False) -> Scores[Key]:
        """Score one raw caption for each image of the references.

        Args:
            candidates: by image id.
            java: whether to compute also the metrics that run Java programs, as far as they are available.

        Raises:
            DataError: if candidates are missing, or belong to unknown images.
        """
        problems = []
        if missing := set(self._images) - candidates.keys():
            problems.append(f"no caption for {shorten_names(missing)}; every image needs one")
        if unknown := candidates.keys() - set(self._images):
            problems.append(f"{shorten_names(unknown)} not among the references; remove them")
        if problems:
            raise DataError(f"candidates: {'. '.join(problems)}")
        captions = Captions([tokenize(candidates[image]) for image in self._images], self._references)
        counts, unavailable = {}, {}
        for name, metric in CAPTION_METRICS.items():
            if java or not metric.needs_java:
                try:
                    rows = metric.counts(captions).tolist()
                except UnavailableError as error:
                    unavailable[name] = str(error)
                else:
                    counts[name] = dict(zip(self._images, map(tuple, rows), strict=True))
        return Scores(counts, unavailable)
