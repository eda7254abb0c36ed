"""Which words of a caption name something, and which of them other people's captions of the picture confirm.

A word is confirmed if one of these captions has it, its plural or another form of it, or a word that people use for
the same thing: by COCO's names of objects (`coco_names.txt`) and the table `synonyms.txt`. `words.txt` says which
words name something; both files state their sources. They are of English. Words are taken one by one: "hot dog"
confirms "dog".
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from captioner.vocabulary import split
from evaluation.objects import read_names

Kind = Literal["thing", "other"]

_IRREGULAR = {
    **{"men": "man", "women": "woman", "children": "child", "people": "person", "geese": "goose", "mice": "mouse"},
    **{
        "feet": "foot",
        "teeth": "tooth",
        "ran": "run",
        "sat": "sit",
        "stood": "stand",
        "held": "hold",
        "rode": "ride",
    },
    **{"ate": "eat", "eaten": "eat", "wore": "wear", "worn": "wear", "lying": "lie", "lay": "lie", "laying": "lie"},
    **{"threw": "throw", "thrown": "throw", "caught": "catch", "swam": "swim", "drove": "drive", "flew": "fly"},
}
_SHORTEST = 3  # letters of a form that an ending is taken from


def _read_words() -> Mapping[str, Kind]:
    """Return of each word that names something whether it is a thing."""
    kinds: dict[str, Kind] = {}
    kind: Kind = "thing"
    for line in (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines():
        if line in ("things:", "others:"):
            kind = "thing" if line == "things:" else "other"
        elif not line.startswith("#"):
            kinds.update(dict.fromkeys(line.split(), kind))
    return kinds


def _read_synonyms() -> Mapping[str, frozenset[str]]:
    """Return of each word the words that confirm it."""
    found: dict[str, set[str]] = {}
    for line in (Path(__file__).parent / "synonyms.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            word, colon, others = line.partition(": ")
            group = (others if colon else line).split(", ")
            for named in [word] if colon else group:
                found.setdefault(named, set()).update(group)
    categories: dict[str, set[str]] = {}
    for name, category in read_names().items():
        if category != "person" and " " not in name:
            categories.setdefault(category, set()).add(name)
    for group_of_names in categories.values():
        for name in group_of_names:
            found.setdefault(name, set()).update(group_of_names)
    return {word: frozenset(others) for word, others in found.items()}


_KINDS = _read_words()
_SYNONYMS = _read_synonyms()


def kind_of(word: str) -> Kind | None:
    """Return whether a word names a thing, or something else that can be seen; None if neither, or not known."""
    return _KINDS.get(word)


@lru_cache(maxsize=1 << 16)
def forms(word: str) -> frozenset[str]:
    """Return a word, and what it may be a plural or another form of; a wrong one among them does no harm.

    "knives" -> "knives", "knive", "kniv", "knif", "knife".
    """
    found = {word, _IRREGULAR.get(word, word)}
    if word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
        for ending, single in (("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
            if word.endswith(ending):
                found.add(word.removesuffix(ending) + single)
    for ending in ("ing", "ed"):
        if word.endswith(ending):
            stem = word.removesuffix(ending)
            found |= {stem, stem + "e"}
            if stem[-1:] == stem[-2:-1]:
                found.add(stem[:-1])
            if stem.endswith("i"):
                found.add(stem[:-1] + "y")
    return frozenset(form for form in found if len(form) >= _SHORTEST or form == word)


@lru_cache(maxsize=1 << 16)
def confirming(word: str) -> frozenset[str]:
    """Return the forms any of which confirms a word."""
    own = forms(word)
    return own.union(*(_SYNONYMS.get(form, ()) for form in own))


def forms_of(captions: Iterable[str]) -> frozenset[str]:
    """Return the forms of all words of raw captions."""
    return frozenset().union(*(forms(word) for caption in captions for word in split(caption)))


def is_confirmed(word: str, seen: frozenset[str]) -> bool:
    """Return whether captions confirm a word; `seen` are their words, as of `forms_of`."""
    return not confirming(word).isdisjoint(seen)


def confirms_all(words: Sequence[str], seen: frozenset[str]) -> bool:
    """Return whether captions confirm every thing that a caption of these words names. One that names none is not
    confirmed."""
    things = [word for word in words if kind_of(word) == "thing"]
    return bool(things) and all(is_confirmed(word, seen) for word in things)
