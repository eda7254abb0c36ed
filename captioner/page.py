"""A picture and its caption as HTML: hovering over a word shows its attention.

A page is self-contained and has no script: it works from a file and offline, and text of captions or file names
could not execute anything. HTML and CSS are sufficient because each word contains its attention map: an image over
the photograph, hidden until the word is hovered, tapped or focused.
"""

import base64
import html
import io
import math
import os
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner import images
from captioner.caption import Caption
from captioner.confidence import UNSURE
from captioner.errors import ImageError
from captioner.files import is_file
from captioner.overlay import PANEL_SIDE, describe_attention, draw_layer, fit_to_panel, panel_size
from captioner.vocabulary import join

PANEL_HEIGHT = 416
"""Maximum height of a picture in pixels."""
QUALITY = 80
"""JPEG quality of the photograph."""
LIGHT_SIDE = 64
"""Side of the light in pixels, as `PANEL_SIDE`: light is smooth, so a small image is stretched."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of a page: inline images and style only."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f4f0; --card: #ffffff; --ink: #211f1c; --faint: #6a655e; --rule: #e0dbd3;
  --accent: #a8480f; --mark: #fde8d0; --grey: #938b80;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #151412; --card: #1f1d1a; --ink: #ece7df; --faint: #a69f94; --rule: #37332d;
    --accent: #f3a35c; --mark: #523516; --grey: #7d766b;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; padding: clamp(1rem, 4vw, 3rem); background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
.captioned {
  position: relative; margin: 0; max-width: 32rem; overflow: hidden; container-type: inline-size;
  background: var(--card); border: 1px solid var(--rule); border-radius: .75rem;
}
.panel {
  display: block; margin: 0 auto; width: min(100%, calc(26rem * var(--ratio))); aspect-ratio: var(--ratio);
}
.name, .look { --room: 2.125rem; }
.name, .figures { display: block; margin: 0; padding: .5rem 1rem; font-size: .8125rem; line-height: 1.125rem; }
.name { height: var(--room); color: var(--faint); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.caption { margin: 0; padding: .25rem 1rem 1rem; font: 1.25rem/1.45 Charter, Cambria, Georgia, serif; }
.word {
  padding: .1em 0; border-radius: .2em; cursor: default;
  text-decoration: underline dotted var(--grey) 1px; text-underline-offset: .25em;
}
.word.sure { text-decoration-style: solid; text-decoration-color: var(--rule); }
.word.unsure { color: var(--faint); }
.trust { margin: 0; padding: 0 1rem 1rem; font-size: .8125rem; color: var(--faint); }
.word:hover, .word:focus { background: var(--mark); box-shadow: 0 0 0 .12em var(--mark); outline: none; }
.word:focus-visible { outline: 2px solid var(--accent); outline-offset: .12em; }
.look {
  position: absolute; inset: 0 0 auto; padding-bottom: var(--room); visibility: hidden; opacity: 0;
  pointer-events: none;
}
.figures {
  position: absolute; inset: auto 0 0; min-height: var(--room); background: var(--card);
  font-family: system-ui, sans-serif;
}
.roomy :is(.name, .look) { --room: 3.25rem; white-space: normal; }
@container (max-width: 25rem) { .roomy :is(.name, .look) { --room: 4.375rem; } }
.word:hover > .look, .word:focus > .look { visibility: visible; opacity: 1; }
.caption:has(:hover) > .word:focus:not(:hover) > .look { visibility: hidden; opacity: 0; }
@media (prefers-reduced-motion: no-preference) { .look { transition: opacity .15s, visibility .15s; } }
"""
"""Style of all pages. A hovered word has priority over a focused one. Figures that need more room than the name
cover part of the picture, never a word."""


ALONE = ".captioned { margin: 0 auto; max-width: clamp(20rem, calc(26rem * var(--ratio)), 44rem); }"
"""Additional style of a page of one picture."""


def document(title: str, body: str, style: str = "") -> str:
    """Return an HTML document, with a title in plain text and a style after `STYLE`."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def overlay_page(picture: images.Source, caption: Caption, name: str = "", colours: str = "white") -> str:
    """Return a page of one picture; see `figure`."""
    return document(caption.text or name, figure(picture, caption, name, colours=colours), ALONE)


FRAME_WIDTHS = 320, 704
"""Minimum and maximum width in pixels of a frame in a notebook; those of a gallery have the minimum."""

FRAME = (
    "html { scrollbar-width: none; } body { padding: 0; background: none; } "
    ".captioned { max-width: none; min-height: 100vh; }"
)
"""Additional style of a frame in a notebook, which the figure fills."""

GALLERY = 24
"""Maximum number of captions that a notebook displays of a list: 0.1 MB each."""


def frame(caption: Caption, max_width: int = FRAME_WIDTHS[1]) -> str:
    """Return the figure of a caption as an inline frame, for notebooks.

    The frame is a document of its own: `POLICY` applies to it, it has no scripts, and its style and that of the
    notebook do not mix. If the picture is unknown or cannot be read again, the words are shown alone.

    Args:
        caption: the caption; its picture is `caption.picture`.
        max_width: maximum width in pixels.
    """
    picture, photograph, name = caption.picture, None, ""
    if isinstance(picture, str | os.PathLike):
        path = Path(os.fsdecode(picture))
        picture, name = path if is_file(path) else None, path.name
    if picture is not None:
        with suppress(ImageError):
            photograph = images.open(picture, at_least=PANEL_SIDE)
    ratio = photograph.width / photograph.height if photograph else 0
    panel = PANEL_HEIGHT * ratio
    width = round(min(max(FRAME_WIDTHS[0], panel), max_width))
    height = 64 + 29 * _count_lines(caption.text, width, 11) + (18 if caption.alternatives else 0)
    height += round(min(panel, width - 2) / ratio) if photograph else 0
    if caption.confidence is not None:
        height += 16 + 20 * _count_lines(_describe_confidence(caption), width, 6.7)
    content = document(caption.text, figure(photograph, caption, name), FRAME)
    output = (
        f'<iframe sandbox="allow-same-origin" title="{html.escape(caption.text)}" srcdoc="{html.escape(content)}" '
        f'style="width: {width}px; height: {height}px; max-width: 100%; border: 0"></iframe>'
    )
    return output.encode("utf-8", "backslashreplace").decode()  # names may contain surrogates


def _count_lines(text: str, width: int, letter: float) -> int:
    """Estimate the number of lines of a text in a frame, with letters of this width in pixels."""
    return len(textwrap.wrap(text, int((width - 34) // letter))) or 1


def gallery(captions: Sequence[Caption]) -> str:
    """Return the frames of the first `GALLERY` captions side by side, for notebooks."""
    frames = "".join(frame(caption, FRAME_WIDTHS[0]) for caption in captions[:GALLERY])
    more = f"<p>{GALLERY} of {len(captions)} captions</p>" if len(captions) > GALLERY else ""
    return f'<div style="display: flex; flex-wrap: wrap; gap: 12px; align-items: start">{frames}</div>{more}'


def figure(
    picture: images.Source | None, caption: Caption, name: str = "", details: str = "", colours: str = "white"
) -> str:
    """Return the picture above its caption, whose words show their attention.

    The light is that of `overlay.light_up`. While it is visible, the line below the picture has the word's
    probability, the ratio of its largest weight to the average and, if the mechanism computes it, the share of the
    word's context that comes from the picture; then the word's alternatives, if requested.

    Args:
        picture: the captioned picture, any source that `Captioner.caption` accepts. None: show the words alone.
        caption: its caption; without attention maps, the words have figures only.
        name: plain text below the picture, while no word is hovered.
        details: HTML after the caption.
        colours: one of `overlay.COLOURS`.

    Raises:
        ImageError: if the picture cannot be read.
        CaptionerError: if there are no such colours.
    """
    size, ratio, panel = None, "1", ""
    if picture is not None:
        photograph = fit_to_panel(images.open(picture, at_least=PANEL_SIDE))
        size, ratio = photograph.size, f"{photograph.width / photograph.height:.6g}"
        alternative = html.escape(caption.text or "no caption")
        source = _to_uri(photograph, "JPEG", quality=QUALITY, optimize=True)
        panel = f'<img class="panel" alt="{alternative}" src="{source}">'
    words = [_word(caption, index, size, colours) for index in range(len(caption.words))]
    trust = "" if caption.confidence is None else f'<p class="trust">{_describe_confidence(caption)}</p>'
    kind = "captioned roomy" if caption.alternatives else "captioned"
    return (
        f'<figure class="{kind}" style="--ratio:{ratio}">{panel}'
        f'<figcaption><p class="name">{html.escape(name)}</p>'
        f'<p class="caption">{"".join(words) or "no words"}</p>{trust}{details}'
        "</figcaption></figure>"
    )


def _describe_confidence(caption: Caption) -> str:
    confidence = caption.confidence or 0
    kind = "unsure: " if confidence < UNSURE else ""
    return f"{kind}{_percent(confidence)} confident of all that it names"


def _word(caption: Caption, index: int, size: tuple[int, int] | None, colours: str) -> str:
    """Return a word with the preceding space, and its light for a photograph of this size."""
    word, weights = caption.words[index], caption.attention[index]
    figures = [f"{_percent(math.exp(caption.log_probs[index]))} likely"]
    light = ""
    if weights.size:
        figures.append(f"brightest spot: {describe_attention(weights)} attention")
    if size and weights.size:
        layer = draw_layer(weights, caption.rectangle, *panel_size(*size, LIGHT_SIDE), colours)
        image = Image.fromarray((255 * layer).round().astype(np.uint8))
        light = f'<img class="panel" alt="" src="{_to_uri(image, "PNG")}">'
    elif size:
        light = '<span class="panel"></span>'
    if caption.visual is not None:
        figures.append(f"{_percent(caption.visual[index])} from the picture")
    kind = "word"
    confidence = caption.word_confidences[index] if caption.word_confidences else None
    if confidence is not None:
        figures.insert(0, f"{_percent(confidence)} confident")
        kind = "word unsure" if confidence < UNSURE else "word sure"
    elif caption.word_confidences is not None:
        kind = "word sure"  # it names nothing
    text = " · ".join(figures)
    if caption.alternatives and caption.alternatives[index]:
        others = (
            f"{other} ({_percent(math.exp(log_prob))})" for other, log_prob in caption.alternatives[index].items()
        )
        text = f"{text}<br>instead: {html.escape(', '.join(others))}"
    space = join(["", word]).removesuffix(word) if index else ""
    return (
        f'{space}<span class="{kind}" tabindex="0">{html.escape(word)}<span class="look">'
        f'{light}<span class="figures">{text}</span></span></span>'
    )


def _percent(share: float) -> str:
    return "under 1%" if 0 < share < 0.005 else f"{share:.0%}"


def _to_uri(image: Image.Image, format: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
