"""Captioned pictures on disk, in the layouts people have them; every reader returns the same records.

A data set is named by its layout and its place, `flickr8k:DIRECTORY`, `jsonl:FILE` or `shapes:DIRECTORY`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import DataError


@dataclass(frozen=True)
class Record:
    """A picture and what people said of it."""

    image: Path
    image_id: str  # unique in its data set
    captions: tuple[str, ...]
    split: str  # train, dev or test


def read_dataset(layout: str, path: Path) -> list[Record]:
    """Return the records of a data set, in the order of its files.

    Raises:
        DataError: when a file is missing or malformed, a picture stands in two splits or has no caption, or no
            picture is found. Whether each picture can be opened shows when it is.
    """
    if layout not in READERS:
        raise DataError(f"unknown layout {layout!r} of a data set; known: {', '.join(READERS)}")
    records = READERS[layout](path)
    if not records:
        raise DataError(f"{path}: no captioned pictures found")
    seen: set[str] = set()
    for record in records:
        if record.image_id in seen:
            raise DataError(f"{path}: picture {record.image_id!r} stands there twice, or in two splits")
        if not record.captions:
            raise DataError(f"{path}: picture {record.image_id!r} has no caption")
        seen.add(record.image_id)
    return records


def read_flickr8k(directory: Path) -> list[Record]:
    """Flickr8k as its authors gave it out (Hodosh, Young and Hockenmaier 2013).

    `Flicker8k_Dataset/` holds the pictures (that is how the folder is spelled) and `Flickr8k_text/` the captions
    and the lists of each split; a list that is missing leaves its split out.
    """
    texts = directory / "Flickr8k_text"
    captions: dict[str, list[str]] = {}
    for where, line in read_lines(texts / "Flickr8k.token.txt"):
        key, tab, caption = line.partition("\t")
        image, hash_sign, _ = key.rpartition("#")
        if not tab or not hash_sign:
            raise DataError(f"{where}: expected IMAGE#NUMBER, a tab and a caption, got {line[:60]!r}")
        captions.setdefault(image, []).append(caption)
    return [
        Record(directory / "Flicker8k_Dataset" / image, image, tuple(captions.get(image, ())), split)
        for split in ("train", "dev", "test")
        if (listed := texts / f"Flickr_8k.{split}Images.txt").exists() or split == "train"
        for _, image in read_lines(listed)
    ]


def read_jsonl(file: Path) -> list[Record]:
    """JSON Lines: {"image": PATH, "captions": [TEXT, ...], "split": "train" | "dev" | "test"} a picture.

    Paths are relative to the file. Other keys are left alone.
    """
    records = []
    for where, line in read_lines(file):
        try:
            row = json.loads(line)
            image, captions, split = row["image"], row["captions"], row["split"]
            valid = isinstance(image, str) and all(isinstance(caption, str) for caption in captions)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid or isinstance(captions, str) or split not in ("train", "dev", "test"):
            raise DataError(
                f'{where}: expected {{"image": PATH, "captions": [TEXT, ...], "split": "train|dev|test"}}, '
                f"got {line[:60]!r}"
            )
        records.append(Record(file.parent / image, image, tuple(captions), split))
    return records


def read_shapes(directory: Path) -> list[Record]:
    """Pictures of coloured shapes, generated in the folder if it is missing or empty; see `evaluation.shapes`."""
    from evaluation import shapes  # which imports this module

    return shapes.read_shapes(directory)


READERS: dict[str, Callable[[Path], list[Record]]] = {
    "flickr8k": read_flickr8k,
    "jsonl": read_jsonl,
    "shapes": read_shapes,
}


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line that is not blank stands, for messages, and its text.

    Raises:
        DataError: when the file is missing or cannot be read.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", line.strip()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file. Is this the folder of the data set?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot read this file ({error})") from error
