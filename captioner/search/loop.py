"""The loop of all searches: step, constrain, choose, finish."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from captioner.engine import State, StepResult
from captioner.search.beam import Beam, ConstrainedBeam, DiverseBeam
from captioner.search.constraints import Constraint, MinimumLength, force_end
from captioner.search.hypothesis import Alternatives, Hypothesis, Lattice, best_of_groups
from captioner.search.sampling import Sampling
from captioner.search.settings import SearchSettings
from captioner.search.top_k import top_k


@np.errstate(over="ignore")  # with damaged weights, log-probabilities may overflow to minus infinity
def search(
    step: Callable[[np.ndarray, Any], StepResult],
    state: State,
    images: int,
    settings: SearchSettings,
    *,
    start: int,
    end: int,
    constraints: Sequence[Constraint] = (),
    required: Sequence[int] = (),
    alternatives: int = 0,
    ending_earlier: bool = False,
) -> list[list[Hypothesis]]:
    """Return the best sentences of each image.

    All images and their rows are searched together, and finished images leave the batch.

    Args:
        step: reads the previous word of each row and predicts the next, as `captioner.engine.Engine.step` does. Its
            attention maps are kept and must not be changed later; its log-probabilities are changed in place.
        state: state with one row per image.
        images: number of images.
        settings: search settings. `max_words` and `min_words` are enforced here; settings that depend on the
            vocabulary (`ban`, `require`, `repeat_size`, `bar_repeats`, `bar_unknown`) are passed as `constraints`
            and `required`.
        start: token id of the start.
        end: token id of the end.
        constraints: constraints on the next word. At `max_words`, sentences end regardless of them.
        required: distinct ids of words that every sentence must contain, none of them always forbidden. Not
            available for sampling.
        alternatives: number of likeliest words to record at each position, before any constraint.
        ending_earlier: whether to truncate sentences of `max_words` where their score is best; see
            `captioner.search.hypothesis.end_earlier`. Not for sampling.

    Returns:
        For each image `settings.candidates` hypotheses, best first; fewer, or none, only if the constraints allow
        no more.

    Raises:
        CheckpointError: if the predictions are NaN.
    """
    if not images:
        return []
    constraints = [MinimumLength(settings.min_words, end), *constraints]
    strategy = _strategy(settings, required, end)
    beams = len(strategy.start)  # C
    finished: list[list[list[Hypothesis]]] = [[[] for _ in range(strategy.groups)] for _ in range(images)]

    live = np.arange(images)  # (B,), indices of unfinished images
    totals = np.broadcast_to(strategy.start, (images, beams, 1))  # (B, C, K), log-probabilities of the rows
    words = np.full((images, beams), start, dtype=np.int64)  # (B, C * K)
    state = state.select(live, np.zeros_like(words))
    lattice = Lattice(images, beams)
    for length in range(settings.max_words + 1):
        log_probs, state, maps = step(words, state)
        lattice.attend(maps, Alternatives(*top_k(log_probs, alternatives)[::-1]) if alternatives else None)
        if length == settings.max_words:
            force_end(log_probs, end)
        else:
            for constraint in constraints:
                constraint(log_probs, lattice.history)
        found = strategy.choose(totals, log_probs.reshape(*totals.shape, -1))
        lattice.end(log_probs[:, :, end])

        ends = found.words == end
        ended = np.nonzero((ends & np.isfinite(found.totals))[:, :, : strategy.size])
        hypotheses = lattice.finish(ended[0], found.rows[ended], found.totals[ended], settings)
        for image, beam, hypothesis in zip(live[ended[0]], ended[1], hypotheses, strict=True):
            finished[image][beam % strategy.groups].append(hypothesis)

        order = np.argsort(ends, axis=2, kind="stable")[:, :, : strategy.size]  # unfinished ones, best first
        full = np.array([[len(group) >= strategy.size for group in finished[image]] for image in live])
        found = found.take(order)
        stopped = np.take_along_axis(ends, order, axis=2) | full[:, :, None]
        totals = np.where(stopped, np.float32(-np.inf), found.totals)
        kept = np.flatnonzero(np.isfinite(totals).any(axis=(1, 2)))
        if not len(kept):
            break
        live, totals = live[kept], totals[kept]
        rows, words, log_probs = (values[kept].reshape(len(kept), -1) for values in found[:3])
        lattice.extend(kept, rows, words, log_probs)
        state = state.select(kept, rows)
    return [best_of_groups(groups, settings, ending_earlier=ending_earlier) for groups in finished]


def _strategy(settings: SearchSettings, required: Sequence[int], end: int) -> Beam | Sampling:
    if settings.sample:
        return Sampling(settings)
    if required:
        return ConstrainedBeam(settings.beam_size, required, end)
    if settings.diverse_groups > 1:
        size = settings.beam_size // settings.diverse_groups
        return DiverseBeam(size, settings.diverse_groups, settings.diversity, end)
    return Beam(settings.beam_size)
