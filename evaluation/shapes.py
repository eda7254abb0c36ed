"""Check captions of coloured shapes against their scenes: whether they are true, and what each noun names."""

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from captioner.vocabulary import split
from evaluation.datasets.draw_shapes import FORMS, RELATIONS, holds
from evaluation.datasets.scenes import Colour, Kind, Scene, Shape, Size


@dataclass(frozen=True)
class Mention:
    """A noun phrase of a caption."""

    kind: str
    colour: str
    size: str | None
    place: int
    """Where its noun, the kind, stands among the words of the caption; the first word is 0."""

    def names(self, shape: Shape) -> bool:
        """Tell whether the phrase can name this object."""
        return (self.kind, self.colour) == (shape.kind, shape.colour) and self.size in (None, shape.size)


@dataclass(frozen=True)
class Sentence:
    """What a caption claims: that there are such objects, all different, in such relations."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...]
    """(first, relation, second): places in `mentions`."""


def parse(caption: str) -> Sentence | None:
    """Return what a caption claims, or None when it is no sentence of the grammar.

    Case and punctuation do not matter: words are those of `captioner.vocabulary.split`.
    """
    text = " ".join(split(caption))
    for count, pattern in _patterns():
        if found := pattern.fullmatch(text):
            letters = "ABC"[:count]
            phrases = tuple(
                Mention(
                    found[f"{letter}_kind"],
                    found[f"{letter}_colour"],
                    found[f"{letter}_size"],
                    text.count(" ", 0, found.start(f"{letter}_kind")),
                )
                for letter in letters
            )
            relations = tuple(
                (letters.index(name[0]), relation, letters.index(name[1]))
                for name, relation in found.groupdict().items()
                if len(name) == 2
            )
            return Sentence(phrases, relations)
    return None


def is_true(caption: str, scene: Scene) -> bool:
    """Tell whether a caption is a sentence of the grammar and true: some objects are all that it claims."""
    return bool(mentions(split(caption), scene))


def mentions(words: Sequence[str], scene: Scene) -> list[tuple[int, Shape]]:
    """Return the place of each noun among the words of a caption, and the object that it names.

    Where several choices of objects make the caption true, the first in the order of the scene counts; in
    generated scenes there is but one. A caption that is not true names nothing: the list is empty.
    """
    sentence = parse(" ".join(words))
    if sentence is None:
        return []
    for objects in itertools.permutations(scene.objects, len(sentence.mentions)):
        if all(mention.names(shape) for mention, shape in zip(sentence.mentions, objects, strict=True)) and all(
            holds(relation, objects[first], objects[second]) for first, relation, second in sentence.relations
        ):
            return [(mention.place, shape) for mention, shape in zip(sentence.mentions, objects, strict=True)]
    return []


@functools.cache
def _patterns() -> list[tuple[int, re.Pattern[str]]]:
    """Return how many objects each form mentions, and the expression that its sentences match."""
    return [
        (count, re.compile(" ".join(_expression(token) for token in form.split())))
        for count, forms in FORMS.items()
        for form in forms
    ]


def _expression(token: str) -> str:
    if not token.isupper():
        return token
    if len(token) == 2:
        return f"(?P<{token}>{'|'.join(RELATIONS)})"
    size, colour, kind = ("|".join(get_args(words)) for words in (Size, Colour, Kind))
    return f"a (?:(?P<{token}_size>{size}) )?(?P<{token}_colour>{colour}) (?P<{token}_kind>{kind})"
