"""Inputs of training: cached grids for a frozen encoder, pixels for an encoder that learns.

The grid cache contains the annotations of every picture, computed once by the frozen encoder. A cache is a folder.
`header.json` describes encoder, weights, frame and pictures; its hash is part of the name of the folder, so that a
cache of other settings is never used. `grids-0000.bin` and so on contain one fp16 record per picture. They are only
appended to, so an interrupted computation resumes after the last complete batch. Each shard or Parquet file has a
cache of its own, so that further shards leave the grids of the others as they are.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from captioner import config, images
from captioner.ahead import one_ahead
from captioner.caption import Rectangle
from captioner.cores import count_cores
from captioner.errors import ConfigError, OutputError
from captioner.files import write_atomically
from captioner.images import ImageSettings
from captioner.network.encoder import Encoder
from evaluation.datasets import PackedImage, Record
from training.augment import augment

WHOLE = Rectangle(0.0, 0.0, 1.0, 1.0)
"""The rectangle of a whole picture."""

SHARD_BYTES = 2**31
"""Maximum size of a file of grids."""


class Pictures:
    """The input of training for each picture, in the order of the records."""

    mirrored: bool
    """Whether training mirrors them."""

    def show(
        self, picture: int, mirrored: bool = False, variant: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Rectangle]:
        """Return the input for a picture, float32, and the part of the picture that it covers.

        Args:
            picture: its index.
            mirrored: mirror it horizontally.
            variant: random seed of the augmentation, together with the image id; None: do not augment.

        Raises:
            ImageError: if it cannot be read.
        """
        raise NotImplementedError

    def read(self, picture: int, mirrored: bool = False) -> Tensor:
        """Return the input for a picture without augmentation."""
        return self.show(picture, mirrored)[0]


class GridCache(Pictures):
    """Grids of pictures on disk, memory-mapped only while they are read."""

    def __init__(self, files: Sequence["GridFile"], shape: tuple[int, int, int]):
        """Open complete files of grids with records of `shape` (views, L, D)."""
        self.mirrored = shape[0] == 2
        self._files = [file.path for file in files]
        self._starts = list(itertools.accumulate((len(file.records) for file in files), initial=0))
        self._shape = shape

    def show(
        self, picture: int, mirrored: bool = False, variant: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Rectangle]:
        """Return the annotations (L, D)."""
        number = bisect.bisect_right(self._starts, picture) - 1
        views, *shape = self._shape
        offset = ((picture - self._starts[number]) * views + mirrored) * math.prod(shape) * 2
        grid = np.memmap(self._files[number], np.float16, "r", offset, tuple(shape))
        return torch.from_numpy(grid.astype(np.float32)), WHOLE


class GridFile(NamedTuple):
    """A file of grids."""

    path: Path
    records: Sequence[Record]
    """Its pictures."""


class PictureFiles(Pictures):
    """Pictures that are read from their files at every access."""

    def __init__(
        self, records: Sequence[Record], settings: ImageSettings, *, mirrored: bool, augmented: bool = False
    ):
        self.mirrored = mirrored
        self._augmented = augmented
        self._records = records
        self._settings = settings

    def show(
        self, picture: int, mirrored: bool = False, variant: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Rectangle]:
        """Return the pixels (3, size, size), and the part of the picture before `prepare`."""
        record = self._records[picture]
        shown = images.open(record.image, at_least=2 * self._settings.size)
        part = WHOLE
        if self._augmented and variant:
            shown, part = augment(shown, np.random.default_rng(zlib.crc32(f"{variant} {record.image_id}".encode())))
        pixels = images.prepare(shown, self._settings)[0]
        return torch.from_numpy(pixels[:, :, ::-1].copy() if mirrored else pixels), part


def cache_grids(
    folder: Path,
    encoder: Encoder,
    settings: ImageSettings,
    records: Sequence[Record],
    *,
    mirrored: bool,
    batch_size: int = 32,
    name: str = "grids",
) -> GridCache:
    """Compute the missing grids in `folder`, with a progress bar on a terminal, and open the cache.

    Args:
        folder: contains one cache for each combination of settings and pictures.
        encoder: encoder with its trained weights, in eval mode.
        settings: preprocessing of the pictures.
        records: the pictures.
        mirrored: also cache the mirrored pictures.
        batch_size: number of pictures in a batch.
        name: prefix of the name of the cache.

    Raises:
        ConfigError: if annotations exceed the range of fp16, as with wrong weights.
        ImageError: if a picture cannot be read.
        OutputError: if the disk is full, or the folder cannot be written.
    """
    views = 2 if mirrored else 1
    size = record_bytes(encoder, settings, mirrored=mirrored)
    most = max(SHARD_BYTES // size // batch_size, 1) * batch_size  # records per file: whole batches
    description = {
        "encoder": config.to_dict(encoder.settings),
        "weights": _hash_weights(encoder),
        "images": config.to_dict(settings),
        "views": views,
    }
    headers: dict[Path, str] = {}
    caches: dict[Path, list[GridFile]] = {}
    try:
        # Pictures with their own files are together.
        for _, group in itertools.groupby(records, lambda record: getattr(record.image, "file", None)):
            part = list(group)
            pictures = [[record.image_id, *_identify(record.image)] for record in part]
            header = json.dumps({**description, "pictures": pictures}, sort_keys=True)
            cache = folder / f"{name}-{hashlib.sha256(header.encode()).hexdigest()[:12]}"
            headers[cache] = header
            caches[cache] = [
                GridFile(cache / f"grids-{number:04}.bin", part[at : at + most])
                for number, at in enumerate(range(0, len(part), most))
            ]
        folder.mkdir(parents=True, exist_ok=True)
        files = [file for parts in caches.values() for file in parts]
        done = sum(file.path.stat().st_size for file in files if file.path.exists()) // size
        missing, free = (len(records) - done) * size, shutil.disk_usage(folder).free
        if missing > free:
            raise OutputError(
                f"{folder}: the grids need {missing / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free. "
                "Choose another encoder.cache, a coarser grid, or encoder.mirrored = false"
            )
        with tqdm(total=len(records), initial=done, desc=name, unit="picture", disable=None) as bar:
            for cache, parts in caches.items():
                cache.mkdir(exist_ok=True)
                with FileLock(cache / "lock"):  # another run may write it
                    with write_atomically(cache / "header.json", overwrite=True) as written:
                        written.write(headers[cache].encode())
                    for file in parts:
                        _complete(file, size, encoder, settings, views, batch_size, bar)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write the grids ({error.strerror or error})") from error
    rows, columns = encoder.grid(settings.size)
    return GridCache(files, (views, rows * columns, encoder.size))


def _identify(image: Path | PackedImage) -> list[int | str]:
    """Return what changes with the content of a picture."""
    return [image.size, image.member] if isinstance(image, PackedImage) else [image.stat().st_size]


def record_bytes(encoder: Encoder, settings: ImageSettings, *, mirrored: bool) -> int:
    """Return the size of the grids of a picture on disk, in bytes."""
    return (2 if mirrored else 1) * math.prod(encoder.grid(settings.size)) * encoder.size * 2


def _complete(
    file: GridFile,
    record_bytes: int,
    encoder: Encoder,
    settings: ImageSettings,
    views: int,
    batch_size: int,
    bar: tqdm,
) -> None:
    """Append the missing records to a file of grids.

    All batches have the same size, because the rounding of a grid depends on it: the last one is filled up with its
    last picture.
    """
    path, records = file
    with path.open("ab") as grids, ThreadPoolExecutor(count_cores()) as readers, torch.inference_mode():
        done = path.stat().st_size // record_bytes
        if done < len(records):
            done -= done % batch_size
        grids.truncate(done * record_bytes)
        device = next(encoder.parameters()).device

        def read(batch: Sequence[Record]) -> Tensor:
            frames = readers.map(lambda record: images.open_frame(record.image, settings)[0], batch)
            pixels = [torch.from_numpy(frame) for frame in frames]
            return torch.stack(pixels + pixels[-1:] * (batch_size - len(pixels)))

        batches = [records[at : at + batch_size] for at in range(done, len(records), batch_size)]
        for batch, pixels in zip(batches, one_ahead(read, batches), strict=True):
            pixels = pixels.to(device)
            seen = [encoder(pixels)[0]] + ([encoder(pixels.flip(3))[0]] if views == 2 else [])
            stored = torch.stack(seen, dim=1)[: len(batch)].half()
            if not stored.isfinite().all():
                raise ConfigError(
                    f"{path}: annotations exceed the range of float16, in which grids are stored. "
                    "Are encoder.weights those of this encoder?"
                )
            grids.write(stored.cpu().numpy().tobytes())
            bar.update(len(batch))
        grids.flush()
        os.fsync(grids.fileno())


def _hash_weights(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
