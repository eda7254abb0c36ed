"""Content words of a caption, and which of them the references of the picture confirm.

A word is confirmed if a reference contains the word, an inflected form or a synonym of it, by COCO's object names
(`coco_names.txt`) and `synonyms.txt`. `words.txt` lists the content words. Both files are English and state their
sources. Words are compared one by one: "hot dog" confirms "dog".
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

from captioner.vocabulary import split
from evaluation.objects import read_list, read_names

Kind = Literal["thing", "other"]

_IRREGULAR = {
    **{"men": "man", "women": "woman", "children": "child", "people": "person", "geese": "goose", "mice": "mouse"},
    **{"feet": "foot", "teeth": "tooth"},
    **{"ran": "run", "sat": "sit", "stood": "stand", "held": "hold", "rode": "ride"},
    **{"ate": "eat", "eaten": "eat", "wore": "wear", "worn": "wear", "lying": "lie", "lay": "lie", "laying": "lie"},
    **{"threw": "throw", "thrown": "throw", "caught": "catch", "swam": "swim", "drove": "drive", "flew": "fly"},
}
_SHORTEST = 3  # letters of a form without its ending


def _read_words() -> Mapping[str, Kind]:
    """Return the kind of each content word."""
    kinds: dict[str, Kind] = {}
    kind: Kind = "thing"
    for line in read_list("words.txt"):
        if line in ("things:", "others:"):
            kind = "thing" if line == "things:" else "other"
        else:
            kinds.update(dict.fromkeys(line.split(), kind))
    return kinds


def _read_synonyms() -> Mapping[str, frozenset[str]]:
    """Return the synonyms of each word."""
    found: dict[str, set[str]] = {}
    for line in read_list("synonyms.txt"):
        word, colon, synonyms = line.partition(": ")
        group = (synonyms if colon else line).split(", ")
        for named in [word] if colon else group:
            found.setdefault(named, set()).update(group)
    categories: dict[str, set[str]] = {}
    for name, category in read_names().items():
        if category != "person" and " " not in name:
            categories.setdefault(category, set()).add(name)
    for group_of_names in categories.values():
        for name in group_of_names:
            found.setdefault(name, set()).update(group_of_names)
    return {word: frozenset(synonyms) for word, synonyms in found.items()}


_KINDS = _read_words()
_SYNONYMS = _read_synonyms()


def kind_of(word: str) -> Kind | None:
    """Return whether a word names a thing or something else that is visible; None if neither or unknown."""
    return _KINDS.get(word)


@lru_cache(maxsize=1 << 16)
def forms(word: str) -> frozenset[str]:
    """Return a word and its possible base forms; additional wrong forms do no harm.

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
    """Return the forms that confirm a word."""
    own = forms(word)
    return own.union(*(_SYNONYMS.get(form, ()) for form in own))


def forms_of(captions: Iterable[str]) -> frozenset[str]:
    """Return the forms of all words of raw captions."""
    return frozenset().union(*(forms(word) for caption in captions for word in split(caption)))


def is_confirmed(word: str, seen: frozenset[str]) -> bool:
    """Return whether references confirm a word; `seen` is `forms_of` the references."""
    return not confirming(word).isdisjoint(seen)


def confirms_all(words: Sequence[str], seen: frozenset[str]) -> bool:
    """Return whether references confirm every thing in the words of a caption; False if it names none."""
    things = [word for word in words if kind_of(word) == "thing"]
    return bool(things) and all(is_confirmed(word, seen) for word in things)
