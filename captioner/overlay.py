"""Attention drawn over the picture: one panel a word, light where the network looked.

After figures 2 and 3 of Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044).
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioner import images
from captioner.captioning import Caption
from captioner.errors import CaptionerError

PANEL_SIDE = 300  # pixels; a panel has about the area of a square of this side, whatever its shape
LONGEST_SIDE = 4  # of a panorama's panel, in sides of that square
FIGURE_WIDTH = 2000  # pixels to fill with panels before a new row begins
GAP = 16  # pixels around panels
TITLE_HEIGHT = 32
WORD_SIZE, WEIGHT_SIZE = 21, 15  # of the letters, in pixels
PAPER, INK, FAINT_INK = "#ffffff", "#1a1a1a", "#767676"

DIMMED = 0.2  # brightness that the picture keeps where the network did not look
GLOW = 0.25  # white that full light adds, or a dark picture would stay dark where the network looked
SPREAD = 0.6  # standard deviation, in grid cells, of the Gaussian that smooths the maps


def draw_attention(picture: images.Source, caption: Caption, head: int | None = None) -> Image.Image:
    """Return a figure of where the network looked: the picture itself, then one panel a word.

    A panel is the picture dimmed, and lit in proportion to the attention: a panel's full light is the largest
    weight of its word. The title gives the word and that weight, so that panels can be compared: on a grid of
    7 x 7 it is 1/49 = 2.0% if the network looked everywhere alike, and 100% if it looked at one place alone.
    What lies outside the part of the picture that the network saw stays dim. Where the mechanism can tell, the
    title ends with the share of the word's context that came from the picture.

    Panels flow into rows of about `FIGURE_WIDTH` pixels. Letters that the font lacks show as boxes.

    Args:
        picture: the picture that was captioned, in any form that `Captioner.caption` takes.
        caption: what it was captioned with.
        head: which head's maps to draw, from 0; none: their mean.

    Raises:
        ImageError: if the picture cannot be read.
        CaptionerError: if there is no such head.
    """
    maps = caption.attention
    if head is not None:
        count = 0 if caption.heads is None else caption.heads.shape[1]
        if caption.heads is None or not 0 <= head < count:
            raise CaptionerError(f"head {head}: this caption's attention has {count} heads, counted from 0")
        maps = caption.heads[:, head]
    photograph = fit_to_panel(images.open(picture, at_least=PANEL_SIDE))
    panels = [("word", "peak weight" if caption.visual is None else "peak weight, visual share", photograph)]
    for place, (word, weights) in enumerate(zip(caption.words, maps, strict=True)):
        figures = f"{weights.max():.1%}" + (f", {caption.visual[place]:.0%}" if caption.visual else "")
        panels.append((word, figures, light_up(photograph, weights, caption.rectangle)))
    return _lay_out(panels)


def light_up(photograph: Image.Image, weights: np.ndarray, rectangle: images.Rectangle) -> Image.Image:
    """Return the RGB photograph dimmed, with light where the weights lie.

    Args:
        photograph: the whole picture, of any size.
        weights: (rows, columns), not negative.
        rectangle: the part of the picture that the weights cover, in fractions of its width and height.
    """
    light = spread_light(weights, rectangle, *photograph.size)[..., None]  # (height, width, 1)
    lit = np.asarray(photograph) * (DIMMED + (1 - DIMMED - GLOW) * light) + 255 * GLOW * light
    return Image.fromarray(lit.round().astype(np.uint8))


def spread_light(weights: np.ndarray, rectangle: images.Rectangle, width: int, height: int) -> np.ndarray:
    """Return how much light falls on each pixel of a picture, 0 to 1: (height, width).

    Args:
        weights: (rows, columns), not negative.
        rectangle: the part of the picture that the weights cover; it is dark outside.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """
    rows, columns = weights.shape
    down = _smoothing(_centres(height), rectangle.top, rectangle.bottom, rows)
    across = _smoothing(_centres(width), rectangle.left, rectangle.right, columns)
    # Full light is the smooth map's peak over the whole grid: what the network saw in padding counts too.
    whole = _smoothing(_centres(rows), 0, 1, rows) @ weights @ _smoothing(_centres(columns), 0, 1, columns).T
    return (down @ weights @ across.T / whole.max()).clip(0, 1)


def _centres(count: int) -> np.ndarray:
    """Where the centres of `count` pixels or cells lie between 0 and 1."""
    return (np.arange(count) + 0.5) / count


def _smoothing(places: np.ndarray, start: float, end: float, cells: int) -> np.ndarray:
    """How much each cell of a row of cells from `start` to `end` gives to each place: (places, cells).

    A place's shares sum to 1, or are all 0 outside. A Gaussian has no overshoot, unlike cubic interpolation,
    and shows no edges of cells, unlike linear.
    """
    inside = (places - start) / (end - start)
    distances = inside.clip(0, 1)[:, None] - _centres(cells)
    shares = np.exp(-0.5 * (distances * cells / SPREAD) ** 2)
    shares /= shares.sum(axis=1, keepdims=True)
    return shares * ((inside >= 0) & (inside <= 1))[:, None]


def fit_to_panel(photograph: Image.Image) -> Image.Image:
    """Return the photograph at the size of a panel."""
    return photograph.resize(panel_size(*photograph.size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def panel_size(width: int, height: int, side: int = PANEL_SIDE) -> tuple[int, int]:
    """Return a picture's shape at the area of a square of this side, or smaller if it is very long."""
    scale = side * min(1 / (width * height) ** 0.5, LONGEST_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _lay_out(panels: list[tuple[str, str, Image.Image]]) -> Image.Image:
    """Rows of panels of one size, each under its title of word and weight."""
    import matplotlib  # brings the font

    font_file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    word_font = ImageFont.truetype(font_file, WORD_SIZE)
    weight_font = ImageFont.truetype(font_file, WEIGHT_SIZE)
    titles = [(_shorten(word, word_font), weight) for word, weight, _ in panels]
    title_width = max(
        word_font.getlength(word) + GAP / 2 + weight_font.getlength(weight) for word, weight in titles
    )

    width, height = panels[0][2].size
    across, down = max(width, math.ceil(title_width)) + GAP, TITLE_HEIGHT + height + GAP
    rows = math.ceil(len(panels) / max(1, FIGURE_WIDTH // across))
    columns = math.ceil(len(panels) / rows)
    figure = Image.new("RGB", (GAP + columns * across, GAP // 2 + rows * down), PAPER)
    draw = ImageDraw.Draw(figure)
    for index, ((word, weight), (_, _, panel)) in enumerate(zip(titles, panels, strict=True)):
        row, column = divmod(index, columns)
        left, top = GAP + column * across, GAP // 2 + row * down + TITLE_HEIGHT
        baseline, word_end = top - TITLE_HEIGHT // 3, left + word_font.getlength(word)
        draw.text((left, baseline), word, INK, word_font, anchor="ls")
        draw.text((word_end + GAP / 2, baseline), weight, FAINT_INK, weight_font, anchor="ls")
        figure.paste(panel, (left, top))
    return figure


def _shorten(word: str, font: ImageFont.FreeTypeFont) -> str:
    """The word on one line, cut off where it would be wider than a panel."""
    word = " ".join(word.split())
    if font.getlength(word) <= PANEL_SIDE:
        return word
    while font.getlength(word + "…") > PANEL_SIDE:
        word = word[:-1]
    return word + "…"
