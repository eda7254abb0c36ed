"""Draw the attention of several runs on `shapes` for the nouns of one picture: docs/attention-maps.png.

    python scripts/attention_maps.py PICTURE FILE RUN...

One row per run, with its caption beside the maps.
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import captioner
from captioner.config import from_dict
from captioner.overlay import light_up
from captioner.search import SearchSettings
from evaluation.shapes import parse
from evaluation.table import name_attention, name_decoder

SIDE = 192  # pixels of a map


def main() -> None:
    """Caption the picture, and draw the attention."""
    picture, file, *runs = sys.argv[1:]
    photograph = Image.open(picture).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    figure, rows = plt.subplots(len(runs), 4, figsize=(10, 1.9 * len(runs)), layout="constrained", squeeze=False)
    for row, run in zip(rows, runs, strict=True):
        settings = json.loads(Path(run, "settings.json").read_text())
        model = captioner.load(Path(run, "best.safetensors"))
        caption = model.caption(picture, from_dict(SearchSettings, settings["search"]))
        sentence = parse(caption.text)
        indices = [mention.index for mention in sentence.mentions] if sentence else []
        kinds = dict.fromkeys(
            [name_decoder(model.header.model.decoder), name_attention(model.header.model.attention)]
        )
        for axis in row:
            axis.axis("off")
        text = "\n".join(textwrap.wrap(caption.text, 26))
        row[0].text(0, 0.85, ", ".join(kinds), weight="bold", va="top", transform=row[0].transAxes)
        row[0].text(0, 0.65, text, va="top", fontsize=9, transform=row[0].transAxes)
        for axis, index in zip(row[1:], indices, strict=False):
            axis.imshow(light_up(photograph, caption.attention[index], caption.rectangle))
            axis.set_title(f"{caption.words[index]}  {caption.attention[index].max():.0%}", fontsize=9, loc="left")
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
