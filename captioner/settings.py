"""Settings of a network: which encoder, attention and decoder, and their sizes. Model files store them.

These classes know neither pixels nor tensors, so that a model file can be read and checked without an engine.
"""

import difflib
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from captioner import config
from captioner.config import Range

WIDEST = 65_536
"""Maximum width of a layer: far above any captioning network."""

Width = Annotated[int, Range(1, WIDEST)]
Probability = Annotated[float, Range(0, 1, exclude="high")]


class EncoderFamily(NamedTuple):
    """What encoders of one kind have in common. To add a kind, add its record to `ENCODERS`.

    Importing torchvision takes seconds, so the names of its networks are listed here.
    """

    builder: str
    """Function of `captioner.network.encoder`: (name, stride) -> (layers, number of channels)."""
    strides: tuple[int, ...] = (16, 32)
    """Supported strides of the grid. The network is cut where it reaches the stride."""
    rounded_up: int | None = None
    """Part of the stride by which the padding makes the network divide rounding up; by the rest it rounds down.
    None: all of it. A run on the meta device would tell, but it makes torch import its compiler, which takes longer
    than importing torch."""


ENCODERS: dict[str, EncoderFamily] = {
    "efficientnet_v2_b0": EncoderFamily("efficientnet_v2_b0"),
    "small_cnn": EncoderFamily("small_cnn", strides=(8,)),
    **dict.fromkeys(
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), EncoderFamily("torchvision_features")
    ),
    **dict.fromkeys(("vgg16", "vgg19"), EncoderFamily("torchvision_features", rounded_up=1)),
    "densenet121": EncoderFamily("torchvision_features", rounded_up=4),
    **dict.fromkeys(
        ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s"),
        EncoderFamily("torchvision_features"),
    ),
    "convnext_tiny": EncoderFamily("torchvision_features", rounded_up=1),
}
"""The encoders by name."""

TIMM = EncoderFamily("timm_features", strides=(8, 16, 32))
"""Networks of timm, whose names begin with `timm:`."""

_TIMM_NAME = re.compile(r"timm:[a-z0-9][\w.]{0,99}")


def encoder_family(name: str) -> EncoderFamily:
    """Return the family of an encoder.

    Raises:
        ValueError: if there is none of this name. Names that begin with `timm:` are only checked for their form:
            timm is imported when a network is built.
    """
    if _TIMM_NAME.fullmatch(name):
        return TIMM
    if name not in ENCODERS:
        close = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(ENCODERS)}, and timm:NAME"
        raise ValueError(f"name: unknown encoder {name[:120]!r}; {hint}")
    return ENCODERS[name]


@dataclass(frozen=True)
class EncoderSettings:
    """The network that encodes the image, and its grid. Model files store these.

    Raises:
        ValueError: for a value that no encoder has.
    """

    name: str = "efficientnet_v2_b0"
    """`efficientnet_v2_b0`; `small_cnn`, for small generated images; the name of a torchvision network, such as
    `resnet50`; or `timm:` and the name of a timm network, such as `timm:convnext_tiny.fb_in22k_ft_in1k`."""
    stride: Literal[8, 16, 32] = 32
    """Height and width in pixels of a cell of the grid: 8 for `small_cnn`; 16 or 32 for the others; for networks of
    timm, those that the network has (a vision transformer has one, the size of its patches)."""
    grid: tuple[Annotated[int, Range(1, 1000)], Annotated[int, Range(1, 1000)]] | None = None
    """Average the cells into this many rows and columns. None: use the network's own grid."""

    def __post_init__(self) -> None:
        config.check(self)
        strides = encoder_family(self.name).strides
        if self.stride not in strides:
            expected = " or ".join(map(str, strides))
            raise ValueError(f"stride: expected {expected} for {self.name}, got {self.stride!r}")


@dataclass(frozen=True)
class AttentionSettings:
    """The attention mechanism."""

    kind: str = "additive"
    """`none`, `mean`, `additive`, `concat`, `general`, `dot`, `location`, `scaled_dot`, `multi_head`, `local_m`,
    `local_p`, `adaptive`, `hard`, or the name of a registered mechanism (`captioner.network.attention.register`).
    The name is looked up when a network is built: ONNX Runtime needs the graphs only."""
    size: Width = 512
    """A, the width of the layer that combines image and state."""
    score: Literal["additive", "concat", "general", "dot", "location", "scaled_dot"] = "additive"
    """Score function of `local_m`, `local_p`, `adaptive` and `hard`."""
    coverage: bool = False
    """Let scores depend on the coverage: the sum of a location's weights over the previous words."""
    heads: Width = 4
    """Number of heads of `multi_head`."""
    radius: Annotated[float, Range(0, 1e6, exclude="low")] = 2.0
    """Radius of the window of `local_m` and `local_p`, in cells."""
    pass_words: Annotated[int, Range(1, 1_000_000)] = 12
    """Number of words in which the window of `local_m` passes over the grid once."""
    choice: Literal["argmax", "sample"] = "argmax"
    """How `hard` chooses a location in inference."""
    normalize: Literal["softmax", "entmax15"] = "softmax"
    """How scores become weights. `entmax15` gives locations with low scores a weight of exactly zero (Peters et al.
    2019, arXiv 1905.05702)."""

    def __post_init__(self) -> None:
        config.check(self)
        if not self.kind.isidentifier() or len(self.kind) > 100:
            raise ValueError(f"kind: expected the name of a mechanism, such as 'additive', got {self.kind[:60]!r}")
        if self.kind == "multi_head" and self.size % self.heads:
            raise ValueError(f"heads: {self.heads} heads cannot share a size of {self.size} evenly")
        if self.coverage and self.kind in ("none", "mean"):
            raise ValueError(f"coverage: {self.kind!r} computes no scores that coverage could change")
        if self.kind == "adaptive" and self.score == "location":
            raise ValueError("score: 'location' scores grid locations, and the sentinel of 'adaptive' has none")


@dataclass(frozen=True)
class DecoderSettings:
    """The decoder, its sizes and its regularisation."""

    kind: Literal["rnn", "gru", "lstm", "top_down", "transformer"] = "lstm"
    """The decoder: a recurrent network, the two LSTMs of top-down attention, or a transformer."""
    attend: Literal["before", "after"] = "before"
    """When `rnn`, `gru` and `lstm` attend: before the cell is updated, from the previous state (Bahdanau et al.
    2015, Show, Attend and Tell), or after, from the new state (Luong et al. 2015)."""
    hidden_size: Width = 512
    """H."""
    embedding_size: Width = 512
    """E."""
    dropout: Probability = 0.5
    """Dropout of embedded words and of the input of the output layer."""
    annotation_dropout: Probability = 0.0
    """Dropout of the elements of annotation vectors."""
    tied_output: bool = False
    """Use the transposed embedding as the output layer."""
    normalize: bool = True
    """Normalise every annotation vector to mean 0 and variance 1; see `Decoder.start`."""
    layers: Annotated[int, Range(1, 100)] = 2
    """Number of layers of `transformer`."""
    forget_bias: Annotated[float, Range(-1000, 1000)] = 0.0
    """Initial bias of the forget gates of `lstm` and `top_down`. With 1 or 2 they remember from the beginning (Gers
    et al. 2000; Jozefowicz et al. 2015, section 3), which helps a decoder that reads the image only at its
    start."""

    def __post_init__(self) -> None:
        config.check(self)
        if self.attend == "after" and self.kind in ("top_down", "transformer"):
            raise ValueError(f"attend: {self.kind!r} defines when it attends; leave this at 'before'")
        if self.forget_bias and self.kind not in ("lstm", "top_down"):
            raise ValueError(f"forget_bias: {self.kind!r} has no forget gate; leave this at 0")


@dataclass(frozen=True)
class ModelSettings:
    """All settings that determine the shape of the network, except the size of the vocabulary."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """The network that encodes the image."""
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    """The attention mechanism."""
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    """The decoder."""

    def __post_init__(self) -> None:
        attention, decoder = self.attention, self.decoder
        if decoder.kind == "transformer" and (attention.kind != "multi_head" or attention.coverage):
            raise ValueError(
                "attention.kind: the 'transformer' decoder needs 'multi_head' attention without coverage (it reads "
                f"all words of a caption at once); got {attention.kind!r}"
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
                "have no effect; use decoder.kind 'lstm'"
            )
