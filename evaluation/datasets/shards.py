"""Reader of WebDataset shards: tar archives of pictures and captions (Aizman et al. 2019, arXiv 2001.01858).

The headers of an archive are read once, for the position of each picture in it. Then any picture can be read, in
any order. So shards need no shuffle buffer: the pictures of an epoch are a random permutation of all of them, as
with files. Processes share them as they share files, and a run resumes at the same picture.
"""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner import images
from captioner.bulk.rows import DAMAGE, MAX_TEXT, TarMember, split_member_name
from captioner.errors import ImageError
from evaluation.datasets.files import (
    Columns,
    PackedImage,
    Problems,
    Record,
    cannot_read,
    find_files,
    find_split,
    parse_json,
    to_captions,
)


@dataclass(frozen=True, slots=True)
class ShardImage(PackedImage):
    """A picture in a tar archive."""

    offset: int
    """Position of its content in the archive."""

    def __call__(self) -> bytes:
        """Read the content.

        Raises:
            ImageError: if it cannot be read.
        """
        try:
            with self.file.open("rb") as shard:
                shard.seek(self.offset)
                content = shard.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.name}: cannot read this file ({error.strerror or error}).") from error
        if len(content) < self.size:
            raise ImageError(f"{self.name}: the shard has become shorter. Restore it, or start again.")
        return content


@dataclass
class _Sample:
    """The members of a shard with the same key."""

    pictures: dict[str, ShardImage] = field(default_factory=dict)
    """By suffix."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Contents of `json` and `txt`."""


def read_webdataset(path: Path, problems: Problems, columns: Columns = Columns()) -> list[Record]:  # noqa: B008
    """WebDataset: `.tar` shards, in which `dog.jpg` is beside `dog.json`, `dog.txt`, or both.

    The JSON object has the captions, a text or a list of texts, under `captions` or `caption`, and optionally
    `split`; `Columns` names other keys. Otherwise, each line of the text is a caption. The image id is the key, the
    path without suffixes, which is unique in the data set. Members of a key need not be adjacent. The path is that
    of a shard or a folder of shards, or a pattern such as `train-{000..146}.tar`.
    """
    records = []
    shards: dict[str, Path] = {}  # by key
    for file in find_files(path, ".tar"):
        for key, sample in _read_shard(file, columns, problems).items():
            where = f"{file}: {key}"
            if shards.setdefault(key, file) != file:
                problems.add("keys in two shards", f"{key} in {shards[key]} and {file}")
            elif not sample.pictures:
                problems.add("keys without a picture", where)
            elif len(sample.pictures) > 1:
                problems.add(
                    "keys with several pictures, of which columns.image can name the suffix",
                    f"{where} with {', '.join(sample.pictures)}",
                )
            elif record := _to_record(file, key, sample, columns, problems):
                records.append(record)
    return records


def _read_shard(file: Path, columns: Columns, problems: Problems) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    suffixes = {f".{columns.image}"} if columns.image else images.SUFFIXES
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=TarMember) as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                key, suffix = split_member_name(info.name)
                is_picture = f".{suffix}" in suffixes
                if not info.isreg() or info.issparse() or not (is_picture or suffix in ("json", "txt")):
                    continue
                sample = samples.setdefault(key, _Sample())
                where = f"{file}: {info.name}"
                if suffix in sample.pictures or suffix in sample.texts:
                    problems.add("duplicate members", where)
                elif info.size > (images.MAX_BYTES if is_picture else MAX_TEXT):
                    problems.add("members that are too long", f"{where} with {info.size:,} bytes")
                elif is_picture:
                    sample.pictures[suffix] = ShardImage(file, info.name, info.size, info.offset_data)
                else:
                    stream.seek(info.offset_data)
                    sample.texts[suffix] = stream.read(info.size)
    except OSError as error:
        raise cannot_read(file, error) from error
    except DAMAGE as error:
        problems.add(
            "shards that are not complete and uncompressed tar archives",
            f"{file} after {len(samples):,} keys: {error}",
        )
    return samples


def _to_record(file: Path, key: str, sample: _Sample, columns: Columns, problems: Problems) -> Record | None:
    where = f"{file}: {key}"
    (image,) = sample.pictures.values()
    row: Any = {}
    if "json" in sample.texts:
        try:
            row = parse_json(sample.texts["json"].decode("utf-8-sig"))
        except ValueError:  # UnicodeDecodeError, too
            row = None
        if not isinstance(row, dict):
            problems.add("members that are not a JSON object", f"{where}.json")
            return None
    names = columns.captions or tuple(name for name in ("captions", "caption") if name in row)[:1]
    captions = to_captions(row.get(name) for name in names)
    if not names and "txt" in sample.texts:
        try:
            lines = sample.texts["txt"].decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            problems.add("members that are not UTF-8", f"{where}.txt")
            return None
        captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        expected = ", ".join(columns.captions) or "captions, or lines in .txt"
        problems.add(f"keys without captions in .json ({expected})", where)
        return None
    image_id = str(row.get(columns.id, "")) if columns.id else key
    if not image_id:
        problems.add(f"keys without {columns.id} in .json", where)
    split = row.get(columns.split, "") if columns.split else row.get("split")
    split = find_split(split, file, image_id, where, problems)
    return Record(image, image_id, captions, split)
