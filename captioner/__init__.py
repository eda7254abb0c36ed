"""Captions for pictures, with the attention of the network for each word.

    import captioner

    model = captioner.load()
    caption = model.caption("dog.jpg")
    print(caption.text)
    captioner.draw_attention("dog.jpg", caption).save("dog-attention.png")

Most names are imported on first use, so that importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captioner.errors import (
    CaptionerError,
    CheckpointError,
    ConfigError,
    DataError,
    ImageError,
    MissingExtraError,
    OutputError,
)
from captioner.version import __version__

if TYPE_CHECKING:
    from captioner.caption import Caption, Captions
    from captioner.captioning import Captioner, load
    from captioner.output import read_captions
    from captioner.overlay import draw_attention
    from captioner.search import SearchSettings

__all__ = [
    "Caption",
    "Captioner",
    "CaptionerError",
    "Captions",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ImageError",
    "MissingExtraError",
    "OutputError",
    "SearchSettings",
    "__version__",
    "draw_attention",
    "load",
    "read_captions",
]

_LAZY = {
    "Caption": "captioner.caption",
    "Captioner": "captioner.captioning",
    "Captions": "captioner.caption",
    "SearchSettings": "captioner.search",
    "draw_attention": "captioner.overlay",
    "load": "captioner.captioning",
    "read_captions": "captioner.output",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that `caption --help` is fast."""
    if name not in _LAZY:
        raise AttributeError(f"module 'captioner' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
