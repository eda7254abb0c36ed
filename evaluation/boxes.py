"""Bounding boxes of people, to measure attention on pictures without masks.

The file is JSON, `{"images/dog.jpg": [[left, top, right, bottom], ...]}`: paths relative to the folder of the file,
and boxes in fractions of the width and height of the picture.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioner.errors import DataError
from evaluation.datasets import Record, resolve_paths
from evaluation.datasets.files import read_json

CATEGORY = "person"
"""The category of COCO of the boxes, whose names (man, girl, people) are evaluated on them."""

SIDE = 1000
"""Width and height of a mask, in pixels: boxes are rounded to thousandths of the picture."""


@dataclass(frozen=True)
class Boxes:
    """The boxes of a picture."""

    outlines: dict[str, Sequence[Sequence[float]]]
    """Left, top, right and bottom in fractions of the picture, by category, as the polygons of `Instances`."""

    def mask(self, category: str) -> np.ndarray:
        """Return the pixels of all boxes of a category, bool (SIDE, SIDE); at least one pixel per box."""
        mask = np.zeros((SIDE, SIDE), bool)
        for box in self.outlines[category]:
            left, top, right, bottom = (round(SIDE * side) for side in box)
            left, top = min(left, SIDE - 1), min(top, SIDE - 1)
            mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        return mask


def read_boxes(file: Path, records: Sequence[Record]) -> dict[str, Boxes]:
    """Return the boxes of these pictures, by image id; pictures that are not in the file are omitted.

    Raises:
        DataError: if the file cannot be read, is not of this format, or contains none of the pictures.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not all(map(_is_list_of_boxes, content.values())):
        raise DataError(
            f'{file}: expected boxes of people, {{"IMAGE": [[left, top, right, bottom], ...]}} in fractions of the '
            "picture, with 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1"
        )
    by_path = {os.path.realpath(file.parent / name): boxes for name, boxes in content.items()}
    found = {
        record.image_id: Boxes({CATEGORY: by_path[path]} if by_path[path] else {})
        for record, path in zip(records, resolve_paths(records), strict=True)
        if path in by_path
    }
    if not found:
        raise DataError(
            f"{file}: contains none of these pictures. Its paths must be relative to the folder of the file"
        )
    return found


def _is_list_of_boxes(boxes: object) -> bool:
    return isinstance(boxes, list) and all(
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(side, int | float) and 0 <= side <= 1 for side in box)
        and box[0] <= box[2]
        and box[1] <= box[3]
        for box in boxes
    )
