"""Objects that captions name, by COCO's 80 categories.

The names and the rules for pairs of words are those of Rohrbach et al. 2018, "Object Hallucination in Image
Captioning" (arXiv 1809.02156), as in the authors' program; `coco_names.txt` tells their source and licence.

Known to differ: that program overlooks some of its own names, "bus", "ties", "collies" and "canoes" for the
singular that it makes of them, "motor bike", "cheesecake" and "iphone" for how its list is written. Here they
count. Its rules, followed to the letter, find the same in 24,354 of the 25,014 captions of COCO val2017 and, for
lack of these names, less in 658; in the other two, punctuation makes the difference.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_PLURALS = (
    (r"$", "s"),
    (r"(s|x|z|ch|sh|o)$", r"\1es"),
    (r"(?<![aeiou])y$", "ies"),
    (r"(?<!f)fe?$", "ves"),
    (r"man$", "men"),
    (r"child$", "children"),
    (r"goose$", "geese"),
    (r"mouse$", "mice"),
    (r"^ox$", "oxen"),
)
"""Endings and what they become. A wrong plural among the right ones, "mans", does no harm."""

_ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("animal", "cub"),  # of no category
)

_READ_AS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "toilet seat": "toilet",
    "home plate": "",
    "train track": "",
}
"""Pairs of words that name what their second word names, or nothing, and never what their first word names."""


def read_names() -> dict[str, str]:
    """Return the category of every name; names have one or two words."""
    lines = (Path(__file__).parent / "coco_names.txt").read_text(encoding="utf-8").splitlines()
    names = {}
    for line in lines:
        if line and not line.startswith("#"):
            category, _, others = line.partition(": ")
            names.update(dict.fromkeys([category, *filter(None, others.split(", "))], category))
    return names


def _inflect(name: str) -> set[str]:
    """Return a name and its plurals."""
    return {name, *(re.sub(ending, plural, name) for ending, plural in _PLURALS)}


_NAMES = read_names()

CATEGORIES = frozenset(_NAMES.values())
"""The 80 names that COCO's files give its categories."""

_CATEGORY_OF: dict[str, str | None] = {
    form: category
    for name, category in {**_NAMES, **{pair: _NAMES.get(word) for pair, word in _READ_AS.items()}}.items()
    for form in _inflect(name)
}
"""Of each form of each name, and of each pair; none: the pair names nothing."""


class Mention(NamedTuple):
    """A name in a caption: the category, and the places of the first word and of the one after the last."""

    category: str
    start: int
    stop: int


def find_mentions(words: Sequence[str]) -> list[Mention]:
    """Return what a caption names, in its order.

    A pair of words goes before its words: a hot dog is no dog, and a baby elephant no person. Where a toilet is
    named, seats are its seat, not chairs.

    Args:
        words: of the caption, in lower case.
    """
    has_toilet = not {"toilet", "toilets"}.isdisjoint(words)
    found = []
    start = 0
    while start < len(words):
        pair, word = " ".join(words[start : start + 2]), words[start]
        name = pair if pair in _CATEGORY_OF else word
        stop = start + 1 + name.count(" ")
        category = _CATEGORY_OF.get(name)
        if category and not (has_toilet and name in ("seat", "seats")):
            found.append(Mention(category, start, stop))
        start = stop
    return found
