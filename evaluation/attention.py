"""Measure attention on known objects while a caption names them, against maps that ignore the picture.

Counts are per image, as tallies: those of `evaluation.metrics.OBJECT_METRICS`.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from captioner.caption import Caption
from evaluation.bootstrap import Tally
from evaluation.datasets import Record
from evaluation.pointing import attention_mass, points_at


class Noun(NamedTuple):
    """A noun of a caption that names an object."""

    words: slice
    """Its words in the caption."""
    name: Hashable
    """The category or object. Nouns with the same name, such as "man" and "people", name the same objects."""
    shares: np.ndarray | None
    """Share of each cell that the objects cover (rows, columns); None: not annotated."""


class GroundedCaption(NamedTuple):
    """A caption with its nouns."""

    record: Record
    caption: Caption
    nouns: Sequence[Noun]

    @property
    def marked(self) -> list[tuple[Noun, np.ndarray]]:
        """The nouns with annotated objects, which can be measured, and the shares of these objects."""
        return [(noun, noun.shares) for noun in self.nouns if noun.shares is not None]


def map_of(noun: Noun, caption: Caption) -> np.ndarray:
    """Return the attention map (rows, columns) of a noun, averaged over its words."""
    return caption.attention[noun.words].mean(axis=0)


def has_peak(attention: np.ndarray) -> bool:
    """Return whether a map has a largest weight; even attention has none."""
    return bool(attention.min() < attention.max())


def tally_attention(captions: Sequence[GroundedCaption]) -> dict[str, Tally[str]]:
    """Return the tallies of the attention maps of all nouns with annotated objects.

    Even attention and the centre cell are baselines that ignore the picture. In a grid with an even number of rows
    or columns, the centre cell is the lower or right one of the middle.

    Returns:
        "attention mass": attention on the object; "mass, even attention" and "mass, centre cell": the same for
        these maps; per noun.
        "pointing": nouns whose attention peak is on the object, among those whose map has a peak;
        "pointing, any cell": share of cells that contain a part of the object; "pointing, centre cell"; per noun.
        "own map above other": pairs of nouns that name different things, in which the map of the first has more
        mass on its object than the map of the second; ties count half.
        "entropy": of the maps, relative to even attention; "largest weight"; per noun.
    """
    tallies: dict[str, Tally[str]] = {}
    for grounded in captions:
        for name, part in _count(grounded).items():
            tallies.setdefault(name, {})[grounded.record.image_id] = part
    return tallies


def _count(grounded: GroundedCaption) -> dict[str, tuple[float, float]]:
    """Return the part and the whole of each tally for one picture."""
    marked = grounded.marked
    mass = even = centre = hits = peaks = any_cell = centre_hits = above = pairs = entropy = largest = 0.0
    for noun, shares in marked:
        attention, (rows, columns) = map_of(noun, grounded.caption), shares.shape
        mass += attention_mass(attention, shares)
        even += shares.mean()
        centre += shares[rows // 2, columns // 2]
        any_cell += (shares > 0).mean()
        centre_hits += shares[rows // 2, columns // 2] > 0
        if has_peak(attention):
            hits += points_at(attention, shares)
            peaks += 1
        for other in grounded.nouns:
            if other.name != noun.name:
                difference = attention_mass(attention - map_of(other, grounded.caption), shares)
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
    """Return the entropy of a map relative to even attention, 0..1; 1 for a grid of one cell."""
    weights = attention[attention > 0].astype(float)
    return float(-(weights * np.log(weights)).sum() / np.log(attention.size)) if attention.size > 1 else 1.0
