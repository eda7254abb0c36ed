"""Does attention lie on the object? Measured for any data with masks, one map and one object at a time.

The grid of the map and the mask cover the same frame, so a cell may end within a pixel: a pixel counts by the part
of it that lies in the cell.
"""

import numpy as np

from captioner.errors import DataError


def attention_mass(attention: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of attention that falls on an object, 0..1; each cell's weight is spread evenly over it.

    Args:
        attention: the map (rows, columns) of one word, summing to 1.
        mask: the object, bool (H, W).

    Raises:
        DataError: if the map or the mask has another shape or type.
    """
    return float((attention * _covered(attention, mask)).sum())


def points_at(attention: np.ndarray, mask: np.ndarray) -> bool:
    """Tell whether attention hits an object in the pointing game of Zhang et al. 2016 (arXiv 1608.00507).

    The peak is the cell of the greatest weight, the first in reading order where several are equal. It hits if it
    holds any part of the object, however small. The paper's peak is a pixel, and hits up to 15 pixels beside the
    object; ours is a cell, and has no such tolerance.

    Args:
        attention: the map (rows, columns) of one word.
        mask: the object, bool (H, W).

    Raises:
        DataError: if the map or the mask has another shape or type.
    """
    return bool(_covered(attention, mask).flat[attention.argmax()] > 0)


def _covered(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (rows, columns): the share of each cell that the object covers."""
    if attention.ndim != 2 or mask.ndim != 2 or mask.dtype != bool or not attention.size or not mask.size:
        raise DataError(
            "expected a map (rows, columns) and a bool mask (H, W), "
            f"got {attention.shape} and {mask.dtype} {mask.shape}"
        )
    (rows, columns), (height, width) = attention.shape, mask.shape
    return _overlaps(rows, height) @ mask @ _overlaps(columns, width).T * (rows * columns / (height * width))


def _overlaps(cells: int, pixels: int) -> np.ndarray:
    """Return (cells, pixels): how much of each pixel lies in each cell, where both divide the same length."""
    edges = np.arange(cells + 1)[:, None] * pixels / cells
    left = np.arange(pixels)
    return (np.minimum(edges[1:], left + 1) - np.maximum(edges[:-1], left)).clip(min=0)
