"""Search: beam search (greedy is a beam of one), diverse and constrained beam search, and sampling.

NumPy over an engine's `step` (see `captioner.engine`), independent of models, vocabularies and files.
Shapes: B images, K rows each, V vocabulary size, T words of a sentence, L locations of the grid.
"""

from captioner.search.constraints import (
    BanWords,
    BanWordsAfter,
    Constraint,
    MinimumLength,
    NoRepeatedPhrase,
    NoRepeatedWord,
)
from captioner.search.hypothesis import Alternatives, Hypothesis
from captioner.search.loop import search
from captioner.search.settings import SearchSettings

__all__ = [
    "Alternatives",
    "BanWords",
    "BanWordsAfter",
    "Constraint",
    "Hypothesis",
    "MinimumLength",
    "NoRepeatedPhrase",
    "NoRepeatedWord",
    "SearchSettings",
    "search",
]
