"""Bootstrap confidence intervals of scores, and the paired bootstrap test of two sets of captions.

Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13; for corpus scores, Koehn 2004,
"Statistical significance tests for machine translation evaluation". Images are sampled with replacement, as many as
there are, and each sample is scored as a corpus from the sum of its counts. CIDEr-D keeps the document frequencies
of all images.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from captioner.errors import DataError
from evaluation.metrics import METRICS, Scores

Key = TypeVar("Key", bound=Hashable)
Tally: TypeAlias = dict[Key, tuple[float, float]]
"""Of each image a part and the whole that it is of, such as the mistakes among the words of its caption."""

ROUNDS = 1000
"""Number of bootstrap samples."""

LEVEL = 0.95
"""Confidence level of intervals."""

_CHUNK = 1 << 22  # weights in memory at a time


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """The score of one set of captions minus that of another on the same images."""

    value: float
    low: float
    high: float
    p: float
    """The two-sided p-value of the paired bootstrap (Efron and Tibshirani, section 16.4), at least
    1 / (samples + 1)."""


def intervals(scores: Scores[Key], rounds: int = ROUNDS, seed: int = 0) -> dict[str, Interval]:
    """Return the confidence interval of each score; NaN if the score is."""
    if not scores.counts:
        return {}
    (samples,) = _resample([scores], list(scores.counts), rounds, seed)
    return {name: Interval(*middle(values)) for name, values in samples.items()}


def compare(first: Scores[Key], second: Scores[Key], rounds: int = ROUNDS, seed: int = 0) -> dict[str, Difference]:
    """Return the difference of each score that both have, `first` minus `second`, with paired samples.

    A score that is NaN is left out, as are samples in which it is.

    Raises:
        DataError: if they are of different images.
    """
    if unpaired := set(first.images) ^ set(second.images):
        raise DataError(f"these scores are of different pictures: {len(unpaired):,} are in only one of them")
    metrics = [name for name in first.counts if name in second.counts]
    samples, other_samples = _resample([first, second], metrics, rounds, seed)
    found = {}
    for name, values in samples.items():
        value = first.corpus[name] - second.corpus[name]
        if math.isnan(value):
            continue
        differences = values - other_samples[name]
        extreme = np.abs(differences - value) >= abs(value)
        drawn = np.count_nonzero(~np.isnan(differences))
        found[name] = Difference(value, *middle(differences), float((extreme.sum() + 1) / (drawn + 1)))
    return found


def middle(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the middle `LEVEL` of the values of samples (rounds,) but for NaN; NaN without any."""
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resample(
    several: Sequence[Scores[Key]], metrics: Sequence[str], rounds: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Return the scores (rounds,) of the same bootstrap samples by each of `several`, by name."""
    images = several[0].images
    tables = [
        np.array([scores.counts[metric][image] for image in images]) for scores in several for metric in metrics
    ]
    counts = np.concatenate(tables, axis=1)
    drawn = np.concatenate([weights @ counts for weights in draw_weights(len(images), rounds, seed)])
    sums = iter(np.split(drawn, np.cumsum([table.shape[1] for table in tables])[:-1], axis=1))
    return [
        {
            name: values
            for metric in metrics
            for name, values in zip(METRICS[metric].names, METRICS[metric].score(next(sums)).T, strict=True)
        }
        for _ in several
    ]


def draw_weights(images: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each bootstrap sample contains each image, in chunks (samples, images)."""
    random = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // images)
    for done in range(0, rounds, at_once):
        yield random.multinomial(images, np.full(images, 1 / images), min(at_once, rounds - done)).astype(float)
