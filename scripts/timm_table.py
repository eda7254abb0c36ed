"""Print a table of networks of timm as encoders: their grid, D, and whether the ONNX exporter takes them.

    python scripts/timm_table.py                     # the families that tests/training/test_timm.py trains
    python scripts/timm_table.py convnext_base 32    # a network at a stride

Networks have random weights: nothing is downloaded.
"""

import sys
from collections.abc import Iterable

from captioner.errors import CaptionerError, UnsupportedError
from captioner.network.encoder import Encoder, read_timm_images
from captioner.network.export import export_graphs
from captioner.settings import AttentionSettings, DecoderSettings, EncoderSettings, ModelSettings

FAMILIES = {
    "resnet18": 32,
    "convnext_atto": 16,
    "efficientnet_b0": 32,
    "mobilenetv4_conv_small": 32,
    "regnety_002": 32,
    "fastvit_mci0": 32,
    "resnet50_clip": 32,
    "vit_tiny_patch16_224": 16,
    "swin_tiny_patch4_window7_224": 32,
    "test_vit": 16,
}
"""Stride of the grid by name of the network."""


def describe(name: str, stride: int) -> str:
    """Return a row of the table.

    Raises:
        CaptionerError: if timm knows no such network, or it has no grid of this stride.
    """
    size = read_timm_images(f"timm:{name}")["size"]
    settings = EncoderSettings(f"timm:{name}", stride)  # type: ignore[arg-type]  # checked there
    encoder = Encoder(settings)
    rows, columns = encoder.grid(size)
    millions = sum(weight.numel() for weight in encoder.parameters()) / 1e6
    try:
        export_graphs(ModelSettings(settings, AttentionSettings(size=8), DecoderSettings(hidden_size=8)), 20, size)
        exports = "yes"
    except UnsupportedError as error:
        exports = f"no: {error}"
    return f"| `{name}` | {stride} | {size} | {rows} x {columns} | {encoder.size} | {millions:.1f} M | {exports} |"


def main(networks: Iterable[tuple[str, int]]) -> None:
    """Print the table."""
    print(
        "| network | stride | image | grid | D | parameters | export to ONNX |\n|---|---:|---:|---:|---:|---:|---|"
    )
    for name, stride in networks:
        print(describe(name, stride), flush=True)


if __name__ == "__main__":
    try:
        main([(sys.argv[1], int(sys.argv[2]))] if sys.argv[1:] else FAMILIES.items())
    except (CaptionerError, ValueError) as error:
        sys.exit(str(error))
