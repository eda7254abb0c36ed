"""The protocol between a captioning network and everything around it, in NumPy.

Shapes: B images, K rows (hypotheses) each, L locations of the grid, V vocabulary size.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np


class Look(NamedTuple):
    """Where the network looked before it wrote one word of each row."""

    attention: np.ndarray
    """float32 (B, K, L); each row sums to 1."""
    visual: np.ndarray | None = None
    """float32 (B, K): share of each context that comes from the picture, 0 to 1. None if the mechanism has none."""
    heads: np.ndarray | None = None
    """float32 (B, K, heads, L), of which `attention` is the mean. None if there is one head only."""


class State(Protocol):
    """All that an engine knows between two words, for B images of K rows each. A value: no method changes it."""

    def select(self, images: np.ndarray, rows: np.ndarray) -> "State":
        """Return the state of some images and rows.

        Args:
            images: int64 (B',), ascending indices of the images to keep. The others are dropped.
            rows: int64 (B', K'), indices of rows of each of these images. A row may be named several times (a
                hypothesis that branches) or not at all.
        """
        ...

    def annotations(self) -> np.ndarray:
        """Return the mean annotation of each image, float32 (B, D)."""
        ...

    def replace_cells(self, cells: np.ndarray) -> "State":
        """Return the state of images in which some cells show nothing of their own, to find out what they were for.

        Their annotations, and the keys that attention computes from these, become the means over the grid: keys are
        affine functions of annotations, so their mean is the key of the mean annotation. What was computed from the
        whole grid (the first state of a decoder, its mean annotation) stays.

        Args:
            cells: bool (B, L), which cells of each image.
        """
        ...


class Step(NamedTuple):
    """What an engine answers to one word of each row."""

    log_probs: np.ndarray
    """float32 (B, K, V), log-probabilities of the next word. The caller may change this array."""
    state: State
    look: Look


class Engine(Protocol):
    """A captioning network, whatever computes it."""

    @property
    def name(self) -> str:
        """What computes, and on which device, such as "ONNX Runtime on CPU"."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the attention grid."""
        ...

    def start(self, pixels: np.ndarray) -> State:
        """Encode images and return the state before the first word, with one row an image.

        Args:
            pixels: float32 (B, 3, S, S), as `captioner.images.prepare` returns them.
        """
        ...

    def step(self, words: np.ndarray, state: Any) -> Step:
        """Read the previous word of each row and predict the next.

        Args:
            words: int64 (B, K), token ids.
            state: of this engine, for B images of K rows each.
        """
        ...
