"""Hypotheses, and the back-pointers from which a search collects the attention of their words."""

from collections.abc import Collection, Iterable
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from captioner.engine import AttentionMaps
from captioner.search.settings import SearchSettings


class Alternatives(NamedTuple):
    """The likeliest words at each position, before any constraint. While searching, the leading axes are (B, K)."""

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
    """Score for ranking: `log_prob` after length normalisation and coverage penalty."""
    attention: np.ndarray
    """float32 (T, L), attention weights of each word."""
    visual: np.ndarray | None
    """float32 (T,), share of each context that comes from the image. None if the mechanism does not compute it."""
    heads: np.ndarray | None
    """float32 (T, heads, L). None if there is only one head."""
    alternatives: Alternatives | None
    """The likeliest words at each position. None if not requested."""
    ends: np.ndarray
    """float32 (T,), log-probability of the end at each word's position; minus infinity where it was forbidden."""


class _Written(NamedTuple):
    """One word of each row: rows (B, K) before the word become rows (B', K') after it."""

    images: np.ndarray  # (B',), index of the image
    rows: np.ndarray  # (B', K'), index of the previous row
    log_probs: np.ndarray  # (B', K')


class Lattice:
    """Unfinished hypotheses of B images, K rows each, and back-pointers from every word to the previous row.

    Attention maps are stored step by step as the engine returned them, and copied for finished hypotheses only.
    """

    def __init__(self, images: int, rows: int):
        """Create rows without words."""
        self.history = np.empty((images, rows, 0), dtype=np.int64)
        """Token ids (B, K, t) of each row."""
        self._written: list[_Written] = []  # t steps
        self._maps: list[AttentionMaps] = []  # t + 1 steps, the last (B, K, ...)
        self._alternatives: list[Alternatives] = []  # t + 1 steps, or empty
        self._ends: list[np.ndarray] = []  # t + 1 steps, (B, K)

    def attend(self, maps: AttentionMaps, alternatives: Alternatives | None) -> None:
        """Record the attention for the next word of each row, and its likeliest words (B, K, A)."""
        self._maps.append(maps)
        if alternatives:
            self._alternatives.append(alternatives)

    def end(self, log_probs: np.ndarray) -> None:
        """Record the log-probability (B, K) of the end of each row."""
        self._ends.append(log_probs.copy())

    def extend(self, images: np.ndarray, rows: np.ndarray, words: np.ndarray, log_probs: np.ndarray) -> None:
        """Append words (B', K') to `rows` (B', K') of `images` (B',), which become the rows of the lattice."""
        self._written.append(_Written(images, rows, log_probs))
        self.history = np.concatenate([self.history[images[:, None], rows], words[:, :, None]], axis=2)

    def finish(
        self, images: np.ndarray, rows: np.ndarray, log_probs: np.ndarray, settings: SearchSettings
    ) -> list[Hypothesis]:
        """Return the hypotheses of n rows: image, row and log-probability of the ended sentence, (n,) each."""
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
            """Return the values (n, T, ...) of the hypotheses, from those of each step (B, K, ...)."""
            steps = [array for array in arrays if array is not None]
            if not steps:
                return None
            values = np.empty((count, length, *steps[0].shape[2:]), dtype=steps[0].dtype)
            for position, rows_before in enumerate(path):
                values[:, position] = steps[position][rows_before]
            return values

        attention = along_path(maps.attention for maps in self._maps)
        visual = along_path(maps.visual for maps in self._maps)
        heads = along_path(maps.heads for maps in self._maps)
        ids = along_path(likeliest.ids for likeliest in self._alternatives)
        others = along_path(likeliest.log_probs for likeliest in self._alternatives)
        ends = along_path(self._ends)
        assert attention is not None
        assert ends is not None
        # Copies, so that one hypothesis does not keep the arrays of all alive.
        return [
            Hypothesis(
                words=words[index].tolist(),
                log_probs=word_log_probs[index].tolist(),
                log_prob=float(log_probs[index]),
                score=_score(float(log_probs[index]), attention[index], settings),
                attention=attention[index].copy(),
                visual=None if visual is None else visual[index].copy(),
                heads=None if heads is None else heads[index].copy(),
                alternatives=(
                    None if ids is None or others is None else Alternatives(ids[index].copy(), others[index].copy())
                ),
                ends=ends[index].copy(),
            )
            for index in range(count)
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
    """Return `settings.candidates` hypotheses of an image, best first.

    They are chosen in turn: the best of each group, then the second of each, and so on. Beam search removes
    duplicates of earlier groups; sampling keeps all.
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
    """Return the hypotheses of an image, those of `max_words` truncated where their score is best.

    A beam keeps an end only if it is among the likeliest continuations. Where it never is, as for an image that the
    network knows nothing about, a hypothesis grows to `max_words`, though an earlier end would have a better score.
    No hypothesis becomes a duplicate of another, or of one in `seen`.
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
    return found._replace(
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
