"""What training shows of pictures: cached grids to train with a frozen encoder, pixels to train it as well.

The grid cache holds the annotations of every picture, computed once by the frozen encoder and kept on disk.
A cache is a folder of two files. `header.json` says what the grids were made of: encoder, weights, frame and
pictures; its hash names the folder, so that a cache of other settings is never used. `grids.bin` is one record of
fp16 values after another, a record a picture. It only grows at its end, so work that was interrupted goes on after
the last whole batch.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captioner import config, images
from captioner.ahead import one_ahead
from captioner.encoder import Encoder
from captioner.images import ImageSettings
from evaluation.datasets import Record
from training.augment import augment


class GridCache:
    """Grids of pictures, memory-mapped: reading some brings only these into memory.

    Attributes:
        mirrored: whether it has those of the mirrored pictures, too.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int, int]):
        """Open `grids.bin`; `shape` is (pictures, views, L, D)."""
        self.mirrored = shape[1] == 2
        self._grids = np.memmap(file, dtype=np.float16, mode="r", shape=shape)

    def read(self, picture: int, mirrored: bool = False) -> Tensor:
        """Return the annotations (L, D) of the picture at this place, float32."""
        return torch.from_numpy(self._grids[picture, int(mirrored)].astype(np.float32))


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

    def read(self, picture: int, mirrored: bool = False, variant: tuple[int, ...] | None = None) -> Tensor:
        """Return the pixels (3, size, size) of the picture at this place, float32.

        Args:
            picture: its place.
            mirrored: left to right.
            variant: numbers that, with the picture's id, decide how it is augmented, if it is to be; none: not.

        Raises:
            ImageError: when it cannot be read.
        """
        record = self._records[picture]
        shown = images.open(record.image, at_least=2 * self._settings.size)
        if self._augmented and variant:
            shown = augment(shown, np.random.default_rng(zlib.crc32(f"{variant} {record.image_id}".encode())))
        pixels = images.prepare(shown, self._settings)[0]
        # By numpy: torch would start threads of its own for each thread that reads.
        return torch.from_numpy(pixels.numpy()[:, :, ::-1].copy()) if mirrored else pixels


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
        ImageError: when a picture cannot be read.
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
    place.mkdir(parents=True, exist_ok=True)
    (place / "header.json").write_text(text)

    device = next(encoder.parameters()).device
    locations = math.prod(encoder.grid(settings.size))
    record_bytes = views * locations * encoder.size * 2
    file = place / "grids.bin"
    with file.open("ab") as grids, torch.inference_mode():
        done = file.stat().st_size // record_bytes
        if done < len(records):
            done -= done % batch_size  # whole batches, as the last digits of a grid depend on its batch
        grids.truncate(done * record_bytes)
        batches = [records[at : at + batch_size] for at in range(done, len(records), batch_size)]
        bar = tqdm(total=len(records), initial=done, desc=name, unit="picture", disable=None)
        for pixels in one_ahead(partial(_read_batch, settings=settings), batches):
            pixels = pixels.to(device)
            seen = [encoder(pixels)[0]] + ([encoder(pixels.flip(3))[0]] if mirrored else [])
            grids.write(torch.stack(seen, dim=1).half().cpu().numpy().tobytes())
            bar.update(len(pixels))
        bar.close()
        grids.flush()
        os.fsync(grids.fileno())
    return GridCache(file, (len(records), views, locations, encoder.size))


def _read_batch(records: Sequence[Record], settings: ImageSettings) -> Tensor:
    return torch.stack([_read(record, settings) for record in records])


def _read(record: Record, settings: ImageSettings) -> Tensor:
    return images.prepare(images.open(record.image, at_least=2 * settings.size), settings)[0]


def _hash_weights(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
