"""Captions held against what is in their pictures: is it there, and did attention lie on it?

All is counted image by image, in tallies, which `evaluation.bootstrap.ratios` turns into shares with intervals.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from captioner.caption import Caption, Rectangle
from evaluation.bootstrap import Ratio, Tally
from evaluation.datasets import Record
from evaluation.instances import Instances, read_instances
from evaluation.objects import find_mentions
from evaluation.pointing import attention_mass, points_at
from evaluation.shapes import Scene, is_true, mentions, read_scenes
from evaluation.tokenize import tokenize

Key = TypeVar("Key", bound=Hashable)

_COUNTED = {"CHAIR-i": "mentions", "CHAIR-s": "captions", "true": "captions", "true of three": "captions"}
"""What the wholes of tallies count; all others count nouns."""


class Truth(NamedTuple):
    """What is known of the objects in a set of pictures, by image id; empty: nothing."""

    scenes: dict[str, Scene]
    instances: dict[str, Instances]


NOTHING = Truth({}, {})


def read_truth(layout: str, path: Path, records: Sequence[Record], files: Sequence[Path] = ()) -> Truth:
    """Return what is known of pictures of a data set: the scenes of `shapes`, and COCO's instances.

    Args:
        layout: of the data set.
        path: where it is.
        records: the pictures.
        files: of instances. If none are given, those that lie beside the captions of `coco` are read.

    Raises:
        DataError: when a file cannot be read, or knows nothing of a picture.
        MissingExtraError: when instances need a library that is not installed.
    """
    if layout == "coco" and not files:
        folders = sorted({record.image.parent.name for record in records})
        beside = [path / "annotations" / f"instances_{folder}.json" for folder in folders]
        files = [file for file in beside if file.exists()]
    return Truth(
        scenes=read_scenes(path) if layout == "shapes" else {},
        instances=read_instances(files, [record.image_id for record in records]) if files else {},
    )


def tally(results: Sequence[tuple[Record, Caption]], truth: Truth) -> dict[str, Tally[str]]:
    """Return the tallies of captions that the truth about their pictures allows."""
    return {
        **(tally_scenes(results, truth.scenes) if truth.scenes else {}),
        **(tally_instances(results, truth.instances) if truth.instances else {}),
    }


def tally_scenes(results: Sequence[tuple[Record, Caption]], scenes: Mapping[str, Scene]) -> dict[str, Tally[str]]:
    """Return the tallies of captions of coloured shapes.

    Returns:
        "true": captions that are true, among all; "true of three": the same, of scenes of three objects;
        "attention mass": attention on the object, among the nouns of true captions, each of which names one;
        "pointing": nouns at which attention points at the object, among those whose map has a peak.
    """
    true: Tally[str] = {}
    true_of_three: Tally[str] = {}
    mass: Tally[str] = {}
    pointing: Tally[str] = {}
    for record, caption in results:
        image, scene = record.image_id, scenes[record.image_id]
        is_of_three = len(scene.objects) == 3
        is_said_truly = is_true(caption.text, scene)
        true[image] = (int(is_said_truly), 1)
        true_of_three[image] = (int(is_said_truly and is_of_three), int(is_of_three))
        mass[image], pointing[image] = _look(
            ((caption.attention[place], scene.mask(shape)) for place, shape in mentions(caption.words, scene)),
            caption.rectangle,
        )
    return {"true": true, "true of three": true_of_three, "attention mass": mass, "pointing": pointing}


def tally_instances(
    results: Sequence[tuple[Record, Caption]], instances: Mapping[str, Instances]
) -> dict[str, Tally[str]]:
    """Return the tallies of captions of pictures whose objects COCO's annotators marked.

    Attention is measured at the mentions whose category is marked in the picture, against all objects of that
    category together. A mention of two words has the mean of their maps.

    Returns:
        "CHAIR-i" and "CHAIR-s", as of `tally_hallucinations`; "attention mass" and "pointing", as of
        `tally_scenes`.
    """
    captions = {record.image_id: caption.text for record, caption in results}
    references = {record.image_id: record.captions for record, _ in results}
    mass: Tally[str] = {}
    pointing: Tally[str] = {}
    for record, caption in results:
        here = instances[record.image_id]
        mass[record.image_id], pointing[record.image_id] = _look(
            (
                (caption.attention[mention.start : mention.stop].mean(axis=0), here.mask(mention.category))
                for mention in find_mentions(caption.words)
                if mention.category in here.outlines
            ),
            caption.rectangle,
        )
    return {**tally_hallucinations(captions, references, instances), "attention mass": mass, "pointing": pointing}


def tally_hallucinations(
    captions: Mapping[Key, str], references: Mapping[Key, Sequence[str]], instances: Mapping[Key, Instances]
) -> dict[str, Tally[Key]]:
    """Return the tallies of CHAIR: objects that captions name and that are not there.

    Rohrbach et al. 2018 (arXiv 1809.02156), section 2.2. An object is there if it is marked in the picture, or if
    a reference names it.

    Args:
        captions: a raw caption an image.
        references: what people wrote of each.
        instances: what people marked in each.

    Returns:
        "CHAIR-i": mentions of what is not there, among all; "CHAIR-s": captions with such a mention, among all.
    """
    of_mentions: Tally[Key] = {}
    of_captions: Tally[Key] = {}
    for image, others in references.items():
        there = {*instances[image].outlines, *_list_categories(others)}
        named = _list_categories([captions[image]])
        hallucinated = sum(category not in there for category in named)
        of_mentions[image] = (hallucinated, len(named))
        of_captions[image] = (min(hallucinated, 1), 1)
    return {"CHAIR-i": of_mentions, "CHAIR-s": of_captions}


def _list_categories(captions: Iterable[str]) -> list[str]:
    return [mention.category for caption in captions for mention in find_mentions(tokenize(caption))]


def _look(
    named: Iterable[tuple[np.ndarray, np.ndarray]], rectangle: Rectangle
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (mass, nouns) and (hits, nouns with a peak) of the map of each noun and the mask of its object."""
    mass = 0.0
    nouns = hits = peaks = 0
    for attention, mask in named:
        mass += attention_mass(attention, mask, rectangle)
        nouns += 1
        if attention.min() < attention.max():  # even attention has no peak
            hits += points_at(attention, mask, rectangle)
            peaks += 1
    return (mass, nouns), (hits, peaks)


def count_of(name: str) -> str:
    """Return what the whole of a tally counts."""
    return _COUNTED.get(name, "nouns")


def objects_to_text(ratios: Mapping[str, Ratio]) -> str:
    """Return a line for the ratio of each tally: in percent, with its interval, and of how many."""
    lines = [f"{'%':>20}{'95 % interval':>17}"]
    for name, (value, low, high, whole) in ratios.items():
        if value is None or low is None or high is None:
            lines.append(f"{name:<14}{'none':>6}")
        else:
            interval = f"{100 * low:.1f} to {100 * high:.1f}"
            lines.append(f"{name:<14}{100 * value:6.1f}{interval:>17}  of {whole:,.0f} {count_of(name)}")
    return "\n".join(lines)
