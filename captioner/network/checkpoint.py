"""Weights of a network into a model file, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from captioner import config
from captioner.confidence import Calibration, Tables
from captioner.errors import CheckpointError, ConfigError
from captioner.files import write_atomically
from captioner.model_file import (
    CONFIDENCE,
    DAMAGED,
    FORMAT,
    GRAPH,
    KEY,
    GraphInfo,
    Graphs,
    Header,
    header_of,
    open_file,
    weight_names,
)
from captioner.network.model import CaptioningNetwork, build_network


def save_checkpoint(
    path: Path,
    network: CaptioningNetwork,
    header: Header,
    dtype: torch.dtype = torch.float32,
    graphs: Graphs | None = None,
) -> None:
    """Write a model file; it is there whole or not at all.

    Args:
        path: replaced if it exists.
        network: whose weights are stored, encoder included.
        header: what the file says of itself; what it says of graphs is replaced, and a calibration is left out: it
            is of other weights.
        dtype: what weights are stored as, such as `torch.float16` for half the size.
        graphs: from `captioner.network.export`. None: only the PyTorch engine can use the file.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in network.state_dict().items()
    }
    _write_with_graphs(path, tensors, replace(header, calibration=None), graphs)


def add_graphs(path: Path, graphs: Graphs) -> None:
    """Replace a model file by one that also holds these graphs. Weights stay as they are, to the bit.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    with open_file(path, "pt") as file:
        header = header_of(path, file)
        names = [name for name in file.keys() if not name.startswith(GRAPH)]  # noqa: SIM118 (not a dictionary)
        tensors = {name: file.get_tensor(name) for name in names}
    _write_with_graphs(path, tensors, header, graphs)


def add_calibration(path: Path, calibration: Calibration, tables: Tables, measured: dict[str, Any]) -> None:
    """Replace a model file by one with this calibration. Weights and graphs stay as they are, to the bit.

    Args:
        path: the model file.
        calibration: what its header says of confidence.
        tables: what it follows from; stored as float16, but for the mean and the rates.
        measured: how good it is, for the card of the model.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    with open_file(path, "pt") as file:
        header = header_of(path, file)
        names = [name for name in file.keys() if not name.startswith(CONFIDENCE)]  # noqa: SIM118 (not a dictionary)
        tensors = {name: file.get_tensor(name) for name in names}
    for name, table in tables._asdict().items():
        dtype = torch.float16 if name in ("axes", "detectors") else torch.float32
        tensors[CONFIDENCE + name] = torch.from_numpy(table).to(dtype)
    card = {**header.card, "calibration": measured}
    _write(path, tensors, replace(header, calibration=calibration, card=card))


def _write_with_graphs(path: Path, tensors: dict[str, torch.Tensor], header: Header, graphs: Graphs | None) -> None:
    if graphs is not None:
        for name in ("start", "step"):
            graph = torch.frombuffer(bytearray(getattr(graphs, name)), dtype=torch.uint8)
            tensors = {**tensors, GRAPH + name: graph}
    _write(path, tensors, replace(header, graphs=graphs and GraphInfo.of(graphs)))


def _write(path: Path, tensors: dict[str, torch.Tensor], header: Header) -> None:
    text = json.dumps(config.to_dict(replace(header, format=FORMAT)), ensure_ascii=False)
    with write_atomically(path, overwrite=True) as file:
        file.write(save(tensors, metadata={KEY: text}))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[CaptioningNetwork, Header]:
    """Return the network, with float32 weights and in eval mode, and the header.

    Raises:
        CheckpointError: as `read_header`, or when the weights are not those that the header describes.
    """
    with open_file(path, "pt") as file:
        header = header_of(path, file)
        try:
            with torch.device("meta"):  # shapes alone: no memory is spent before they have been compared
                network = build_network(header.model, len(header.words), header.images.size)
        except ConfigError as error:
            raise CheckpointError(f"{path}: the network of its header cannot be built: {error}") from error
        except RuntimeError as error:  # sizes beyond what any tensor can have
            raise CheckpointError(f"{path}: the network of its header cannot be built ({error})") from error
        expected = {name: _describe(tensor) for name, tensor in network.state_dict().items()}
        found = {name: _describe_slice(file.get_slice(name)) for name in weight_names(file)}
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
    return network.to(device).eval().requires_grad_(False), header  # `to` moves buffers that no file holds


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
