"""Boxes of persons in training pictures, to supervise attention."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from captioner.caption import Rectangle
from captioner.vocabulary import SPECIAL, Vocabulary
from evaluation.boxes import CATEGORY
from evaluation.objects import find_mentions

_SAMPLES = 8  # sampling points per cell along each axis


def cover(boxes: np.ndarray, shown: Rectangle, grid: tuple[int, int], *, mirrored: bool) -> Tensor:
    """Return the share of each cell inside any box, 0..1: (L,).

    Args:
        boxes: (N, 4), in fractions of the picture.
        shown: the part of the picture that the grid covers.
        grid: rows and columns.
        mirrored: whether the part is mirrored horizontally.
    """
    rows, columns = grid
    down = shown.top + _middles(rows) * (shown.bottom - shown.top)
    across = shown.left + _middles(columns) * (shown.right - shown.left)
    left, top, right, bottom = boxes.T[..., None]  # (N, 1) each
    inside = ((down >= top) & (down < bottom))[:, :, None] & ((across >= left) & (across < right))[:, None]
    shares = inside.any(axis=0).reshape(rows, _SAMPLES, columns, _SAMPLES).mean(axis=(1, 3), dtype=np.float32)
    return torch.from_numpy((shares[:, ::-1] if mirrored else shares).flatten())


def _middles(cells: int) -> np.ndarray:
    return (np.arange(cells * _SAMPLES) + 0.5) / (cells * _SAMPLES)


def find_persons(vocabulary: Vocabulary) -> list[int]:
    """Return the token ids of words that name a person; see `evaluation.objects`."""
    return [
        index
        for index, word in enumerate(vocabulary.words)
        if any(found.category == CATEGORY for found in find_mentions([word]))
    ]


def frequent_words(captions: Sequence[Sequence[Sequence[int]]], least: int, most: float) -> list[int]:
    """Return the token ids, ascending, that occur in the captions of `least` or more pictures, and at most a share.

    Args:
        captions: token ids of each caption of each picture.
        least: minimum number of pictures.
        most: maximum share of the pictures, 0..1.
    """
    counts = Counter(chain.from_iterable(set(chain.from_iterable(several)) for several in captions))
    return sorted(
        word for word, count in counts.items() if word >= len(SPECIAL) and least <= count <= most * len(captions)
    )
