"""Attention drawn over the picture, light where the network looked: a panel a word, or an animation.

After figures 2 and 3 of Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioner import images
from captioner.caption import Caption, Rectangle
from captioner.colours import COLOUR_MAPS, apply_colour_map
from captioner.errors import CaptionerError

PANEL_SIDE = 300  # pixels; a panel has about the area of a square of this side, whatever its shape
LONGEST_SIDE = 4  # of a panorama's panel, in sides of that square
FIGURE_WIDTH = 2000  # pixels to fill with panels before a new row begins
GAP = 16  # pixels around panels
TITLE_HEIGHT = 32
WORD_SIZE, WEIGHT_SIZE = 21, 15  # of the letters, in pixels
PAPER, INK, FAINT_INK, ACCENT = "#ffffff", "#1a1a1a", "#767676", "#a8480f"

DIMMED = 0.2  # brightness that the picture keeps where the network did not look
GLOW = 0.25  # white that full light adds, or a dark picture would stay dark where the network looked
COLOURED = 0.65  # opacity of colours over the picture
SPREAD = 0.6  # standard deviation, in grid cells, of the Gaussian that smooths the maps

SECONDS = 0.9  # that an animation stays at a word
PAUSE = 2.0  # seconds that it stays at the picture itself

COLOURS = ("white", *COLOUR_MAPS)
"""Ways to draw attention: the paper's white light, and the colour maps of `captioner.colours`."""

FONT = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"


def draw_attention(
    picture: images.Source, caption: Caption, head: int | None = None, colours: str = "white"
) -> Image.Image:
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
        colours: one of `COLOURS`.

    Raises:
        ImageError: if the picture cannot be read.
        CaptionerError: if there is no such head or no such colours.
    """
    if head is not None:
        caption = pick_head(caption, head)
    photograph = fit_to_panel(images.open(picture, at_least=PANEL_SIDE))
    panels = [("word", "peak weight" if caption.visual is None else "peak weight, visual share", photograph)]
    for place, (word, weights) in enumerate(zip(caption.words, caption.attention, strict=True)):
        figures = f"{weights.max():.1%}" + (f", {caption.visual[place]:.0%}" if caption.visual else "")
        panels.append((word, figures, light_up(photograph, weights, caption.rectangle, colours)))
    return _lay_out(panels)


def animate_attention(picture: images.Source, caption: Caption, colours: str = "white") -> list[Image.Image]:
    """Return the frames of an animation: the picture over its caption, then each word with its light.

    Args:
        picture: the picture that was captioned, in any form that `Captioner.caption` takes.
        caption: what it was captioned with.
        colours: one of `COLOURS`.

    Raises:
        ImageError: if the picture cannot be read.
        CaptionerError: if there are no such colours.
    """
    photograph = fit_to_panel(images.open(picture, at_least=PANEL_SIDE))
    lit = [light_up(photograph, weights, caption.rectangle, colours) for weights in caption.attention]
    return [_set_under(panel, caption.words, place) for place, panel in enumerate([photograph, *lit], start=-1)]


def save_animation(frames: list[Image.Image], file: BinaryIO) -> None:
    """Write frames of `animate_attention` as a GIF that never ends."""
    milliseconds = [round(1000 * PAUSE), *[round(1000 * SECONDS)] * (len(frames) - 1)]
    first, *others = (_to_palette(frame) for frame in frames)
    first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def pick_head(caption: Caption, head: int) -> Caption:
    """Return the caption with the maps of one head, counted from 0, for its attention.

    Raises:
        CaptionerError: if there is no such head.
    """
    count = 0 if caption.heads is None else caption.heads.shape[1]
    if caption.heads is None or not 0 <= head < count:
        raise CaptionerError(f"head {head}: this caption's attention has {count} heads, counted from 0")
    return replace(caption, attention=caption.heads[:, head])


def light_up(
    photograph: Image.Image, weights: np.ndarray, rectangle: Rectangle, colours: str = "white"
) -> Image.Image:
    """Return the RGB photograph under the layer of `draw_layer`.

    Args:
        photograph: the whole picture, of any size.
        weights: (rows, columns), not negative.
        rectangle: the part of the picture that the weights cover, in fractions of its width and height.
        colours: one of `COLOURS`.
    """
    layer = draw_layer(weights, rectangle, *photograph.size, colours)
    colour, opacity = layer[..., :3], layer[..., 3:]
    lit = np.asarray(photograph) * (1 - opacity) + 255 * colour * opacity
    return Image.fromarray(lit.round().astype(np.uint8))


def draw_layer(
    weights: np.ndarray, rectangle: Rectangle, width: int, height: int, colours: str = "white"
) -> np.ndarray:
    """Return what to lay over a picture, (height, width, 4): red, green, blue and opacity, 0 to 1.

    White light leaves the picture dim where the network did not look, and adds a glow where it did. Colours cover
    the picture evenly, dark to bright, and what the network did not see is black.

    Raises:
        CaptionerError: if there are no such colours.
    """
    if colours not in COLOURS:
        raise CaptionerError(f"colours {colours!r}: expected one of {', '.join(COLOURS)}")
    light = spread_light(weights, rectangle, width, height)
    if colours == "white":
        opacity = 1 - DIMMED - (1 - DIMMED - GLOW) * light
        grey = GLOW * light / opacity
        return np.stack([grey, grey, grey, opacity], axis=-1)
    colour = apply_colour_map(colours, light) * (light > 0)[..., None]
    return np.dstack([colour, np.full_like(light, COLOURED)])


def spread_light(weights: np.ndarray, rectangle: Rectangle, width: int, height: int) -> np.ndarray:
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
    word_font, weight_font = _font(WORD_SIZE), _font(WEIGHT_SIZE)
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


def _set_under(panel: Image.Image, words: Sequence[str], place: int) -> Image.Image:
    """Return the panel over the caption, which takes as many lines as it needs.

    The word at `place` is in ink and the others are faint; at -1, all are in ink.
    """
    font = _font(WORD_SIZE)
    space, width = font.getlength(" "), max(panel.width, PANEL_SIDE)
    spots: list[tuple[float, int, str]] = []  # left and line of each word
    left, line = 0.0, 0
    for word in words:
        word = _shorten(word, font)
        if left and left + font.getlength(word) > width - 2 * GAP:
            left, line = 0.0, line + 1
        spots.append((left, line, word))
        left += font.getlength(word) + space
    frame = Image.new("RGB", (width, panel.height + GAP + (line + 1) * TITLE_HEIGHT), PAPER)
    frame.paste(panel, ((width - panel.width) // 2, 0))
    draw = ImageDraw.Draw(frame)
    for number, (left, line, word) in enumerate(spots):
        baseline = panel.height + GAP // 2 + (line + 1) * TITLE_HEIGHT - TITLE_HEIGHT // 3
        ink = INK if place in (-1, number) else FAINT_INK
        draw.text((GAP + left, baseline), word, ink, font, anchor="ls")
        if number == place:
            draw.line((GAP + left, baseline + 5, GAP + left + font.getlength(word), baseline + 5), ACCENT, 3)
    return frame


def _to_palette(frame: Image.Image) -> Image.Image:
    """Return the frame in the 256 colours that a GIF has, with dots where smooth light would show steps."""
    # Unlike Pillow's default, octrees keep colours that few pixels have, such as that of the line under a word.
    palette = frame.quantize(method=Image.Quantize.FASTOCTREE)
    return frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font at a size in pixels. Unlike Pillow's own, it has letters beyond ASCII, such as é and я."""
    try:
        return ImageFont.truetype(FONT, size)
    except ImportError as error:
        raise CaptionerError(
            "overlays need FreeType, and the installed Pillow was built without it. "
            "Install a wheel: pip install --force-reinstall --only-binary :all: pillow"
        ) from error


def _shorten(word: str, font: ImageFont.FreeTypeFont) -> str:
    """The word on one line, cut off where it would be wider than a panel."""
    word = " ".join(word.split())
    if font.getlength(word) <= PANEL_SIDE:
        return word
    while font.getlength(word + "…") > PANEL_SIDE:
        word = word[:-1]
    return word + "…"
