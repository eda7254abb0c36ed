"""Statistics of captions that need no references: distinct captions, lengths, repetition, unfinished sentences."""

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
"""Words that cannot end a caption: articles, conjunctions, prepositions, auxiliaries."""


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics of a set of captions; shares are 0..1."""

    captions: int
    distinct: int
    """Number of distinct captions, by their tokens."""
    vocabulary: int
    """Number of distinct words."""
    mean_words: float
    copied: float | None
    """Share of captions that are training captions, word for word; None: unknown."""
    repeats_at_once: float
    """Share with a word twice in a row, as "a a dog"."""
    repeats_two_words: float
    """Share with a repeated bigram, as "a cat on top of a cat"."""
    unfinished: float
    """Share that ends in a word of `UNFINISHED`, as "a man on a"."""
    unknown: float
    """Share that contains `<unk>`."""


def describe(captions: Iterable[str], training: Iterable[str] | None = None) -> CaptionStatistics:
    """Return the statistics of raw captions, tokenized as for scoring; `training` are those of training pictures.

    Raises:
        DataError: if there is no caption.
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
        repeats_at_once=fmean(
            any(word == following for word, following in itertools.pairwise(caption)) for caption in words
        ),
        repeats_two_words=fmean(map(_repeats_two_words, words)),
        unfinished=fmean(bool(caption) and caption[-1] in UNFINISHED for caption in words),
        unknown=fmean(UNKNOWN in caption.lower() for caption in raw),
    )


def _repeats_two_words(caption: Sequence[str]) -> bool:
    pairs = list(itertools.pairwise(caption))
    return len(set(pairs)) < len(pairs)


def to_rows(statistics: CaptionStatistics) -> list[tuple[str, str]]:
    """Return the name and the value of each figure."""
    copied = "unknown" if statistics.copied is None else f"{statistics.copied:.1%}"
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
    """Return one line per figure."""
    return "\n".join(f"{name:<25}{figure}" for name, figure in to_rows(statistics))
