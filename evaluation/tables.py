"""Scores as a Markdown table, for a paper or a README."""

from collections.abc import Mapping

from evaluation import bootstrap
from evaluation.metrics import Scores


def to_markdown(several: Mapping[str, Scores[str]], *, plain: bool = False) -> str:
    """Return a Markdown table, a row for each name, of the corpus scores times 100.

    Args:
        several: scores by what to call them; a metric that only some of them have is a dash in the others.
        plain: leave out the 95 % intervals.
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
