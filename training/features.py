"""The grid cache: annotations of every picture, computed once by a frozen encoder and kept on disk.

A cache is a folder of two files. `header.json` says what the grids were made of: encoder, weights, frame and
pictures; its hash names the folder, so that a cache of other settings is never used. `grids.bin` is one record of
fp16 values after another, a record a picture. It only grows at its end, so work that was interrupted goes on after
the last whole batch.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captioner import config, images
from captioner.ahead import one_ahead
from captioner.encoder import Encoder
from captioner.images import ImageSettings
from evaluation.datasets import Record


class GridCache:
    """Grids of pictures, memory-mapped: reading some brings only these into memory."""

    def __init__(self, file: Path, shape: tuple[int, int, int, int]):
        """Open `grids.bin`; `shape` is (pictures, views, L, D)."""
        self.views = shape[1]
        self._grids = np.memmap(file, dtype=np.float16, mode="r", shape=shape)

    def read(self, picture: int, mirrored: bool = False) -> Tensor:
        """Return the annotations (L, D) of the picture at this place, float32."""
        return torch.from_numpy(self._grids[picture, int(mirrored)].astype(np.float32))


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
    with torch.inference_mode():
        blank = torch.zeros(1, 3, settings.size, settings.size, device=device)
        _, locations, size = encoder(blank)[0].shape
    record_bytes = views * locations * size * 2
    file = place / "grids.bin"
    with file.open("ab") as grids, torch.inference_mode():
        done = file.stat().st_size // record_bytes
        if done < len(records):
            done -= done % batch_size  # whole batches, as the last digits of a grid depend on its batch
        grids.truncate(done * record_bytes)
        batches = [records[at : at + batch_size] for at in range(done, len(records), batch_size)]
        bar = tqdm(total=len(records), initial=done, desc=name, unit="picture", disable=None)
        for pixels in one_ahead(partial(_read, settings=settings), batches):
            pixels = pixels.to(device)
            seen = [encoder(pixels)[0]] + ([encoder(pixels.flip(3))[0]] if mirrored else [])
            grids.write(torch.stack(seen, dim=1).half().cpu().numpy().tobytes())
            bar.update(len(pixels))
        bar.close()
        grids.flush()
        os.fsync(grids.fileno())
    return GridCache(file, (len(records), views, locations, size))


def _read(records: Sequence[Record], settings: ImageSettings) -> Tensor:
    pictures = (images.open(record.image, at_least=2 * settings.size) for record in records)
    return torch.stack([images.prepare(picture, settings)[0] for picture in pictures])


def _hash_weights(encoder: Encoder) -> str:
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
