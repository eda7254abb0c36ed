"""An HTML report of a model's captions of a data set: scores, charts, and pictures with their attention."""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from captioner.caption import Caption
from captioner.installation import require_extra
from captioner.page import document, figure
from evaluation.datasets import Record
from evaluation.findings import Findings
from evaluation.metrics import Scores
from evaluation.statistics import describe, to_rows
from evaluation.tables import count_wholes, format_interval, format_score
from evaluation.tokenize import tokenize

SHOWN = ("CIDEr-D", "BLEU-4", "ROUGE-L")
"""Scores of single pictures in histograms and galleries."""

HIGHEST = {"BLEU-4": 100, "ROUGE-L": 100}
"""Upper ends of axes, times 100; the axis of CIDEr-D ends at the highest score of a picture."""

LONGEST = 25
"""Length of a caption in words, from which lengths share a bin."""

BINS = 30
"""Maximum number of histogram bins."""

GALLERIES = {
    "best": "The highest CIDEr-D, best first.",
    "worst": "The lowest CIDEr-D, worst first.",
    "random": "A random sample of all pictures.",
}


@dataclass(frozen=True)
class Histogram:
    """Counts of one or more series in the same bins."""

    title: str
    axis: str
    """What is counted, and in which unit."""
    edges: np.ndarray
    """(bins + 1,), ascending."""
    labels: list[str]
    """The label of each bin."""
    counts: dict[str, np.ndarray]
    """Integers (bins,) by the name of the series."""


def choose(scores: Mapping[str, float], count: int, seed: int = 0) -> dict[str, list[str]]:
    """Return at most `count` image ids of each of `GALLERIES`, from scores by image id."""
    ascending = sorted(scores, key=scores.__getitem__)
    drawn = random.Random(seed).sample(list(scores), min(count, len(scores)))
    return {"best": ascending[::-1][:count], "worst": ascending[:count], "random": drawn}


def render(
    title: str,
    about: Mapping[str, str],
    records: Sequence[Record],
    findings: Findings,
    galleries: Mapping[str, Sequence[tuple[Record, Caption]]],
    training: Sequence[str] | None = None,
) -> str:
    """Return the report as an HTML page.

    Args:
        title: heading, plain text.
        about: names and values to describe the model and the data, plain text.
        records: all pictures that were captioned.
        findings: of their captions.
        galleries: the pictures to show, by the names of `GALLERIES`.
        training: captions of the training pictures; None: unknown.

    Raises:
        ImageError: if a picture of the galleries cannot be read.
        MissingExtraError: if Jinja2 is not installed.
    """
    scores, captions = findings.scores, findings.captions.values()
    references = itertools.chain.from_iterable(record.captions for record in records)
    histograms = [
        count_lengths(captions, references),
        *(count_scores(name, scores.per_image[name].values()) for name in SHOWN),
    ]
    shown = [
        (name, GALLERIES[name], [_figure(record, caption, scores) for record, caption in pictures])
        for name, pictures in galleries.items()
        if pictures
    ]
    statistics = _parts().table("Captions", (), to_rows(describe(captions, training)), kind="statistics")
    tables = [_score_table(findings), statistics, _object_table(findings), _confidence_table(findings)]
    charts = [*map(draw, histograms), *_confidence_charts(findings)]
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return document(title, str(_parts().page(title, about, tables, charts, shown)), style)


@cache
def _parts() -> Any:
    """Return the macros of the template, which escape what they are given."""
    with require_extra("train", "the report"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html").module


def _score_table(findings: Findings) -> str:
    scores = findings.scores
    penalty_free = {name: f"{100 * value:.1f}" for name, value in scores.without_brevity_penalty.items()}
    rows = [
        (name, f"{100 * value:.1f}", format_interval(name, *findings.intervals[name]), penalty_free.get(name, ""))
        for name, value in scores.corpus.items()
    ]
    notes = [f"{metric} is unavailable: {reason}." for metric, reason in scores.unavailable.items()]
    return _parts().table("Scores", ("× 100", "Score", "95% interval", "Without brevity penalty"), rows, notes)


def _object_table(findings: Findings) -> str:
    """Return the table of objects, empty if none are known."""
    rows = [
        (
            name,
            format_score(name, value),
            format_interval(name, *findings.object_intervals[name]),
            count_wholes(findings.objects, name),
        )
        for name, value in findings.objects.corpus.items()
        if not math.isnan(value)
    ]
    return _parts().table("Objects", ("%", "Share", "95% interval", "Of"), rows) if rows else ""


def _confidence_table(findings: Findings) -> str:
    """Return the table of confidence, empty if the model has none."""
    rows = [
        (f"{metric}, {kind}", f"{100 * value:.1f}", format_interval(metric, low, high), f"{found.count:,}")
        for kind, found in findings.trust.items()
        for metric, (value, low, high) in found.figures.items()
    ]
    return _parts().table("Confidence", ("× 100", "Figure", "95% interval", "Of"), rows) if rows else ""


def _confidence_charts(findings: Findings) -> list[str]:
    charts = []
    for kind, found in findings.trust.items():
        points = [(part.confidence, part.confirmed) for part in found.bins]
        charts.append(draw_curve(f"Reliability, {kind}", "confidence", "confirmed", points, diagonal=True))
    if "captions" in findings.trust:
        curve = findings.trust["captions"].curve
        title = "Captions that are not confirmed"
        charts.append(draw_curve(title, "captioned, most confident first", "not confirmed", curve))
    return charts


def _figure(record: Record, caption: Caption, scores: Scores[str]) -> str:
    from markupsafe import Markup

    values = [(name, f"{100 * scores.per_image[name][record.image_id]:.1f}") for name in SHOWN]
    details = _parts().details(values, record.captions)
    return Markup(figure(record.image, caption, record.image.name, str(details)))


def count_lengths(captions: Iterable[str], references: Iterable[str]) -> Histogram:
    """Return the histogram of the lengths of raw captions and references, in tokens."""
    edges = np.arange(LONGEST + 2) - 0.5
    counts = {}
    for name, several in (("captions", captions), ("references", references)):
        lengths = [min(len(tokenize(caption)), LONGEST) for caption in several]
        counts[name] = np.histogram(lengths, edges)[0]
    labels = [f"{length} words" for length in range(LONGEST)] + [f"{LONGEST} words or more"]
    return Histogram("Length of captions", f"words ({LONGEST}: or more)", edges, labels, counts)


def count_scores(metric: str, scores: Iterable[float]) -> Histogram:
    """Return the histogram of the scores of single pictures, times 100."""
    values = 100 * np.array(list(scores))
    highest = HIGHEST.get(metric, max(values.max(), 1))
    step = round_step(highest, BINS)
    edges = step * np.arange(math.ceil(highest / step) + 1)
    counts = np.histogram(values.clip(0, edges[-1]), edges)[0]  # rounding may move a score beyond an end
    labels = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    return Histogram(f"{metric} of a picture", f"{metric} × 100", edges, labels, {"pictures": counts})


def round_step(span: float, most: int) -> float:
    """Return the smallest of ... 0.5, 1, 2, 5, 10, 20 ... of which at most `most` fit into the span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * times for times in (1, 2, 5, 10) if span <= most * power * times)


BAR_WIDTHS = (0.9, 0.42)
"""Widths in bins; a second series stands behind the first."""


@dataclass(frozen=True)
class Plot:
    """The coordinates of a chart in its SVG, for values from `low` to `high` and shares from 0 to `highest`."""

    low: float = 0
    high: float = 1
    highest: float = 1
    width: int = 300
    height: int = 190
    left: int = 36
    right: int = 288
    top: int = 8
    ground: int = 148

    def x(self, value: float) -> float:
        """Return the horizontal position of a value."""
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)

    def y(self, share: float) -> float:
        """Return the vertical position of a share."""
        return self.ground - (self.ground - self.top) * share / self.highest

    def draw(self, **parts: Any) -> str:
        """Return the chart as HTML; the macro `chart` of the template names its parts."""
        return _parts().chart(self, **{"diagonal": False, "bars": (), "points": (), "legend": (), **parts})


def draw(histogram: Histogram) -> str:
    """Return a histogram of shares as SVG with its title, and a legend if there are two series."""
    shares = {name: counts / max(counts.sum(), 1) for name, counts in histogram.counts.items()}
    first, last = histogram.edges[0], histogram.edges[-1]
    highest = max(share.max() for share in shares.values())
    step, tick = round_step(highest, 4), round_step(last - first, 6)
    top = step * math.ceil(highest / step)
    bars, peaks = [], []
    for series, (name, share) in reversed(list(enumerate(shares.items()))):
        margin = (1 - BAR_WIDTHS[len(shares) - 1 - series]) / 2
        for index in share.nonzero()[0]:
            low, high = histogram.edges[index : index + 2]
            space = margin * (high - low)
            label = f"{name}, {histogram.labels[index]}: {share[index]:.1%} ({histogram.counts[name][index]:,})"
            bars.append((series, low + space, high - space, share[index], label))
        peaks.append(f"{name}: most often {histogram.labels[share.argmax()]}, {share.max():.1%}")
    return Plot(first, last, top).draw(
        title=histogram.title,
        description="; ".join(peaks),
        axis=histogram.axis,
        grid=[(share, f"{100 * share:g}%") for share in np.arange(0, top + step / 2, step)],
        ticks=[(x, f"{x:g}") for x in np.arange(math.ceil(first / tick) * tick, last + tick / 100, tick)],
        bars=bars,
        legend=list(shares),
    )


def draw_curve(
    title: str, x_name: str, y_name: str, points: Sequence[tuple[float, float]], diagonal: bool = False
) -> str:
    """Return a curve of shares against shares, 0..1, as SVG with its title, and the diagonal for comparison."""
    labels = [f"{x_name} {x:.0%}: {y:.0%} {y_name}" for x, y in points]
    shares = [(share, f"{share:.0%}") for share in np.arange(0, 1.01, 0.25)]
    return Plot().draw(
        title=title,
        description=labels[-1],
        axis=x_name,
        grid=shares,
        ticks=shares,
        diagonal=diagonal,
        points=[(*point, label) for point, label in zip(points, labels, strict=True)],
    )
