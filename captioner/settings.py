"""Settings of a network: which encoder, attention and decoder, and their sizes. Model files store them.

These classes know neither pixels nor tensors, so that a model file can be read and checked without an engine.
"""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from captioner.config import check_ranges

WIDEST = 65_536
"""Largest width of a layer: far above any network that captions."""

OWN_NETWORK = "efficientnet_v2_b0"
SMALL_NETWORK = "small_cnn"
TORCHVISION_NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg16",
    "vgg19",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
)
"""The networks of torchvision that work here, listed so that checking a name does not import torchvision."""


@dataclass(frozen=True)
class EncoderSettings:
    """Which network sees the picture, and how fine its grid is; checkpoints store these.

    Raises:
        ValueError: for a value that no encoder has.
    """

    name: str = OWN_NETWORK
    """`efficientnet_v2_b0`; `small_cnn`, for small generated pictures; or a network of torchvision by its name
    there, such as `resnet50`."""
    stride: Literal[8, 16, 32] = 32
    """Pixels of the frame that a cell of the grid covers, down and across: 8 for `small_cnn`, 16 or 32 for the
    others."""
    grid: tuple[int, int] | None = None
    """Average the cells into this many rows and columns; none: as the network gives them."""

    def __post_init__(self) -> None:
        names = [OWN_NETWORK, SMALL_NETWORK, *TORCHVISION_NETWORKS]
        if self.name not in names:
            near = difflib.get_close_matches(self.name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"name: unknown encoder {self.name!r}; {hint}")
        strides = (8,) if self.name == SMALL_NETWORK else (16, 32)
        if self.stride not in strides:
            expected = " or ".join(map(str, strides))
            raise ValueError(f"stride: expected {expected} for {self.name}, got {self.stride!r}")
        if self.grid is not None and (len(self.grid) != 2 or not all(1 <= side <= 1000 for side in self.grid)):
            raise ValueError(f"grid: expected rows and columns, 1 to 1000, got {self.grid!r}")


@dataclass(frozen=True)
class AttentionSettings:
    """Which mechanism, and how wide."""

    kind: str = "additive"
    """`none`, `mean`, `additive`, `concat`, `general`, `dot`, `location`, `scaled_dot`, `multi_head`, `local_m`,
    `local_p`, `adaptive`, `hard`, or the name of a mechanism of your own (`captioner.network.attention.register`).
    Whether there is such a mechanism is checked when a network is built; ONNX Runtime needs the graphs alone."""
    size: int = 512  # A, width of the layer in which image and state meet
    score: Literal["additive", "concat", "general", "dot", "location", "scaled_dot"] = "additive"
    """What `local_m`, `local_p`, `adaptive` and `hard` score locations by."""
    coverage: bool = False  # scores see how much each location was looked at before
    heads: int = 4  # of `multi_head`
    radius: float = 2.0  # of the window of `local_m` and `local_p`, in cells
    pass_words: int = 12  # words in which the window of `local_m` passes over the grid once
    choice: Literal["argmax", "sample"] = "argmax"  # how `hard` chooses when captioning
    normalize: Literal["softmax", "entmax15"] = "softmax"
    """How scores become weights. `entmax15` gives locations with low scores a weight of exactly zero (Peters et al.
    2019, arXiv 1905.05702)."""

    def __post_init__(self) -> None:
        if not self.kind.isidentifier() or len(self.kind) > 100:
            raise ValueError(f"kind: expected the name of a mechanism, such as 'additive', got {self.kind[:60]!r}")
        check_ranges(self, {"size": (1, WIDEST), "heads": (1, WIDEST), "pass_words": (1, 1_000_000)})
        if not 0 < self.radius <= 1e6:
            raise ValueError(f"radius: must be above 0 and at most 1e6, got {self.radius}")
        if self.kind == "multi_head" and self.size % self.heads:
            raise ValueError(f"heads: {self.heads} heads cannot share a size of {self.size} evenly")
        if self.coverage and self.kind in ("none", "mean"):
            raise ValueError(f"coverage: {self.kind!r} scores no locations that it could correct")
        if self.kind == "adaptive" and self.score == "location":
            raise ValueError("score: 'location' scores places of the grid, and the sentinel of 'adaptive' has none")


@dataclass(frozen=True)
class DecoderSettings:
    """Which decoder, how wide, and how regularised."""

    kind: Literal["rnn", "gru", "lstm", "top_down", "transformer"] = "lstm"
    attend: Literal["before", "after"] = "before"
    """When `rnn`, `gru` and `lstm` look: before they move, from the previous state (Bahdanau et al. 2015, Show,
    Attend and Tell), or after, from the new one (Luong et al. 2015)."""
    hidden_size: int = 512  # H
    embedding_size: int = 512  # E
    dropout: float = 0.5  # of embedded words and of the output layer's input, while training
    annotation_dropout: float = 0.0  # of the numbers of every annotation vector, while training
    tied_output: bool = False  # the output layer is the embedding, transposed
    normalize: bool = True  # bring every annotation vector to mean 0 and variance 1; see `Decoder.start`
    layers: int = 2  # of `transformer`
    forget_bias: float = 0.0
    """The bias of the forget gates of `lstm` and `top_down` before they learn. At 1 or 2 they remember from the
    beginning (Gers et al. 2000; Jozefowicz et al. 2015, section 3), which helps a decoder that sees the picture
    but once, at its start."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("hidden_size", "embedding_size"), (1, WIDEST))
        check_ranges(self, {**sizes, "layers": (1, 100), "forget_bias": (-1000, 1000)})
        for name in ("dropout", "annotation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 0 and below 1, got {getattr(self, name)}")
        if self.attend == "after" and self.kind in ("top_down", "transformer"):
            raise ValueError(f"attend: {self.kind!r} has its own place to look; leave this at 'before'")
        if self.forget_bias and self.kind not in ("lstm", "top_down"):
            raise ValueError(f"forget_bias: {self.kind!r} has no forget gate; leave this at 0")


@dataclass(frozen=True)
class ModelSettings:
    """Everything that decides the network's shape, but for the size of its vocabulary."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)

    def __post_init__(self) -> None:
        attention, decoder = self.attention, self.decoder
        if decoder.kind == "transformer" and (attention.kind != "multi_head" or attention.coverage):
            raise ValueError(
                "attention.kind: the 'transformer' decoder looks with 'multi_head', without coverage (it reads all "
                f"words of a caption at once, and none knows where the others looked); got {attention.kind!r}"
                f"{' with coverage' if attention.coverage else ''}"
            )
        if decoder.kind == "transformer" and decoder.hidden_size % attention.heads:
            raise ValueError(
                f"attention.heads: {attention.heads} heads cannot share decoder.hidden_size, "
                f"{decoder.hidden_size}, evenly"
            )
        if decoder.kind == "top_down" and attention.kind in ("none", "mean"):
            raise ValueError(
                f"attention.kind: 'top_down' reads the mean annotation at every word, so {attention.kind!r} would "
                "change nothing that it seems to; use decoder.kind 'lstm'"
            )
