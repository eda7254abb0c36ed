"""Read candidates, references and scores; write COCO's results.

References, by image:
    * COCO's annotations: an object with `annotations` (of `image_id` and `caption`) and optionally `images` (of
      `id` and `file_name`);
    * JSON Lines, one object per image: `{"image": "dog.jpg", "captions": ["A dog.", "A brown dog."]}`;
    * one object of lists: `{"dog.jpg": ["A dog.", "A brown dog."]}`.

Candidates, one per image:
    * COCO's results: a list of `{"image_id": 42, "caption": "a dog"}`;
    * JSON Lines, as `caption --format jsonl` writes: `{"image": "photos/dog.jpg", "caption": "a dog"}`;
    * one object: `{"dog.jpg": "a dog"}`.

Image ids are strings: 42, 42.0 and "42" are the same image.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.errors import DataError
from evaluation.datasets.files import parse_json, shorten_names
from evaluation.metrics import METRICS, OBJECT_METRICS, Scores


@dataclass(frozen=True)
class References:
    """References: `captions` by image id, and `ids` by file name without folders, where it is unique."""

    captions: dict[str, list[str]]
    ids: dict[str, str]


def read_references(path: str | Path) -> References:
    """Read references.

    Raises:
        DataError: if the file cannot be read, is not JSON, or has the wrong format.
    """
    content = _read(path)
    captions: dict[str, list[str]] = {}
    if isinstance(content, dict) and "annotations" in content:
        for image, caption in _pairs(content["annotations"], "image_id", "caption", path):
            captions.setdefault(image, []).append(_text(caption, image, path))
        files = list(_pairs(content.get("images", []), "id", "file_name", path))
    else:
        for image, several in _pairs(content, "image", "captions", path):
            if not isinstance(several, list):
                raise DataError(f"{path}: image {image}: expected a list of captions, got {_show(several)}")
            captions.setdefault(image, []).extend(_text(caption, image, path) for caption in several)
        files = [(image, image) for image in captions]
    names = [(Path(str(name)).name, image) for image, name in files]
    times = Counter(name for name, _ in names)
    return References(captions, {name: image for name, image in names if times[name] == 1})


def read_candidates(path: str | Path, references: References) -> dict[str, str]:
    """Read one caption for each image, by the image ids of the references.

    An unknown id is looked up by its file name, so that captions of `photos/000000000042.jpg` match COCO's
    annotations of image 42.

    Raises:
        DataError: if the file cannot be read, is not JSON, or has the wrong format, such as two captions for an
            image.
    """
    content = _read(path)
    captions: dict[str, str] = {}
    duplicates = []
    is_results = isinstance(content, list) and isinstance(content[0], dict) and "image_id" in content[0]
    for name, caption in _pairs(content, "image_id" if is_results else "image", "caption", path):
        image = name if name in references.captions else references.ids.get(Path(name).name, name)
        if image in captions:
            duplicates.append(image)
        captions[image] = _text(caption, image, path)
    if duplicates:
        raise DataError(f"{path}: duplicate captions for {shorten_names(duplicates)}; expected one per image")
    return captions


def to_results(captions: Mapping[str, str]) -> list[dict[str, int | str]]:
    """Return captions by image id as COCO's results; ids are numbers if all of them are numeric."""
    numbers = all(re.fullmatch(r"0|[1-9]\d*", image) for image in captions)
    return [
        {"image_id": int(image) if numbers else image, "caption": caption} for image, caption in captions.items()
    ]


def number_images(captions: Mapping[str, str], expected: str | Path | None = None) -> dict[str, str]:
    """Return captions of COCO's pictures by COCO's image ids, from the names of their files.

    Args:
        captions: by `COCO_test2014_000000000042.jpg` or `000000000042.jpg`, with or without folders, or by `42`.
        expected: COCO's list of images (`image_info_test2014.json`) or annotations, whose images are required.

    Raises:
        DataError: if names are not those of COCO, or images are duplicate, missing or not expected.
    """
    found: dict[str, str] = {}
    invalid, duplicates = [], []
    for name, caption in captions.items():
        number = re.fullmatch(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)", Path(name).stem)
        if number is None:
            invalid.append(name)
        elif number[1] in found:
            duplicates.append(number[1])
        else:
            found[number[1]] = caption
    if invalid:
        raise DataError(
            f"{shorten_names(invalid)}: not a file name of COCO, expected such as COCO_test2014_000000000042.jpg"
        )
    if duplicates:
        raise DataError(f"duplicate captions for {shorten_names(duplicates)}; expected one per image")
    if expected is not None:
        content = _read(expected)
        if not isinstance(content, dict) or "images" not in content:
            raise DataError(f"{expected}: expected an object with 'images', as COCO's image_info_test2014.json")
        wanted = {image for image, _ in _pairs(content["images"], "id", "file_name", expected)}
        if missing := wanted - found.keys():
            raise DataError(f"no caption for {shorten_names(missing)} of {expected}")
        if unknown := found.keys() - wanted:
            raise DataError(f"{shorten_names(unknown)}: not in {expected}")
    return found


def to_json(scores: Scores[str]) -> dict[str, Any]:
    """Return all scores as JSON types; `read_scores` reads them."""
    return {
        "corpus": scores.corpus,
        "without_brevity_penalty": scores.without_brevity_penalty,
        "per_image": scores.per_image,
        "counts": scores.counts,
    }


def read_scores(path: str | Path) -> Scores[str]:
    """Read scores that `python -m evaluation` wrote with `--json`.

    Raises:
        DataError: if the file cannot be read, or contains something else.
    """
    if Path(path).is_dir():
        raise DataError(
            f"{path}: is a folder, not a file of scores. Compare runs with: python -m evaluation table RUN RUN. "
            f"Or score their checkpoints first: python -m evaluation run {path} --data LAYOUT:PATH --json FILE"
        )
    content = _read(path)
    try:
        counts = {
            name: {image: tuple(map(float, row)) for image, row in content["counts"][name].items()}
            for name in METRICS
            if name in content["counts"]
        }
        images = counts["BLEU"].keys()
        if not images or any(rows.keys() != images for rows in counts.values()):
            raise ValueError("counts of different images")
        scores = Scores(counts)
        for name, value in scores.corpus.items():
            if math.isinf(value) or (math.isnan(value) and name not in OBJECT_METRICS):  # NaN: no objects
                raise ValueError(f"{name} is not finite")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise DataError(
            f"{path}: not a file that `run` or `score` of this version wrote with --json ({error!r:.100})"
        ) from error
    return scores


def _read(path: str | Path) -> Any:
    """Return the content of a JSON file, or the list of the objects of a JSON Lines file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot read this file ({reason})") from error
    try:
        content = parse_json(text)
    except json.JSONDecodeError as whole:
        content = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                if line.strip():
                    content.append(parse_json(line))
            except json.JSONDecodeError as error:
                reason = f"{error.msg} in line {number}" if content else f"{whole.msg} in line {whole.lineno}"
                raise DataError(f"{path}: neither JSON nor JSON Lines ({reason})") from error
            except ValueError as error:
                raise DataError(f"{path}, line {number}: cannot use this JSON ({error})") from error
    except ValueError as error:
        raise DataError(f"{path}: cannot use this JSON ({error})") from error
    if isinstance(content, dict) and isinstance(content.get("image"), str):
        content = [content]  # JSON Lines of one line
    if not content or not isinstance(content, (dict, list)):
        raise DataError(f"{path}: no captions; expected an object or a list of objects, got {_show(content)}")
    return content


def _pairs(content: Any, key: str, value: str, path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield the image id and the value of each record of a list, or of each item of an object."""
    if isinstance(content, dict):
        yield from content.items()
        return
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects with {key!r} and {value!r}, got {_show(content)}")
    for number, record in enumerate(content, start=1):
        if not isinstance(record, dict) or not {key, value} <= record.keys():
            raise DataError(f"{path}: record {number}: expected {key!r} and {value!r}, got {_show(record)}")
        yield _to_id(record[key]), record[value]


def _to_id(value: Any) -> str:
    """Return an image id as a string; 42.0, as in pandas columns with missing values, is 42."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _text(caption: Any, image: str, path: str | Path) -> str:
    if not isinstance(caption, str):
        raise DataError(f"{path}: image {image}: expected a caption, got {_show(caption)}")
    return caption


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = "deeply nested lists or objects"
    return text if len(text) <= 60 else text[:57] + "..."
