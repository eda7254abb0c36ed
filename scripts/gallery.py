"""Draw README's gallery: photographs that may be used freely, and where the network looked for each word.

    python -m scripts.gallery docs/gallery.jpg [CHECKPOINT]

The first photograph is the example of the package; the others are in docs/photographs. Pexels published them under
CC0 until 2018: a surfer (416676), a bike (71104), a skateboard (428314) and a plane (8394). All of a caption is
shown, whatever it says.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import captioner
from captioner.captioning import Captioner
from captioner.cli import EXAMPLE
from captioner.files import write_atomically
from captioner.overlay import FAINT_INK, FONT, GAP, INK, PAPER, group_words, light_up

FOLDER = Path(__file__).parents[1] / "docs/photographs"

PHOTOGRAPHS = [EXAMPLE, *(FOLDER / f"{name}.jpg" for name in ("bike", "skateboard", "plane"))]
"""The photographs of README's gallery, in its order."""

WIDTH = 260  # pixels of a panel
SMALL = 22  # size of letters, in pixels
TITLE_HEIGHT = 40


def draw_gallery(model: Captioner, photographs: Sequence[Image.Image]) -> Image.Image:
    """Return a figure with a row for each photograph: itself, then a panel for each word of what it shows.

    The words stand below the panels, so that a row reads as the caption.
    """
    font = ImageFont.truetype(FONT, SMALL)
    rows = []
    for photograph in photographs:
        caption = model.caption(photograph)
        small = photograph.resize((WIDTH, round(WIDTH * photograph.height / photograph.width)), reducing_gap=3.0)
        panels = [("", "", small)]
        for group in group_words(caption.words):
            *before, word = (caption.words[index] for index in group)
            lit = light_up(small, caption.attention[group[-1]], caption.rectangle)
            panels.append((" ".join([*before, ""]), word, lit))
        rows.append(panels)
    heights = [panels[0][2].height + TITLE_HEIGHT for panels in rows]
    columns = max(len(panels) for panels in rows)
    figure = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(figure)
    top = GAP
    for panels, height in zip(rows, heights, strict=True):
        for column, (before, word, panel) in enumerate(panels):
            left = GAP + column * (WIDTH + GAP)
            figure.paste(panel, (left, top))
            baseline = top + panel.height + SMALL + 4
            draw.text((left, baseline), before, FAINT_INK, font, anchor="ls")
            draw.text((left + font.getlength(before), baseline), word, INK, font, anchor="ls")
        top += height
    return figure


def main(file: Path, checkpoint: str = "default") -> None:
    """Draw the gallery with a checkpoint, and replace the file."""
    photographs = [Image.open(photograph) for photograph in PHOTOGRAPHS]
    figure = draw_gallery(captioner.load(checkpoint), photographs)
    with write_atomically(file, overwrite=True) as output:
        figure.save(output, "JPEG", quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
