"""How far scores would move with other pictures: bootstrap intervals, and the paired test of two sets of captions.

Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13; for scores of translations, Koehn 2004,
"Statistical significance tests for machine translation evaluation". Pictures are drawn with replacement, as many as
there are, a thousand times over, and each draw is scored as a corpus of its own. BLEU is of the summed counts of
a draw, and so is METEOR; ROUGE-L, CIDEr-D and SPICE are its means, with the document frequencies of all pictures.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from captioner.errors import DataError
from evaluation.meteor import meteor
from evaluation.metrics import METRICS, BleuCounts, Scores, bleu
from evaluation.ngrams import LONGEST_NGRAM

Key = TypeVar("Key", bound=Hashable)
Tally: TypeAlias = dict[Key, tuple[float, float]]
"""Of each image a part and the whole that it is of, such as the mistakes among the words of its caption."""

ROUNDS = 1000
"""How many draws."""

LEVEL = 0.95
"""The share of draws that an interval holds."""

_MEANS = (*METRICS[LONGEST_NGRAM:], "SPICE")  # the metrics that are means of images
_CHUNK = 1 << 22  # how many weights are drawn at a time


class Interval(NamedTuple):
    """Where a score lies, but for the choice of the pictures."""

    low: float
    high: float


class Difference(NamedTuple):
    """By how much one set of captions scores higher than another on the same pictures."""

    value: float
    low: float
    high: float
    p: float
    """How often draws would differ from the difference by as much as it does from 0, if there were none: the
    two-sided level of the paired bootstrap (Efron and Tibshirani, section 16.4), not below 1 / (draws + 1)."""


class Ratio(NamedTuple):
    """The sum of all parts of a tally over the sum of its wholes, and its interval; none: the wholes sum to 0."""

    value: float | None
    low: float | None
    high: float | None
    whole: float
    """The sum of the wholes."""


def intervals(scores: Scores[Key], rounds: int = ROUNDS, seed: int = 0) -> dict[str, Interval]:
    """Return the interval of each metric: the middle `LEVEL` of the draws' scores."""
    (draws,) = _draw([scores], list(scores.bleu_counts), rounds, seed)
    return {metric: Interval(*middle(values)) for metric, values in draws.items()}


def ratios(tallies: Mapping[str, Tally[Key]], rounds: int = ROUNDS, seed: int = 0) -> dict[str, Ratio]:
    """Return the ratio of each tally, all of the same images; the draws are those of `intervals` and `compare`.

    A draw without any whole, as a few images may yield, has no ratio and is left out.
    """
    if not tallies:
        return {}
    images = list(next(iter(tallies.values())))
    counts = np.array([[tally[image] for tally in tallies.values()] for image in images], float)
    additive = counts.reshape(len(images), -1)  # from (images, tallies, 2)
    draws = np.concatenate([weights @ additive for weights in draw_weights(len(images), rounds, seed)])
    found = {}
    for number, name in enumerate(tallies):
        part, whole = counts[:, number].sum(axis=0).tolist()
        parts, wholes = draws[:, 2 * number : 2 * number + 2].T
        drawn = parts[wholes > 0] / wholes[wholes > 0]
        found[name] = Ratio(part / whole, *middle(drawn), whole) if whole else Ratio(None, None, None, 0)
    return found


def compare(first: Scores[Key], second: Scores[Key], rounds: int = ROUNDS, seed: int = 0) -> dict[str, Difference]:
    """Return for each metric what `first` scores above `second`, both drawn together.

    Raises:
        DataError: when they are not of the same pictures.
    """
    images = list(first.bleu_counts)
    if others := first.bleu_counts.keys() ^ second.bleu_counts.keys():
        raise DataError(f"these scores are not of the same pictures: {len(others):,} are in only one of them")
    common = first.corpus.keys() & second.corpus.keys()
    first, second = (_leave(scores, common) for scores in (first, second))
    draws, others_draws = _draw([first, second], images, rounds, seed)
    found = {}
    for metric, values in draws.items():
        value = first.corpus[metric] - second.corpus[metric]
        differences = values - others_draws[metric]
        extreme = np.abs(differences - value) >= abs(value)
        found[metric] = Difference(value, *middle(differences), float((extreme.sum() + 1) / (rounds + 1)))
    return found


def _leave(scores: Scores[Key], metrics: Collection[str]) -> Scores[Key]:
    """Return the scores without what other metrics than these are drawn from."""
    return replace(
        scores,
        per_image={metric: values for metric, values in scores.per_image.items() if metric in metrics},
        meteor_counts=scores.meteor_counts if "METEOR" in metrics else {},
    )


def middle(values: np.ndarray) -> tuple[float, float]:
    """Return between which two values the middle `LEVEL` of draws (rounds,) lie."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _draw(
    several: Sequence[Scores[Key]], images: Sequence[Key], rounds: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Score `rounds` draws (rounds,) of these images by each of `several`, the same draws for all."""
    additive = np.concatenate([_additive(scores, images) for scores in several], axis=1)  # (images, each's sums)
    sums = np.concatenate([weights @ additive for weights in draw_weights(len(images), rounds, seed)])
    means = [metric for metric in _MEANS if metric in several[0].per_image]
    return [_score(part, means, len(images)) for part in np.split(sums, len(several), axis=1)]


def draw_weights(images: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each draw holds each image, some draws (draws, images) at a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // images)
    for done in range(0, rounds, at_once):
        yield random.multinomial(images, np.full(images, 1 / images), min(at_once, rounds - done)).astype(float)


def _additive(scores: Scores[Key], images: Sequence[Key]) -> np.ndarray:
    """Return all that a corpus's scores are made of, for each image (images, 10 + the means + METEOR's)."""
    rows = []
    for image in images:
        counts = scores.bleu_counts[image]
        means = (scores.per_image[metric][image] for metric in _MEANS if metric in scores.per_image)
        of_meteor = scores.meteor_counts.get(image, [])
        rows.append([*counts.matches, *counts.possible, counts.length, counts.reference_length, *means, *of_meteor])
    return np.array(rows, dtype=float)


def _score(sums: np.ndarray, metrics: Sequence[str], images: int) -> dict[str, np.ndarray]:
    """Return the scores (draws,) of draws from their sums (draws, ...); `metrics` are the means among them."""
    matches, possible, lengths, means, of_meteor = np.split(sums, [4, 8, 10, 10 + len(metrics)], axis=1)
    bleus = [
        bleu(BleuCounts(tuple(matches[draw]), tuple(possible[draw]), *lengths[draw])) for draw in range(len(sums))
    ]
    scores = dict(zip([*METRICS[:LONGEST_NGRAM], *metrics], [*np.array(bleus).T, *(means / images).T], strict=True))
    if of_meteor.size:
        scores["METEOR"] = meteor(of_meteor)
    return scores
