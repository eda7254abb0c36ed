"""Compare captions with the objects of their pictures: hallucinated objects, true sentences, attention.

Counts are per image, as tallies: those of `evaluation.metrics.OBJECT_METRICS`.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from captioner.caption import Caption
from captioner.captioning import Captioner
from evaluation.attention import GroundedCaption, Noun, tally_attention
from evaluation.bootstrap import Tally
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


class Truth(NamedTuple):
    """The known objects of a set of pictures, by image id; empty if unknown."""

    scenes: dict[str, Scene]
    instances: dict[str, Instances]
    boxes: dict[str, Boxes]


NOTHING = Truth({}, {}, {})


def read_truth(
    layout: str, path: Path, records: Sequence[Record], files: Sequence[Path] = (), boxes: Path | None = None
) -> Truth:
    """Return the known objects of a data set: scenes of `shapes`, COCO's instances, boxes of people.

    The default files of instances are those beside the captions of `coco`.

    Raises:
        DataError: if a file cannot be read, instances lack a picture, or boxes contain none of the pictures.
        MissingExtraError: if instances need a library that is not installed.
    """
    if layout == "coco" and not files:
        folders = sorted({record.image.parent.name for record in records if isinstance(record.image, Path)})
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
    """Return all tallies of captions that can be computed from the known objects.

    Those of `tally_scenes`, `tally_hallucinations` and `tally_attention`, and of `tally_faithfulness` with the
    model that wrote the captions.
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
    """Return the nouns of a caption that name known objects.

    In scenes, each noun of a true caption names one object. Otherwise, a noun names all objects of its category
    together. Boxes take precedence over instances.
    """
    _, rows, columns = caption.attention.shape

    def covered_by(mask: np.ndarray) -> np.ndarray:
        return object_shares(mask, (rows, columns), caption.rectangle)

    if truth.scenes:
        scene = truth.scenes[record.image_id]
        return [
            Noun(slice(index, index + 1), shape, covered_by(scene.mask(shape)))
            for index, shape in mentions(caption.words, scene)
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
        "true": true captions, among all; "true of three": the same for scenes of three objects.
    """
    true: Tally[str] = {}
    true_of_three: Tally[str] = {}
    for record, caption in results:
        scene = scenes[record.image_id]
        is_of_three = len(scene.objects) == 3
        is_true_caption = is_true(caption.text, scene)
        true[record.image_id] = (int(is_true_caption), 1)
        true_of_three[record.image_id] = (int(is_true_caption and is_of_three), int(is_of_three))
    return {"true": true, "true of three": true_of_three}


def tally_hallucinations(
    captions: Mapping[Key, str], references: Mapping[Key, Sequence[str]], instances: Mapping[Key, Instances]
) -> dict[str, Tally[Key]]:
    """Return the tallies of CHAIR: hallucinated objects.

    Rohrbach et al. 2018 (arXiv 1809.02156), section 2.2. An object is present if it is annotated in the picture or
    a reference names it. Captions and references are raw.

    Returns:
        "CHAIR-i": hallucinated mentions, among all; "CHAIR-s": captions with such a mention, among all.
    """
    of_mentions: Tally[Key] = {}
    of_captions: Tally[Key] = {}
    for image, texts in references.items():
        present = {*instances[image].outlines, *_list_categories(texts)}
        named = _list_categories([captions[image]])
        hallucinated = sum(category not in present for category in named)
        of_mentions[image] = (hallucinated, len(named))
        of_captions[image] = (min(hallucinated, 1), 1)
    return {"CHAIR-i": of_mentions, "CHAIR-s": of_captions}


def _list_categories(captions: Iterable[str]) -> list[str]:
    return [mention.category for caption in captions for mention in find_mentions(tokenize(caption))]
