"""Checkpoints: one self-describing file that holds all a captioner needs.

A `.safetensors` file with every weight, the encoder's included, and one metadata key, `captioner`, that holds
JSON: what the network is, how pictures and words become its numbers, and where it all comes from. Reading one
executes nothing in it, and checks its size and header before any weight is read.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from captioner import config
from captioner.errors import CheckpointError, ConfigError
from captioner.files import write_atomically
from captioner.images import ImageSettings
from captioner.model import CaptioningNetwork, ModelSettings, build_network
from captioner.vocabulary import Vocabulary

FORMAT = 1
"""The format this version writes. A newer one is refused; an older one goes through `UPGRADES`."""

UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From a format's number to the function that turns its header into that of the next."""

KEY = "captioner"
"""The metadata key that holds the header."""

SHIPPED = {file.stem: file for file in sorted((Path(__file__).parent / "weights").glob("*.safetensors"))}
"""The checkpoints that come with the package, by name."""

MAX_BYTES = 4 << 30
"""Longest file that is read: far above any checkpoint of ours."""

DAMAGED = "Was it copied or downloaded to the end?"


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    format: int
    model: ModelSettings
    images: ImageSettings
    words: tuple[str, ...]  # the vocabulary: words or pieces
    tokenizer: str  # how captions become those; `Vocabulary.rule`
    merges: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)  # of pieces; see `Vocabulary`
    repeated: tuple[str, ...] | None = field(default=None, kw_only=True)  # words that may come twice; none: all
    card: dict[str, Any] = field(default_factory=dict)  # for people: training, data, scores, sources, licences

    def __post_init__(self) -> None:
        try:
            rule = Vocabulary(self.words, self.merges, self.repeated).rule
        except ValueError as error:
            raise ValueError(f"words: {error}") from error
        if self.tokenizer != rule:
            raise ValueError(f"tokenizer: expected {rule!r} with {len(self.merges)} merges, got {self.tokenizer!r}")


def save_checkpoint(
    path: Path, network: CaptioningNetwork, header: Header, dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint; the file is there whole or not at all.

    Args:
        path: replaced if it exists.
        network: whose weights are stored, encoder included.
        header: what the file says of itself.
        dtype: what weights are stored as, such as `torch.float16` for half the size.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in network.state_dict().items()
    }
    text = json.dumps(config.to_dict(header), ensure_ascii=False)
    with write_atomically(path, overwrite=True) as file:
        file.write(save(tensors, metadata={KEY: text}))


def find_checkpoint(name: str | os.PathLike[str]) -> Path:
    """Return the file of a checkpoint: of `SHIPPED` by its name, or any other by its path."""
    return SHIPPED.get(os.fspath(name)) or Path(name)


def read_header(path: Path) -> Header:
    """Return what a checkpoint says of itself, without reading its weights.

    Raises:
        CheckpointError: when there is no such file, or it is damaged, not one of ours, or of a newer version.
    """
    with _open(path) as file:
        return _header(path, file)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[CaptioningNetwork, Header]:
    """Return the network, with float32 weights and in eval mode, and the header.

    Raises:
        CheckpointError: as `read_header`, or when the weights are not those that the header describes.
    """
    with _open(path) as file:
        header = _header(path, file)
        try:
            with torch.device("meta"):  # shapes alone: no memory is spent before they have been compared
                network = build_network(header.model, len(header.words), header.images.size)
        except ConfigError as error:
            raise CheckpointError(f"{path}: its header describes an impossible network: {error}") from error
        except RuntimeError as error:  # sizes beyond what any tensor can have
            raise CheckpointError(f"{path}: its header describes an impossible network ({error})") from error
        expected = {name: _describe(tensor) for name, tensor in network.state_dict().items()}
        found = {name: _describe_slice(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        if problem := _difference(expected, found):
            raise CheckpointError(f"{path}: the weights are not those its header describes: {problem}. {DAMAGED}")
        tensors = {name: file.get_tensor(name) for name in expected}
    # Copied to where torch's allocator puts them: in the file's own memory a weight may begin at any byte, and
    # products with it may round otherwise.
    weights = {
        name: tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False), header


def _describe(tensor: torch.Tensor) -> str:
    return f"{'real' if tensor.is_floating_point() else 'whole'} numbers {tuple(tensor.shape)}"


def _describe_slice(part: Any) -> str:
    """Describe a tensor of a file as `_describe` does, without reading it."""
    real = part.get_dtype() in ("F16", "BF16", "F32", "F64")
    return f"{'real' if real else 'whole'} numbers {tuple(part.get_shape())}"


def _difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """Return how the weights found differ from those expected, in a few words; nothing if they do not."""
    if missing := expected.keys() - found.keys():
        return f"{min(missing)} is missing"
    if unknown := found.keys() - expected.keys():
        return f"{min(unknown)} is unknown"
    wrong = [name for name in expected if expected[name] != found[name]]
    return f"{wrong[0]} must be {expected[wrong[0]]}, got {found[wrong[0]]}" if wrong else ""


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a `.safetensors` file, and give every way in which reading it fails one kind of error."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint file. With the package come: {', '.join(SHIPPED) or 'none'}"
        )
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES >> 30} GiB, so not a checkpoint of ours")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a .safetensors file, or damaged ({error}). {DAMAGED} "
            "Pickled checkpoints (.pt, .pth, .tar) are never read: they can run code."
        ) from error


def _header(path: Path, file: Any) -> Header:
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise CheckpointError(f"{path}: holds weights, but not a captioner (no {KEY!r} in its metadata)")
    try:
        values = json.loads(text)
        number = values["format"]
        if not isinstance(number, int):
            raise TypeError("format is not a number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({error}). {DAMAGED}") from error
    if number > FORMAT:
        raise CheckpointError(
            f"{path}: written in format {number}, and this version reads up to {FORMAT}. "
            "Upgrade with: pip install --upgrade captioner"
        )
    try:
        while number < FORMAT:
            values, number = UPGRADES[number](values), number + 1
        return config.from_dict(Header, values, source=str(path))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{path}: its header is not valid: {error}") from error
