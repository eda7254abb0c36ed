"""Tables of scores, times 100 as in papers: plain text for a terminal, and Markdown."""

import math
from collections.abc import Mapping

from evaluation import bootstrap
from evaluation.bootstrap import Difference, Interval
from evaluation.metrics import CAPTION_METRICS, OBJECT_METRICS, Scores


def scores_to_text(scores: Scores[str], intervals: Mapping[str, Interval]) -> str:
    """Return one line per corpus score, with its confidence interval."""
    lines = [f"{'x 100':>16}{'95 % interval':>17}{'without penalty':>18}"]
    for metric, value in scores.corpus.items():
        interval = format_interval(metric, *intervals[metric])
        without = (
            f"{100 * scores.without_brevity_penalty[metric]:18.1f}"
            if metric in scores.without_brevity_penalty
            else ""
        )
        lines.append(f"{metric:<10}{100 * value:6.1f}{interval:>17}{without}")
    lines.append(count_images(scores))
    if len(scores.images) == 1:
        lines.append("CIDEr-D is 0 for a single image: it weights words by document frequency")
    return "\n".join(lines)


def objects_to_text(objects: Scores[str], intervals: Mapping[str, Interval]) -> str:
    """Return one line per score of `OBJECT_METRICS`, with its interval and the number of what it counts."""
    width = max(14, *(2 + len(name) for name in objects.corpus))
    lines = [f"{'%':>{width + 6}}{'95 % interval':>17}"]
    for name, value in objects.corpus.items():
        if math.isnan(value):
            lines.append(f"{name:<{width}}{'none':>6}")
        else:
            score, interval = format_score(name, value), format_interval(name, *intervals[name])
            lines.append(f"{name:<{width}}{score:>6}{interval:>17}  of {count_wholes(objects, name)}")
    return "\n".join(lines)


def format_score(name: str, value: float, sign: str = "-") -> str:
    """Return a score or a difference as text: times 100, or in nats if its name says so; with "+" by `sign`."""
    return f"{value:{sign}.2f}" if name.endswith("nats") else f"{100 * value:{sign}.1f}"


def format_interval(name: str, low: float, high: float, sign: str = "-") -> str:
    """Return an interval of a score as text."""
    return f"{format_score(name, low, sign)} to {format_score(name, high, sign)}"


def count_wholes(objects: Scores[str], name: str) -> str:
    """Return the number of what a score of `OBJECT_METRICS` counts, such as "312 nouns"."""
    return f"{sum(whole for _, whole in objects.counts[name].values()):,.0f} {OBJECT_METRICS[name].unit}"


def differences_to_text(first: Scores[str], second: Scores[str], differences: Mapping[str, Difference]) -> str:
    """Return one line per corpus score: first, second and their difference."""
    width = max(10, *(2 + len(name) for name in differences))
    lines = [f"{'x 100':>{width + 6}}{'second':>8}{'difference':>12}{'95 % interval':>18}{'p':>8}"]
    for name, found in differences.items():
        scores = f"{format_score(name, first.corpus[name]):>6}{format_score(name, second.corpus[name]):>8}"
        difference = format_score(name, found.value, "+")
        interval = format_interval(name, found.low, found.high, "+")
        lines.append(f"{name:<{width}}{scores}{difference:>12}{interval:>18}{found.p:8.3f}")
    return "\n".join([*lines, count_images(first)])


def scores_to_markdown(several: Mapping[str, Scores[str]], *, plain: bool = False) -> str:
    """Return a Markdown table of the scores of captions by name, with 95 % intervals unless `plain`.

    Missing scores are shown as a dash.
    """
    metrics = [
        name
        for metric in CAPTION_METRICS.values()
        for name in metric.names
        if any(name in scores.corpus for scores in several.values())
    ]
    lines = [["", *metrics], ["---", *["---:"] * len(metrics)]]
    for name, scores in several.items():
        intervals = {} if plain else bootstrap.intervals(scores)
        cells = []
        for metric in metrics:
            cell = f"{100 * scores.corpus[metric]:.1f}" if metric in scores.corpus else "–"
            if metric in intervals:
                cell += f" [{100 * intervals[metric].low:.1f}, {100 * intervals[metric].high:.1f}]"
            cells.append(cell)
        lines.append([name.replace("|", r"\|"), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count_images(scores: Scores[str]) -> str:
    """Return the number of scored images with its unit."""
    images = len(scores.images)
    return f"{images} images" if images != 1 else "1 image"
