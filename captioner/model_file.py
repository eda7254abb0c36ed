"""Model files: one self-describing `.safetensors` file for everything that a captioner needs.

It contains all weights, including the encoder; the ONNX graphs of the network without weights, as bytes; the tables
of the confidence, if the model is calibrated; and the metadata key `captioner` with a JSON header: settings of the
network and of images, vocabulary, search settings that the model was selected with, and provenance. Reading a file
executes no code from it, and checks size and header before weights are read.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from captioner import config, hub
from captioner.confidence import LARGEST, MAX_AXES, Calibration, Tables
from captioner.errors import CheckpointError, ConfigError
from captioner.files import is_file, is_folder
from captioner.images import ImageSettings
from captioner.installation import install_hint
from captioner.search.settings import SearchSettings
from captioner.settings import WIDEST, ModelSettings
from captioner.vocabulary import Vocabulary

FORMAT = 2
"""The format that this version writes. Newer formats are refused; older ones are upgraded by `UPGRADES`."""


def _from_format_1(header: dict[str, Any]) -> dict[str, Any]:
    """Move the search settings, which were among those of training. There were no graphs."""
    return {**header, "search": header.get("card", {}).get("training", {}).get("search")}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_format_1}
"""Functions that convert a header of a format to the next format."""

KEY = "captioner"
"""The metadata key that holds the header."""

SHIPPED = {file.stem: file for file in sorted((Path(__file__).parent / "weights").glob("*.safetensors"))}
"""The model files of the package by name."""

MAX_BYTES = 4 << 30
"""Maximum size of a model file: far above any real one."""

MAX_HEADER_BYTES = 8 << 20
"""Maximum length of the header of a `.safetensors` file. A vocabulary of 100,000 words needs 2 MB."""

MAX_GRAPH_BYTES = 2 << 20
"""Maximum length of an ONNX graph. The deepest networks need less than 1 MB."""

GRAPH = "graph."
"""Prefix of the names of tensors that contain graphs."""

CONFIDENCE = "confidence."
"""Prefix of the names of tensors that contain `captioner.confidence.Tables`."""

DAMAGED = "Check that it was copied or downloaded completely."
"""Advice of errors of damaged files."""


@dataclass(frozen=True)
class Fold:
    """A batch norm to fold into the preceding convolution, by the names of these layers."""

    convolution: str
    """Name of the convolution."""
    norm: str
    """Name of the batch norm."""
    epsilon: float
    """What is added to its variances."""


class Graphs(NamedTuple):
    """The ONNX graphs of a network; see `captioner.network.export`."""

    start: bytes
    step: bytes
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class GraphInfo:
    """Description of the graphs in a header."""

    start: str
    """Hexadecimal SHA-256 of the graph of `Engine.start`."""
    step: str
    """Hexadecimal SHA-256 of the graph of `Engine.step`."""
    folds: tuple[Fold, ...]
    """Batch norms to fold when an engine loads."""

    @classmethod
    def of(cls, graphs: Graphs) -> "GraphInfo":
        """Describe graphs."""
        return cls(_digest(graphs.start), _digest(graphs.step), graphs.folds)


_NO_WORD = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that break lines, control terminals, or cannot be encoded as UTF-8."""


@dataclass(frozen=True)
class Header:
    """The header of a model file."""

    format: int
    """Version of the format; see `FORMAT`."""
    model: ModelSettings
    """Settings of the network."""
    images: ImageSettings
    """How pictures become the network's input."""
    words: tuple[str, ...]
    """The vocabulary: words or word pieces."""
    tokenizer: str
    """Name of the tokenizer; see `Vocabulary.rule`."""
    merges: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    """Merges of pieces; see `Vocabulary`."""
    repeated: tuple[str, ...] | None = field(default=None, kw_only=True)
    """Words that may be repeated in a caption. None: all."""
    search: SearchSettings | None = field(default=None, kw_only=True)
    """Search settings that the model was selected with. None: unknown."""
    graphs: GraphInfo | None = field(default=None, kw_only=True)
    """The ONNX graphs in the file. None: without graphs, the PyTorch engine is needed."""
    calibration: Calibration | None = field(default=None, kw_only=True)
    """Parameters of the confidence. None: the model is not calibrated."""
    card: dict[str, Any] = field(default_factory=dict)
    """Model card: training, data, scores, sources, licences."""

    def __post_init__(self) -> None:
        try:
            rule = Vocabulary(self.words, self.merges, self.repeated).rule
        except ValueError as error:
            raise ValueError(f"words: {error}") from error
        calibrated = self.calibration.words if self.calibration else ()
        if match := _NO_WORD.search("".join((*self.words, *calibrated))):
            raise ValueError(f"words: spaces, control characters and surrogates are not allowed, got {match[0]!r}")
        if self.tokenizer != rule:
            raise ValueError(f"tokenizer: expected {rule!r} with {len(self.merges)} merges, got {self.tokenizer!r}")


def find_checkpoint(name: str | os.PathLike[str]) -> Path:
    """Return the path of a model file from the name of a shipped model, the folder of a training run, a path, or an
    address of the Hugging Face Hub (`hf://user/repo`), from where it is downloaded once."""
    if os.fspath(name).startswith(hub.SCHEME):
        return hub.download_model(os.fspath(name), MAX_BYTES)
    path = Path(name)
    return SHIPPED.get(os.fspath(name)) or (path / "best.safetensors" if is_folder(path) else path)


def read_header(path: Path) -> Header:
    """Return the header of a model file.

    Raises:
        CheckpointError: if the file is missing, damaged, not a model file, or of a newer format.
    """
    with open_file(path) as file:
        return header_of(path, file)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights by name, without reading them.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    with open_file(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in weight_names(file)}


def weight_names(file: Any) -> list[str]:
    """Return the names of the tensors of an open model file, except graphs and tables of the confidence."""
    return [name for name in file.keys() if not name.startswith((GRAPH, CONFIDENCE))]  # noqa: SIM118 (no dictionary)


def differences(expected: Mapping[str, object], stored: Mapping[str, object]) -> list[str]:
    """Return the differences of stored weights from those expected, given descriptions, such as shapes, by name."""
    return [
        *(f"{name} is missing" for name in expected if name not in stored),
        *(f"{name} is unknown" for name in stored if name not in expected),
        *(
            f"{name} must be {description}, got {stored[name]}"
            for name, description in expected.items()
            if stored.get(name, description) != description
        ),
    ]


@contextmanager
def open_file(path: Path, framework: str = "np") -> Iterator[Any]:
    """Open a `.safetensors` file; all errors of reading it become `CheckpointError`."""
    if not is_file(path):
        raise CheckpointError(f"{path}: no such checkpoint file. Shipped models: {', '.join(SHIPPED) or 'none'}")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES >> 30} GiB, so not a model file")
    try:
        with path.open("rb") as prefix:
            length = int.from_bytes(prefix.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise SafetensorError(f"a header of {length:,} bytes")
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a .safetensors file, or damaged ({error}). {DAMAGED} "
            "Pickled checkpoints (.pt, .pth, .tar) are never read: they can run code."
        ) from error


def header_of(path: Path, file: Any) -> Header:
    """Return the header of an open model file."""
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise CheckpointError(f"{path}: not a captioner model (no {KEY!r} in its metadata)")
    try:
        values = json.loads(text)
        number = values["format"]
        if type(number) is not int or number < 1:
            raise TypeError("format is not a number")
        if number > FORMAT:
            raise CheckpointError(
                f"{path}: has format {number}, but this version reads formats up to {FORMAT}. "
                f"Upgrade: {install_hint(upgrade=True)}"
            )
        while number < FORMAT:
            values, number = UPGRADES[number](values), number + 1
        return config.from_dict(Header, values, source="header")
    except ConfigError as error:
        first, *others = str(error).splitlines()
        more = f" (and {len(others)} more problems)" if others else ""
        raise CheckpointError(f"{path}: invalid {first[:300]}{more}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({error}). {DAMAGED}") from error


def no_graphs(path: Path) -> CheckpointError:
    """Return the error of a model file without ONNX graphs."""
    return CheckpointError(f"{path}: holds no ONNX graphs. Add them with: python -m training export {path}")


def read_graphs(path: Path, file: Any, info: GraphInfo) -> Graphs:
    """Return the ONNX graphs of an open model file; only checksums are verified.

    Raises:
        CheckpointError: if they are missing, damaged or too long.
    """
    graphs = {}
    for name, digest in {"start": info.start, "step": info.step}.items():
        try:
            part = file.get_slice(GRAPH + name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: the graph {name!r} is missing. {DAMAGED}") from error
        if part.get_dtype() != "U8" or len(part.get_shape()) != 1 or part.get_shape()[0] > MAX_GRAPH_BYTES:
            raise CheckpointError(f"{path}: the graph {name!r} is not a list of at most {MAX_GRAPH_BYTES:,} bytes")
        graphs[name] = file.get_tensor(GRAPH + name).tobytes()
        if _digest(graphs[name]) != digest:
            raise CheckpointError(f"{path}: checksum mismatch of the graph {name!r}. {DAMAGED}")
    return Graphs(**graphs, folds=info.folds)


def read_tables(path: Path, header: Header) -> Tables | None:
    """Return the tables of the calibration in the header of a model file; None if it has none.

    Raises:
        CheckpointError: if the file cannot be read, or tables are missing, not finite or of the wrong shape.
    """
    if header.calibration is None:
        return None
    with open_file(path) as file:
        stored = weight_shapes(file, ())
        for name in Tables._fields:
            if CONFIDENCE + name not in stored:
                reason = "missing, or not of a float type"
                raise CheckpointError(f"{path}: the table {name!r} of confidence is {reason}. {DAMAGED}")
        shapes = {name: stored[CONFIDENCE + name] for name in Tables._fields}
        words, axes = len(header.calibration.words), shapes["axes"][1:]
        expected = {
            "mean": shapes["mean"][:1],
            "axes": (*shapes["mean"], *axes[:1]),
            "detectors": (*axes, words),
            "rates": (2, words),
        }
        if not axes or axes[0] > MAX_AXES or shapes["mean"] > (WIDEST,) or shapes != expected:
            raise CheckpointError(
                f"{path}: the tables of confidence do not match each other and {words:,} words: "
                f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}. {DAMAGED}"
            )
        tables = Tables(*(file.get_tensor(CONFIDENCE + name).astype(np.float32) for name in Tables._fields))
    for name, table in tables._asdict().items():
        if not (np.abs(table) <= (1 if name == "rates" else LARGEST)).all():
            raise CheckpointError(f"{path}: the table {name!r} of confidence has values out of range. {DAMAGED}")
    return tables


def _digest(graph: bytes) -> str:
    return hashlib.sha256(graph).hexdigest()


FLOATS = {"F16", "F32", "F64"}
"""Types of weights, as named by `.safetensors`, that NumPy can read."""


def weight_shapes(file: Any, folds: Sequence[Fold]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float tensors of an open model file, and of the biases that folding adds.

    Raises:
        ValueError: if a fold refers to a missing tensor or one of another shape.
    """
    shapes = {}
    for name in file.keys():  # noqa: SIM118 (not a dictionary)
        part = file.get_slice(name)
        if part.get_dtype() in FLOATS:
            shapes[name] = tuple(part.get_shape())
    for fold in folds:
        kernel = shapes.get(f"{fold.convolution}.weight", ())
        if len(kernel) != 4:
            raise ValueError(f"{fold.convolution} cannot be folded: expected a 4-dimensional weight, got {kernel}")
        channels = kernel[:1]
        shapes.setdefault(f"{fold.convolution}.bias", channels)
        for name in (f"{fold.convolution}.bias", *(f"{fold.norm}.{name}" for name in NORM)):
            if shapes.get(name) != channels:
                raise ValueError(
                    f"{fold.norm} cannot be folded: expected {name} of {channels}, got {shapes.get(name)}"
                )
    return shapes


NORM = ("weight", "bias", "running_mean", "running_var")
"""Names of the float tensors of a batch norm."""


def read_weights(file: Any, names: Iterable[str], folds: Sequence[Fold]) -> dict[str, np.ndarray]:
    """Return tensors of an open model file as float32, with batch norms folded into the preceding convolutions.

    The names are among those of `weight_shapes(file, folds)`.
    """
    by_convolution = {fold.convolution: fold for fold in folds}
    stored = set(file.keys())

    def read(name: str) -> np.ndarray:
        return file.get_tensor(name).astype(np.float32)

    def fold_into(name: str) -> np.ndarray:
        layer, _, kind = name.rpartition(".")
        fold = by_convolution.get(layer)
        if fold is None or kind not in ("weight", "bias"):
            return read(name)
        gamma, beta, mean, variance = (read(f"{fold.norm}.{part}") for part in NORM)
        scale = gamma / np.sqrt(variance + np.float32(fold.epsilon))
        if kind == "weight":
            return read(name) * scale[:, None, None, None]
        bias = read(name) if name in stored else np.float32(0)
        return beta + (bias - mean) * scale

    with np.errstate(all="ignore"):  # NaN of damaged weights is reported by the search
        return {name: fold_into(name) for name in names}
