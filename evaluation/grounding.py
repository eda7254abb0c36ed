"""Captions held against what is in their pictures: is it there, and did attention lie on it?

All is counted image by image, in tallies, which `evaluation.bootstrap.ratios` turns into shares with intervals.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from captioner.caption import Caption
from captioner.captioning import Captioner
from evaluation.attention import GroundedCaption, Noun, tally_attention
from evaluation.bootstrap import Ratio, Tally
from evaluation.boxes import Boxes, read_boxes
from evaluation.datasets import Record
from evaluation.datasets.scenes import Scene
from evaluation.datasets.shapes import read_scenes
from evaluation.faithfulness import tally_faithfulness
from evaluation.instances import Instances, read_instances
from evaluation.objects import find_mentions
from evaluation.pointing import object_shares
from evaluation.shapes import is_true, mentions
from evaluation.tokenize import tokenize

Key = TypeVar("Key", bound=Hashable)

_COUNTED = {
    "CHAIR-i": "mentions",
    "CHAIR-s": "captions",
    "true": "captions",
    "true of three": "captions",
    "own map above other": "pairs",
}
"""What the wholes of tallies count; all others count nouns."""


class Truth(NamedTuple):
    """What is known of the objects in a set of pictures, by image id; empty: nothing."""

    scenes: dict[str, Scene]
    instances: dict[str, Instances]
    boxes: dict[str, Boxes]


NOTHING = Truth({}, {}, {})


def read_truth(
    layout: str, path: Path, records: Sequence[Record], files: Sequence[Path] = (), boxes: Path | None = None
) -> Truth:
    """Return what is known of pictures of a data set: the scenes of `shapes`, COCO's instances, people's boxes.

    Args:
        layout: of the data set.
        path: where it is.
        records: the pictures.
        files: of instances. If none are given, those that lie beside the captions of `coco` are read.
        boxes: the file of boxes; None: there is none.

    Raises:
        DataError: when a file cannot be read, instances know nothing of a picture, or boxes of all pictures.
        MissingExtraError: when instances need a library that is not installed.
    """
    if layout == "coco" and not files:
        folders = sorted({record.image.parent.name for record in records})
        beside = [path / "annotations" / f"instances_{folder}.json" for folder in folders]
        files = [file for file in beside if file.exists()]
    return Truth(
        scenes=read_scenes(path) if layout == "shapes" else {},
        instances=read_instances(files, [record.image_id for record in records]) if files else {},
        boxes=read_boxes(boxes, records) if boxes else {},
    )


def tally(
    results: Sequence[tuple[Record, Caption]], truth: Truth, model: Captioner | None = None, batch_size: int = 64
) -> dict[str, Tally[str]]:
    """Return the tallies of captions that the truth about their pictures allows.

    Args:
        results: pictures and their captions.
        truth: what is known of the pictures.
        model: which wrote the captions, to measure faithfulness; None: it is not measured.
        batch_size: pictures that go through the model together.

    Returns:
        Those of `tally_scenes`, `tally_hallucinations`, `tally_attention` and `tally_faithfulness`.
    """
    tallies = tally_scenes(results, truth.scenes) if truth.scenes else {}
    if truth.instances:
        captions = {record.image_id: caption.text for record, caption in results}
        references = {record.image_id: record.captions for record, _ in results}
        tallies |= tally_hallucinations(captions, references, truth.instances)
    if truth != NOTHING:
        grounded = [
            GroundedCaption(record, caption, find_nouns(record, caption, truth)) for record, caption in results
        ]
        tallies |= tally_attention(grounded)
        if model is not None:
            tallies |= tally_faithfulness(model, grounded, batch_size)
    return tallies


def find_nouns(record: Record, caption: Caption, truth: Truth) -> list[Noun]:
    """Return the nouns of a caption that name what can be told from other things.

    In scenes, each noun of a true caption names one object. Elsewhere, a noun names all objects of its category
    together; there are none if nothing is known of the picture. Boxes go before instances.
    """
    _, rows, columns = caption.attention.shape

    def covered_by(mask: np.ndarray) -> np.ndarray:
        return object_shares(mask, (rows, columns), caption.rectangle)

    if truth.scenes:
        scene = truth.scenes[record.image_id]
        return [
            Noun(slice(place, place + 1), shape, covered_by(scene.mask(shape)))
            for place, shape in mentions(caption.words, scene)
        ]
    known: Mapping[str, Boxes | Instances] = truth.boxes or truth.instances
    if (objects := known.get(record.image_id)) is None:
        return []
    return [
        Noun(
            slice(mention.start, mention.stop),
            mention.category,
            covered_by(objects.mask(mention.category)) if mention.category in objects.outlines else None,
        )
        for mention in find_mentions(caption.words)
    ]


def tally_scenes(results: Sequence[tuple[Record, Caption]], scenes: Mapping[str, Scene]) -> dict[str, Tally[str]]:
    """Return the tallies of captions of coloured shapes.

    Returns:
        "true": captions that are true, among all; "true of three": the same, of scenes of three objects.
    """
    true: Tally[str] = {}
    true_of_three: Tally[str] = {}
    for record, caption in results:
        scene = scenes[record.image_id]
        is_of_three = len(scene.objects) == 3
        is_said_truly = is_true(caption.text, scene)
        true[record.image_id] = (int(is_said_truly), 1)
        true_of_three[record.image_id] = (int(is_said_truly and is_of_three), int(is_of_three))
    return {"true": true, "true of three": true_of_three}


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


def count_of(name: str) -> str:
    """Return what the whole of a tally counts."""
    return _COUNTED.get(name, "nouns")


def format_value(name: str, value: float) -> str:
    """Return a ratio as tables show it: in percent, or in nats where its name says so."""
    return f"{value:.2f}" if name.endswith("nats") else f"{100 * value:.1f}"


def objects_to_text(ratios: Mapping[str, Ratio]) -> str:
    """Return a line for the ratio of each tally: its value, its interval, and of how many."""
    width = max(14, *(2 + len(name) for name in ratios))
    lines = [f"{'%':>{width + 6}}{'95 % interval':>17}"]
    for name, (value, low, high, whole) in ratios.items():
        if value is None or low is None or high is None:
            lines.append(f"{name:<{width}}{'none':>6}")
        else:
            interval = f"{format_value(name, low)} to {format_value(name, high)}"
            count = f"{whole:,.0f} {count_of(name)}"
            lines.append(f"{name:<{width}}{format_value(name, value):>6}{interval:>17}  of {count}")
    return "\n".join(lines)
