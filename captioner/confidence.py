"""How far a caption can be trusted: the probability that people who see the picture would confirm what it names.

A linear detector of each word says from the picture whether the word would be confirmed. A logistic regression
(one of things, one of other words) weighs it against what the network says itself, how common the word is, and how
often people agree on it. The log-odds of all things in a caption together, again through a logistic regression, are
those of the caption. Pictures that lie far from the training pictures are trusted less: how far is the length of
what the leading axes of the training pictures leave of a picture's mean annotation, as in Wang et al. 2022, "ViM:
Out-of-distribution with virtual-logit matching" (arXiv 2203.10807), section 4.

`python -m training calibrate` fits all of it; docs/confidence.md says how, and how good it is.
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
"""A word or a caption with less confidence is unsure: it is rather wrong than right."""

MAX_WORDS = 100_000
"""Maximum number of words of a calibration."""

MAX_AXES = 1024
"""Maximum number of axes of a calibration."""

LARGEST = 1e6
"""Largest absolute value of a number of a calibration, and of annotations along an axis."""

TOLERATED = 2.0
"""Standard deviations that a picture may be farther from the training pictures than development pictures are on
average. So are 2 of 100 of these, if the logarithm of the distance has a normal distribution."""

PENALTY = 2.0
"""What each standard deviation beyond takes from the log-odds of words and captions."""

_LEAST_LOG_PROB = -8.0
_LEAST, _MOST = 0.005, 0.99  # of what a detector says: it is linear, and leaves the range of probabilities
_RAREST = 1e-4


Weight = Annotated[float, Range(-1000, 1000)]


@dataclass(frozen=True)
class WordWeights:
    """The weights of the log-odds that a word is confirmed."""

    constant: Weight
    log_prob: Weight
    """Of the word's log-probability."""
    detector: Weight
    """Of the log-odds that the detector of the word gives the picture."""
    rate: Weight
    """Of the log-odds of training pictures that the word is confirmed of."""
    agreement: Weight
    """Of the log-odds that another person's caption confirms the word where one person's has it."""

    def __post_init__(self) -> None:
        config.check(self)


@dataclass(frozen=True)
class CaptionWeights:
    """The weights of the log-odds that all things in a caption are confirmed."""

    constant: Weight
    product: Weight
    """Of the log-odds of the product of the probabilities of the things."""

    def __post_init__(self) -> None:
        config.check(self)


@dataclass(frozen=True)
class Distance:
    """How far development pictures lie from the training pictures: mean and deviation of the logarithm."""

    mean: Weight
    deviation: Annotated[float, Range(1e-6, 1000)]

    def __post_init__(self) -> None:
        config.check(self)


@dataclass(frozen=True)
class Calibration:
    """What the header of a model file says of confidence; `Tables` are the numbers beside it."""

    words: tuple[str, ...]
    """The words that have a confidence: those of things, then others."""
    things: int
    """How many are of things."""
    thing: WordWeights
    other: WordWeights
    caption: CaptionWeights
    distance: Distance

    def __post_init__(self) -> None:
        if not 1 <= self.things <= len(self.words):
            raise ValueError(f"things: must be at least 1 and at most {len(self.words)}, got {self.things}")
        if len(self.words) > MAX_WORDS:
            raise ValueError(f"words: at most {MAX_WORDS:,}, got {len(self.words):,}")
        if len(set(self.words)) < len(self.words):
            raise ValueError("words: a word is there twice")


class Tables(NamedTuple):
    """The tensors of a calibration: D numbers of an annotation, A axes, W words."""

    mean: np.ndarray
    """float32 (D,), mean annotation of the training pictures."""
    axes: np.ndarray
    """float32 (D, A): orthonormal columns, the leading principal axes of the mean annotations of pictures."""
    detectors: np.ndarray
    """float32 (A, W): how the probability that a word is confirmed grows along each axis."""
    rates: np.ndarray
    """float32 (2, W): the share of training pictures with a word confirmed, and the share of captions with
    the word where another person's caption confirms it."""


class Seen(NamedTuple):
    """What is known of B pictures."""

    projections: np.ndarray
    """float32 (B, A), along the axes."""
    log_distances: np.ndarray
    """float32 (B,), logarithm of the distance from the training pictures."""


class Confidence:
    """A calibration, ready to rate captions."""

    def __init__(self, calibration: Calibration, tables: Tables):
        """Hold both; the shapes of the tables fit the calibration and each other."""
        self.calibration = calibration
        self.tables = tables
        self._places = {word: place for place, word in enumerate(calibration.words)}
        rates = log_odds(tables.rates.clip(_RAREST, 1 - _RAREST))
        self._rates = rates.T  # (W, 2)

    def see(self, annotations: np.ndarray) -> Seen:
        """Return what is known of pictures from their mean annotations, float32 (B, D).

        Raises:
            CheckpointError: if the network's annotations have another width, or are too large or NaN.
        """
        mean, axes = self.tables.mean, self.tables.axes
        if annotations.shape[1:] != mean.shape:
            raise CheckpointError(
                f"the calibration is of annotations of {mean.shape[0]} numbers, and those of the network have "
                f"{annotations.shape[1:]}. Calibrate the model again."
            )
        with np.errstate(all="ignore"):  # checked below
            centred = annotations - mean
            projections = centred @ axes
            rest = (centred**2).sum(axis=1) - (projections**2).sum(axis=1)
            seen = Seen(projections, np.log(rest.clip(1e-12)) / 2)
        if not (np.abs(projections) < LARGEST).all() or not np.isfinite(seen.log_distances).all():
            raise CheckpointError("the model's annotations are too large, or not numbers. Use another model file.")
        return seen

    def features(
        self, words: Sequence[str], log_probs: Sequence[float], projection: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what the confidence of words follows from.

        Args:
            words: T words of a caption.
            log_probs: log-probability of each.
            projection: float32 (A,), of the picture.

        Returns:
            The index of each word among those of the calibration, int64 (T,), -1 where it names nothing; and of the
            n that name something float64 (n, 4): log-probability, and log-odds of detector, rate and agreement.
        """
        places = np.array([self._places.get(word, -1) for word in words], dtype=np.int64)
        named = places[places >= 0]
        said = np.maximum(np.array(log_probs, dtype=float)[places >= 0], _LEAST_LOG_PROB)
        detected = self.tables.rates[0, named] + projection @ self.tables.detectors[:, named]
        return places, np.column_stack([said, log_odds(detected.clip(_LEAST, _MOST)), self._rates[named]])

    def rate(self, caption: Caption, seen: Seen, number: int) -> Caption:
        """Return a caption with its confidence and those of its words.

        Args:
            caption: of one of the pictures.
            seen: what is known of the pictures.
            number: index of the picture among them.
        """
        calibration = self.calibration
        places, features = self.features(caption.words, caption.log_probs, seen.projections[number])
        named = places >= 0
        is_thing = places[named] < calibration.things
        odds = np.where(is_thing, weigh(features, calibration.thing), weigh(features, calibration.other))
        beyond = (float(seen.log_distances[number]) - calibration.distance.mean) / calibration.distance.deviation
        penalty = PENALTY * max(0.0, beyond - TOLERATED)
        of_words: list[float | None] = [None] * len(places)
        for place, confidence in zip(np.flatnonzero(named), probability(odds - penalty), strict=True):
            of_words[place] = float(confidence)
        weights = calibration.caption
        whole = 0.0  # of a caption that names no thing: there is nothing that could be confirmed
        if is_thing.any():
            whole = float(probability(weights.constant + weights.product * product_odds(odds[is_thing]) - penalty))
        return replace(caption, confidence=whole, word_confidences=tuple(of_words))


def weigh(features: np.ndarray, weights: WordWeights) -> np.ndarray:
    """Return the log-odds (n,) of words from their features (n, 4)."""
    slopes = [weights.log_prob, weights.detector, weights.rate, weights.agreement]
    return weights.constant + features @ np.array(slopes)


def product_odds(odds: np.ndarray) -> float:
    """Return the log-odds of the product of probabilities that are given as log-odds (n,)."""
    return float(log_odds(probability(odds).prod().clip(_RAREST, _MOST)))


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p))."""
    return np.log(probabilities) - np.log1p(-probabilities)


def probability(odds: np.ndarray | float) -> np.ndarray:
    """Return the probability of log-odds."""
    return 1 / (1 + np.exp(-np.clip(odds, -100, 100)))
