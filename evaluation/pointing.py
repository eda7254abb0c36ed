"""Does attention lie on the object? Measured for any data with masks, one map and one object at a time.

The grid of the map covers a rectangle of the picture, the mask all of it, so a cell may end within a pixel: a pixel
counts by the part of it that lies in the cell. What the rectangle leaves out of an object cannot be looked at, and
nothing of it lies in a border.
"""

import numpy as np

from captioner.caption import Rectangle
from captioner.errors import DataError


def object_shares(mask: np.ndarray, grid: tuple[int, int], rectangle: Rectangle) -> np.ndarray:
    """Return the share of each cell that an object covers, 0 to 1: (rows, columns).

    Args:
        mask: the object, bool (H, W), in the whole picture.
        grid: rows and columns of cells.
        rectangle: the part of the picture that the cells divide.

    Raises:
        DataError: if the mask has another shape or type, or there is no cell.
    """
    if mask.ndim != 2 or mask.dtype != bool or not mask.size or len(grid) != 2 or 0 in grid:
        raise DataError(
            f"expected a bool mask (H, W) and a grid of cells, got {mask.dtype} {mask.shape} and {grid}"
        )
    (rows, columns), (height, width) = grid, mask.shape
    left, top, right, bottom = rectangle
    return _overlaps(rows, height, top, bottom) @ mask @ _overlaps(columns, width, left, right).T


def attention_mass(attention: np.ndarray, shares: np.ndarray) -> float:
    """Return the share of attention that falls on an object, 0..1; each cell's weight is spread evenly over it.

    Args:
        attention: the map (rows, columns) of one word, summing to 1.
        shares: of the object, as `object_shares` returns them for this grid.
    """
    return float((attention * shares).sum())


def points_at(attention: np.ndarray, shares: np.ndarray) -> bool:
    """Tell whether attention hits an object in the pointing game of Zhang et al. 2016 (arXiv 1608.00507).

    The peak is the cell of the greatest weight, the first in reading order where several are equal. It hits if it
    holds any part of the object, however small. The paper's peak is a pixel, and hits up to 15 pixels beside the
    object; ours is a cell, and has no such tolerance.

    Args:
        attention: the map (rows, columns) of one word.
        shares: of the object, as `object_shares` returns them for this grid.
    """
    return bool(shares.flat[attention.argmax()] > 0)


def _overlaps(cells: int, pixels: int, start: float, stop: float) -> np.ndarray:
    """Return (cells, pixels): the share of each cell that lies in each pixel.

    The pixels divide the whole length, and the cells the part from `start` to `stop`, in fractions of the whole.
    """
    edges = pixels * (start + (stop - start) * np.arange(cells + 1)[:, None] / cells)
    edges = edges.round(9)  # or an edge between two pixels might fall, by a hair, into one of them
    first = np.arange(pixels)
    inside = (np.minimum(edges[1:], first + 1) - np.maximum(edges[:-1], first)).clip(min=0)
    return inside * (cells / (pixels * (stop - start)))
