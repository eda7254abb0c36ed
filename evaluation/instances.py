"""COCO's instance annotations: categories and masks of the objects of a picture.

Lin et al. 2014 (arXiv 1405.0312). The files are `instances_val2017.json` and the like, from COCO's archives.
"""

import warnings
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from captioner.errors import DataError
from captioner.installation import require_extra
from evaluation.datasets.files import read_json, shorten_names
from evaluation.objects import CATEGORIES


@dataclass(frozen=True)
class Instances:
    """The annotated objects of a picture."""

    size: tuple[int, int]
    """Height and width of the picture, in pixels."""
    outlines: dict[str, list[Any]]
    """Polygons and run-length encodings of all objects, by category."""

    def mask(self, category: str) -> np.ndarray:
        """Return the pixels of all objects of a category, crowds included: bool (H, W)."""
        from pycocotools import mask

        codes = [outline for outline in self.outlines[category] if isinstance(outline, dict)]
        if polygons := [outline for outline in self.outlines[category] if isinstance(outline, list)]:
            codes += mask.frPyObjects(polygons, *self.size)
        return _decode(mask.merge(codes)) if codes else np.zeros(self.size, bool)


def read_instances(files: Sequence[Path], images: Iterable[str]) -> dict[str, Instances]:
    """Return the objects of these images, by id, from one or more files of instances.

    Masks are decoded on demand. Image ids are strings.

    Raises:
        DataError: if a file cannot be read or is not of this format, or an image is missing.
        MissingExtraError: if pycocotools is not installed.
    """
    with require_extra("train", "reading instances of COCO"):
        import pycocotools.mask  # noqa: F401 (fail before hours of work)
    wanted = set(images)
    found: dict[str, Instances] = {}
    for file in files:
        found.update(_read_file(file, wanted))
    if missing := wanted - found.keys():
        raise DataError(
            f"{', '.join(map(str, files))}: no image {shorten_names(missing)}. "
            "Use the instances of the same pictures, with COCO's image ids"
        )
    return found


def _read_file(file: Path, images: Set[str]) -> dict[str, Instances]:
    content = read_json(file)
    try:
        categories = {category["id"]: category["name"] for category in content["categories"]}
        if unknown := set(categories.values()) - CATEGORIES:
            raise DataError(f"{file}: expected COCO's 80 categories, got {shorten_names(unknown)}")
        found = {
            image: Instances((int(row["height"]), int(row["width"])), {})
            for row in content["images"]
            if (image := str(row["id"])) in images
        }
        for row in content["annotations"]:
            if instances := found.get(str(row["image_id"])):
                outlines = _check(row["segmentation"], instances.size, f"{file}, annotation {row['id']}")
                instances.outlines.setdefault(categories[row["category_id"]], []).extend(outlines)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: expected COCO's instances, `images` with id, height and width, `categories` with id and name "
            f"and `annotations` with id, image_id, category_id and segmentation ({error!r:.60})"
        ) from error
    return found


def _check(segmentation: Any, size: tuple[int, int], where: str) -> list[Any]:
    """Return the polygons of an annotation, or its compressed run-length encoding, for `Instances.mask`."""
    from pycocotools import mask

    try:
        if isinstance(segmentation, list):
            if not all(isinstance(number, int | float) for polygon in segmentation for number in polygon):
                raise ValueError("a coordinate is not a number")
            return [polygon for polygon in segmentation if len(polygon) >= 6]  # fewer than 3 points have no area
        code = segmentation
        if isinstance(code["counts"], list):
            if min(code["counts"]) < 0 or sum(code["counts"]) != size[0] * size[1]:
                raise ValueError("the runs do not fill the picture")
            code = mask.frPyObjects(code, *size)
        if _decode(code).shape != size:
            raise ValueError("the size is not that of the picture")
        return [code]
    except Exception as error:  # pycocotools raises plain Exception, among others
        raise DataError(
            f"{where}: expected polygons or a run-length encoding of {size[0]} x {size[1]} pixels, "
            f"got {str(segmentation)[:60]} ({error})"
        ) from error


def _decode(code: Any) -> np.ndarray:
    from pycocotools import mask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools 2.0.11 under numpy 2
        return mask.decode(code).astype(bool)
