"""What a model writes about a data set, as one HTML page: scores, histograms, and pictures with their attention."""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from captioner.caption import Caption
from captioner.page import document, figure
from evaluation.datasets import Record
from evaluation.findings import Findings
from evaluation.grounding import count_of, format_value
from evaluation.metrics import Scores
from evaluation.statistics import CaptionStatistics, describe, to_rows
from evaluation.tokenize import tokenize

SHOWN = ("CIDEr-D", "BLEU-4", "ROUGE-L")
"""The metrics of which single pictures tell something."""

HIGHEST = {"BLEU-4": 100, "ROUGE-L": 100}
"""Where the axis of a metric ends, times 100; that of CIDEr-D ends at its highest score, far below the possible."""

SCORE_TITLES = ("× 100", "Score", "95% interval", "Without brevity penalty")

CONFIDENCE_TITLES = ("× 100", "Figure", "95% interval", "Of")

OBJECT_TITLES = ("%", "Share", "95% interval", "Of")

LONGEST = 25
"""Words of a caption; longer ones count with these in histograms."""

BINS = 30
"""Of a histogram of scores, at most."""

GALLERIES = {
    "best": "The highest CIDEr-D, best first.",
    "worst": "The lowest CIDEr-D, worst first.",
    "random": "Drawn from all pictures, good and bad alike.",
}

HINT = """Point at a word, tap it, or reach it with the Tab key: the picture dims, and stays light where the network
looked while it wrote the word. The line below the picture says how much attention the brightest spot got: 1.0 ×
average would be a look at everything alike."""

STYLE = """
main { max-width: 78rem; margin: 0 auto; }
h1 { margin: 0 0 1rem; font-size: clamp(1.6rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 3rem 0 .75rem; font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; }
h3 { margin: 2.25rem 0 0; font-size: 1.1rem; }
p { margin: .25rem 0 1rem; max-width: 44rem; }
dl, dd, ul { margin: 0; padding: 0; }
.about { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
.about dt, .label, .own-scores dt { font-size: .75rem; color: var(--faint); }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 3rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 0 .35rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; }
th { font-weight: 400; vertical-align: top; }
th:first-child { padding-left: 0; text-align: left; }
thead th { font-size: .75rem; line-height: 1.2; color: var(--faint); vertical-align: bottom; }
td { color: var(--faint); }
.scores tbody { font-size: .9375rem; white-space: nowrap; }
.score, .statistics td { color: var(--ink); }
.score { font-weight: 600; }
table + p { margin-top: .75rem; font-size: .875rem; color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.5rem; }
.chart h3 { margin: 0 0 .25rem; font-size: 1rem; font-weight: 600; }
.chart svg { display: block; width: 100%; overflow: visible; font-size: 11px; fill: var(--faint); }
.grid { stroke: var(--rule); }
.right { stroke: var(--grey); stroke-dasharray: 3 4; fill: none; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; }
.point { fill: var(--accent); }
path.series-0 { fill: var(--accent); }
path.series-1 { fill: var(--grey); }
.legend { display: flex; gap: 1rem; margin: 0; font-size: .8125rem; color: var(--faint); }
.legend span::before {
  content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .4em; border-radius: .15em;
}
.legend .series-0::before { background: var(--accent); }
.legend .series-1::before { background: var(--grey); }
a { color: var(--accent); }
nav { display: flex; gap: 1.25rem; }
.gallery {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.25rem;
  align-items: start;
}
.own-scores { display: flex; padding: .6rem 1rem; border-block: 1px solid var(--rule); }
.own-scores div { flex: 1; }
.own-scores dd { font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.label { margin: 0; padding: .6rem 1rem .2rem; }
figcaption ul { padding: 0 1rem 1rem; list-style: none; font-size: .875rem; line-height: 1.4; }
figcaption li + li { margin-top: .35rem; }
"""


@dataclass(frozen=True)
class Histogram:
    """How often values fall into each bin, for one or more series that share the bins."""

    title: str
    axis: str
    """What is counted, and in which unit."""
    edges: np.ndarray
    """(bins + 1,), ascending."""
    labels: list[str]
    """What each bin is called."""
    counts: dict[str, np.ndarray]
    """(bins,) whole numbers by the name of the series."""


def choose(scores: Mapping[str, float], count: int, seed: int = 0) -> dict[str, list[str]]:
    """Return the image ids of each of `GALLERIES`, `count` or, if there are fewer, all.

    Args:
        scores: by image id.
        count: pictures of each gallery.
        seed: of the random ones.
    """
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
    """Return the whole page.

    Args:
        title: its heading, plain text.
        about: what was captioned, by what and how, by what each of these is called; plain text.
        records: all pictures that were captioned.
        findings: of their captions.
        galleries: the pictures to show, under the names of `GALLERIES`.
        training: captions that the model may have learned by heart; none: not known.

    Raises:
        ImageError: if one of these pictures cannot be read.
    """
    scores, captions = findings.scores, findings.captions.values()
    histograms = [
        count_lengths(captions, itertools.chain.from_iterable(record.captions for record in records)),
        *(count_scores(metric, scores.per_image[metric].values()) for metric in SHOWN),
    ]
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in about.items())
    links = "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name, shown in galleries.items() if shown)
    tables = _score_table(findings) + _statistics_table(describe(captions, training)) + _objects_table(findings)
    tables += _confidence_table(findings)
    charts = "".join(map(draw, histograms)) + _confidence_charts(findings)
    sections = [
        f'<header><h1>{escape(title)}</h1><dl class="about">{rows}</dl></header>',
        f'<div class="tables">{tables}</div>',
        f'<section><h2>Distributions</h2><div class="charts">{charts}</div></section>',
        f'<section><h2>Pictures</h2><p>{HINT}</p><nav aria-label="Pictures">{links}</nav></section>'
        if links
        else "",
        *(_gallery(name, shown, scores) for name, shown in galleries.items() if shown),
    ]
    return document(title, f"<main>{''.join(sections)}</main>", STYLE)


def _score_table(findings: Findings) -> str:
    scores = findings.scores
    lines = []
    for metric, value in scores.corpus.items():
        low, high = findings.intervals[metric]
        without = (
            f"{100 * scores.without_brevity_penalty[metric]:.1f}"
            if metric in scores.without_brevity_penalty
            else ""
        )
        lines.append(
            f'<tr><th scope="row">{metric}</th><td class="score">{100 * value:.1f}</td>'
            f"<td>{100 * low:.1f} to {100 * high:.1f}</td><td>{without}</td></tr>"
        )
    reasons = "".join(
        f"<p>{metric} is unavailable: {escape(reason)}.</p>"
        for metric, reason in findings.scores.unavailable.items()
    )
    titles = "".join(f'<th scope="col">{title}</th>' for title in SCORE_TITLES)
    return (
        f'<section><h2>Scores</h2><table class="scores"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>{reasons}</section>"
    )


def _statistics_table(statistics: CaptionStatistics) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(name.capitalize())}</th><td>{escape(value)}</td></tr>'
        for name, value in to_rows(statistics)
    )
    return f'<section><h2>Captions</h2><table class="statistics"><tbody>{lines}</tbody></table></section>'


def _objects_table(findings: Findings) -> str:
    """Return the shares of what is known of objects, empty where nothing is."""
    lines = []
    for name, (value, low, high, whole) in findings.objects.items():
        if value is not None and low is not None and high is not None:
            title = name[0].upper() + name[1:]
            lines.append(
                f'<tr><th scope="row">{escape(title)}</th><td class="score">{format_value(name, value)}</td>'
                f"<td>{format_value(name, low)} to {format_value(name, high)}</td>"
                f"<td>{whole:,.0f} {count_of(name)}</td></tr>"
            )
    if not lines:
        return ""
    titles = "".join(f'<th scope="col">{title}</th>' for title in OBJECT_TITLES)
    return (
        f'<section><h2>Objects</h2><table class="scores"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></section>"
    )


def _confidence_table(findings: Findings) -> str:
    """Return the figures of confidence, empty without any."""
    lines = []
    for kind, found in findings.trust.items():
        for metric, (value, low, high) in found.figures.items():
            title = metric[0].upper() + metric[1:]
            lines.append(
                f'<tr><th scope="row">{escape(title)}, {kind}</th><td class="score">{100 * value:.1f}</td>'
                f"<td>{100 * low:.1f} to {100 * high:.1f}</td><td>{found.count:,}</td></tr>"
            )
    if not lines:
        return ""
    titles = "".join(f'<th scope="col">{title}</th>' for title in CONFIDENCE_TITLES)
    return (
        f'<section><h2>Confidence</h2><table class="scores"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></section>"
    )


def _confidence_charts(findings: Findings) -> str:
    charts = []
    for kind, found in findings.trust.items():
        points = [(each.confidence, each.confirmed) for each in found.bins]
        charts.append(draw_curve(f"Reliability, {kind}", "confidence", "confirmed", points, diagonal=True))
    if "captions" in findings.trust:
        curve = findings.trust["captions"].curve
        title = "Captions that are not confirmed"
        charts.append(draw_curve(title, "captioned, most confident first", "not confirmed", curve))
    return "".join(charts)


def _gallery(name: str, shown: Sequence[tuple[Record, Caption]], scores: Scores[str]) -> str:
    figures = "".join(
        figure(record.image, caption, record.image.name, _details(record, scores)) for record, caption in shown
    )
    return (
        f'<section id="{name}"><h3>{name.capitalize()}</h3><p>{GALLERIES[name]}</p>'
        f'<div class="gallery">{figures}</div></section>'
    )


def _details(record: Record, scores: Scores[str]) -> str:
    figures = "".join(
        f"<div><dt>{metric}</dt><dd>{100 * scores.per_image[metric][record.image_id]:.1f}</dd></div>"
        for metric in SHOWN
    )
    references = "".join(f'<li dir="auto">{escape(caption)}</li>' for caption in record.captions)
    return f'<dl class="own-scores">{figures}</dl><p class="label">People wrote</p><ul>{references}</ul>'


def count_lengths(captions: Iterable[str], references: Iterable[str]) -> Histogram:
    """Return the histogram of the words in raw captions, tokenized as for scores, and in references."""
    edges = np.arange(LONGEST + 2) - 0.5
    counts = {}
    for name, several in (("captions", captions), ("references", references)):
        lengths = [min(len(tokenize(caption)), LONGEST) for caption in several]
        counts[name] = np.histogram(lengths, edges)[0]
    labels = [f"{length} words" for length in range(LONGEST)] + [f"{LONGEST} words or more"]
    return Histogram("Length of captions", f"words ({LONGEST}: or more)", edges, labels, counts)


def count_scores(metric: str, scores: Iterable[float]) -> Histogram:
    """Return the histogram of a metric's scores of single pictures, times 100."""
    values = 100 * np.array(list(scores))
    highest = HIGHEST.get(metric, max(values.max(), 1))
    step = round_step(highest, BINS)
    edges = step * np.arange(math.ceil(highest / step) + 1)
    counts = np.histogram(values.clip(0, edges[-1]), edges)[0]  # what rounding moves beyond an end counts, too
    labels = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    return Histogram(f"{metric} of a picture", f"{metric} × 100", edges, labels, {"pictures": counts})


def round_step(span: float, most: int) -> float:
    """Return the smallest of ... 0.5, 1, 2, 5, 10, 20 ... of which at most so many fit into the span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * times for times in (1, 2, 5, 10) if span <= most * power * times)


WIDTH, HEIGHT = 300, 190  # of a chart, in units that are pixels where it has just that width
LEFT, RIGHT, TOP, BOTTOM = 36, 12, 8, 42  # margins around the bars
BAR_WIDTHS = (0.9, 0.42)  # in bins; a second series stands behind the first


def draw(histogram: Histogram) -> str:
    """Return the histogram as SVG under its title, with shares upwards and a legend if there are two series."""
    shares = {name: counts / max(counts.sum(), 1) for name, counts in histogram.counts.items()}
    first, last = histogram.edges[0], histogram.edges[-1]
    highest = max(share.max() for share in shares.values())
    step = round_step(highest, 4)
    top = step * math.ceil(highest / step)
    ground = HEIGHT - BOTTOM

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first)

    def up(share: float) -> float:
        return ground - (ground - TOP) * share / top

    marks = []
    for share in np.arange(0, top + step / 2, step):
        marks.append(f'<path class="grid" d="M{LEFT} {up(share):.1f}H{WIDTH - RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{up(share) + 4:.1f}" text-anchor="end">{100 * share:g}%</text>')
    tick = round_step(last - first, 6)
    for value in np.arange(math.ceil(first / tick) * tick, last + tick / 100, tick):
        marks.append(f'<text x="{across(value):.1f}" y="{ground + 16}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(histogram.axis)}</text>')

    peaks = []
    for place, (name, share) in reversed(list(enumerate(shares.items()))):
        margin = (1 - BAR_WIDTHS[len(shares) - 1 - place]) / 2
        for number in share.nonzero()[0]:
            low, high = histogram.edges[number : number + 2]
            left, right = across(low + margin * (high - low)), across(high - margin * (high - low))
            label = f"{name}, {histogram.labels[number]}: {share[number]:.1%} ({histogram.counts[name][number]:,})"
            path = f"M{left:.1f} {ground}V{up(share[number]):.1f}H{right:.1f}V{ground}Z"
            marks.append(f'<path class="series-{place}" d="{path}"><title>{escape(label)}</title></path>')
        peaks.append(f"{name}: most often {histogram.labels[share.argmax()]}, {share.max():.1%}")
    legend = "".join(f'<span class="series-{place}">{name}</span>' for place, name in enumerate(shares))
    title = escape(histogram.title)
    return (
        f'<div class="chart"><h3>{title}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}. {escape("; ".join(peaks))}.">{"".join(marks)}</svg>'
        + (f'<p class="legend">{legend}</p>' if len(shares) > 1 else "")
        + "</div>"
    )


def draw_curve(
    title: str, across_name: str, up_name: str, points: Sequence[tuple[float, float]], diagonal: bool = False
) -> str:
    """Return shares against shares as SVG under its title.

    Args:
        title: of the chart.
        across_name: what the first number of a point is, for the axis.
        up_name: what the second is.
        points: at least one, of numbers from 0 to 1.
        diagonal: whether to draw where both are the same, and each point.
    """
    ground, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    places = [(LEFT + (end - LEFT) * across, ground - (ground - TOP) * up) for across, up in points]
    marks = []
    for share in np.arange(0, 1.01, 0.25):
        up, across = ground - (ground - TOP) * share, LEFT + (end - LEFT) * share
        marks.append(f'<path class="grid" d="M{LEFT} {up:.1f}H{end}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        marks.append(f'<text x="{across:.1f}" y="{ground + 16}" text-anchor="middle">{share:.0%}</text>')
    marks.append(f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across_name)}</text>')
    if diagonal:
        marks.append(f'<path class="right" d="M{LEFT} {ground}L{end} {TOP}"/>')
    line = "L".join(f"{across:.1f} {up:.1f}" for across, up in places)
    marks.append(f'<path class="line" d="M{line}"/>')
    for (across, up), (first, second) in zip(places, points, strict=True):
        label = f"{across_name} {first:.0%}: {second:.0%} {up_name}"
        circle = f'<circle class="point" cx="{across:.1f}" cy="{up:.1f}" r="{3 if diagonal else 2}">'
        marks.append(f"{circle}<title>{escape(label)}</title></circle>")
    last = f"{across_name} {points[-1][0]:.0%}: {points[-1][1]:.0%} {up_name}"
    return (
        f'<div class="chart"><h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}. {escape(last)}.">{"".join(marks)}</svg></div>'
    )
