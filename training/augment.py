"""Data augmentation for an encoder that learns: random crops and colours."""

import numpy as np
from PIL import Image, ImageEnhance

from captioner.caption import Rectangle

SMALLEST = 0.8
"""Minimum share of the width, and of the height, of a crop."""

COLOUR = 0.2
"""Maximum change of brightness, contrast and saturation: 0.2 is 0.8 to 1.2 times. Hues do not change, as captions
name them."""


def augment(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, Rectangle]:
    """Return a random crop of an RGB picture with random colour changes, and its rectangle.

    Crops are large, because captions describe the whole picture. This starts no threads, so reader threads may
    call it.
    """
    width, height = picture.size
    columns, rows = (max(1, round(side * generator.uniform(SMALLEST, 1))) for side in picture.size)
    left, top = (int(generator.integers(spare + 1)) for spare in (width - columns, height - rows))
    shown = Rectangle(left / width, top / height, (left + columns) / width, (top + rows) / height)
    picture = picture.crop((left, top, left + columns, top + rows))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(generator.uniform(1 - COLOUR, 1 + COLOUR))
    return picture, shown
