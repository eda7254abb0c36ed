"""What training shows of pictures: cached grids to train with a frozen encoder, pixels to train it as well.

The grid cache holds the annotations of every picture, computed once by the frozen encoder and kept on disk.
A cache is a folder. `header.json` says what the grids were made of: encoder, weights, frame and pictures; its hash
names the folder, so that a cache of other settings is never used. `grids-0000.bin` and its successors hold one
record of fp16 values after another, a record a picture. They only grow at their end, so work that was interrupted
goes on after the last whole batch.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from captioner import config, images
from captioner.ahead import one_ahead
from captioner.caption import Rectangle
from captioner.cores import count_cores
from captioner.errors import ConfigError, OutputError
from captioner.files import write_atomically
from captioner.images import ImageSettings
from captioner.network.encoder import Encoder
from evaluation.datasets import Record
from training.augment import augment

WHOLE = Rectangle(0.0, 0.0, 1.0, 1.0)
"""The rectangle of a whole picture."""

SHARD_BYTES = 2**31
"""How large a file of grids may become."""


class GridCache:
    """Grids of pictures on disk. Each is mapped into memory for as long as it is read, and so none stays there.

    Attributes:
        mirrored: whether it has those of the mirrored pictures, too.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], shard: int):
        """Open a complete cache; `shape` is of a record, (views, L, D), and a file has `shard` records."""
        self.mirrored = shape[0] == 2
        self._folder = folder
        self._shape = shape
        self._shard = shard

    def show(
        self, picture: int, mirrored: bool = False, variant: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Rectangle]:
        """Return the annotations (L, D) of the picture at this place, float32, and what part of it they cover."""
        number, place = divmod(picture, self._shard)
        views, *shape = self._shape
        before = (place * views + mirrored) * math.prod(shape) * 2
        grid = np.memmap(_shard_file(self._folder, number), np.float16, "r", before, tuple(shape))
        return torch.from_numpy(grid.astype(np.float32)), WHOLE

    def read(self, picture: int, mirrored: bool = False) -> Tensor:
        """Return the annotations (L, D) of the picture at this place, float32."""
        return self.show(picture, mirrored)[0]


class PictureFiles:
    """Pictures that are read from their files whenever they are asked for.

    Attributes:
        mirrored: whether they are to be shown mirrored, too.
    """

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
        """Return pixels (3, size, size) of the picture at this place, float32, and the part of it before `prepare`.

        Args:
            picture: its place.
            mirrored: left to right.
            variant: numbers that, with the picture's id, decide how it is augmented, if it is to be; none: not.

        Raises:
            ImageError: when it cannot be read.
        """
        record = self._records[picture]
        shown = images.open(record.image, at_least=2 * self._settings.size)
        part = WHOLE
        if self._augmented and variant:
            shown, part = augment(shown, np.random.default_rng(zlib.crc32(f"{variant} {record.image_id}".encode())))
        pixels = images.prepare(shown, self._settings)[0]
        return torch.from_numpy(pixels[:, :, ::-1].copy() if mirrored else pixels), part

    def read(self, picture: int, mirrored: bool = False) -> Tensor:
        """Return the pixels (3, size, size) of the picture at this place, float32, not augmented."""
        return self.show(picture, mirrored)[0]


Pictures: TypeAlias = GridCache | PictureFiles
"""What an encoder makes of pictures, or what it is to see of them: their order is that of the records."""


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
    """Compute the grids that are not in `folder` yet, with a progress bar on a terminal, and open them.

    Args:
        folder: holds one cache for each combination of the settings and pictures.
        encoder: with its trained weights; in eval mode, as it always is.
        settings: how the pictures become its input.
        records: the pictures.
        mirrored: also keep the grid of each picture mirrored left to right.
        batch_size: pictures to compute at once.
        name: begins the cache's name, for people.

    Raises:
        ConfigError: when annotations are too large for fp16, as those of wrong weights are.
        ImageError: when a picture cannot be read.
        OutputError: when the disk is full, or the folder cannot be written.
    """
    views = 2 if mirrored else 1
    header = {
        "encoder": config.to_dict(encoder.settings),
        "weights": _hash_weights(encoder),
        "images": config.to_dict(settings),
        "views": views,
        "pictures": [[record.image_id, record.image.stat().st_size] for record in records],
    }
    text = json.dumps(header, sort_keys=True)
    place = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    size = record_bytes(encoder, settings, mirrored=mirrored)
    shard = max(SHARD_BYTES // size // batch_size, 1) * batch_size  # records a file: whole batches
    parts = [records[at : at + shard] for at in range(0, len(records), shard)]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):  # another run may be at it
            with write_atomically(place / "header.json", overwrite=True) as written:
                written.write(text.encode())
            files = [_shard_file(place, number) for number in range(len(parts))]
            done = sum(file.stat().st_size for file in files if file.exists()) // size
            missing, free = (len(records) - done) * size, shutil.disk_usage(place).free
            if missing > free:
                raise OutputError(
                    f"{place}: the grids take {missing / 1e9:.1f} GB more, and the disk has {free / 1e9:.1f} GB "
                    "left. Choose another encoder.cache, a coarser grid, or encoder.mirrored = false."
                )
            with tqdm(total=len(records), initial=done, desc=name, unit="picture", disable=None) as bar:
                for file, part in zip(files, parts, strict=True):
                    _complete(file, size, encoder, settings, part, views, batch_size, bar)
    except OSError as error:
        raise OutputError(f"{place}: cannot write the grids ({error.strerror or error})") from error
    rows, columns = encoder.grid(settings.size)
    return GridCache(place, (views, rows * columns, encoder.size), shard)


def record_bytes(encoder: Encoder, settings: ImageSettings, *, mirrored: bool) -> int:
    """Return how many bytes of disk the grids of one picture take."""
    return (2 if mirrored else 1) * math.prod(encoder.grid(settings.size)) * encoder.size * 2


def _complete(
    file: Path,
    record_bytes: int,
    encoder: Encoder,
    settings: ImageSettings,
    records: Sequence[Record],
    views: int,
    batch_size: int,
    bar: tqdm,
) -> None:
    """Add the records that a file of grids does not have yet."""
    with file.open("ab") as grids, ThreadPoolExecutor(count_cores()) as readers, torch.inference_mode():
        done = file.stat().st_size // record_bytes
        if done < len(records):
            done -= done % batch_size  # whole batches, as the last digits of a grid depend on its batch
        grids.truncate(done * record_bytes)
        device = next(encoder.parameters()).device

        def read(batch: Sequence[Record]) -> Tensor:
            return torch.stack(list(readers.map(partial(_read, settings=settings), batch)))

        batches = [records[at : at + batch_size] for at in range(done, len(records), batch_size)]
        for pixels in one_ahead(read, batches):
            pixels = pixels.to(device)
            seen = [encoder(pixels)[0]] + ([encoder(pixels.flip(3))[0]] if views == 2 else [])
            stored = torch.stack(seen, dim=1).half()
            if not stored.isfinite().all():
                raise ConfigError(
                    f"{file}: what the encoder makes of some picture is beyond float16, in which grids are kept. "
                    "Are encoder.weights those of this network?"
                )
            grids.write(stored.cpu().numpy().tobytes())
            bar.update(len(pixels))
        grids.flush()
        os.fsync(grids.fileno())


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"grids-{number:04}.bin"


def _read(record: Record, settings: ImageSettings) -> Tensor:
    return torch.from_numpy(images.open_frame(record.image, settings)[0])


def _hash_weights(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
