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
    index: int
    """Index of its noun, the kind, in the words of the caption."""

    def names(self, shape: Shape) -> bool:
        """Return whether the phrase can name this object."""
        return (self.kind, self.colour) == (shape.kind, shape.colour) and self.size in (None, shape.size)


@dataclass(frozen=True)
class Sentence:
    """The meaning of a caption: distinct objects and their relations."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...]
    """(first, relation, second), with indices of `mentions`."""


def parse(caption: str) -> Sentence | None:
    """Return the meaning of a caption; None if it is not a sentence of the grammar.

    Case and punctuation are ignored: words are those of `captioner.vocabulary.split`.
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
    """Return whether a caption is a sentence of the grammar and true of some objects of the scene."""
    return bool(mentions(split(caption), scene))


def mentions(words: Sequence[str], scene: Scene) -> list[tuple[int, Shape]]:
    """Return the index of each noun in the words of a caption, and the object that it names; empty if not true.

    If several choices of objects make the caption true, the first in the order of the scene counts; generated
    scenes have only one.
    """
    sentence = parse(" ".join(words))
    if sentence is None:
        return []
    for objects in itertools.permutations(scene.objects, len(sentence.mentions)):
        if all(mention.names(shape) for mention, shape in zip(sentence.mentions, objects, strict=True)) and all(
            holds(relation, objects[first], objects[second]) for first, relation, second in sentence.relations
        ):
            return [(mention.index, shape) for mention, shape in zip(sentence.mentions, objects, strict=True)]
    return []


@functools.cache
def _patterns() -> list[tuple[int, re.Pattern[str]]]:
    """Return the number of objects of each form, and the regular expression of its sentences."""
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
