"""Readers of captioned pictures in common layouts; all return the same records.

A data set is named by its layout and path, LAYOUT:PATH:

    coco:DIRECTORY       COCO's captions of 2014 or 2017, in the folders of its archives
    karpathy:FILE        Karpathy's JSON of COCO, Flickr8k or Flickr30k, the splits that papers use
    flickr8k:DIRECTORY   as distributed by its authors or Kaggle
    flickr30k:DIRECTORY  as distributed by its authors or Kaggle
    jsonl:FILE           one {"image": PATH, "captions": [TEXT, ...]} per line
    csv:FILE, tsv:FILE   a table with the columns image and caption
    folder:DIRECTORY     pictures, each beside a .txt file of captions
    webdataset:FILES     .tar shards, a pattern such as train-{000..146}.tar, or their folder
    parquet:FILES        Parquet files, a pattern such as train-*.parquet, or their folder
    hub:ADDRESS          hf://datasets/USER/NAME[@REVISION][/FILES], a data set of the Hugging Face Hub
    shapes:DIRECTORY     drawn from a seed; see `evaluation.datasets.shapes`

The readers document each layout. A set without splits is split by a hash of each image id.
"""

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from captioner import images
from captioner.console import escape_controls
from captioner.errors import DataError, ImageError
from evaluation.datasets.files import SPLITS, Columns, PackedImage, Problems, Record, read_lines, split_by_hash
from evaluation.datasets.own import read_folder, read_jsonl, read_table
from evaluation.datasets.parquet import read_hub, read_parquet
from evaluation.datasets.published import read_coco, read_flickr8k, read_flickr30k, read_karpathy
from evaluation.datasets.shapes import read_shapes
from evaluation.datasets.shards import read_webdataset

__all__ = [
    "READERS",
    "WITH_COLUMNS",
    "Columns",
    "PackedImage",
    "Record",
    "find_unreadable",
    "read_dataset",
    "read_jsonl",
    "read_lines",
    "resolve_paths",
    "split_by_hash",
    "split_missing",
]


READERS: dict[str, Callable[..., list[Record]]] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "jsonl": read_jsonl,
    "csv": read_table,
    "tsv": partial(read_table, delimiter="\t"),
    "folder": read_folder,
    "shapes": read_shapes,
    "webdataset": read_webdataset,
    "parquet": read_parquet,
    "hub": read_hub,
}
"""The reader of each layout: of a path, and an object that collects its problems."""

WITH_COLUMNS = ("webdataset", "parquet", "hub")
"""Layouts whose readers take `Columns`, too."""


def read_dataset(
    layout: str,
    path: Path,
    splits: Collection[str] = SPLITS,
    *,
    on_disk: bool = True,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
) -> list[Record]:
    """Return the records of a data set, in the order of its files.

    All problems are reported together. `find_unreadable` checks whether pictures can be opened. A picture that is
    listed under two paths (`a.jpg` and `./a.jpg`, or a link to it) is a duplicate.

    Args:
        layout: a key of `READERS`.
        path: a file or folder, depending on the layout.
        splits: splits of the records to return. The pictures of other splits need not be on disk.
        on_disk: whether the pictures of these splits must be on disk.
        columns: names of columns, for the layouts `WITH_COLUMNS`.

    Raises:
        DataError: if a file of captions is missing or malformed; if pictures are missing, duplicate, in two splits,
            or without a caption; or if there are no pictures.
        MissingExtraError: if the layout needs a library that is not installed.
    """
    if "\0" in str(path):
        raise DataError(f"{escape_controls(str(path))}: invalid path (NUL character)")
    if layout not in READERS:
        raise DataError(f"unknown data set layout {layout!r}; known: {', '.join(READERS)}")
    problems = Problems()
    options = (columns,) if layout in WITH_COLUMNS else ()
    records = READERS[layout](path, problems, *options)
    _check_captions(records, problems)
    if on_disk:
        for record in split_missing([record for record in records if record.split in splits])[1]:
            problems.add("pictures missing on disk", str(record.image))
    problems.raise_any(path)
    if not records:
        raise DataError(f"{path}: no captioned pictures found")
    return [record for record in records if record.split in splits]


def resolve_paths(records: Sequence[Record]) -> list[str]:
    """Return the real path of each picture: the same for `a.jpg`, `./a.jpg` and a link to it.

    The path of a picture inside a larger file is that of the file and its name there.
    """
    folders: dict[Path, tuple[str, set[str]]] = {}  # resolved folder, and names of its links
    paths = []
    for record in records:
        path = record.image.file if isinstance(record.image, PackedImage) else record.image
        folder, name = path.parent, path.name
        if folder not in folders:
            folders[folder] = os.path.realpath(str(folder).replace("\0", "")), _list_names(folder, links=True)
        resolved, links = folders[folder]
        real = os.path.realpath(path) if name in links else f"{resolved}/{name}"
        paths.append(f"{real}/{record.image.member}" if isinstance(record.image, PackedImage) else real)
    return paths


def _check_captions(records: Sequence[Record], problems: Problems) -> None:
    by_id: dict[str, Record] = {}
    by_path: dict[str, Record] = {}
    for record, path in zip(records, resolve_paths(records), strict=True):
        same_path = by_path.setdefault(path, record)
        first = by_id.setdefault(record.image_id, same_path)
        if first is not record:
            names = " and ".join(dict.fromkeys((first.image_id, record.image_id)))
            if first.split == record.split:
                problems.add("duplicate pictures", names)
            else:
                problems.add("pictures in two splits", f"{names} in {first.split} and {record.split}")
        if not record.captions:
            problems.add("pictures without a caption", record.image_id)
        elif not all(caption.strip() for caption in record.captions):
            problems.add("pictures with an empty caption", record.image_id)


def split_missing(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records whose picture is on disk, and those whose picture is missing."""
    folders: dict[Path, set[str]] = {}  # listing a folder is faster than 100,000 calls of stat

    def is_on_disk(image: Path | PackedImage) -> bool:
        if isinstance(image, PackedImage):
            return True
        if image.parent not in folders:
            folders[image.parent] = _list_names(image.parent)
        return image.name in folders[image.parent]

    found: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        found[not is_on_disk(record.image)].append(record)
    return found


def _list_names(folder: Path, *, links: bool = False) -> set[str]:
    """Return the names in a folder, or those of its symbolic links; empty if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not links or entry.is_symlink()}
    except (OSError, ValueError):  # ValueError: invalid name
        return set()


def find_unreadable(records: Sequence[Record], workers: int = 4) -> list[tuple[Record, str]]:
    """Return the records whose picture cannot be opened, each with an error message that names the file.

    Only headers are decoded, with a progress bar on a terminal: truncated pictures are not found.
    """
    with ThreadPoolExecutor(workers) as pool:
        bar = tqdm(records, desc="pictures", unit="picture", disable=None)
        return [
            (record, reason) for record, reason in zip(bar, pool.map(_find_reason, records), strict=True) if reason
        ]


def _find_reason(record: Record) -> str:
    """Return the error message of a picture, empty if it can be opened."""
    try:
        images.read_size(record.image)
    except ImageError as error:
        return str(error)
    return ""
