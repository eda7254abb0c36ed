"""Tables of scores, times 100 as in papers: plain text for a terminal, and Markdown."""

from collections.abc import Mapping

from evaluation import bootstrap
from evaluation.bootstrap import Difference, Interval
from evaluation.metrics import Scores


def scores_to_text(scores: Scores[str], intervals: Mapping[str, Interval]) -> str:
    """Return one line per corpus score, with its confidence interval."""
    lines = [f"{'x 100':>16}{'95 % interval':>17}{'without penalty':>18}"]
    for metric, value in scores.corpus.items():
        interval = f"{100 * intervals[metric].low:.1f} to {100 * intervals[metric].high:.1f}"
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


def differences_to_text(first: Scores[str], second: Scores[str], differences: Mapping[str, Difference]) -> str:
    """Return one line per corpus score: first, second and their difference."""
    lines = [f"{'x 100':>16}{'second':>8}{'difference':>12}{'95 % interval':>18}{'p':>8}"]
    for metric, found in differences.items():
        interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
        scores = f"{100 * first.corpus[metric]:6.1f}{100 * second.corpus[metric]:8.1f}"
        lines.append(f"{metric:<10}{scores}{100 * found.value:+12.1f}{interval:>18}{found.p:8.3f}")
    return "\n".join([*lines, count_images(first)])


def scores_to_markdown(several: Mapping[str, Scores[str]], *, plain: bool = False) -> str:
    """Return a Markdown table of corpus scores, one row per name.

    Args:
        several: scores by name; missing scores are shown as a dash.
        plain: omit the 95 % intervals.
    """
    metrics = list(dict.fromkeys(metric for scores in several.values() for metric in scores.corpus))
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
