"""What captions are like, whatever the pictures show: how many differ, how long they are, what goes wrong."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from captioner.errors import DataError
from evaluation.tokenize import tokenize

UNKNOWN = "<unk>"

UNFINISHED = frozenset(
    word
    for words in (
        "a an the",  # articles
        "and or but while as",  # conjunctions
        "of in on at to by for from with into onto over under through near next",  # prepositions
        "is are",
    )
    for word in words.split()
)
"""Words that no finished caption ends with: articles, conjunctions, prepositions, auxiliaries."""


@dataclass(frozen=True)
class CaptionStatistics:
    """Of a set of captions; shares lie in 0..1."""

    captions: int
    distinct: int
    """Different captions, by their tokens."""
    vocabulary: int
    """Different words."""
    mean_words: float
    copied: float | None
    """Share of captions that a training picture has word for word; none: training captions are not at hand."""
    repeats_at_once: float
    """Share with a word twice in a row, "a a dog"."""
    repeats_two_words: float
    """Share with the same two words in two places, "a cat on top of a cat"."""
    unfinished: float
    """Share that ends in one of `UNFINISHED`, "a man on a"."""
    unknown: float
    """Share that holds `<unk>`."""


def describe(captions: Iterable[str], training: Iterable[str] | None = None) -> CaptionStatistics:
    """Return the statistics of raw captions, tokenized as for scores.

    Args:
        captions: one or more.
        training: the captions that the writer learned from, if they are known.

    Raises:
        DataError: without any caption.
    """
    raw = list(captions)
    if not raw:
        raise DataError("captions: expected at least one")
    words = [tuple(tokenize(caption)) for caption in raw]
    known = None if training is None else {tuple(tokenize(caption)) for caption in training}
    return CaptionStatistics(
        captions=len(words),
        distinct=len(set(words)),
        vocabulary=len({word for caption in words for word in caption}),
        mean_words=fmean(map(len, words)),
        copied=None if known is None else fmean(caption in known for caption in words),
        repeats_at_once=fmean(any(one == two for one, two in itertools.pairwise(caption)) for caption in words),
        repeats_two_words=fmean(map(_repeats_two_words, words)),
        unfinished=fmean(bool(caption) and caption[-1] in UNFINISHED for caption in words),
        unknown=fmean(UNKNOWN in caption.lower() for caption in raw),
    )


def _repeats_two_words(caption: Sequence[str]) -> bool:
    pairs = list(itertools.pairwise(caption))
    return len(set(pairs)) < len(pairs)


def to_rows(statistics: CaptionStatistics) -> list[tuple[str, str]]:
    """Return what each figure is called, and the figure."""
    copied = "not known" if statistics.copied is None else f"{statistics.copied:.1%}"
    return [
        ("captions", f"{statistics.captions:,}, {statistics.distinct:,} of them distinct"),
        ("words", f"{statistics.mean_words:.1f} a caption, {statistics.vocabulary:,} different ones"),
        ("copied from training", copied),
        ("a word twice in a row", f"{statistics.repeats_at_once:.1%}"),
        ("two words in two places", f"{statistics.repeats_two_words:.1%}"),
        ("unfinished", f"{statistics.unfinished:.1%}"),
        ("with <unk>", f"{statistics.unknown:.1%}"),
    ]


def to_text(statistics: CaptionStatistics) -> str:
    """Return a line for each figure."""
    return "\n".join(f"{name:<25}{figure}" for name, figure in to_rows(statistics))
