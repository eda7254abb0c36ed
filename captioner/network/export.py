"""ONNX graphs of a network, without its weights, for `captioner.onnx`.

    start: pixels (B, 3, S, S)                      -> state of one row per image
    step:  words (B, K), state of K rows an image   -> log-probabilities (B, K, V), attention, state

B, K, and axes that grow with the number of words are dynamic. A state is passed as named tensors: `image.*` for the
state of each image (B, ...), `row.*` for the state of each row (B, K, ...).

The graphs depend on the settings only: their weights are references to tensors of the model file, with batch norms
folded.
"""

import contextlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from captioner.errors import UnsupportedError
from captioner.graph_check import IMAGE, NEXT, ROW, WEIGHTS, GraphError, check_graph
from captioner.installation import require_extra
from captioner.model_file import Graphs
from captioner.network.decoder import Decoder, State
from captioner.network.fold import fold_batch_norms
from captioner.network.model import CaptioningNetwork, build_network
from captioner.settings import ModelSettings

OPSET = 20
"""Version of the ONNX operators that the graphs use."""


def export_graphs(settings: ModelSettings, vocabulary_size: int, image_size: int) -> Graphs:
    """Return the graphs of networks with these settings; settings of training are ignored, and results are cached.

    Raises:
        MissingExtraError: if `onnx` or `onnxscript`, which PyTorch's exporter needs, is not installed.
        UnsupportedError: if PyTorch cannot export this network; the message has the reason.
    """
    decoder = replace(settings.decoder, dropout=0.0, annotation_dropout=0.0, forget_bias=0.0)
    return _export_network(replace(settings, decoder=decoder), vocabulary_size, image_size)


@lru_cache(maxsize=8)
def _export_network(settings: ModelSettings, vocabulary_size: int, image_size: int) -> Graphs:
    with torch.random.fork_rng(devices=[]):  # keeps the random numbers of a training run
        torch.manual_seed(0)
        network = build_network(settings, vocabulary_size, image_size).eval().requires_grad_(False)
        folds = fold_batch_norms(network.encoder)
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_()  # otherwise zeros and ones are optimised away
    weights = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    pixels = torch.zeros(2, 3, image_size, image_size)
    words = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        state = network.decoder.start(network.encoder(pixels)[0])
        state = state.select(torch.arange(2), torch.zeros(2, 3, dtype=torch.long))
        for _ in range(2):  # the exporter treats sizes of 0 and 1 as constants
            _, state, attended = network.decoder.step(words, state)
        _, next_state, _ = network.decoder.step(words, state)
    names = [*(IMAGE + name for name in state.images._fields), *(ROW + name for name in state.rows._fields)]
    image_axes = [{0: "B"} for _ in state.images]
    row_axes = [
        {0: "B", 1: "K"} | {axis: "T" for axis in range(2, old.ndim) if old.shape[axis] != new.shape[axis]}
        for old, new in zip(state.rows, next_state.rows, strict=True)
    ]
    maps = [name for name, tensor in _maps(attended).items() if tensor is not None]
    return Graphs(
        start=_export(_Start(network), (pixels,), ({0: "B"},), ["pixels"], names, weights),
        step=_export(
            _Step(network.decoder, state),
            (words, *state.images, *state.rows),
            ({0: "B", 1: "K"}, (*image_axes, *row_axes)),
            ["words", *names],
            ["log_probs", *maps, *(NEXT + name for name in names if name.startswith(ROW))],
            weights,
        ),
        folds=folds,
    )


def _maps(attended: Any) -> dict[str, Tensor | None]:
    return {"attention": attended.weights, "visual": attended.visual, "heads": attended.heads}


class _Start(nn.Module):
    """Pixels (B, 3, S, S) to the state before the first word, flattened to its tensors."""

    def __init__(self, network: CaptioningNetwork):
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        annotations, _ = self.encoder(pixels)
        state = self.decoder.start(annotations)
        return (*state.images, *state.rows)


class _Step(nn.Module):
    """A step of the decoder, with states flattened to their tensors."""

    def __init__(self, decoder: Decoder, example: State):
        super().__init__()
        self.decoder = decoder
        self._image = type(example.images)
        self._rows = type(example.rows)

    def forward(self, words: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self._image._fields)
        state = State(rows=self._rows(*tensors[count:]), images=self._image(*tensors[:count]))
        log_probs, state, attended = self.decoder.step(words, state)
        # The exporter would rename an input that is also an output.
        rows = (row.clone() if any(row is tensor for tensor in tensors) else row for row in state.rows)
        return (log_probs, *(tensor for tensor in _maps(attended).values() if tensor is not None), *rows)


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    axes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    weights: dict[str, tuple[int, ...]],
) -> bytes:
    with require_extra("train", "exporting ONNX graphs"):
        import onnx
        from onnxscript import optimizer
    dims = {name: torch.export.Dim(name, min=0 if name == "T" else 1, max=1 << 16) for name in "BKT"}
    shapes = torch.utils._pytree.tree_map_only(str, dims.__getitem__, axes)
    try:
        with _quiet(), torch.no_grad():
            # In two calls: the second alone silently treats sizes as constants that it cannot keep dynamic.
            exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                exported,
                input_names=list(input_names),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            # Constants that depend on weights must not be folded, nor batch norms fused: the graph would contain
            # their values. Initializers that are inputs of the graph are not fused.
            graph = program.model.graph
            count = len(graph.inputs)
            graph.inputs.extend(value for name, value in graph.initializers.items() if name in weights)
            optimizer.optimize_ir(
                program.model,
                should_fold=lambda node: (
                    False if any(value is not None and value.name in weights for value in node.inputs) else None
                ),
            )
            del graph.inputs[count:]
    except Exception as error:  # the exceptions of the exporter have no other base class
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UnsupportedError(f"this network cannot be exported to ONNX: {reason}") from error
    model = program.model_proto
    for tensor in model.graph.initializer:
        if tensor.name in weights:  # its values become a reference to the model file
            for field in ("raw_data", "float_data", "external_data"):
                tensor.ClearField(field)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=WEIGHTS)
    for output, name in zip(model.graph.output, output_names, strict=True):
        # Named here, because several outputs may be the same tensor.
        model.graph.node.append(onnx.helper.make_node("Identity", [output.name], [name]))
        output.name = name
    for name in ("value_info", "metadata_props"):
        model.graph.ClearField(name)
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    data = model.SerializeToString()
    try:
        check_graph(data, weights)
    except GraphError as error:
        raise UnsupportedError(f"this network cannot be exported to ONNX: {error}") from error
    return data


@contextlib.contextmanager
def _quiet() -> Any:
    """Suppress progress messages and warnings of the exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
