"""Pictures that an encoder sees anew at every epoch, so that it learns what they show instead of their pixels."""

import numpy as np
from PIL import Image, ImageEnhance

from captioner.caption import Rectangle

SMALLEST = 0.8
"""The least share of a picture's width, and of its height, that is shown."""

COLOUR = 0.2
"""How far brightness, contrast and saturation may be from the picture's own: 0.2 is from 0.8 to 1.2 times. Hues
stay as they are: captions name them."""


def augment(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, Rectangle]:
    """Return a random part of an RGB picture, in slightly other colours, and which part it is.

    Captions speak of the whole picture, so most of it is always there. Threads that read pictures may call this:
    neither Pillow nor numpy starts others.
    """
    width, height = picture.size
    columns, rows = (max(1, round(side * generator.uniform(SMALLEST, 1))) for side in picture.size)
    left, top = (int(generator.integers(spare + 1)) for spare in (width - columns, height - rows))
    shown = Rectangle(left / width, top / height, (left + columns) / width, (top + rows) / height)
    picture = picture.crop((left, top, left + columns, top + rows))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(generator.uniform(1 - COLOUR, 1 + COLOUR))
    return picture, shown
