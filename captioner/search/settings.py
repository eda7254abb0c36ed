"""How to choose the words of a caption."""

from dataclasses import dataclass
from typing import Annotated

from captioner import config
from captioner.config import Range

MAX_REQUIRED = 4
"""Maximum number of required words: a search with n of them does 2 ** n times the work."""


@dataclass(frozen=True)
class SearchSettings:
    """How to choose the words of a caption. The ranges keep time and memory bounded and every score finite.

    Raises:
        ValueError: if a field has the wrong type or is out of range, or two fields contradict each other. The
            message starts with the name of the field.
    """

    beam_size: Annotated[int, Range(1, 100)] = 5
    """Number of sentences that beam search keeps at each step. 1 is greedy search."""
    candidates: Annotated[int, Range(1, 1000)] = 1
    """Number of captions of each picture, best first. At most `beam_size`, or up to 1000 with `sample`. Beam search
    returns no sentence twice; sampling draws each sentence independently, so it may."""
    max_words: Annotated[int, Range(1, 1000)] = 20
    """Maximum number of words of a caption. For a vocabulary of word pieces, a piece counts as a word here and in
    the other limits. Beam search ends a sentence that gets this long where its score is best."""
    min_words: Annotated[int, Range(0, 1000)] = 1
    """Minimum number of words of a caption."""
    length_penalty: Annotated[float, Range(-10, 10)] = 0.8
    """Exponent of the length by which the score of a sentence is divided: higher favours longer captions. A
    sentence of T words, its end included, scores log-probability / T ** length_penalty: 1 compares means."""
    diverse_groups: Annotated[int, Range(1, 100)] = 1
    """Number of groups that the beam is divided into. It must divide `beam_size`. Each group avoids the words that
    earlier groups chose at the same position, so that the candidates differ."""
    diversity: Annotated[float, Range(0, 1000)] = 0.5
    """Log-probability that a word loses each time an earlier group chose it at the same position."""
    coverage_penalty: Annotated[float, Range(0, 1000)] = 0.0
    """Weight of coverage in the score: above 0 favours captions that attend to all of the picture. Beta of Wu et
    al. 2016 (arXiv 1609.08144), equation 14: beta times the sum over locations of log(min(attention summed over the
    words, 1)) is added to the score."""
    repeat_size: Annotated[int, Range(0, 1000)] = 4
    """Forbid phrases of up to this many words from following themselves ("a man a man"). 0 allows repeats."""
    bar_repeats: bool = True
    """Write a word at most once, unless captions written by people often repeat it ("a", "in")."""
    bar_unknown: bool = True
    """Never write `<unk>`."""
    alternatives: Annotated[int, Range(0, 100)] = 0
    """Number of other words to report for each word, the likeliest at its position."""
    ban: tuple[str, ...] = ()
    """Never write this word. Only the exact form is banned: "dog" does not ban "dogs"."""
    require: tuple[str, ...] = ()
    """Write this word, in any position; at most 4 words. Only the exact form counts. Not available with
    `sample`."""
    sample: bool = False
    """Draw words at random, by their probability, instead of searching for the best sentence."""
    temperature: Annotated[float, Range(0.001, 1000)] = 1.0
    """Temperature of sampling: below 1 favours likely words, above 1 unlikely ones."""
    top_k: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Sample from this many of the likeliest words only. 0 samples from all."""
    top_p: Annotated[float, Range(0, 1, exclude="low")] = 1.0
    """Sample from the fewest likeliest words whose probabilities sum to at least this."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Seed of sampling. The same seed gives the same sentences."""

    def __post_init__(self) -> None:
        config.check(self)
        if self.max_words < self.min_words:
            raise ValueError(f"max_words: must be at least min_words, {self.min_words}, got {self.max_words}")
        if len(self.require) > min(MAX_REQUIRED, self.max_words):
            raise ValueError(
                f"require: at most {MAX_REQUIRED} words and no more than max_words, got {len(self.require)}"
            )
        if self.sample and self.require:
            raise ValueError("require: not available with sampling; leave out sample")
        if self.sample and self.diverse_groups > 1:
            raise ValueError("diverse_groups: sampling has no beam to divide; leave out sample")
        if self.candidates > self.beam_size and not self.sample:
            raise ValueError(
                f"candidates: a beam of {self.beam_size} cannot give {self.candidates}; raise beam_size"
            )
        if self.beam_size % self.diverse_groups:
            multiple = -(-self.beam_size // self.diverse_groups) * self.diverse_groups
            raise ValueError(
                f"diverse_groups: must divide beam_size, {self.beam_size}, got {self.diverse_groups}; "
                f"a beam_size of {multiple} would do"
            )
        if self.diverse_groups > 1 and self.require:
            raise ValueError("diverse_groups: not available with required words; leave out require")
