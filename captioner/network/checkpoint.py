"""Save networks to model files, and load them."""

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
    differences,
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
    """Write a model file atomically.

    Args:
        path: the file, replaced if it exists.
        network: the network, including its encoder.
        header: the header; `graphs` is replaced, and `calibration` removed, which belongs to other weights.
        dtype: type of the stored weights, such as `torch.float16` for half the size.
        graphs: graphs from `captioner.network.export`. None: only the PyTorch engine can use the file.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in network.state_dict().items()
    }
    _write_with_graphs(path, tensors, replace(header, calibration=None), graphs)


def add_graphs(path: Path, graphs: Graphs) -> None:
    """Add graphs to a model file. The weights do not change.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    header, tensors = _read_without(path, GRAPH)
    _write_with_graphs(path, tensors, header, graphs)


def add_calibration(path: Path, calibration: Calibration, tables: Tables, measured: dict[str, Any]) -> None:
    """Add a calibration to a model file, and its measured quality to the model card. Weights and graphs do not
    change. The tables are stored as float16, except the mean and the rates.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    header, tensors = _read_without(path, CONFIDENCE)
    for name, table in tables._asdict().items():
        dtype = torch.float16 if name in ("axes", "detectors") else torch.float32
        tensors[CONFIDENCE + name] = torch.from_numpy(table).to(dtype)
    card = {**header.card, "calibration": measured}
    _write(path, tensors, replace(header, calibration=calibration, card=card))


def _read_without(path: Path, prefix: str) -> tuple[Header, dict[str, torch.Tensor]]:
    """Return the header and the tensors of a model file, except those whose names start with `prefix`."""
    with open_file(path, "pt") as file:
        names = [name for name in file.keys() if not name.startswith(prefix)]  # noqa: SIM118 (not a dictionary)
        return header_of(path, file), {name: file.get_tensor(name) for name in names}


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
        CheckpointError: as `read_header`, or if the weights do not match the header.
    """
    with open_file(path, "pt") as file:
        header = header_of(path, file)
        try:
            with torch.device("meta"):  # shapes only: they are checked before memory is allocated
                network = build_network(header.model, len(header.words), header.images.size)
        except (ConfigError, RuntimeError) as error:  # or impossible sizes of tensors
            raise CheckpointError(f"{path}: the network of its header cannot be built: {error}") from error
        expected = {name: _describe(tensor) for name, tensor in network.state_dict().items()}
        stored = {name: _describe_slice(file.get_slice(name)) for name in weight_names(file)}
        if problems := differences(expected, stored):
            raise CheckpointError(f"{path}: its weights do not match its header: {problems[0]}. {DAMAGED}")
        tensors = {name: file.get_tensor(name) for name in expected}
    # Copied to memory of torch: tensors in the memory of the file are not aligned, and may round differently.
    weights = {
        name: tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }
    network.load_state_dict(weights, strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False), header  # `to` moves buffers that are not in the file


def _describe(tensor: torch.Tensor) -> str:
    return f"{'float' if tensor.is_floating_point() else 'integer'} {tuple(tensor.shape)}"


def _describe_slice(part: Any) -> str:
    """Describe a tensor of a file as `_describe` does, without reading it."""
    is_float = part.get_dtype() in ("F16", "BF16", "F32", "F64")
    return f"{'float' if is_float else 'integer'} {tuple(part.get_shape())}"
