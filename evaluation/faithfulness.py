"""Faithfulness of attention: does the probability of a word depend on the cells with the largest weights?

A plausible map need not explain the word (Jain and Wallace 2019, arXiv 1902.10186). At the step that predicts a
noun, the cells with the largest weights in its map are replaced by the mean annotation, after the same previous
words; Petsiuk et al. 2018 (arXiv 1806.07421, "deletion") replace pixels. Attention is computed again, with the mean
as the key of replaced cells. The state from previous words and from the initialization is unchanged. The baseline
replaces as many random cells.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from captioner.captioning import Captioner
from captioner.cores import count_cores
from captioner.vocabulary import END, START
from evaluation.attention import GroundedCaption, Noun, has_peak, map_of
from evaluation.bootstrap import Tally

SHARE = 0.2
"""Share of cells that are replaced."""

DRAWS = 10
"""Number of samples of random cells per noun."""


def tally_faithfulness(
    model: Captioner, captions: Sequence[GroundedCaption], batch_size: int = 64
) -> dict[str, Tally[str]]:
    """Return the tallies of the decrease of the log-probabilities of nouns in captions of the model, in nats.

    Nouns count if their object is annotated and their map has a peak. Decreases of several tokens are summed.

    Returns:
        "fall without its cells, nats"; "fall without random cells, nats", the mean of `DRAWS` samples; and
        "faithfulness, nats", the first minus the second.

    Raises:
        ImageError: if a picture cannot be read.
    """
    random = np.random.default_rng(0)
    measured = {grounded.record.image_id: _find_measured(grounded) for grounded in captions}
    falls = dict.fromkeys(measured, np.zeros(1 + DRAWS))
    named = [grounded for grounded in captions if measured[grounded.record.image_id]]
    for at in range(0, len(named), batch_size):
        batch = named[at : at + batch_size]
        images = [grounded.record.image_id for grounded in batch]
        falls |= zip(images, _measure(model, batch, [measured[image] for image in images], random), strict=True)
    counts = {image: float(len(nouns)) for image, nouns in measured.items()}
    own = {image: (float(fall[0]), counts[image]) for image, fall in falls.items()}
    random_falls = {image: (float(fall[1:].mean()), counts[image]) for image, fall in falls.items()}
    return {
        "fall without its cells, nats": own,
        "fall without random cells, nats": random_falls,
        "faithfulness, nats": {image: (own[image][0] - random_falls[image][0], counts[image]) for image in own},
    }


def _find_measured(grounded: GroundedCaption) -> list[Noun]:
    return [noun for noun, _ in grounded.marked if has_peak(map_of(noun, grounded.caption))]


def _measure(
    model: Captioner,
    captions: Sequence[GroundedCaption],
    nouns: Sequence[Sequence[Noun]],
    random: np.random.Generator,
) -> np.ndarray:
    """Return the decrease for the nouns of each caption, float64 (captions, 1 + DRAWS); first for their own
    cells."""
    with ThreadPoolExecutor(count_cores()) as readers:
        pixels = [
            read.pixels for read in readers.map(model.prepare, [grounded.record.image for grounded in captions])
        ]
    tokens = [model.vocabulary.encode(grounded.caption.text) for grounded in captions]
    replaced: dict[tuple[int, int], np.ndarray] = {}  # bool (1 + DRAWS, L), by caption and token index
    for number, grounded in enumerate(captions):
        spans = model.vocabulary.spans(tokens[number])
        for noun in nouns[number]:
            cells = choose_cells(map_of(noun, grounded.caption), random)
            for span in spans[noun.words]:
                replaced |= {(number, index): cells for index in range(span.start, span.stop)}

    falls = np.zeros((len(captions), 1 + DRAWS))
    state, previous = model.engine.start(np.stack(pixels)), np.full((len(captions), 1), START, dtype=np.int64)
    for index in range(1 + max(index for _, index in replaced)):
        step = model.engine.step(previous, state)
        images = np.array(
            [number for number in range(len(captions)) if (number, index) in replaced], dtype=np.int64
        )
        if len(images):
            before = state.select(images, np.zeros((len(images), 1), dtype=np.int64))
            cells = np.stack([replaced[number, index] for number in images])
            written = np.array([tokens[number][index] for number in images])
            for draw in range(1 + DRAWS):
                without = model.engine.step(previous[images], before.replace_cells(cells[:, draw]))
                fall = step.log_probs[images, 0, written] - without.log_probs[np.arange(len(images)), 0, written]
                falls[images, draw] += fall
        state = step.state
        previous = np.array([[ids[index] if index < len(ids) else END] for ids in tokens], dtype=np.int64)
    return falls


def choose_cells(attention: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the cells to replace, bool (1 + DRAWS, L): those with the largest weights, then random ones."""
    size = attention.size
    count = max(1, round(SHARE * size))
    chosen = [np.argsort(-attention, axis=None, kind="stable")[:count]]
    chosen += [random.choice(size, count, replace=False) for _ in range(DRAWS)]
    cells = np.zeros((1 + DRAWS, size), bool)
    np.put_along_axis(cells, np.array(chosen), True, axis=1)
    return cells
