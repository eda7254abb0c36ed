"""The tokenizer and the vocabulary.

A caption is lower-cased and split into words by `split`. A vocabulary contains frequent words, and all others are
`<unk>`; or it contains word pieces, which spell any word of known characters. The four special words come first, so
that their ids never change.
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

from captioner.errors import ConfigError, DataError
from captioner.installation import require_extra

PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
"""The special words, whose token ids are `PAD`, `START`, `END` and `UNKNOWN`."""
RULE = "words-1"
"""Name of the tokenizer `split`, stored in model files, which distinguishes it from later versions."""
PIECES_RULE = "pieces-1"
"""Name of the tokenizer of word pieces: `split`, then byte-pair encoding of each word."""
END_OF_WORD = "</w>"
"""Ends the last piece of a word. Words never contain "<" or "/"."""
REPEATED = 0.05
"""Minimum share of captions with a word that contain it twice, for words that may be repeated."""

# Represents any combining mark, such as the vowel signs of Indic and Thai scripts.
_MARK = "\N{COMBINING GRAVE ACCENT}"
# Joiners within words: apostrophe, full stop, hyphen, Hebrew punctuation, zero-width (non-)joiner.
_JOINERS = "'.\N{HEBREW PUNCTUATION GERESH}\N{HEBREW PUNCTUATION GERSHAYIM}\u200c\u200d-"
_PART = rf"[^\W_]+(?:{_MARK}+[^\W_]*)*"
_WORD = re.compile(rf"'s\b|{_PART}(?:[{_JOINERS}](?!s\b){_PART})*")


def split(text: str) -> list[str]:
    """Return the lower-case words of a caption, without punctuation; a possessive 's is a separate word.

    A word is a sequence of letters, digits and combining marks in any script. Languages without spaces between
    words, such as Thai and Chinese, need a vocabulary of pieces: a phrase is one word here.

    "A dog's T-shirt isn't 2.5 ft." -> ["a", "dog", "'s", "t-shirt", "isn't", "2.5", "ft"]
    """
    text = unicodedata.normalize("NFKC", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()
    if text.isascii():
        return _WORD.findall(text)
    # `re` has no class for combining marks.
    outline = "".join(_MARK if _is_mark(character) else character for character in text)
    return [text[slice(*word.span())] for word in _WORD.finditer(outline)]


@lru_cache(maxsize=1 << 12)
def _is_mark(character: str) -> bool:
    """Return whether a character is a combining mark; variation selectors of emoji are not."""
    return unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"


def join(words: Iterable[str]) -> str:
    """Join words with spaces, without a space before a possessive 's."""
    return " ".join(words).replace(" 's", "'s")


class Vocabulary:
    """The words, or word pieces, of a network. The token id of a word is its index.

    Pieces come from byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909, section 3.2), where the last piece
    of a word ends with `END_OF_WORD`. Every character of the training captions is a piece, both within a word and
    at its end, so only words with unknown characters are `<unk>`, which the network never learns to write.

    Learning pieces and encoding with them need the `tokenizers` library; `spans` and `decode` do not.
    """

    def __init__(
        self,
        words: Sequence[str],
        merges: Sequence[tuple[str, str]] = (),
        repeated: Sequence[str] | None = None,
    ):
        """Check and store the words.

        Args:
            words: distinct words or pieces, the four special words first.
            merges: pairs of pieces that merge, in order of priority; empty for whole words.
            repeated: words that may be repeated in a caption. None: all.

        Raises:
            ValueError: if `words` is invalid, or `merges` or `repeated` contain pieces or words that are not in it.
        """
        self.words = tuple(words)
        self.merges = tuple(merges)
        self.repeated = None if repeated is None else tuple(repeated)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if self.words[: len(SPECIAL)] != SPECIAL:
            raise ValueError(f"a vocabulary must start with {', '.join(SPECIAL)}")
        if len(self._ids) != len(self.words):
            raise ValueError("a vocabulary must not contain duplicates")
        for left, right in self.merges:
            if not {left, right, left + right} <= self._ids.keys():
                raise ValueError(
                    f"a vocabulary must contain {left!r}, {right!r} and {left + right!r}, which are merged"
                )
        if missing := set(self.repeated or ()) - self._ids.keys():
            raise ValueError(f"a vocabulary must contain {min(missing)!r}, which is in `repeated`")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int) -> "Vocabulary":
        """Collect the words that occur at least `min_count` times, the most frequent first.

        A word may be repeated if at least the share `REPEATED` of the captions with it do so: such as "a" and "in",
        but not "bed".
        """
        counts: Counter[str] = Counter()
        captions_with: Counter[str] = Counter()
        repeats: Counter[str] = Counter()
        for caption in captions:
            words_of_caption = Counter(split(caption))
            counts.update(words_of_caption)
            captions_with.update(words_of_caption.keys())
            repeats.update(word for word, count in words_of_caption.items() if count > 1)
        frequent = [word for word, count in counts.items() if count >= min_count]
        words = sorted(frequent, key=lambda word: (-counts[word], word))
        repeated = [word for word in words if repeats[word] >= REPEATED * captions_with[word]]
        return cls([*SPECIAL, *words], repeated=repeated)

    @classmethod
    def build_pieces(cls, captions: Iterable[str], size: int) -> "Vocabulary":
        """Learn word pieces: single characters, then merges of the most frequent pairs, up to `size` pieces.

        The result is deterministic. There are fewer than `size` pieces if every word is a piece before that.

        Raises:
            ConfigError: if `size` does not exceed the number of single characters.
            DataError: if no word has two characters.
            MissingExtraError: if the `tokenizers` library is not installed.
        """
        library = _tokenizers()
        lines = [" ".join(split(caption)) for caption in captions]
        characters = sorted(set().union(*lines) - {" "})
        single = [*SPECIAL, *characters, *(character + END_OF_WORD for character in characters)]
        if size <= len(single):
            raise ConfigError(f"pieces: must be above {len(single)}, the single characters, got {size}")
        tokenizer = library.Tokenizer(library.models.BPE(end_of_word_suffix=END_OF_WORD))
        tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
        # Ties between pairs are resolved by ids. The library would assign ids to characters at the end of words in
        # the order of a hash table, different in every run; special tokens keep their order.
        trainer = library.trainers.BpeTrainer(
            vocab_size=size, special_tokens=single, end_of_word_suffix=END_OF_WORD, show_progress=False
        )
        tokenizer.train_from_iterator(lines, trainer)
        merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
        if not merges:
            raise DataError("cannot learn pieces: no word of the captions has more than one character")
        # Two merges may give the same piece.
        return cls(list(dict.fromkeys([*single, *(left + right for left, right in merges)])), merges)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def rule(self) -> str:
        """Name of the tokenizer: `RULE` or `PIECES_RULE`."""
        return PIECES_RULE if self.merges else RULE

    def encode(self, caption: str) -> list[int]:
        """Return the token ids of a caption without start and end, `UNKNOWN` for unknown words.

        Raises:
            MissingExtraError: if this vocabulary has pieces, and the `tokenizers` library is not installed.
        """
        if not self.merges:
            return [self._ids.get(word, UNKNOWN) for word in split(caption)]
        return [token for word in split(caption) for token in self._cut(word)]

    def _cut(self, word: str) -> list[int]:
        ids = [token.id for token in self._byte_pairs.tokenize(word)]
        return [UNKNOWN] if UNKNOWN in ids else ids

    @cached_property
    def _byte_pairs(self) -> Any:
        """The byte-pair encoder of these pieces."""
        return _tokenizers().models.BPE(
            vocab=self._ids,
            merges=list(self.merges),
            unk_token=SPECIAL[UNKNOWN],
            end_of_word_suffix=END_OF_WORD,
        )

    @cached_property
    def within(self) -> tuple[int, ...]:
        """Ids of pieces that do not end a word."""
        return tuple(token for token in range(len(self)) if not self._ends_word(token))

    @cached_property
    def once(self) -> tuple[int, ...]:
        """Ids of words that may not be repeated in a caption."""
        if self.repeated is None:
            return ()
        repeated = set(self.repeated)
        return tuple(token for token, word in enumerate(self.words) if token > UNKNOWN and word not in repeated)

    def completing(self, ids: Sequence[int], words: Iterable[str], last: bool = False) -> list[int]:
        """Return the ids that complete one of `words` after `ids`, for any segmentation into pieces.

        Args:
            ids: previous token ids.
            words: words from `split`; unknown words have no id.
            last: whether only the end can follow, which also completes a word.
        """
        spans = self.spans(ids)
        prefix = ""
        if spans and not self._ends_word(ids[-1]):
            prefix = "".join(self.words[token] for token in ids[spans[-1]])
        suffixes = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
        final = [suffix + END_OF_WORD for suffix in suffixes] if self.merges else suffixes
        completing = [self._ids[piece] for piece in (final + suffixes if last else final) if piece in self._ids]
        return [END, *completing] if "" in suffixes else completing

    def spans(self, ids: Sequence[int]) -> list[slice]:
        """Return the slice of `ids` of each word of `decode(ids)`."""
        ends = [stop for stop, token in enumerate(ids, 1) if self._ends_word(token)]
        if len(ids) > (ends[-1] if ends else 0):  # truncated within a word
            ends.append(len(ids))
        return [slice(start, stop) for start, stop in pairwise([0, *ends])]

    def _ends_word(self, token: int) -> bool:
        return not self.merges or token < len(SPECIAL) or self.words[token].endswith(END_OF_WORD)

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return the words of token ids; an incomplete word at the end is included."""
        pieces = [self.words[token].removesuffix(END_OF_WORD) for token in ids]
        return tuple("".join(pieces[span]) for span in self.spans(ids))


def _tokenizers() -> ModuleType:
    """Import the `tokenizers` library, which captioning does not need."""
    with require_extra("train", "a vocabulary of word pieces"):
        import tokenizers
    return tokenizers
