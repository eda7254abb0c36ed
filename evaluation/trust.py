"""The quality of confidences: calibration, ranking, and risk at coverage.

Reliability diagrams and the expected calibration error: Guo et al. 2017 (arXiv 1706.04599), section 2. The number
of their bins: Roelofs et al. 2022 (arXiv 2012.08668). Risk and coverage: Geifman and El-Yaniv 2017 (arXiv
1705.08500).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from captioner.caption import Caption
from evaluation.bootstrap import ROUNDS, draw_weights, middle
from evaluation.confirmed import confirms_all, forms_of, is_confirmed, kind_of
from evaluation.tables import format_interval

COVERAGES = (1.0, 0.5, 0.1)
"""Coverages at which the risk is reported: shares of the most confident captions."""

FEWEST = 10
"""Minimum number of confidences in a bin."""


@dataclass(frozen=True)
class Rated:
    """Confidences, and whether the captions or words were confirmed."""

    confidences: np.ndarray
    """float64 (n,)."""
    confirmed: np.ndarray
    """bool (n,)."""
    images: np.ndarray
    """int64 (n,), image index of each."""

    def take(self, chosen: np.ndarray) -> "Rated":
        """Return the rows of an index or a mask."""
        return Rated(self.confidences[chosen], self.confirmed[chosen], self.images[chosen])


class Bin(NamedTuple):
    """A bin of the reliability diagram."""

    confidence: float
    """Mean confidence."""
    confirmed: float
    """Share that was confirmed."""
    size: int
    """Number of confidences."""


class Figure(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Trust:
    """The quality of the confidences of captions, things or words."""

    count: int
    confirmed: float
    """Share that was confirmed."""
    figures: dict[str, Figure]
    """By name: "AUC", "ECE" and, for captions, "risk at 50 %" and the like."""
    bins: list[Bin]
    """The reliability diagram."""
    curve: list[tuple[float, float]]
    """Coverage and risk, by ascending coverage; at most 100 points."""


def rate_captions(captions: Sequence[Caption], references: Sequence[Sequence[str]]) -> dict[str, Rated]:
    """Compare a caption with confidences of each picture with the references of the picture.

    Return those of "captions", "things" and "words" (things and other content words), without empty ones.
    """
    rows: dict[str, list[tuple[float, bool, int]]] = {"captions": [], "things": [], "words": []}
    for image, (caption, texts) in enumerate(zip(captions, references, strict=True)):
        if caption.confidence is None or caption.word_confidences is None:
            continue
        seen = forms_of(texts)
        rows["captions"].append((caption.confidence, confirms_all(caption.words, seen), image))
        for word, confidence in zip(caption.words, caption.word_confidences, strict=True):
            if confidence is not None:
                row = (confidence, is_confirmed(word, seen), image)
                rows["words"].append(row)
                if kind_of(word) == "thing":
                    rows["things"].append(row)
    return {name: Rated(*map(np.array, zip(*several, strict=True))) for name, several in rows.items() if several}


def measure(rated: Mapping[str, Rated], rounds: int = ROUNDS, seed: int = 0) -> dict[str, Trust]:
    """Return the quality of the confidences of each kind."""
    return {name: _measure(rows, name == "captions", rounds, seed) for name, rows in rated.items()}


def _measure(rated: Rated, of_captions: bool, rounds: int, seed: int) -> Trust:
    metrics: dict[str, Callable[[Rated], float]] = {"AUC": area_under_curve, "ECE": calibration_error}
    if of_captions:
        metrics |= {
            f"risk at {coverage:.0%}": lambda drawn, coverage=coverage: risk(drawn, coverage)  # type: ignore[misc]
            for coverage in COVERAGES
        }
    draws = [[metric(drawn) for metric in metrics.values()] for drawn in _draws(rated, rounds, seed)]
    figures = {
        name: Figure(metric(rated), *middle(column))
        for (name, metric), column in zip(metrics.items(), np.array(draws).T, strict=True)
    }
    covered = np.linspace(0, 1, min(100, len(rated.confidences)) + 1)[1:]
    return Trust(
        count=len(rated.confidences),
        confirmed=float(rated.confirmed.mean()),
        figures=figures,
        bins=bins_of(rated),
        curve=[(float(coverage), risk(rated, float(coverage))) for coverage in covered],
    )


def _draws(rated: Rated, rounds: int, seed: int) -> Iterator[Rated]:
    """Yield bootstrap samples of images, as in `evaluation.bootstrap`."""
    images, where = np.unique(rated.images, return_inverse=True)
    for several in draw_weights(len(images), rounds, seed):
        for times in several.astype(int):
            yield rated.take(np.repeat(np.arange(len(where)), times[where]))


def difference(metric: Callable[[Rated], float], first: Rated, second: Rated, rounds: int = ROUNDS) -> Figure:
    """Return the difference of a metric, first minus second, with paired samples."""
    pairs = zip(_draws(first, rounds, 0), _draws(second, rounds, 0), strict=True)
    drawn = np.array([metric(sample) - metric(other) for sample, other in pairs])
    return Figure(metric(first) - metric(second), *middle(drawn))


def area_under_curve(rated: Rated) -> float:
    """Return the area under the ROC curve: how often a confirmed row has more confidence than an unconfirmed one.

    Ties count half; NaN if all or none is confirmed.
    """
    values, ranks_of, counts = np.unique(rated.confidences, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[ranks_of] if len(values) else np.zeros(0)
    right = int(rated.confirmed.sum())
    wrong = len(ranks) - right
    if not right or not wrong:
        return float("nan")
    return float((ranks[rated.confirmed].sum() - right * (right + 1) / 2) / (right * wrong))


def bins_of(rated: Rated) -> list[Bin]:
    """Return bins of equal size: the largest number for which the confirmed shares ascend.

    Roelofs et al., section 4, "monotonic sweep": more bins would show noise as calibration error.
    """
    order = np.argsort(rated.confidences, kind="stable")
    best = [order]
    for count in range(2, len(order) // FEWEST + 1):
        bins = np.array_split(order, count)
        shares = [rated.confirmed[rows].mean() for rows in bins]
        if any(low > high for low, high in itertools.pairwise(shares)):
            break
        best = bins
    return [
        Bin(float(rated.confidences[rows].mean()), float(rated.confirmed[rows].mean()), len(rows)) for rows in best
    ]


def calibration_error(rated: Rated) -> float:
    """Return the expected calibration error: the mean difference of confidence and confirmed share over bins."""
    bins = bins_of(rated)
    return sum(abs(part.confidence - part.confirmed) * part.size for part in bins) / len(rated.confidences)


def risk(rated: Rated, coverage: float) -> float:
    """Return the unconfirmed share of the most confident rows, a share `coverage` of all."""
    count = max(1, round(coverage * len(rated.confidences)))
    chosen = np.argsort(-rated.confidences, kind="stable")[:count]
    return float(1 - rated.confirmed[chosen].mean())


def to_json(trust: Mapping[str, Trust]) -> dict[str, Any]:
    """Return all numbers as JSON types."""
    return {
        name: {
            "count": found.count,
            "confirmed": found.confirmed,
            "figures": {metric: figure._asdict() for metric, figure in found.figures.items()},
            "bins": [part._asdict() for part in found.bins],
            "curve": found.curve,
        }
        for name, found in trust.items()
    }


def to_text(trust: Mapping[str, Trust]) -> str:
    """Return one line per figure, times 100."""
    lines = [f"{'confidence':<24}{'x 100':>8}{'95 % interval':>17}"]
    for name, found in trust.items():
        for metric, (value, low, high) in found.figures.items():
            interval = format_interval(metric, low, high)
            lines.append(f"{f'{metric}, {name}':<24}{100 * value:8.1f}{interval:>17}")
        lines.append(f"{f'confirmed, {name}':<24}{100 * found.confirmed:8.1f}{'':>17}  of {found.count:,}")
    return "\n".join(lines)
