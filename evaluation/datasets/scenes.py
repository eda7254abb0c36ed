"""Scenes of coloured shapes: which objects a picture shows, and which pixels they cover."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["circle", "square", "triangle", "cross"]
Colour: TypeAlias = Literal["red", "yellow", "green", "cyan", "blue", "purple"]
Size: TypeAlias = Literal["small", "large"]

SIDE = 64
"""Width and height of a picture, in pixels."""

X = np.arange(SIDE, dtype=np.float32)[None, :] + 0.5
Y = X.T
"""The centres of the pixels, (1, 64) and (64, 1)."""


@dataclass(frozen=True)
class Shape:
    """An object of a scene."""

    kind: Kind
    colour: Colour
    size: Size
    centre: tuple[float, float]
    """x and y of its centre, in pixels from the upper left corner of the picture."""
    radius: float
    """Half the side of its bounding box, in pixels."""


@dataclass(frozen=True)
class Scene:
    """The objects of a picture. Generated objects do not overlap, and no two share both kind and colour."""

    objects: tuple[Shape, ...]

    def mask(self, shape: Shape) -> np.ndarray:
        """Return the pixels of an object, bool (64, 64)."""
        return distance(shape) <= 0


def distance(shape: Shape) -> np.ndarray:
    """Return the distance of each pixel to the shape (64, 64), in pixels; negative inside."""
    x, y = X - shape.centre[0], Y - shape.centre[1]
    across, down, radius = np.abs(x), np.abs(y), shape.radius
    if shape.kind == "circle":
        return np.hypot(x, y) - radius
    if shape.kind == "triangle":  # its tip in the middle of the box's upper side
        return np.maximum(y - radius, (2 * across - y - radius) / 5**0.5)
    box = np.maximum(across, down) - radius
    return box if shape.kind == "square" else np.maximum(box, np.minimum(across, down) - 0.35 * radius)
