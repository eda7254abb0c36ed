"""Confidence of captions: the calibrated probability that people who see the picture confirm what a caption names.

A linear detector of each word predicts from the picture whether people confirm the word. A logistic regression (one
for things, one for other words) combines it with the log-probability of the network, the frequency of the word, and
the agreement of people on it. The log-odds of a caption are a logistic regression of those of all its things.
Pictures far from the training pictures have less confidence. Their distance is the norm of the residual of the mean
annotation after projection on the principal axes of training pictures, as in Wang et al. 2022, "ViM:
Out-of-distribution with virtual-logit matching" (arXiv 2203.10807), section 4.

`python -m training calibrate` fits the parameters; see docs/confidence.md for the method and its quality.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np

from captioner import config
from captioner.caption import Caption
from captioner.config import Range
from captioner.errors import CheckpointError

UNSURE = 0.5
"""Threshold below which a word or a caption is unsure: it is more likely wrong than right."""

MAX_WORDS = 100_000
"""Maximum number of words of a calibration."""

MAX_AXES = 1024
"""Maximum number of axes of a calibration."""

LARGEST = 1e6
"""Maximum absolute value of the tables of a calibration, and of projections of annotations."""

TOLERATED = 3.0
"""Standard deviations above the mean log-distance of development pictures without a penalty."""

PENALTY = 2.0
"""Penalty on the log-odds for each standard deviation above `TOLERATED`."""

_LEAST_LOG_PROB = -8.0
_LEAST, _MOST = 0.005, 0.99  # of the output of a detector, which is linear and not limited to 0..1
_RAREST = 1e-4


Weight = Annotated[float, Range(-1000, 1000)]


@dataclass(frozen=True)
class WordWeights:
    """Weights of the log-odds that a word is confirmed."""

    constant: Weight
    """The log-odds without evidence."""
    log_prob: Weight
    """Weight of the log-probability of the word."""
    detector: Weight
    """Weight of the log-odds of the word's detector."""
    rate: Weight
    """Weight of the log-odds that the word is confirmed for a training picture."""
    agreement: Weight
    """Weight of the log-odds that a person confirms the word of another person's caption."""

    def __post_init__(self) -> None:
        config.check(self)


@dataclass(frozen=True)
class CaptionWeights:
    """Weights of the log-odds that all things in a caption are confirmed."""

    constant: Weight
    """The log-odds without evidence."""
    product: Weight
    """Weight of the log-odds of the product of the probabilities of the things."""
    weakest: Weight
    """Weight of the log-odds of the least likely thing."""

    def __post_init__(self) -> None:
        config.check(self)


@dataclass(frozen=True)
class Distance:
    """Mean and standard deviation of the log-distance of development pictures from the training pictures."""

    mean: Weight
    """Mean of the log-distance."""
    deviation: Annotated[float, Range(1e-6, 1000)]
    """Standard deviation of the log-distance."""

    def __post_init__(self) -> None:
        config.check(self)


@dataclass(frozen=True)
class Calibration:
    """Parameters of the confidence in the header of a model file; `Tables` are its tensors."""

    words: tuple[str, ...]
    """Words that have a confidence: first things, then others."""
    things: int
    """Number of things."""
    thing: WordWeights
    """Weights of words for things."""
    other: WordWeights
    """Weights of the other words."""
    caption: CaptionWeights
    """Weights of whole captions."""
    distance: Distance
    """Distribution of the distance from the training pictures."""

    def __post_init__(self) -> None:
        if not 1 <= self.things <= len(self.words):
            raise ValueError(f"things: must be at least 1 and at most {len(self.words)}, got {self.things}")
        if len(self.words) > MAX_WORDS:
            raise ValueError(f"words: at most {MAX_WORDS:,}, got {len(self.words):,}")
        if len(set(self.words)) < len(self.words):
            raise ValueError("words: must not contain duplicates")


class Tables(NamedTuple):
    """Tensors of a calibration: annotation size D, A axes, W words."""

    mean: np.ndarray
    """float32 (D,), mean annotation of the training pictures."""
    axes: np.ndarray
    """float32 (D, A): orthonormal columns, the leading principal axes of the mean annotations of pictures."""
    detectors: np.ndarray
    """float32 (A, W), linear detectors: the gradient of a word's probability along each axis."""
    rates: np.ndarray
    """float32 (2, W), shares of training pictures for which a word is confirmed, and of captions with the word that
    another person's caption confirms."""


class Seen(NamedTuple):
    """Features of B pictures."""

    projections: np.ndarray
    """float32 (B, A), projections on the axes."""
    log_distances: np.ndarray
    """float32 (B,), log-distances from the training pictures."""


class Confidence:
    """Computes the confidence of captions from a calibration."""

    def __init__(self, calibration: Calibration, tables: Tables):
        """Take a calibration and its tables, whose shapes match."""
        self.calibration = calibration
        self.tables = tables
        self._indices = {word: index for index, word in enumerate(calibration.words)}
        self._rates = log_odds(tables.rates.clip(_RAREST, 1 - _RAREST)).T  # (W, 2)

    def see(self, annotations: np.ndarray) -> Seen:
        """Return the features of pictures from their mean annotations, float32 (B, D).

        Raises:
            CheckpointError: if the annotations have another size, or are too large or NaN.
        """
        mean, axes = self.tables.mean, self.tables.axes
        if annotations.shape[1:] != mean.shape:
            raise CheckpointError(
                f"the calibration expects annotations of size {mean.shape[0]}, but the network has "
                f"{annotations.shape[1:]}. Calibrate the model again."
            )
        with np.errstate(all="ignore"):  # checked below
            centred = annotations - mean
            projections = centred @ axes
            residual = (centred**2).sum(axis=1) - (projections**2).sum(axis=1)
            seen = Seen(projections, np.log(residual.clip(1e-12)) / 2)
        if not (np.abs(projections) < LARGEST).all() or not np.isfinite(seen.log_distances).all():
            raise CheckpointError("the model's annotations are too large or NaN. Use another model file.")
        return seen

    def features(
        self, words: Sequence[str], log_probs: Sequence[float], projection: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of words.

        Args:
            words: T words of a caption.
            log_probs: log-probabilities of the words.
            projection: float32 (A,), projection of the picture.

        Returns:
            Indices of the words in the calibration, int64 (T,), -1 for others; and features of the n words in the
            calibration, float64 (n, 4): log-probability, and log-odds of detector, rate and agreement.
        """
        indices = np.array([self._indices.get(word, -1) for word in words], dtype=np.int64)
        known = indices[indices >= 0]
        clipped = np.maximum(np.array(log_probs, dtype=float)[indices >= 0], _LEAST_LOG_PROB)
        detected = self.tables.rates[0, known] + projection @ self.tables.detectors[:, known]
        return indices, np.column_stack([clipped, log_odds(detected.clip(_LEAST, _MOST)), self._rates[known]])

    def rate(self, caption: Caption, seen: Seen, index: int) -> Caption:
        """Return a caption of the picture `index` of `seen` with its confidence and those of its words."""
        calibration = self.calibration
        indices, features = self.features(caption.words, caption.log_probs, seen.projections[index])
        known = indices >= 0
        is_thing = indices[known] < calibration.things
        odds = np.where(is_thing, weigh(features, calibration.thing), weigh(features, calibration.other))
        deviations = (float(seen.log_distances[index]) - calibration.distance.mean) / calibration.distance.deviation
        penalty = PENALTY * max(0.0, deviations - TOLERATED)
        of_words: list[float | None] = [None] * len(indices)
        for position, confidence in zip(np.flatnonzero(known), probability(odds - penalty), strict=True):
            of_words[position] = float(confidence)
        weights = calibration.caption
        whole = 0.0  # a caption without things has nothing to confirm
        if is_thing.any():
            product, weakest = caption_features(odds[is_thing])
            whole_odds = weights.constant + weights.product * product + weights.weakest * weakest
            whole = float(probability(whole_odds - penalty))
        return replace(caption, confidence=whole, word_confidences=tuple(of_words))


def weigh(features: np.ndarray, weights: WordWeights) -> np.ndarray:
    """Return the log-odds (n,) of words from features (n, 4)."""
    slopes = [weights.log_prob, weights.detector, weights.rate, weights.agreement]
    return weights.constant + features @ np.array(slopes)


def caption_features(odds: np.ndarray) -> np.ndarray:
    """Return the log-odds of the product and of the smallest of probabilities with log-odds (n,), float64 (2,)."""
    probabilities = probability(odds)
    return log_odds(np.array([probabilities.prod(), probabilities.min()]).clip(_RAREST, _MOST))


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p))."""
    return np.log(probabilities) - np.log1p(-probabilities)


def probability(odds: np.ndarray | float) -> np.ndarray:
    """Return the probability of log-odds."""
    return 1 / (1 + np.exp(-np.clip(odds, -100, 100)))
