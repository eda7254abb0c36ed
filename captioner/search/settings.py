"""How to choose the words of a caption."""

from dataclasses import dataclass, fields

MOST_REQUIRED = 4
"""Maximum number of required words: a search with n of them does 2 ** n times the work."""

_BOUNDS: dict[str, tuple[float, float]] = {
    "beam_size": (1, 100),
    "candidates": (1, 1000),
    "max_words": (1, 1000),
    "min_words": (0, 1000),
    "length_penalty": (-10, 10),
    "diverse_groups": (1, 100),
    "diversity": (0, 1000),
    "coverage_penalty": (0, 1000),
    "repeat_size": (0, 1000),
    "alternatives": (0, 100),
    "temperature": (0.001, 1000),
    "top_k": (0, 2**31 - 1),
    "seed": (0, 2**63 - 1),
}
"""Lowest and highest value of each number. They keep time and memory bounded and every score finite."""


@dataclass(frozen=True)
class SearchSettings:
    """How to choose the words of a caption.

    Raises:
        ValueError: when a field has the wrong type or is out of range, or two fields contradict each other. The
            message starts with the name of the field.
    """

    beam_size: int = 5
    """Number of sentences that beam search keeps at each word, 1 to 100. With 1 it is greedy search."""
    candidates: int = 1
    """Number of sentences to return for each picture, best first: at most `beam_size`, or up to 1000 with `sample`.
    Beam search returns no sentence twice; sampling draws each sentence independently, so it may."""
    max_words: int = 20
    """Maximum length of a sentence in words, 1 to 1000. For a vocabulary of word pieces, a piece counts as a word
    here and in the other limits. Beam search ends a sentence that gets this long where its score is best."""
    min_words: int = 1
    """Minimum length of a sentence in words."""
    length_penalty: float = 0.8
    """Exponent of the length by which the score of a sentence is divided, -10 to 10. A sentence of T words, its end
    included, scores log-probability / T ** length_penalty: 0 favours short sentences, 1 compares means."""
    diverse_groups: int = 1
    """Number of groups that the beam is divided into; it must divide `beam_size`. Each group avoids the words that
    earlier groups chose at the same position, so that the candidates differ."""
    diversity: float = 0.5
    """Log-probability that a word loses each time an earlier group chose it at the same position, 0 to 1000."""
    coverage_penalty: float = 0.0
    """Weight of coverage in the score, 0 to 1000; above 0, sentences win that look at all of the picture. Beta of
    Wu et al. 2016 (arXiv 1609.08144), equation 14: beta times the sum over locations of
    log(min(attention summed over the words, 1)) is added to the score."""
    repeat_size: int = 4
    """Forbid phrases of up to this many words from following themselves ("a man a man"). 0 allows repeats."""
    bar_repeats: bool = True
    """Write a word at most once, unless captions written by people often repeat it ("a", "in")."""
    bar_unknown: bool = True
    """Never write `<unk>`."""
    alternatives: int = 0
    """Number of other words to report for each word, the likeliest at its position, 0 to 100."""
    ban: tuple[str, ...] = ()
    """Words never to write. Only the exact form is banned: "dog" does not ban "dogs"."""
    require: tuple[str, ...] = ()
    """Words that every sentence must contain, in any order, at most 4. Only the exact form counts. Not available
    with `sample`."""
    sample: bool = False
    """Draw words at random, by their probability, instead of searching for the best sentence."""
    temperature: float = 1.0
    """Temperature of sampling, 0.001 to 1000: below 1 favours likely words, above 1 unlikely ones."""
    top_k: int = 0
    """Sample from this many of the likeliest words only. 0 samples from all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest words whose probabilities sum to at least this, above 0 and at most 1."""
    seed: int = 0
    """Seed of sampling. The same seed gives the same sentences."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not _has_type(value, field.type):
                raise ValueError(f"{field.name}: expected {_TYPES[field.type]}, got {value!r}")
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: must be at least {low} and at most {high}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be above 0 and at most 1, got {self.top_p}")
        if self.max_words < self.min_words:
            raise ValueError(f"max_words: must be at least min_words, {self.min_words}, got {self.max_words}")
        if len(self.require) > min(MOST_REQUIRED, self.max_words):
            raise ValueError(
                f"require: at most {MOST_REQUIRED} words and no more than max_words, got {len(self.require)}"
            )
        if self.sample:
            if self.require:
                raise ValueError("require: words drawn at random cannot be required; leave out sample")
            if self.diverse_groups > 1:
                raise ValueError("diverse_groups: sampling has no beam to divide; leave out sample")
        elif self.candidates > self.beam_size:
            raise ValueError(
                f"candidates: a beam of {self.beam_size} cannot give {self.candidates}; raise beam_size"
            )
        if self.beam_size % self.diverse_groups:
            even = -(-self.beam_size // self.diverse_groups) * self.diverse_groups
            raise ValueError(
                f"diverse_groups: must divide beam_size, {self.beam_size}, got {self.diverse_groups}; "
                f"a beam_size of {even} would do"
            )
        if self.diverse_groups > 1 and self.require:
            raise ValueError("diverse_groups: required words divide the beam in their own way; leave out require")


_TYPES: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple[str, ...]: "a tuple of words",
}


def _has_type(value: object, expected: object) -> bool:
    """Return whether a value is of a field's type; an int is a float too, and a bool is no number."""
    if expected == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is expected
