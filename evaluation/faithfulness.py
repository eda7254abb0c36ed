"""Does a word need what its map shows? Cells are taken from the network's view, and its word becomes less likely.

A map that looks right need not be why a word was written (Jain and Wallace 2019, arXiv 1902.10186). So the cells
that a noun's map weighs most are replaced by the mean annotation while the network predicts that noun, after the
same words as before; Petsiuk et al. 2018 (arXiv 1806.07421, "deletion") do so with pixels. Attention is computed
anew: a replaced cell has the key of the mean, too. What the network remembers of the words before, and of its first
look at the whole picture, stays. As many random cells tell what the loss of any cells costs.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from captioner.captioning import Captioner
from captioner.cores import count_cores
from captioner.vocabulary import END, START
from evaluation.attention import Look, Noun, has_peak, map_of
from evaluation.bootstrap import Tally

SHARE = 0.2
"""Of the cells, how many are replaced."""

DRAWS = 10
"""How many times random cells are drawn for each noun."""


def tally_faithfulness(model: Captioner, looks: Sequence[Look], batch_size: int = 64) -> dict[str, Tally[str]]:
    """Return the tallies of what the log-probabilities of nouns lose, in nats, of nouns.

    A noun is measured if its object is marked and its map has a peak. That of several tokens loses the sum.

    Args:
        model: which wrote the captions.
        looks: its captions.
        batch_size: pictures that go through the network together.

    Returns:
        "fall without its cells, nats"; "fall without random cells, nats", the mean of `DRAWS` draws; and
        "faithfulness, nats", the former minus the latter.

    Raises:
        ImageError: when a picture cannot be read.
    """
    random = np.random.default_rng(0)
    measured = {look.record.image_id: _find_measured(look) for look in looks}
    falls = dict.fromkeys(measured, np.zeros(1 + DRAWS))
    named = [look for look in looks if measured[look.record.image_id]]
    for at in range(0, len(named), batch_size):
        batch = named[at : at + batch_size]
        images = [look.record.image_id for look in batch]
        falls |= zip(images, _measure(model, batch, [measured[image] for image in images], random), strict=True)
    counts = {image: float(len(nouns)) for image, nouns in measured.items()}
    own = {image: (float(fall[0]), counts[image]) for image, fall in falls.items()}
    others = {image: (float(fall[1:].mean()), counts[image]) for image, fall in falls.items()}
    return {
        "fall without its cells, nats": own,
        "fall without random cells, nats": others,
        "faithfulness, nats": {image: (own[image][0] - others[image][0], counts[image]) for image in own},
    }


def _find_measured(look: Look) -> list[Noun]:
    return [noun for noun in look.marked if has_peak(map_of(noun, look.caption))]


def _measure(
    model: Captioner, looks: Sequence[Look], nouns: Sequence[Sequence[Noun]], random: np.random.Generator
) -> np.ndarray:
    """Return what the nouns of each caption lose, float64 (captions, 1 + DRAWS): first without their own cells."""
    with ThreadPoolExecutor(count_cores()) as readers:
        pixels = [read.pixels for read in readers.map(model.prepare, [look.record.image for look in looks])]
    tokens = [model.vocabulary.encode(look.caption.text) for look in looks]
    replaced: dict[tuple[int, int], np.ndarray] = {}  # bool (1 + DRAWS, L), by caption and place among its tokens
    for number, look in enumerate(looks):
        spans = model.vocabulary.spans(tokens[number])
        for noun in nouns[number]:
            cells = choose_cells(map_of(noun, look.caption), random)
            for span in spans[noun.words]:
                replaced |= {(number, place): cells for place in range(span.start, span.stop)}

    falls = np.zeros((len(looks), 1 + DRAWS))
    state, previous = model.engine.start(np.stack(pixels)), np.full((len(looks), 1), START)
    for place in range(1 + max(place for _, place in replaced)):
        step = model.engine.step(previous, state)
        images = np.array([number for number in range(len(looks)) if (number, place) in replaced], dtype=int)
        if len(images):
            before = state.select(images, np.zeros((len(images), 1), dtype=int))
            cells = np.stack([replaced[number, place] for number in images])
            written = np.array([tokens[number][place] for number in images])
            for draw in range(1 + DRAWS):
                without = model.engine.step(previous[images], before.replace_cells(cells[:, draw]))
                fall = step.log_probs[images, 0, written] - without.log_probs[np.arange(len(images)), 0, written]
                falls[images, draw] += fall
        state = step.state
        previous = np.array([[each[place] if place < len(each) else END] for each in tokens])
    return falls


def choose_cells(attention: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the cells to replace, bool (1 + DRAWS, L): those that a map weighs most, and then random ones."""
    size = attention.size
    count = max(1, round(SHARE * size))
    chosen = [np.argsort(-attention, axis=None, kind="stable")[:count]]
    chosen += [random.choice(size, count, replace=False) for _ in range(DRAWS)]
    cells = np.zeros((1 + DRAWS, size), bool)
    np.put_along_axis(cells, np.array(chosen), True, axis=1)
    return cells
