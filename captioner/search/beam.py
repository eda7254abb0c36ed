"""Beam search: plain, diverse (groups) and constrained (required words).

All three divide the rows of an image into C beams of K rows each, and keep the likeliest continuations of each
beam. B images, V vocabulary size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from captioner.search.top_k import top_k


class Continuations(NamedTuple):
    """Continuations by one word, n for each of C beams of B images, best first."""

    rows: np.ndarray
    """int64 (B, C, n), index of the continued row of the image, 0 to C * K - 1."""
    words: np.ndarray
    """int64 (B, C, n)."""
    log_probs: np.ndarray
    """float32 (B, C, n), log-probabilities of the words."""
    totals: np.ndarray
    """float32 (B, C, n), log-probabilities of the sentences; minus infinity: no such sentence."""

    def take(self, order: np.ndarray) -> "Continuations":
        """Return the continuations with these indices (B, C, m) along the last axis."""
        return Continuations(*(np.take_along_axis(values, order, axis=2) for values in self))

    def best(self, count: int, scores: np.ndarray | None = None) -> "Continuations":
        """Return the `count` best of each beam by `scores` (B, C, n) or totals; ties keep their order."""
        scores = self.totals if scores is None else scores
        return self.take(np.argsort(-scores, axis=2, kind="stable")[:, :, :count])


def concatenate(parts: Sequence[Continuations], axis: int) -> Continuations:
    """Concatenate along the axis of the beams (1) or of the continuations (2)."""
    return Continuations(*(np.concatenate(values, axis=axis) for values in zip(*parts, strict=True)))


def continuations(totals: np.ndarray, log_probs: np.ndarray, count: int) -> Continuations:
    """Return the `count` likeliest words of each row, in the order of the rows; the best `count` of a beam are
    among them. The other arguments are those of `Beam.choose`.
    """
    images, beams, size, _ = log_probs.shape
    values, words = top_k(log_probs, count)  # (B, C, K, n)
    rows = np.arange(beams * size).reshape(beams, size, 1)
    parts = np.broadcast_to(rows, words.shape), words, values, totals[:, :, :, None] + values
    return Continuations(*(part.reshape(images, beams, -1) for part in parts))


class Beam:
    """Keep the likeliest rows.

    The end competes with the other words, so an unlikely early end is not kept.
    """

    def __init__(self, size: int):
        self.size = size
        """K, number of rows of each beam."""
        self.groups = 1
        """Number of groups of beams whose finished sentences are counted and ranked separately."""
        self.start = np.zeros((1, 1), dtype=np.float32)
        """Totals (C, 1) before the first word, one row per beam."""

    def choose(self, totals: np.ndarray, log_probs: np.ndarray) -> Continuations:
        """Return the 2 K best continuations of each beam, so that K remain if K end.

        Args:
            totals: float32 (B, C, K), log-probability of each row.
            log_probs: float32 (B, C, K, V), of the next word, after all constraints. May be changed.
        """
        count = 2 * self.size
        return continuations(totals, log_probs, count).best(count)


class DiverseBeam(Beam):
    """One beam for each group: diverse beam search.

    Vijayakumar et al. 2016 (arXiv 1610.02424), section 3, with their Hamming diversity. The groups choose in turn,
    and a word loses `diversity` each time an earlier group chose it. This changes the order at this step only, not
    the totals.
    """

    def __init__(self, size: int, groups: int, diversity: float, end: int):
        super().__init__(size)
        self.groups = groups
        self.diversity = diversity
        self.end = end
        self.start = np.zeros((groups, 1), dtype=np.float32)

    def choose(self, totals: np.ndarray, log_probs: np.ndarray) -> Continuations:
        """Return the best continuations of each group."""
        # Earlier groups choose up to (groups - 1) * size words; 2 * size others of each row remain.
        candidates = continuations(totals, log_probs, (self.groups + 1) * self.size)
        images = np.arange(len(totals))[:, None]
        chosen = np.zeros((len(totals), log_probs.shape[3]), dtype=np.float32)  # number of rows
        groups = []
        for group in range(self.groups):
            own = Continuations(*(values[:, group : group + 1] for values in candidates))
            own = own.best(2 * self.size, own.totals - self.diversity * chosen[images, own.words[:, 0]][:, None])
            continues = (own.words[:, 0] != self.end) & np.isfinite(own.totals[:, 0])
            continues &= np.cumsum(continues, axis=1) <= self.size
            np.add.at(chosen, (images, own.words[:, 0]), continues)
            groups.append(own)
        return concatenate(groups, axis=1)


class ConstrainedBeam(Beam):
    """One beam for each set of required words, for sentences that have exactly these: constrained beam search.

    Anderson et al. 2017 (arXiv 1612.00576), section 3.2. Rows with and without a required word never compete, so a
    row with it is kept however unlikely the word. The sets are the states of the paper's finite-state machine, and
    the bits of a beam's index are the required words in its set. A row stays in its beam until a missing required
    word moves it to another; only rows of the last beam, which has all, can end. A row with more missing words than
    `max_words` allows never ends, and displaces no other: all rows of its beam miss as many.
    """

    def __init__(self, size: int, required: Sequence[int], end: int):
        super().__init__(size)
        self.required = np.array(required, dtype=np.int64)  # (R,)
        self.end = end
        beams = np.arange(2 ** len(required))[:, None]
        bits = 1 << np.arange(len(required))
        self.missing = beams & bits == 0  # (C, R)
        self.previous = beams ^ bits  # (C, R), the previous beam
        self.start = np.where(beams == 0, np.float32(0), np.float32(-np.inf))

    def choose(self, totals: np.ndarray, log_probs: np.ndarray) -> Continuations:
        """Return the best continuations of each beam: of its rows, and of rows that a required word moves to it."""
        images, beams, size = totals.shape
        values = log_probs[:, self.previous, :, self.required].transpose(2, 0, 1, 3)  # (B, C, R, K)
        values = np.where(self.missing[:, :, None], np.float32(-np.inf), values)
        rows = self.previous[:, :, None] * size + np.arange(size)
        words = self.required[:, None]
        parts = rows, words, values, totals[:, self.previous] + values
        arriving = Continuations(
            *(np.broadcast_to(part, values.shape).reshape(images, beams, -1) for part in parts)
        )

        beam, word = np.nonzero(self.missing)
        log_probs[:, beam, :, self.required[word]] = -np.inf
        log_probs[:, :-1, :, self.end] = -np.inf
        staying = super().choose(totals, log_probs)
        return concatenate([staying, arriving], axis=2).best(2 * self.size)
