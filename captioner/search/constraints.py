"""Constraints on the next word: each sets the log-probabilities of forbidden words to minus infinity.

A constraint is called before each word with the log-probabilities (B, K, V), which it changes in place, and the
previous token ids, int64 (B, K, t). To add one: write a class here and use it in `captioner.captioning`.
"""

from collections.abc import Callable, Sequence

import numpy as np

Constraint = Callable[[np.ndarray, np.ndarray], None]


class BanWords:
    """Forbid these words."""

    def __init__(self, words: Sequence[int]):
        self.words = np.array(words, dtype=np.int64)

    def __call__(self, log_probs: np.ndarray, history: np.ndarray) -> None:
        log_probs[:, :, self.words] = -np.inf


class BanWordsAfter:
    """Forbid the words that a function returns for the previous words, such as the last piece of a banned word."""

    def __init__(self, banned: Callable[[list[int]], Sequence[int]]):
        self.banned = banned

    def __call__(self, log_probs: np.ndarray, history: np.ndarray) -> None:
        for image, rows in enumerate(history.tolist()):
            for row, written in enumerate(rows):
                log_probs[image, row, list(self.banned(written))] = -np.inf


class MinimumLength:
    """Forbid the end before `min_words` words."""

    def __init__(self, min_words: int, end: int):
        self.min_words = min_words
        self.end = end

    def __call__(self, log_probs: np.ndarray, history: np.ndarray) -> None:
        if history.shape[2] < self.min_words:
            log_probs[:, :, self.end] = -np.inf


class NoRepeatedWord:
    """Forbid repeating these words."""

    def __init__(self, words: Sequence[int]):
        self.words = np.array(words, dtype=np.int64)

    def __call__(self, log_probs: np.ndarray, history: np.ndarray) -> None:
        images, rows, positions = np.nonzero(np.isin(history, self.words))
        log_probs[images, rows, history[images, rows, positions]] = -np.inf


class NoRepeatedPhrase:
    """Forbid repeating a phrase of up to `size` words directly, unless its last word is `repeatable`."""

    def __init__(self, size: int, repeatable: Sequence[int] = ()):
        self.size = size
        self.repeatable = np.array(repeatable, dtype=np.int64)

    def __call__(self, log_probs: np.ndarray, history: np.ndarray) -> None:
        length = history.shape[2]
        for size in range(1, min(self.size, (length + 1) // 2) + 1):
            # The next word would be the last of the second phrase: it must not be that of the first.
            first = history[:, :, length - 2 * size + 1 : length - size]
            second = history[:, :, length - size + 1 :]
            last = history[:, :, length - size]
            repeats = (first == second).all(axis=2) & ~np.isin(last, self.repeatable)
            images, rows = np.nonzero(repeats)
            log_probs[images, rows, last[images, rows]] = -np.inf


def force_end(log_probs: np.ndarray, end: int) -> None:
    """Forbid every word but the end, and allow the end however unlikely it is."""
    ends = np.maximum(log_probs[:, :, end], -1e4)
    log_probs.fill(-np.inf)
    log_probs[:, :, end] = ends
