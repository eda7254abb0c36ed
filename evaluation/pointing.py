"""Attention mass and pointing game for one attention map and one object mask.

The grid of the map covers a rectangle of the picture and the mask all of it, so a cell may end within a pixel: a
pixel counts by the part of it that is in the cell. Parts of the object outside of the rectangle do not count.

A map (rows, columns) of one word sums to 1; shares are those of `object_shares` for its grid.
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
        DataError: if the mask has the wrong shape or type, or the grid has no cell.
    """
    if mask.ndim != 2 or mask.dtype != bool or not mask.size or len(grid) != 2 or 0 in grid:
        raise DataError(
            f"expected a bool mask (H, W) and a grid of cells, got {mask.dtype} {mask.shape} and {grid}"
        )
    (rows, columns), (height, width) = grid, mask.shape
    left, top, right, bottom = rectangle
    return _overlaps(rows, height, top, bottom) @ mask @ _overlaps(columns, width, left, right).T


def attention_mass(attention: np.ndarray, shares: np.ndarray) -> float:
    """Return the share of attention on an object, 0..1; the weight of a cell is spread evenly over it."""
    return float((attention * shares).sum())


def points_at(attention: np.ndarray, shares: np.ndarray) -> bool:
    """Return whether attention hits an object in the pointing game of Zhang et al. 2016 (arXiv 1608.00507).

    The peak is the cell with the largest weight, the first in reading order on a tie. It hits if it contains any
    part of the object. In the paper the peak is a pixel, with a tolerance of 15 pixels; here it is a cell, without
    tolerance.
    """
    return bool(shares.flat[attention.argmax()] > 0)


def _overlaps(cells: int, pixels: int, start: float, stop: float) -> np.ndarray:
    """Return the share of each cell in each pixel (cells, pixels).

    The pixels divide the whole length, and the cells the part from `start` to `stop`, in fractions of the whole.
    """
    edges = pixels * (start + (stop - start) * np.arange(cells + 1)[:, None] / cells)
    edges = edges.round(9)  # keep edges between two pixels exact
    first = np.arange(pixels)
    inside = (np.minimum(edges[1:], first + 1) - np.maximum(edges[:-1], first)).clip(min=0)
    return inside * (cells / (pixels * (stop - start)))
