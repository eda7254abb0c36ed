"""Words and their numbers.

A caption is lower-cased and cut into words by one rule, `split`. A vocabulary holds the words seen often enough,
and every other word is `<unk>`; or it holds pieces of words, and any word of known characters can be spelt. Four
special words come first, so that their numbers never change.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any

from captioner.errors import ConfigError, DataError, MissingExtraError
from captioner.installation import install_hint

PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")

# What `split` does, by name: stored in checkpoints, so that a later rule cannot be mistaken for this one.
RULE = "words-1"
# The rule of a vocabulary of pieces: `split`, then byte-pair encoding of each word.
PIECES_RULE = "pieces-1"
# Closes the last piece of a word. No word holds "<" or "/".
END_OF_WORD = "</w>"
# The least share, of the captions that have a word, that have it twice, for it to be one that may come twice.
REPEATED = 0.05
# Stands for any combining mark, such as the vowel signs of Indic and Thai scripts.
_MARK = "\N{COMBINING GRAVE ACCENT}"
# What joins the parts of a word: apostrophe, full stop, hyphen, Hebrew punctuation, zero-width (non-)joiner.
_JOINERS = "'.\N{HEBREW PUNCTUATION GERESH}\N{HEBREW PUNCTUATION GERSHAYIM}\u200c\u200d-"
_PART = rf"[^\W_]+(?:{_MARK}+[^\W_]*)*"
_WORD = re.compile(rf"'s\b|{_PART}(?:[{_JOINERS}](?!s\b){_PART})*")


def split(text: str) -> list[str]:
    """Return the lower-case words of a caption, without punctuation; a possessive 's is a word of its own.

    A word is a run of letters, digits and combining marks, so that it stays whole in every script. Languages that
    put no spaces between words, such as Thai and Chinese, need a vocabulary of pieces: a phrase is one word here.

    "A dog's T-shirt isn't 2.5 ft." -> ["a", "dog", "'s", "t-shirt", "isn't", "2.5", "ft"]
    """
    text = unicodedata.normalize("NFKC", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()
    if text.isascii():
        return _WORD.findall(text)
    # `re` has no class for marks.
    outline = "".join(_MARK if _is_mark(character) else character for character in text)
    return [text[slice(*word.span())] for word in _WORD.finditer(outline)]


@lru_cache(maxsize=1 << 12)
def _is_mark(character: str) -> bool:
    """Return whether a character is a combining mark; variation selectors, which emoji have, are none."""
    return unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"


def join(words: Iterable[str]) -> str:
    """Return words as a sentence: spaces between them, none before a possessive 's."""
    return " ".join(words).replace(" 's", "'s")


class Vocabulary:
    """What a network can read and write: words, or pieces of words. The number of each is its place.

    Pieces come from byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909, section 3.2), where the last piece
    of a word ends in `END_OF_WORD`. Every character of the captions that they were learnt from is a piece, within a
    word and at its end, so only a word with a character never seen is `<unk>`. No such word was in those captions,
    so a network trained on them never learns to write it.

    Learning pieces and `encode` with them use the `tokenizers` library; `spans` and `decode` need nothing.
    """

    def __init__(
        self,
        words: Sequence[str],
        merges: Sequence[tuple[str, str]] = (),
        repeated: Sequence[str] | None = None,
    ):
        """Hold `words`, the four special words first, each word once.

        Args:
            words: or pieces, if there are merges.
            merges: which two pieces join into a longer one, the first to be tried first; none for whole words.
            repeated: those of the words that a caption may have more than once; none: all of them.

        Raises:
            ValueError: when `words` is not such a list, `merges` use or make pieces that are not in it, or
                `repeated` names others.
        """
        self.words = tuple(words)
        self.merges = tuple(merges)
        self.repeated = None if repeated is None else tuple(repeated)
        self._ids = {word: number for number, word in enumerate(self.words)}
        if self.words[: len(SPECIAL)] != SPECIAL:
            raise ValueError(f"a vocabulary must open with {', '.join(SPECIAL)}")
        if len(self._ids) != len(self.words):
            raise ValueError("a vocabulary must hold each word once")
        for left, right in self.merges:
            if not {left, right, left + right} <= self._ids.keys():
                raise ValueError(f"a vocabulary must hold {left!r} and {right!r}, and what they merge into")
        unheld = set(self.repeated or ()) - self._ids.keys()
        if unheld:
            raise ValueError(f"a vocabulary must hold {min(unheld)!r}, which is said to be repeated")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int) -> "Vocabulary":
        """Collect the words that occur at least `min_count` times, the most frequent first.

        A word may come twice if it does so in at least the share `REPEATED` of the captions that have it: such as
        "a" and "in", but not "bed".
        """
        counts: Counter[str] = Counter()
        once: Counter[str] = Counter()
        twice: Counter[str] = Counter()
        for caption in captions:
            here = Counter(split(caption))
            counts.update(here)
            once.update(here.keys())
            twice.update(word for word, count in here.items() if count > 1)
        frequent = [word for word, count in counts.items() if count >= min_count]
        words = sorted(frequent, key=lambda word: (-counts[word], word))
        repeated = [word for word in words if twice[word] >= REPEATED * once[word]]
        return cls([*SPECIAL, *words], repeated=repeated)

    @classmethod
    def build_pieces(cls, captions: Iterable[str], size: int) -> "Vocabulary":
        """Learn pieces of words: single characters, then the most frequent pairs joined, until there are `size`.

        The same captions give the same pieces. There are fewer than `size` when every word is a piece before that.

        Raises:
            ConfigError: when `size` has no room for more than the single characters.
            DataError: when no word has two characters to join.
            MissingExtraError: when the `tokenizers` library is not installed.
        """
        library = _tokenizers()
        lines = [" ".join(split(caption)) for caption in captions]
        characters = sorted(set().union(*lines) - {" "})
        single = [*SPECIAL, *characters, *(character + END_OF_WORD for character in characters)]
        if size <= len(single):
            raise ConfigError(f"pieces: must be above {len(single)}, the single characters, got {size}")
        tokenizer = library.Tokenizer(library.models.BPE(end_of_word_suffix=END_OF_WORD))
        tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
        # Ties between pairs are decided by the pieces' numbers. The library would number characters at the end of
        # words in the order of a hash table, other in every run; those it is told of first keep their order.
        trainer = library.trainers.BpeTrainer(
            vocab_size=size, special_tokens=single, end_of_word_suffix=END_OF_WORD, show_progress=False
        )
        tokenizer.train_from_iterator(lines, trainer)
        merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
        if not merges:
            raise DataError("pieces cannot be learnt: no word of the captions has more than one character")
        # Two merges may make the same piece.
        return cls(list(dict.fromkeys([*single, *(left + right for left, right in merges)])), merges)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def rule(self) -> str:
        """The name of how captions become numbers: `RULE` or `PIECES_RULE`."""
        return PIECES_RULE if self.merges else RULE

    def encode(self, caption: str) -> list[int]:
        """Return the numbers of a caption's words or pieces, `UNKNOWN` for a word that cannot be written.

        There is no start and no end word.

        Raises:
            MissingExtraError: when this vocabulary holds pieces, and the `tokenizers` library is not installed.
        """
        if not self.merges:
            return [self._ids.get(word, UNKNOWN) for word in split(caption)]
        return [number for word in split(caption) for number in self._cut(word)]

    def _cut(self, word: str) -> list[int]:
        numbers = [token.id for token in self._byte_pairs.tokenize(word)]
        return [UNKNOWN] if UNKNOWN in numbers else numbers

    @cached_property
    def _byte_pairs(self) -> Any:
        """The library's model of these pieces."""
        return _tokenizers().models.BPE(
            vocab=self._ids,
            merges=list(self.merges),
            unk_token=SPECIAL[UNKNOWN],
            end_of_word_suffix=END_OF_WORD,
        )

    @cached_property
    def within(self) -> tuple[int, ...]:
        """The pieces after which a word goes on."""
        return tuple(number for number in range(len(self)) if not self._ends_word(number))

    @cached_property
    def once(self) -> tuple[int, ...]:
        """The words that a caption has no more than once."""
        if self.repeated is None:
            return ()
        repeated = set(self.repeated)
        return tuple(number for number, word in enumerate(self.words) if number > UNKNOWN and word not in repeated)

    def completing(self, ids: Sequence[int], words: Iterable[str], last: bool = False) -> list[int]:
        """Return the numbers that, written after `ids`, would complete one of `words`, however it is cut.

        Args:
            ids: what is written so far.
            words: as `split` gives them; those that cannot be written have no number.
            last: whether nothing but the end can follow, which completes a word as well.
        """
        spans = self.spans(ids)
        begun = "" if not spans or self._ends_word(ids[-1]) else "".join(self.words[one] for one in ids[spans[-1]])
        rests = [word.removeprefix(begun) for word in words if word.startswith(begun)]
        closed = [rest + END_OF_WORD for rest in rests] if self.merges else rests
        found = [self._ids[rest] for rest in (closed + rests if last else closed) if rest in self._ids]
        return [END, *found] if "" in rests else found

    def spans(self, ids: Sequence[int]) -> list[slice]:
        """Return, for each word of `decode(ids)`, which of `ids` it is made of; together they are all of them."""
        ends = [stop for stop, number in enumerate(ids, 1) if self._ends_word(number)]
        if len(ids) > (ends[-1] if ends else 0):  # cut off within a word
            ends.append(len(ids))
        return [slice(start, stop) for start, stop in pairwise([0, *ends])]

    def _ends_word(self, number: int) -> bool:
        return not self.merges or number < len(SPECIAL) or self.words[number].endswith(END_OF_WORD)

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return the whole words of these numbers; pieces at the end that end no word are a word too."""
        pieces = [self.words[number].removesuffix(END_OF_WORD) for number in ids]
        return tuple("".join(pieces[span]) for span in self.spans(ids))


def _tokenizers() -> ModuleType:
    """Import the library of byte-pair encoding, which captioning does without.

    Raises:
        MissingExtraError: when it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError(
            "a vocabulary of pieces needs the tokenizers library, part of the extra `train`. "
            f"Install it with: {install_hint('train')}"
        ) from error
    return tokenizers
