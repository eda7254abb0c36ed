"""Draw attention over a picture: a figure with a panel for each word, or an animation.

After figures 2 and 3 of Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044).

Brightness has the same meaning in all overlays and on the web page (`web/static/light.js`): where the weight of a
word is at most its average over the grid, the picture is dim. Above, light grows with the weight. The largest
weight has full light, which shows the original picture, if it is at least `FULL` times the average. So differences
of soft weights are visible, and uniform attention is dim: small differences are not exaggerated.
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

PANEL_SIDE = 300
"""A panel has about the area of a square of this side, in pixels."""
LONGEST_SIDE = 4
"""Longest side of a panel, in sides of that square."""
FIGURE_WIDTH = 2000
"""Maximum width of a row of panels in pixels."""
GAP = 16
"""Space around panels in pixels."""
TITLE_HEIGHT = 32
"""Height of the title of a panel in pixels."""
WORD_SIZE, WEIGHT_SIZE = 21, 15  # font sizes in pixels
LEGEND_HEIGHT = 24
"""Height of a line of the legend in pixels."""
PAPER, INK, FAINT_INK, ACCENT = "#ffffff", "#1a1a1a", "#767676", "#a8480f"

DIMMED = 0.15
"""Opacity of the picture without attention."""
VEIL = 0.12
"""Grey below the dimmed picture, 0 to 1; with black, a dark picture would look the same everywhere."""
FULL = 2
"""Minimum ratio of a weight with full light to the average weight."""
SOFTNESS = 1.5
"""With 1, light is proportional to the weight above the average; with more, it rises faster at first."""
COLOURED = 0.65
"""Opacity of colours over the picture."""
SPREAD = 0.6
"""Standard deviation, in grid cells, of the Gaussian that smooths the maps."""

SECONDS = 0.9
"""Seconds for each word of an animation."""
PAUSE = 2.0
"""Seconds for the picture itself in an animation."""

COLOURS = ("white", *COLOUR_MAPS)
"""Colours of overlays: white light as in the paper, and the colour maps of `captioner.colours`."""

LEGEND = (
    "Light shows where the network looked for a word. “5.0 × average” means: "
    "the brightest spot got 5 times as much attention as a spot gets on average."
)
"""Legend below the panels of a figure."""

FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some his her its their he she it they who which there and or but as while
    is are was were be been being has have in on at to of by for from with into onto off over under up down
    near behind beside between above below across along around through against front next
    """.split()  # noqa: SIM905 (shorter than a list)
)
"""English words without visual content. They share the panel of the word after them."""

FONT = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"


def draw_attention(
    picture: images.Source, caption: Caption, head: int | None = None, colours: str = "white"
) -> Image.Image:
    """Return a figure of the attention: the picture, then one panel for each word.

    A panel is the dimmed picture with light where the network attended for the word; see the module for the meaning
    of brightness. Parts of the picture outside of the network's input stay dim. The title is the word with the
    `FUNCTION_WORDS` before it, which have no panels, the ratio of its largest weight to the average
    (`describe_attention`) and, if the mechanism computes it, the share of the word's context from the picture.

    Panels are arranged in rows of about `FIGURE_WIDTH` pixels. Characters that are not in the font become boxes.

    Args:
        picture: the captioned picture, any source that `Captioner.caption` accepts.
        caption: its caption.
        head: index of the attention head to draw. None: the mean of all heads.
        colours: one of `COLOURS`.

    Raises:
        ImageError: if the picture cannot be read.
        CaptionerError: if there is no such head or no such colours, or the caption has no attention maps.
    """
    if head is not None:
        caption = pick_head(caption, head)
    _check_maps(caption)
    photograph = fit_to_panel(images.open(picture, at_least=PANEL_SIDE))
    panels = [_Panel("", "picture", "", photograph)]
    for group in group_words(caption.words):
        *function_words, word = (caption.words[index] for index in group)
        weights = caption.attention[group[-1]]
        figures = describe_attention(weights)
        if caption.visual:
            figures += f", {caption.visual[group[-1]]:.0%} from the picture"
        panels.append(
            _Panel(
                " ".join(function_words), word, figures, light_up(photograph, weights, caption.rectangle, colours)
            )
        )
    return _lay_out(panels)


def _check_maps(caption: Caption) -> None:
    if caption.words and not caption.attention.size:
        raise CaptionerError(
            "this caption has no attention maps. Caption the picture again, or write them with the caption: "
            "caption --format jsonl --attention"
        )


def describe_attention(weights: np.ndarray) -> str:
    """Return the ratio of the largest weight of a map (rows, columns) to the average as text; 1.0 is uniform."""
    return f"{weights.max() / weights.mean():.1f} × average"


def group_words(words: Sequence[str]) -> list[range]:
    """Return the indices of the words of each panel: function words and the next other word."""
    ends = [index + 1 for index, word in enumerate(words) if word not in FUNCTION_WORDS]
    if len(words) not in (0, *ends):
        ends.append(len(words))
    return [range(start, end) for start, end in itertools.pairwise([0, *ends])]


def animate_attention(picture: images.Source, caption: Caption, colours: str = "white") -> list[Image.Image]:
    """Return the frames of an animation: the picture with its caption, then each word with its attention.

    Args:
        picture: the captioned picture, any source that `Captioner.caption` accepts.
        caption: its caption.
        colours: one of `COLOURS`.

    Raises:
        ImageError: if the picture cannot be read.
        CaptionerError: if there are no such colours, or the caption has no attention maps.
    """
    _check_maps(caption)
    photograph = fit_to_panel(images.open(picture, at_least=PANEL_SIDE))
    panels = [light_up(photograph, weights, caption.rectangle, colours) for weights in caption.attention]
    return [_add_caption(panel, caption.words, index) for index, panel in enumerate([photograph, *panels], -1)]


def save_animation(frames: list[Image.Image], file: BinaryIO) -> None:
    """Write frames of `animate_attention` as a looping GIF."""
    milliseconds = [round(1000 * PAUSE), *[round(1000 * SECONDS)] * (len(frames) - 1)]
    first, *others = (_to_palette(frame) for frame in frames)
    first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def pick_head(caption: Caption, head: int) -> Caption:
    """Return the caption with the maps of one head, counted from 0, as its attention.

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
    """Return the RGB photograph with the layer of `draw_layer` on top.

    Args:
        photograph: the whole picture, of any size.
        weights: non-negative weights (rows, columns).
        rectangle: part of the picture that the weights cover, in fractions of its width and height.
        colours: one of `COLOURS`.
    """
    layer = draw_layer(weights, rectangle, *photograph.size, colours)
    colour, opacity = layer[..., :3], layer[..., 3:]
    lit = np.asarray(photograph) * (1 - opacity) + 255 * colour * opacity
    return Image.fromarray(lit.round().astype(np.uint8))


def draw_layer(
    weights: np.ndarray, rectangle: Rectangle, width: int, height: int, colours: str = "white"
) -> np.ndarray:
    """Return the layer over a picture, (height, width, 4): red, green, blue and opacity, 0 to 1.

    With white light the picture is dim without attention, and unchanged at full light. Colours cover the picture
    with constant opacity; parts outside of the network's input are black.

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
    """Return the light of each pixel of a picture, 0 to 1: (height, width).

    Args:
        weights: non-negative weights (rows, columns), not all 0.
        rectangle: part of the picture that the weights cover; outside is dark.
        width: width of the picture in pixels.
        height: height of the picture in pixels.
    """
    rows, columns = weights.shape
    down = _smoothing(_centres(height), rectangle.top, rectangle.bottom, rows)
    across = _smoothing(_centres(width), rectangle.left, rectangle.right, columns)
    # Full light is the maximum of the smooth map over the whole grid, including padding.
    whole = _smoothing(_centres(rows), 0, 1, rows) @ weights @ _smoothing(_centres(columns), 0, 1, columns).T
    average = weights.mean()
    above = (down @ weights @ across.T - average) / (max(whole.max(), FULL * average) - average)
    return 1 - (1 - above.clip(0, 1)) ** SOFTNESS


def _centres(count: int) -> np.ndarray:
    """Return the centres of `count` pixels or cells between 0 and 1."""
    return (np.arange(count) + 0.5) / count


def _smoothing(positions: np.ndarray, start: float, end: float, cells: int) -> np.ndarray:
    """Return the weights of a row of cells from `start` to `end` at each position: (positions, cells).

    The weights of a position sum to 1, or are 0 outside. Unlike cubic interpolation, a Gaussian has no overshoot;
    unlike linear interpolation, it shows no edges of cells.
    """
    distances = ((positions - start) / (end - start)).clip(0, 1)[:, None] - _centres(cells)
    weights = np.exp(-0.5 * (distances * cells / SPREAD) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights * _are_inside(positions, start, end)[:, None]


def _are_inside(positions: np.ndarray, start: float, end: float) -> np.ndarray:
    return (positions >= start) & (positions <= end)


def fit_to_panel(photograph: Image.Image) -> Image.Image:
    """Resize a photograph to a panel."""
    return photograph.resize(panel_size(*photograph.size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def panel_size(width: int, height: int, side: int = PANEL_SIDE) -> tuple[int, int]:
    """Return the size of a picture scaled to the area of a square of this side, or less if it is very long."""
    scale = side * min(1 / (width * height) ** 0.5, LONGEST_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


class _Panel(NamedTuple):
    function_words: str
    """The faint start of its title."""
    word: str
    figures: str
    image: Image.Image


def _lay_out(panels: Sequence[_Panel]) -> Image.Image:
    """Arrange panels of one size in rows, with titles and a legend."""
    word_font, weight_font = _font(WORD_SIZE), _font(WEIGHT_SIZE)
    titles = []  # text, colour and font of the parts of each title
    for panel in panels:
        word = _shorten(panel.word, word_font)
        start = f"{_shorten(panel.function_words, word_font)} " * bool(panel.function_words)
        titles.append(
            ((start, FAINT_INK, word_font), (word, INK, word_font), (panel.figures, FAINT_INK, weight_font))
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
        x: float = left
        for text, ink, font in parts:
            x += GAP / 2 * (font is weight_font)
            draw.text((x, top - TITLE_HEIGHT // 3), text, ink, font, anchor="ls")
            x += font.getlength(text)
    for number, line in enumerate(legend):
        draw.text((GAP, bottom + number * LEGEND_HEIGHT), line, FAINT_INK, weight_font, anchor="la")
    return figure


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Wrap the text into lines of at most this width, unless a single word is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _add_caption(panel: Image.Image, words: Sequence[str], current: int) -> Image.Image:
    """Return the panel above the caption, whose current word is dark and the others faint; -1: all are dark."""
    font = _font(WORD_SIZE)
    space, width = font.getlength(" "), max(panel.width, PANEL_SIDE)
    positions: list[tuple[float, int, str]] = []  # left and line of each word
    left, line = 0.0, 0
    for word in words:
        word = _shorten(word, font)
        if left and left + font.getlength(word) > width - 2 * GAP:
            left, line = 0.0, line + 1
        positions.append((left, line, word))
        left += font.getlength(word) + space
    frame = Image.new("RGB", (width, panel.height + GAP + (line + 1) * TITLE_HEIGHT), PAPER)
    frame.paste(panel, ((width - panel.width) // 2, 0))
    draw = ImageDraw.Draw(frame)
    for index, (left, line, word) in enumerate(positions):
        baseline = panel.height + GAP // 2 + (line + 1) * TITLE_HEIGHT - TITLE_HEIGHT // 3
        ink = INK if current in (-1, index) else FAINT_INK
        draw.text((GAP + left, baseline), word, ink, font, anchor="ls")
        if index == current:
            draw.line((GAP + left, baseline + 5, GAP + left + font.getlength(word), baseline + 5), ACCENT, 3)
    return frame


def _to_palette(frame: Image.Image) -> Image.Image:
    """Convert the frame to the 256 colours of a GIF, with dithering."""
    # Unlike Pillow's default, octrees keep rare colours, such as that of the line under a word.
    palette = frame.quantize(method=Image.Quantize.FASTOCTREE)
    return frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font at a size in pixels."""
    try:
        return ImageFont.truetype(FONT, size)
    except ImportError as error:
        raise CaptionerError(
            "overlays need FreeType, and the installed Pillow was built without it. "
            "Install a wheel: pip install --force-reinstall --only-binary :all: pillow"
        ) from error


def _shorten(word: str, font: ImageFont.FreeTypeFont) -> str:
    """Return the word on one line, truncated to the width of a panel."""
    word = " ".join(word.split())
    if font.getlength(word) <= PANEL_SIDE:
        return word
    while font.getlength(word + "…") > PANEL_SIDE:
        word = word[:-1]
    return word + "…"
