"""Words and their numbers.

A caption is lower-cased and cut into words by one rule, `split`; the words seen often enough become the
vocabulary, every other word is `<unk>`. Four special words come first, so that their numbers never change.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")

# What `split` does, by name: stored in checkpoints, so that a later rule cannot be mistaken for this one.
RULE = "words-1"
_WORD = re.compile(r"'s\b|[^\W_]+(?:['.-](?!s\b)[^\W_]+)*")


def split(text: str) -> list[str]:
    """Return the lower-case words of a caption, without punctuation; a possessive 's is a word of its own.

    "A dog's T-shirt isn't 2.5 ft." -> ["a", "dog", "'s", "t-shirt", "isn't", "2.5", "ft"]
    """
    text = unicodedata.normalize("NFKC", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return _WORD.findall(text.lower())


def join(words: Iterable[str]) -> str:
    """Return words as a sentence: spaces between them, none before a possessive 's."""
    return " ".join(words).replace(" 's", "'s")


class Vocabulary:
    """The words a network can read and write; a word's number is its place."""

    def __init__(self, words: Sequence[str]):
        """Hold `words`, the four special words first, each word once.

        Raises:
            ValueError: when `words` is not such a list.
        """
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(self.words)}
        if self.words[: len(SPECIAL)] != SPECIAL:
            raise ValueError(f"a vocabulary must open with {', '.join(SPECIAL)}")
        if len(self._ids) != len(self.words):
            raise ValueError("a vocabulary must hold each word once")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int) -> "Vocabulary":
        """Collect the words that occur at least `min_count` times, the most frequent first."""
        counts = Counter(word for caption in captions for word in split(caption))
        frequent = [word for word, count in counts.items() if count >= min_count]
        return cls([*SPECIAL, *sorted(frequent, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Return the numbers of a caption's words, `UNKNOWN` for those not held; no start or end word."""
        return [self._ids.get(word, UNKNOWN) for word in split(caption)]

    def decode(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Return the words of these numbers."""
        return tuple(self.words[number] for number in ids)
