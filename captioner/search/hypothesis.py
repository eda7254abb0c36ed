"""Sentences, and the back-pointers by which a search finds where the network looked for each of their words."""

from collections.abc import Collection, Iterable
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from captioner.engine import Look
from captioner.search.settings import SearchSettings


class Alternatives(NamedTuple):
    """The likeliest words at some positions, whether or not a constraint forbids them. While searching, the leading
    axes are (B, K)."""

    ids: np.ndarray
    """int64 (T, A), likeliest first."""
    log_probs: np.ndarray
    """float32 (T, A)."""


class Hypothesis(NamedTuple):
    """A finished sentence of T words."""

    words: list[int]
    """T word ids, without start and end."""
    log_probs: list[float]
    """Log-probability of each word."""
    log_prob: float
    """Log-probability of the sentence, its end included."""
    score: float
    """What sentences are ranked by: `log_prob` after length normalization and coverage penalty."""
    attention: np.ndarray
    """float32 (T, L), where the network looked for each word."""
    visual: np.ndarray | None
    """float32 (T,): share of each context that comes from the picture. None if the mechanism has none."""
    heads: np.ndarray | None
    """float32 (T, heads, L). None if there is one head only."""
    alternatives: Alternatives | None
    """The likeliest words at each position. None if they were not asked for."""
    ends: np.ndarray
    """float32 (T,), log-probability of the end instead of each word; minus infinity where it was forbidden."""


class _Written(NamedTuple):
    """One word of each row. The rows before the word are (B, K), those after it (B', K')."""

    images: np.ndarray  # (B',), which of the B images
    rows: np.ndarray  # (B', K'), which of the K rows of this image was continued
    log_probs: np.ndarray  # (B', K')


class Lattice:
    """Unfinished sentences of B images, K rows each, and back-pointers from every word to the row it continued.

    Attention maps are kept as the engine returned them, step by step, and copied only for finished sentences.
    """

    def __init__(self, images: int, rows: int):
        """Hold rows without a word."""
        self.history = np.empty((images, rows, 0), dtype=np.int64)
        """Word ids (B, K, t) of each row."""
        self._written: list[_Written] = []  # t of them
        self._looks: list[Look] = []  # t + 1 of them, the last one (B, K, ...)
        self._alternatives: list[Alternatives] = []  # as many, or none at all
        self._ends: list[np.ndarray] = []  # as many, (B, K)

    def look(self, look: Look, alternatives: Alternatives | None) -> None:
        """Record where the network looked for the next word of each row, and its likeliest words (B, K, A)."""
        self._looks.append(look)
        if alternatives:
            self._alternatives.append(alternatives)

    def end(self, log_probs: np.ndarray) -> None:
        """Record the log-probability (B, K) of the end after each row."""
        self._ends.append(log_probs.copy())

    def extend(self, images: np.ndarray, rows: np.ndarray, words: np.ndarray, log_probs: np.ndarray) -> None:
        """Write a word after some rows; these become the rows of the lattice.

        Args:
            images: int64 (B',), the images to keep.
            rows: int64 (B', K'), the rows to continue.
            words: int64 (B', K').
            log_probs: float32 (B', K'), of the words.
        """
        self._written.append(_Written(images, rows, log_probs))
        self.history = np.concatenate([self.history[images[:, None], rows], words[:, :, None]], axis=2)

    def finish(
        self, images: np.ndarray, rows: np.ndarray, log_probs: np.ndarray, settings: SearchSettings
    ) -> list[Hypothesis]:
        """Return the sentences of n rows.

        Args:
            images: int64 (n,), the image of each row.
            rows: int64 (n,).
            log_probs: float (n,), of the sentences, their end included.
            settings: how to score them.
        """
        words = self.history[images, rows]  # (n, T)
        count, length = words.shape
        word_log_probs = np.empty((count, length), dtype=np.float32)
        path = []  # images and rows (n,) before each word
        for position in reversed(range(length)):
            written = self._written[position]
            word_log_probs[:, position] = written.log_probs[images, rows]
            images, rows = written.images[images], written.rows[images, rows]
            path.append((images, rows))
        path.reverse()

        def along_path(arrays: Iterable[np.ndarray | None]) -> np.ndarray | None:
            """Return the values (n, T, ...) of the sentences, from those of each step (B, K, ...)."""
            steps = [array for array in arrays if array is not None]
            if not steps:
                return None
            values = np.empty((count, length, *steps[0].shape[2:]), dtype=steps[0].dtype)
            for position, rows_before in enumerate(path):
                values[:, position] = steps[position][rows_before]
            return values

        attention = along_path(look.attention for look in self._looks)
        visual = along_path(look.visual for look in self._looks)
        heads = along_path(look.heads for look in self._looks)
        ids = along_path(likeliest.ids for likeliest in self._alternatives)
        others = along_path(likeliest.log_probs for likeliest in self._alternatives)
        ends = along_path(self._ends)
        assert attention is not None
        assert ends is not None
        # Copies, so that a sentence that is kept does not keep the arrays of all of them.
        return [
            Hypothesis(
                words=words[number].tolist(),
                log_probs=word_log_probs[number].tolist(),
                log_prob=float(log_probs[number]),
                score=_score(float(log_probs[number]), attention[number], settings),
                attention=attention[number].copy(),
                visual=None if visual is None else visual[number].copy(),
                heads=None if heads is None else heads[number].copy(),
                alternatives=(
                    None
                    if ids is None or others is None
                    else Alternatives(ids[number].copy(), others[number].copy())
                ),
                ends=ends[number].copy(),
            )
            for number in range(count)
        ]


def _score(log_prob: float, attention: np.ndarray, settings: SearchSettings) -> float:
    """Return the score of a sentence of T words from its log-probability and its attention (T, L)."""
    score = log_prob / (len(attention) + 1) ** settings.length_penalty
    if settings.coverage_penalty:
        covered = attention.sum(axis=0, dtype=np.float64).clip(1e-9, 1)
        score += settings.coverage_penalty * float(np.log(covered).sum())
    return score


def best_of_groups(
    groups: list[list[Hypothesis]], settings: SearchSettings, *, ending_earlier: bool = False
) -> list[Hypothesis]:
    """Return `settings.candidates` sentences of an image, best first.

    They are chosen in turn: the best of each group, then the second of each, and so on. Beam search drops a
    sentence that an earlier group found; sampling keeps every sentence that was drawn.
    """
    seen: set[tuple[int, ...]] = set()
    ranked = []
    for group in groups:
        if ending_earlier:
            group = end_earlier(group, settings, seen)
        new = [found for found in group if settings.sample or tuple(found.words) not in seen]
        ranked.append(sorted(new, key=_descending))
        seen.update(tuple(found.words) for found in group)
    in_turn = [found for rank in zip_longest(*ranked) for found in sorted(filter(None, rank), key=_descending)]
    return sorted(in_turn[: settings.candidates], key=_descending)


def end_earlier(
    hypotheses: Iterable[Hypothesis], settings: SearchSettings, seen: Collection[tuple[int, ...]] = ()
) -> list[Hypothesis]:
    """Return the sentences of an image after ending those of `max_words` where their score is best.

    A beam keeps an end only if it is among the likeliest continuations. Where it never is, as for a picture of
    which the network knows nothing, a sentence runs to `max_words`, though it would have a better score if it had
    ended before. No sentence becomes the same as another one of the list, or as one of `seen`.
    """
    seen = set(seen)
    ended = []
    for found in sorted(hypotheses, key=_descending):
        if len(found.words) == settings.max_words:
            log_probs = np.cumsum([0.0, *found.log_probs[:-1]]) + found.ends
            scores = [_score(log_prob, found.attention[:end], settings) for end, log_prob in enumerate(log_probs)]
            for end in sorted(range(len(scores)), key=lambda end: -scores[end]):
                if scores[end] > found.score and tuple(found.words[:end]) not in seen:
                    found = _cut(found, end, float(log_probs[end]), scores[end])
                    break
        seen.add(tuple(found.words))
        ended.append(found)
    return ended


def _cut(found: Hypothesis, end: int, log_prob: float, score: float) -> Hypothesis:
    return Hypothesis(
        words=found.words[:end],
        log_probs=found.log_probs[:end],
        log_prob=log_prob,
        score=score,
        attention=found.attention[:end],
        visual=None if found.visual is None else found.visual[:end],
        heads=None if found.heads is None else found.heads[:end],
        alternatives=found.alternatives and Alternatives(*(values[:end] for values in found.alternatives)),
        ends=found.ends[:end],
    )


def _descending(hypothesis: Hypothesis) -> float:
    return -hypothesis.score
