"""Finding a good sentence: beam search (greedy is a beam of one), constrained or diverse, and sampling.

Everything here works over a `step` function and knows no model:

    step(words (N,), state) -> (log-probabilities (N, V), state, look)

`look` is a tuple of what is to be remembered of each word: tensors (N, ...) or none, the first of them the
attention (N, L). `state` is any value with `select(rows)`: `rows` (B', K') holds numbers of present rows, those of
one image in one line, and the new state has these rows. Both searches take a state of one row an image, work on all
images and hypotheses together, and let finished images leave the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class SearchState(Protocol):
    """What a search asks of a decoder's state."""

    def select(self, rows: Tensor) -> Any:
        """Return the state of the rows numbered in `rows` (B', K')."""


MOST_REQUIRED = 4
"""Required words: a search with n of them has 2 ** n times the work."""

Look = tuple[Tensor | None, ...]
Step = Callable[[Tensor, Any], tuple[Tensor, Any, Look]]


class Hypothesis(NamedTuple):
    """A finished sentence."""

    words: list[int]  # T word numbers, without start and end
    log_probs: list[float]  # of each word
    log_prob: float  # of the sentence, its end included
    score: float  # what sentences are ranked by
    look: Look  # of each word: attention (T, L), and what else the step remembers (T, ...)


def _rank(found: Hypothesis) -> float:
    """Return what sorts the best sentence to the front."""
    return -found.score


@dataclass(frozen=True)
class SearchSettings:
    """How to choose the words of a caption."""

    beam_size: int = 5
    candidates: int = 1  # how many sentences to return for an image, best first
    max_words: int = 20  # of these limits, where words are cut into pieces, a piece is a word
    min_words: int = 1
    length_penalty: float = 0.8  # a sentence of T words, end included, scores log-probability / T ** length_penalty
    diverse_groups: int = 1  # parts of the beam, each of which avoids the words that those before it choose
    diversity: float = 0.5  # the log-probability that a word loses each time an earlier group has it at its place
    coverage_penalty: float = 0.0
    """Beta of Wu et al. 2016 (arXiv 1609.08144), equation 14: beta times the sum over locations of
    log(min(attention summed over the words, 1)) is added to the score, so that sentences win that look at all of
    the picture."""
    repeat_size: int = 4  # bars a phrase of up to this many words from following itself ("a man a man"); 0: free
    bar_repeats: bool = True  # write a word once, unless people's captions repeat it; see `Vocabulary.build`
    bar_unknown: bool = True  # never write <unk>
    alternatives: int = 0  # how many other words to tell for each, the likeliest in its place
    ban: tuple[str, ...] = ()  # words never to write, each in the very form that is listed
    require: tuple[str, ...] = ()  # up to 4 words to write in any order, each in the very form that is listed
    sample: bool = False  # draw words at random instead of searching
    temperature: float = 1.0  # of sampling; below 1 favours likely words
    top_k: int = 0  # sample from this many likeliest words; 0: from all
    top_p: float = 1.0  # sample from the fewest likeliest words whose probabilities reach this sum
    seed: int = 0  # of sampling

    def __post_init__(self) -> None:
        for name, least in {
            "beam_size": 1,
            "candidates": 1,
            "diverse_groups": 1,
            "min_words": 0,
            "repeat_size": 0,
            "alternatives": 0,
            "top_k": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        for name in ("ban", "require"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: expected a tuple of words, got {getattr(self, name)!r}")
        if len(self.require) > min(MOST_REQUIRED, self.max_words):
            raise ValueError(
                f"require: at most {MOST_REQUIRED} words and no more than max_words, got {len(self.require)}"
            )
        if self.require and self.sample:
            raise ValueError("require: words drawn at random cannot be required; leave out sample")
        if self.max_words < max(1, self.min_words):
            raise ValueError(f"max_words: must be at least 1 and at least min_words, got {self.max_words}")
        if not self.sample and self.candidates > self.beam_size:
            raise ValueError(
                f"candidates: a beam of {self.beam_size} cannot give {self.candidates}; raise beam_size"
            )
        if self.beam_size % self.diverse_groups:
            even = -(-self.beam_size // self.diverse_groups) * self.diverse_groups
            raise ValueError(
                f"diverse_groups: must divide beam_size, {self.beam_size}, got {self.diverse_groups}; "
                f"a beam_size of {even} would do"
            )
        if self.diverse_groups > 1 and self.sample:
            raise ValueError("diverse_groups: sampling has no beam to divide; leave out sample")
        if self.diverse_groups > 1 and self.require:
            raise ValueError("diverse_groups: required words divide the beam in their own way; leave out require")
        for name in ("diversity", "coverage_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: must be at least 0, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be above 0 and at most 1, got {self.top_p}")


def search(
    step: Step,
    state: SearchState,
    start: Tensor,
    settings: SearchSettings,
    *,
    end: int,
    barred: Sequence[int] = (),
    barred_after: Callable[[list[int]], Sequence[int]] | None = None,
    repeatable: Sequence[int] = (),
    once: Sequence[int] = (),
    required: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """Return the best sentences of each image.

    Args:
        step: writes one word further; see the module.
        state: one row an image.
        start: the word (B,) before the first of each image.
        settings: how to choose.
        end: the word that ends a sentence.
        barred: words that are never written, such as padding and `<unk>`.
        barred_after: gives the words that must not come next, after those written so far.
        repeatable: words that `repeat_size` leaves alone, such as pieces within a word.
        once: words that no sentence has twice, while `bar_repeats` is set.
        required: different words, none of them barred, that every sentence has; not for sampling.

    Returns:
        For each image `settings.candidates` sentences, best first; fewer, or none, only where the limits leave no
        more. Always ends: a sentence of `max_words` is made to end.
    """

    def numbers(words: Sequence[int]) -> Tensor:
        return torch.tensor(list(words), dtype=torch.long, device=start.device)

    limits = _Limits(
        settings=settings,
        end=end,
        barred=numbers(barred),
        barred_after=barred_after,
        repeatable=numbers(repeatable),
        once=numbers(once if settings.bar_repeats else ()),
        required=numbers(required),
    )
    find = _sample if settings.sample else _beam
    with torch.no_grad():
        found = find(step, state, start.unsqueeze(1), limits)
    return [sorted(each[: settings.candidates], key=_rank) for each in found]


class _Limits(NamedTuple):
    """What may be written."""

    settings: SearchSettings
    end: int
    barred: Tensor
    barred_after: Callable[[list[int]], Sequence[int]] | None
    repeatable: Tensor
    once: Tensor
    required: Tensor

    def apply(self, log_probs: Tensor, history: Tensor) -> Tensor:
        """Return log-probabilities (N, V) with all that must not follow `history` (N, t) at minus infinity."""
        length = history.shape[1]
        if length == self.settings.max_words:
            # However unlikely the end is, a sentence that would never end is still returned.
            ends = log_probs[:, self.end].clamp(min=-1e4)
            log_probs = torch.full_like(log_probs, -torch.inf)
            log_probs[:, self.end] = ends
            return log_probs
        log_probs = log_probs.index_fill(1, self.barred, -torch.inf)
        if self.barred_after:
            for row, written in enumerate(history.tolist()):
                log_probs[row, list(self.barred_after(written))] = -torch.inf
        if length < self.settings.min_words:
            log_probs[:, self.end] = -torch.inf
        rows, places = torch.isin(history, self.once).nonzero(as_tuple=True)
        log_probs[rows, history[rows, places]] = -torch.inf
        for size in range(1, min(self.settings.repeat_size, (length + 1) // 2) + 1):
            # The phrase of `size` words that ends with the next word must not equal the phrase before it.
            begun = history[:, length - size + 1 :] == history[:, length - 2 * size + 1 : length - size]
            repeats = begun.all(dim=1) & ~torch.isin(history[:, length - size], self.repeatable)
            rows = repeats.nonzero().squeeze(1)
            log_probs[rows, history[rows, length - size]] = -torch.inf
        return log_probs


class _Written(NamedTuple):
    """The unfinished sentences so far, those of one image in one line."""

    words: Tensor  # (B, K, t)
    log_probs: Tensor  # (B, K, t)
    look: Look  # (B, K, t, ...) each

    @classmethod
    def nothing(cls, lines: int, columns: int, look: Look) -> "_Written":
        """Return sentences without words; `look` is what a step remembers of a word."""
        like = next(each for each in look if each is not None)
        return cls(
            words=torch.empty(lines, columns, 0, dtype=torch.long, device=like.device),
            log_probs=like.new_empty(lines, columns, 0),
            look=tuple(
                None if each is None else each.new_empty(lines, columns, 0, *each.shape[1:]) for each in look
            ),
        )

    def extend(self, lines: Tensor, columns: Tensor, words: Tensor, log_probs: Tensor, look: Look) -> "_Written":
        """Continue the sentences at [lines, columns] with one more word, log-probability and look each."""

        def longer(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old[lines, columns], new.unsqueeze(2)], dim=2)

        return _Written(
            longer(self.words, words),
            longer(self.log_probs, log_probs),
            tuple(
                None if old is None or new is None else longer(old, new)
                for old, new in zip(self.look, look, strict=True)
            ),
        )

    def finish(self, line: int, column: int, log_prob: float, settings: SearchSettings) -> Hypothesis:
        """Return one sentence, ended, of this log-probability."""
        words = self.words[line, column].tolist()
        look = tuple(None if each is None else each[line, column] for each in self.look)
        score = log_prob / (len(words) + 1) ** settings.length_penalty
        if settings.coverage_penalty:
            assert look[0] is not None
            covered = look[0].sum(dim=0).clamp(1e-9, 1.0)
            score += settings.coverage_penalty * float(covered.log().sum())
        return Hypothesis(words, self.log_probs[line, column].tolist(), log_prob, score, look)


def _beam(step: Step, state: Any, words: Tensor, limits: _Limits) -> list[list[Hypothesis]]:
    """Keep the likeliest beginnings of each image until as many sentences as the beam is wide have ended.

    An end competes with the other words for its place among the likeliest, so a poor early end is not kept.

    The line of an image has C beams of K beginnings, one after another, that keep apart: one, or one for each group
    (`_by_group`), or one for each set of required words (`_by_written`), of which the last alone has ends.
    """
    groups = limits.settings.diverse_groups
    size, beams = limits.settings.beam_size // groups, groups * 2 ** len(limits.required)
    finished: list[list[list[Hypothesis]]] = [[[] for _ in range(groups)] for _ in words]
    live = list(finished)  # the sentences of each line's image, by group
    words = words.expand(-1, beams)
    state = state.select(torch.arange(len(words), device=words.device).unsqueeze(1).expand(-1, beams))
    totals: Tensor | None = None  # log-probabilities (B, C, K) of what is written
    while live:
        lines, width = words.shape
        log_probs, state, look = step(words.flatten(), state)
        if totals is None:
            totals = log_probs.new_full((lines, beams, 1), -torch.inf)
            totals[:, :groups] = 0  # nothing is written yet, so none of the required words
            written = _Written.nothing(lines, width, look)
        log_probs = limits.apply(log_probs, written.words.flatten(0, 1)).unflatten(0, (lines, width))
        ranked = totals.unsqueeze(3) + log_probs.unflatten(1, (beams, -1))  # (B, C, K, V)
        # At most K of the best 2 K end, so that K remain to go on with.
        if len(limits.required):
            ranked, parents, words = _by_written(ranked, limits, 2 * size)
        elif groups > 1:
            ranked, parents, words = _by_group(ranked, limits, size)
        else:
            ranked, parents, words = _likeliest(ranked, 2 * size)  # (B, C, 2 K) each

        ends = words == limits.end
        for line, beam, rank in (ends & ranked.isfinite())[:, :, :size].nonzero().tolist():
            log_prob = float(ranked[line, beam, rank])
            parent = int(parents[line, beam, rank])
            live[line][beam % groups].append(written.finish(line, parent, log_prob, limits.settings))

        best = ends.byte().argsort(dim=2, stable=True)[:, :, :size]  # those that do not end, in their order
        ranked = ranked.masked_fill(ends, -torch.inf)
        totals, words, parents = (values.gather(2, best) for values in (ranked, words, parents))
        full = [[len(group) >= size for group in image] for image in live]
        totals = totals.masked_fill(torch.tensor(full, device=words.device).unsqueeze(2), -torch.inf)
        going = totals.isfinite().flatten(1).any(dim=1).nonzero().squeeze(1)
        live = [live[line] for line in going.tolist()]
        totals, words, parents = totals[going], words[going].flatten(1), parents[going].flatten(1)
        state, written = _advance(state, written, going, parents, words, log_probs, look)
    return [_in_turn(each) for each in finished]


def _likeliest(ranked: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability, parent and word of the `count` best continuations of each beam, best first.

    `ranked` (B, C, K, V) holds the log-probabilities of all continuations. Parents are numbered by image.
    """
    beams, size, vocabulary = ranked.shape[1:]
    ranked, place = ranked.flatten(2).topk(min(count, size * vocabulary))
    first = size * torch.arange(beams, device=place.device).unsqueeze(1)
    return ranked, first + place // vocabulary, place % vocabulary


def _by_written(ranked: Tensor, limits: _Limits, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_likeliest` does, with a beam for each set of required words: sentences that have just these.

    Constrained beam search: Anderson et al. 2017 (arXiv 1612.00576), section 3.2. Beginnings with and without a
    required word never compete, so one with it is kept however unlikely the word. The sets are the states of the
    paper's finite-state machine, and the bits of a beam's number are the required words in its set. A beginning
    stays in its beam unless a required word comes that it lacks: that leads to another. One that lacks more words
    than `max_words` leaves room for can never end, and takes no other's place: all of its beam lack as many.
    """
    beams, size = ranked.shape[1:3]
    number = torch.arange(beams, device=ranked.device).unsqueeze(1)
    bits = 1 << torch.arange(len(limits.required), device=ranked.device)
    lacks = number & bits == 0  # (C, R)

    leaves = torch.zeros(beams, ranked.shape[3], dtype=torch.bool, device=ranked.device)  # (C, V)
    leaves[:, limits.required] = lacks
    leaves[:-1, limits.end] = True  # it cannot end
    staying = _likeliest(ranked.masked_fill(leaves.unsqueeze(1), -torch.inf), count)

    before = number ^ bits  # (C, R), the beam that a sentence comes from with each word
    arriving = ranked.transpose(2, 3)[:, before, limits.required].masked_fill(lacks.unsqueeze(2), -torch.inf)
    parents = before.unsqueeze(2) * size + torch.arange(size, device=ranked.device)
    words = limits.required.unsqueeze(1)
    others = (each.expand_as(arriving).flatten(2) for each in (arriving, parents, words))  # (B, C, R * K) each

    ranked, parents, words = (torch.cat(both, dim=2) for both in zip(staying, others, strict=True))
    ranked, best = ranked.topk(min(count, ranked.shape[2]))
    return ranked, parents.gather(2, best), words.gather(2, best)


def _by_group(ranked: Tensor, limits: _Limits, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_likeliest` does, with a beam for each group: twice its `size`, so that as many can go on.

    Diverse beam search: Vijayakumar et al. 2016 (arXiv 1610.02424), section 3, with their Hamming diversity. The
    groups choose in turn, and a word is less likely for a group each time that those before it have chosen it. That
    decides on the order at this step alone: the log-probabilities returned are those of the sentences.
    """
    lines, _, width, vocabulary = ranked.shape
    chosen = ranked.new_zeros(lines, 1, vocabulary)  # how often each word was
    found = []
    for number, group in enumerate(ranked.split(1, dim=1)):
        penalty = limits.settings.diversity * chosen.unsqueeze(2)
        _, parents, words = _likeliest(group - penalty, 2 * size)
        totals = group.flatten(2).gather(2, parents * vocabulary + words)
        goes_on = (words != limits.end) & totals.isfinite()
        goes_on &= goes_on.cumsum(dim=2) <= size
        chosen.scatter_add_(2, words, goes_on.to(chosen.dtype))
        found.append((totals, number * width + parents, words))
    totals, parents, words = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    return totals, parents, words


def _in_turn(groups: list[list[Hypothesis]]) -> list[Hypothesis]:
    """Return the best sentence of each group, then the second of each, and so on, no sentence twice."""
    seen: set[tuple[int, ...]] = set()
    new = []
    for group in groups:
        new.append([one for one in sorted(group, key=_rank) if tuple(one.words) not in seen])
        seen.update(tuple(one.words) for one in group)
    return [one for each in zip_longest(*new) for one in sorted(filter(None, each), key=_rank)]


def _sample(step: Step, state: Any, words: Tensor, limits: _Limits) -> list[list[Hypothesis]]:
    """Draw every word at random, by inverting the cumulative distribution at a number from the seed.

    All images use the same random numbers, so that a picture's captions do not depend on its batch.
    """
    settings = limits.settings
    count = settings.candidates
    numbers = torch.Generator().manual_seed(settings.seed)
    draws = torch.rand(settings.max_words + 1, count, generator=numbers, dtype=torch.float64)
    finished: list[list[Hypothesis]] = [[] for _ in words]
    live = list(finished)
    words = words.expand(-1, count)
    state = state.select(torch.arange(len(words), device=words.device).unsqueeze(1).expand(-1, count))
    unended: Tensor | None = None  # (B, K), the sentences still being written
    for draw in draws:
        lines = len(words)
        log_probs, state, look = step(words.flatten(), state)
        if unended is None:
            unended = torch.ones(lines, count, dtype=torch.bool, device=log_probs.device)
            totals = log_probs.new_zeros(lines, count)
            written = _Written.nothing(lines, count, look)
        log_probs = limits.apply(log_probs, written.words.flatten(0, 1)).unflatten(0, (lines, count))
        unended &= log_probs.isfinite().any(dim=2)  # a sentence that nothing may follow is given up
        cumulative = _truncated(log_probs, settings).double().cumsum(dim=2)
        target = draw.to(cumulative.device)[:, None] * cumulative[:, :, -1:]  # (B, K, 1)
        words = torch.searchsorted(cumulative, target, right=True).squeeze(2).clamp(max=log_probs.shape[2] - 1)
        totals = totals + log_probs.gather(2, words.unsqueeze(2)).squeeze(2)

        ends = words == limits.end
        for line, column in (ends & unended).nonzero().tolist():
            log_prob = float(totals[line, column])
            live[line].append(written.finish(line, column, log_prob, settings))
        unended &= ~ends
        kept = unended.any(dim=1).nonzero().squeeze(1)
        if not len(kept):
            break
        live = [live[line] for line in kept.tolist()]
        unended, totals, words = unended[kept], totals[kept], words[kept]
        parents = torch.arange(count, device=words.device).expand(len(kept), -1)
        state, written = _advance(state, written, kept, parents, words, log_probs, look)
    return finished


def _advance(
    state: Any,
    written: _Written,
    lines: Tensor,
    parents: Tensor,
    words: Tensor,
    log_probs: Tensor,
    look: Look,
) -> tuple[Any, _Written]:
    """Go on with some rows: in each line of `lines` (B',) write `words` (B', K') after the rows `parents` (B', K').

    Log-probabilities (B, K, V) and look (N, ...) are those from which the words were chosen.
    """
    width = log_probs.shape[1]
    lines = lines.unsqueeze(1)
    rows = lines * width + parents
    seen = tuple(None if each is None else each[rows] for each in look)
    written = written.extend(lines, parents, words, log_probs[lines, parents, words], seen)
    return state.select(rows), written


def _truncated(log_probs: Tensor, settings: SearchSettings) -> Tensor:
    """Return the probabilities (..., V) to draw from, not normalised: temperature, then top-k, then top-p.

    Top-p, or nucleus, sampling: Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """
    ranked, order = (log_probs / settings.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if settings.top_k:
        ranked[..., settings.top_k :] = 0
    # A word stays when those before it do not reach top_p yet; the likeliest always does.
    before = ranked.cumsum(dim=-1) - ranked
    ranked = ranked.masked_fill(before >= settings.top_p * ranked.sum(dim=-1, keepdim=True), 0)
    return torch.zeros_like(ranked).scatter(-1, order, ranked)
