"""Attention drawn over the picture, light where the network looked: a panel a word, or an animation.

After figures 2 and 3 of Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044).

What brightness means, in every form of overlay and on the web page (`web/static/light.js` computes the same): where
the weight of a word is no more than its average over the grid, the picture is dim. From there, light grows with the
weight. The largest weight of the word has full light, in which the picture is as it is, if it is at least `FULL`
times the average. So light stands out where weights are soft; and if the network looked everywhere alike, all is
dim, as small differences are not blown up.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

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
LEGEND_HEIGHT = 24  # of a line below the panels
PAPER, INK, FAINT_INK, ACCENT = "#ffffff", "#1a1a1a", "#767676", "#a8480f"

DIMMED = 0.15  # share of the picture that shows where the network did not look
VEIL = (
    0.12  # grey that shows instead, 0 to 1: brighter than black, or a dark picture would look the same everywhere
)
FULL = 2  # weight that has full light, over the average weight, if no weight is larger
SOFTNESS = 1.5  # 1: light is proportional to what a weight is above the average; more: it rises faster at first
COLOURED = 0.65  # opacity of colours over the picture
SPREAD = 0.6  # standard deviation, in grid cells, of the Gaussian that smooths the maps

SECONDS = 0.9  # that an animation stays at a word
PAUSE = 2.0  # seconds that it stays at the picture itself

COLOURS = ("white", *COLOUR_MAPS)
"""Ways to draw attention: the paper's white light, and the colour maps of `captioner.colours`."""

LEGEND = (
    "Light shows where the network looked for a word. “5.0 × average” means: "
    "the brightest spot got 5 times as much attention as a spot gets on average."
)
"""What the panels of a figure show, below them."""

FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some his her its their he she it they who which there and or but as while
    is are was were be been being has have in on at to of by for from with into onto off over under up down
    near behind beside between above below across along around through against front next
    """.split()  # noqa: SIM905 (a list would take a line a word)
)
"""English words that name nothing to see. A panel shows the word after them, and its title has them too."""

FONT = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"


def draw_attention(
    picture: images.Source, caption: Caption, head: int | None = None, colours: str = "white"
) -> Image.Image:
    """Return a figure of where the network looked: the picture itself, then one panel a word.

    A panel is the picture dimmed, and light where the network looked for its word; the module says what brightness
    means. What lies outside the part of the picture that the network saw stays dim. The title gives the word, after
    the `FUNCTION_WORDS` before it, which have no panel of their own, and how far its largest weight is above the
    average, as `describe_look` has it. Where the mechanism can tell, it ends with the share of the word's context
    that came from the picture.

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
    panels = [_Panel("", "picture", "", photograph)]
    for group in group_words(caption.words):
        *before, word = (caption.words[place] for place in group)
        weights, shown = caption.attention[group[-1]], describe_look(caption.attention[group[-1]])
        if caption.visual:
            shown += f", {caption.visual[group[-1]]:.0%} from the picture"
        panels.append(
            _Panel(" ".join(before), word, shown, light_up(photograph, weights, caption.rectangle, colours))
        )
    return _lay_out(panels)


def describe_look(weights: np.ndarray) -> str:
    """Return how much attention the brightest spot of a map (rows, columns) got, in words for people.

    It is 1.0 if the network looked everywhere alike, and on a grid of 7 x 7 at most 49.
    """
    return f"{weights.max() / weights.mean():.1f} × average"


def group_words(words: Sequence[str]) -> list[range]:
    """Return the places of the words that share a panel: of function words and the word that they stand before."""
    ends = [place + 1 for place, word in enumerate(words) if word not in FUNCTION_WORDS]
    if len(words) not in (0, *ends):
        ends.append(len(words))
    return [range(start, end) for start, end in itertools.pairwise([0, *ends])]


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

    White light leaves the picture dim where the network did not look, and as it is where it looked most. Colours
    cover the picture evenly, dark to bright, and what the network did not see is black.

    Raises:
        CaptionerError: if there are no such colours.
    """
    if colours not in COLOURS:
        raise CaptionerError(f"colours {colours!r}: expected one of {', '.join(COLOURS)}")
    light = spread_light(weights, rectangle, width, height)
    if colours == "white":
        veil = np.full_like(light, VEIL)
        return np.stack([veil, veil, veil, (1 - DIMMED) * (1 - light)], axis=-1)
    seen = np.outer(
        _are_inside(_centres(height), rectangle.top, rectangle.bottom),
        _are_inside(_centres(width), rectangle.left, rectangle.right),
    )
    colour = apply_colour_map(colours, light) * seen[..., None]
    return np.dstack([colour, np.full_like(light, COLOURED)])


def spread_light(weights: np.ndarray, rectangle: Rectangle, width: int, height: int) -> np.ndarray:
    """Return how much light falls on each pixel of a picture, 0 to 1: (height, width).

    Args:
        weights: (rows, columns), not negative, not all 0.
        rectangle: the part of the picture that the weights cover; it is dark outside.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """
    rows, columns = weights.shape
    down = _smoothing(_centres(height), rectangle.top, rectangle.bottom, rows)
    across = _smoothing(_centres(width), rectangle.left, rectangle.right, columns)
    # Full light is the smooth map's peak over the whole grid: what the network saw in padding counts too.
    whole = _smoothing(_centres(rows), 0, 1, rows) @ weights @ _smoothing(_centres(columns), 0, 1, columns).T
    average = weights.mean()
    above = (down @ weights @ across.T - average) / (max(whole.max(), FULL * average) - average)
    return 1 - (1 - above.clip(0, 1)) ** SOFTNESS


def _centres(count: int) -> np.ndarray:
    """Where the centres of `count` pixels or cells lie between 0 and 1."""
    return (np.arange(count) + 0.5) / count


def _smoothing(places: np.ndarray, start: float, end: float, cells: int) -> np.ndarray:
    """How much each cell of a row of cells from `start` to `end` gives to each place: (places, cells).

    A place's shares sum to 1, or are all 0 outside. A Gaussian has no overshoot, unlike cubic interpolation,
    and shows no edges of cells, unlike linear.
    """
    distances = ((places - start) / (end - start)).clip(0, 1)[:, None] - _centres(cells)
    shares = np.exp(-0.5 * (distances * cells / SPREAD) ** 2)
    shares /= shares.sum(axis=1, keepdims=True)
    return shares * _are_inside(places, start, end)[:, None]


def _are_inside(places: np.ndarray, start: float, end: float) -> np.ndarray:
    return (places >= start) & (places <= end)


def fit_to_panel(photograph: Image.Image) -> Image.Image:
    """Return the photograph at the size of a panel."""
    return photograph.resize(panel_size(*photograph.size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def panel_size(width: int, height: int, side: int = PANEL_SIDE) -> tuple[int, int]:
    """Return a picture's shape at the area of a square of this side, or smaller if it is very long."""
    scale = side * min(1 / (width * height) ** 0.5, LONGEST_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


class _Panel(NamedTuple):
    before: str
    """The faint beginning of its title."""
    word: str
    shown: str
    """How far the word's map stands out."""
    image: Image.Image


def _lay_out(panels: Sequence[_Panel]) -> Image.Image:
    """Rows of panels of one size, each under its title, over the legend."""
    word_font, weight_font = _font(WORD_SIZE), _font(WEIGHT_SIZE)
    titles = []  # text, colour and font of the parts of each title, with a space before the last
    for panel in panels:
        word, before = _shorten(panel.word, word_font), f"{_shorten(panel.before, word_font)} " * bool(panel.before)
        titles.append(
            ((before, FAINT_INK, word_font), (word, INK, word_font), (panel.shown, FAINT_INK, weight_font))
        )
    title_width = max(sum(font.getlength(text) for text, _, font in parts) for parts in titles) + GAP / 2

    width, height = panels[0].image.size
    across, down = max(width, math.ceil(title_width)) + GAP, TITLE_HEIGHT + height + GAP
    rows = math.ceil(len(panels) / max(1, FIGURE_WIDTH // across))
    columns = math.ceil(len(panels) / rows)
    legend = _wrap(LEGEND, weight_font, columns * across - GAP) if len(panels) > 1 else []
    bottom = GAP // 2 + rows * down
    figure = Image.new("RGB", (GAP + columns * across, bottom + len(legend) * LEGEND_HEIGHT), PAPER)
    draw = ImageDraw.Draw(figure)
    for index, (parts, panel) in enumerate(zip(titles, panels, strict=True)):
        row, column = divmod(index, columns)
        left, top = GAP + column * across, GAP // 2 + row * down + TITLE_HEIGHT
        figure.paste(panel.image, (left, top))
        start: float = left
        for text, ink, font in parts:
            start += GAP / 2 * (font is weight_font)
            draw.text((start, top - TITLE_HEIGHT // 3), text, ink, font, anchor="ls")
            start += font.getlength(text)
    for number, line in enumerate(legend):
        draw.text((GAP, bottom + number * LEGEND_HEIGHT), line, FAINT_INK, weight_font, anchor="la")
    return figure


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the text in lines that are at most so wide, if no word alone is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


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
