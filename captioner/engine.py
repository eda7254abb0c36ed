"""The protocol of an engine, which computes a captioning network.

Shapes: B images, K rows (hypotheses) each, L grid locations, V vocabulary size, D annotation size.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np


class AttentionMaps(NamedTuple):
    """Attention of one word of each row."""

    attention: np.ndarray
    """float32 (B, K, L); each row sums to 1."""
    visual: np.ndarray | None = None
    """float32 (B, K), share of each context that comes from the image, 0 to 1. None: not computed."""
    heads: np.ndarray | None = None
    """float32 (B, K, heads, L), of which `attention` is the mean. None if there is only one head."""


class State(Protocol):
    """The state of an engine between two words, for B images of K rows each. Immutable."""

    def select(self, images: np.ndarray, rows: np.ndarray) -> "State":
        """Return the state of some images and rows.

        Args:
            images: int64 (B',), ascending indices of the images to keep.
            rows: int64 (B', K'), indices of rows of each of these images, which may repeat.
        """
        ...

    def annotations(self) -> np.ndarray:
        """Return the mean annotation of each image, float32 (B, D)."""
        ...

    def replace_cells(self, cells: np.ndarray) -> "State":
        """Return the state with the content of some cells removed, to measure what they were used for.

        Their annotations and attention keys are replaced by the means over the grid (keys are affine functions of
        annotations, so their mean is the key of the mean annotation). Values computed from the whole grid, such as
        the initial state of a decoder, do not change.

        Args:
            cells: bool (B, L), the cells of each image.
        """
        ...


class StepResult(NamedTuple):
    """The prediction of one word of each row."""

    log_probs: np.ndarray
    """float32 (B, K, V), log-probabilities of the next word. The caller may change this array."""
    state: State
    maps: AttentionMaps


class Engine(Protocol):
    """A captioning network."""

    @property
    def name(self) -> str:
        """Library and device, such as "ONNX Runtime on CPU"."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the attention grid."""
        ...

    def start(self, pixels: np.ndarray) -> State:
        """Encode images and return the state before the first word, with one row per image.

        Args:
            pixels: float32 (B, 3, S, S), from `captioner.images.prepare`.
        """
        ...

    def step(self, words: np.ndarray, state: Any) -> StepResult:
        """Read the previous word of each row and predict the next.

        Args:
            words: int64 (B, K), token ids.
            state: state of this engine, for B images of K rows each.
        """
        ...
