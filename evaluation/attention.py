"""Where attention lies while a caption names an object whose place is known, and what blind maps would get.

All is counted image by image, in tallies, which `evaluation.bootstrap.ratios` turns into shares with intervals.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from captioner.caption import Caption
from evaluation.bootstrap import Tally
from evaluation.datasets import Record
from evaluation.pointing import attention_mass, object_shares, points_at


class Noun(NamedTuple):
    """A name of an object in a caption."""

    words: slice
    """Of the caption."""
    name: Hashable
    """What is named. Nouns of the same name, such as "man" and "people", name the same objects."""
    mask: np.ndarray | None
    """bool (H, W), the objects in the whole picture; None: nobody has marked them."""


class Look(NamedTuple):
    """A caption with its nouns."""

    record: Record
    caption: Caption
    nouns: Sequence[Noun]

    @property
    def marked(self) -> list[Noun]:
        """The nouns whose objects are marked, the only ones that can be measured."""
        return [noun for noun in self.nouns if noun.mask is not None]


def map_of(noun: Noun, caption: Caption) -> np.ndarray:
    """Return the map (rows, columns) of a noun: the mean over its words."""
    return caption.attention[noun.words].mean(axis=0)


def has_peak(attention: np.ndarray) -> bool:
    """Tell whether a map prefers any cell: even attention does not."""
    return bool(attention.min() < attention.max())


def tally_attention(looks: Sequence[Look]) -> dict[str, Tally[str]]:
    """Return the tallies of the maps of all nouns whose objects are marked.

    Even attention and the centre cell are what a mechanism gets that sees nothing of the picture. The centre of
    grids with an even number of rows is below their middle, that of an even number of columns right of it.

    Returns:
        "attention mass": attention on the object, "mass, even attention" and "mass, centre cell": what these maps
        have there; of nouns.
        "pointing": nouns at which attention points at the object, among those whose map has a peak;
        "pointing, any cell": cells that hold a part of the object, and "pointing, centre cell"; of nouns.
        "own map above other": noun pairs in which the map of the first has more mass on its object than the map of
        the second, which names something else; if both have as much, half a pair.
        "entropy": of the maps, over that of even attention; "largest weight"; of nouns.
    """
    tallies: dict[str, Tally[str]] = {}
    for look in looks:
        for name, part in _count(look).items():
            tallies.setdefault(name, {})[look.record.image_id] = part
    return tallies


def _count(look: Look) -> dict[str, tuple[float, float]]:
    """Return the part and the whole of each tally, of one picture."""
    marked = look.marked
    mass = even = centre = hits = peaks = any_cell = centre_hits = above = pairs = entropy = largest = 0.0
    for noun in marked:
        attention = map_of(noun, look.caption)
        assert noun.mask is not None
        rows, columns = attention.shape
        shares = object_shares(noun.mask, (rows, columns), look.caption.rectangle)
        mass += attention_mass(attention, shares)
        even += shares.mean()
        centre += shares[rows // 2, columns // 2]
        any_cell += (shares > 0).mean()
        centre_hits += shares[rows // 2, columns // 2] > 0
        if has_peak(attention):
            hits += points_at(attention, shares)
            peaks += 1
        for other in look.nouns:
            if other.name != noun.name:
                difference = attention_mass(attention - map_of(other, look.caption), shares)
                above += 0.5 + 0.5 * np.sign(difference)
                pairs += 1
        entropy += _relative_entropy(attention)
        largest += attention.max()
    nouns = float(len(marked))
    return {
        "attention mass": (mass, nouns),
        "mass, even attention": (float(even), nouns),
        "mass, centre cell": (float(centre), nouns),
        "pointing": (hits, peaks),
        "pointing, any cell": (float(any_cell), nouns),
        "pointing, centre cell": (float(centre_hits), nouns),
        "own map above other": (float(above), pairs),
        "entropy": (entropy, nouns),
        "largest weight": (float(largest), nouns),
    }


def _relative_entropy(attention: np.ndarray) -> float:
    """Return the entropy of a map over that of even attention, 0 to 1; 1 for the only map of a grid of one cell."""
    weights = attention[attention > 0].astype(float)
    return float(-(weights * np.log(weights)).sum() / np.log(attention.size)) if attention.size > 1 else 1.0
