"""Boxes around the people of pictures, from a file of their own: to measure attention where no masks are.

The file is JSON, `{"images/dog.jpg": [[left, top, right, bottom], ...]}`: boxes in fractions of the picture's width
and height, and paths of pictures from the file's folder.
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
"""What the boxes hold: the category of COCO whose names (man, girl, people) are measured against them."""

SIDE = 1000
"""Width and height of a mask, in pixels: the sides of boxes are rounded to thousandths of the picture."""


@dataclass(frozen=True)
class Boxes:
    """The boxes around the people of a picture."""

    outlines: dict[str, Sequence[Sequence[float]]]
    """Left, top, right and bottom in fractions of the picture, by category, as `Instances` has polygons."""

    def mask(self, category: str) -> np.ndarray:
        """Return bool (SIDE, SIDE): the pixels of all boxes of a category of `outlines`, at least one of each."""
        mask = np.zeros((SIDE, SIDE), bool)
        for box in self.outlines[category]:
            left, top, right, bottom = (round(SIDE * side) for side in box)
            left, top = min(left, SIDE - 1), min(top, SIDE - 1)
            mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        return mask


def read_boxes(file: Path, records: Sequence[Record]) -> dict[str, Boxes]:
    """Return the boxes of these pictures, by image id; pictures that the file does not name are left out.

    Raises:
        DataError: when the file cannot be read, holds something else, or names none of the pictures.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not all(map(_is_list_of_boxes, content.values())):
        raise DataError(
            f'{file}: expected boxes of people, {{"IMAGE": [[left, top, right, bottom], ...]}} in fractions of the '
            "picture, 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1, got something else"
        )
    by_path = {os.path.realpath(file.parent / name): boxes for name, boxes in content.items()}
    found = {
        record.image_id: Boxes({CATEGORY: by_path[path]} if by_path[path] else {})
        for record, path in zip(records, resolve_paths(records), strict=True)
        if path in by_path
    }
    if not found:
        raise DataError(
            f"{file}: names none of these pictures. Its paths must start in the folder of the file itself"
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
