"""The ONNX Runtime engine, the default: it runs the graphs of a model file on the CPU."""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

# Official builds of ONNX Runtime since 1.29 send usage data to Microsoft, with hashes of models, unless this is set
# before they are imported; and the thread that does so hangs a forked process when it exits.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

from captioner.cores import count_cores
from captioner.engine import AttentionMaps, StepResult
from captioner.errors import CheckpointError
from captioner.graph_check import IMAGE, NEXT, ROW, check_graph
from captioner.model_file import (
    DAMAGED,
    Graphs,
    Header,
    header_of,
    no_graphs,
    open_file,
    read_graphs,
    read_weights,
    weight_shapes,
)

AT_ONCE = 4
"""Number of images that a thread encodes together: larger batches do not fit the processor's cache."""

MAX_MEMORY = 4 << 30
"""Maximum number of bytes of intermediate results of all engines of a process. Damaged or malicious graphs can
request any amount."""

ANNOTATIONS = IMAGE + "annotations"
"""Name of the annotations (B, L, D)."""


@dataclass(frozen=True)
class OnnxState:
    """The state of `OnnxEngine`, tensors by name."""

    images: dict[str, np.ndarray]
    """State of each image (B, ...)."""
    rows: dict[str, np.ndarray]
    """State of each row (B, K, ...)."""

    def select(self, images: np.ndarray, rows: np.ndarray) -> "OnnxState":
        """Return the state of some images and rows; see `captioner.engine.State`."""
        kept = self.images
        if kept and len(images) < len(next(iter(kept.values()))):
            kept = {name: tensor[images] for name, tensor in kept.items()}
        where = images[:, None], rows
        return OnnxState(kept, {name: tensor[where] for name, tensor in self.rows.items()})

    def annotations(self) -> np.ndarray:
        """Return the mean annotation of each image (B, D); see `captioner.engine.State`.

        Raises:
            CheckpointError: if the graph of the model file did not return them.
        """
        annotations = self.images.get(ANNOTATIONS)
        if annotations is None or annotations.ndim != 3 or annotations.dtype != np.float32:
            raise CheckpointError(f"its graph returned no annotations. {DAMAGED}")
        return annotations.mean(axis=1)

    def replace_cells(self, cells: np.ndarray) -> "OnnxState":
        """Return the state with the content of some cells (B, L) removed; see `captioner.engine.State`."""

        def replace(tensor: np.ndarray) -> np.ndarray:  # (B, ..., L, size) if it has a value for each cell
            if tensor.shape[-2] != cells.shape[1]:
                return tensor
            where = cells.reshape(len(cells), *(1,) * (tensor.ndim - 3), -1, 1)
            return np.where(where, tensor.mean(axis=-2, keepdims=True), tensor)

        return OnnxState({name: replace(tensor) for name, tensor in self.images.items()}, self.rows)


PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")


class OnnxEngine:
    """A captioning network in ONNX Runtime. Threads may share it.

    Each of its threads computes different images. Threads that share the work on one image would wait for each
    other at every operator, which takes several times as long if the machine is busy.
    """

    def __init__(
        self,
        graphs: Graphs,
        weights: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
        header: Header,
        threads: int | None = None,
    ):
        """Create the sessions.

        Args:
            graphs: checked by `captioner.graph_check`.
            weights: float32 weights of the graphs `start` and `step`, by the names that these give them.
            header: of the same file.
            threads: number of threads. None: number of available cores.

        Raises:
            ValueError: if a graph is refused, or does not match the header.
        """
        self._start, self._step = map(_Session, graphs[:2], weights)
        self._threads = threads or count_cores()
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self.grid = self._find_grid(header)
        cells, heads = math.prod(self.grid), self._step.outputs.get("heads", ())[2:3]
        self._axes = {
            "log_probs": (len(header.words),),
            "attention": (cells,),
            "visual": (),
            "heads": (*heads, cells),
        }
        """Sizes of the outputs of `step`, except B and K."""

    @property
    def name(self) -> str:
        """Library and device."""
        return f"ONNX Runtime {onnxruntime.__version__} on CPU, {self._threads} thread{'s' * (self._threads > 1)}"

    def start(self, pixels: np.ndarray) -> OnnxState:
        """Encode images (B, 3, S, S); see `captioner.engine.Engine`.

        Raises:
            CheckpointError: if the graph of the model file fails.
        """
        size = min(AT_ONCE, math.ceil(len(pixels) / self._threads))
        parts = self._map(self._encode, (pixels[start : start + size] for start in range(0, len(pixels), size)))
        tensors = _join(parts)
        return OnnxState(
            {name: tensor for name, tensor in tensors.items() if name.startswith(IMAGE)},
            {name: tensor for name, tensor in tensors.items() if name.startswith(ROW)},
        )

    def _encode(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self._start({"pixels": pixels})
        for name, tensor in outputs.items():
            axes = (len(pixels), 1) if name.startswith(ROW) else (len(pixels),)
            if tensor.shape[: len(axes)] != axes:
                raise _wrong_output(name, tensor)
        return outputs

    def step(self, words: np.ndarray, state: OnnxState) -> StepResult:
        """Read the previous words (B, K) and predict the next; see `captioner.engine.Engine`.

        Raises:
            CheckpointError: if the graph of the model file fails.
        """
        inputs = {"words": words, **state.images, **state.rows}
        size = math.ceil(len(words) / self._threads)
        parts = (
            {name: tensor[start : start + size] for name, tensor in inputs.items()}
            for start in range(0, len(words), size)
        )
        outputs = _join(self._map(self._step, parts))
        for name, tensor in outputs.items():
            axes = self._axes.get(name, tensor.shape[2:])
            if tensor.shape != (*words.shape, *axes) or (name in self._axes and tensor.dtype != np.float32):
                raise _wrong_output(name, tensor)
        rows = {name.removeprefix(NEXT): tensor for name, tensor in outputs.items() if name.startswith(NEXT)}
        maps = AttentionMaps(outputs["attention"], outputs.get("visual"), outputs.get("heads"))
        return StepResult(outputs["log_probs"], OnnxState(state.images, rows), maps)

    def _find_grid(self, header: Header) -> tuple[int, int]:
        """Check that inputs and outputs of the graphs match the header; return rows and columns of the grid."""
        start, step = self._start, self._step
        rows = {NEXT + name for name in start.outputs if name.startswith(ROW)}
        if (
            start.inputs.keys() != {"pixels"}
            or step.inputs.keys() != {"words", *start.outputs}
            or step.outputs.keys() - {"visual", "heads"} != {"log_probs", "attention", *rows}
            or not rows
        ):
            raise ValueError("their inputs and outputs are not those of a captioner")
        size, words = header.images.size, len(header.words)
        if start.inputs["pixels"][1:] != (3, size, size):
            raise ValueError(f"expected pixels (B, 3, {size}, {size}), got {start.inputs['pixels'][:8]}")
        cells = step.outputs["attention"][-1:]
        side = math.isqrt(cells[0]) if cells and isinstance(cells[0], int) else 0
        grid = header.model.encoder.grid or (side, side)
        if cells != (math.prod(grid),) or step.outputs["log_probs"][2:] != (words,):
            raise ValueError(f"expected attention to a grid of {grid} and {words} words")
        return grid

    def _map(self, function: Callable[[PartT], ResultT], parts: Iterable[PartT]) -> list[ResultT]:
        """Apply a function to each part in the threads of this engine."""
        parts = list(parts)
        if len(parts) == 1 or self._threads == 1:
            return [function(part) for part in parts]
        if self._pool is None or self._process != os.getpid():  # a fork copies the pool without its threads
            self._pool, self._process = ThreadPoolExecutor(self._threads, "onnx"), os.getpid()
        return list(self._pool.map(function, parts))


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the tensors of the parts of a batch, by name."""
    if len(parts) == 1:
        return parts[0]
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        raise CheckpointError(f"its graph returned tensors of incompatible shapes ({error}). {DAMAGED}") from error


class _Session:
    """A graph with its weights."""

    def __init__(self, graph: bytes, weights: dict[str, np.ndarray]):
        _limit_memory()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the calling thread; others would not survive a fork
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised as exceptions
        options.add_session_config_entry("session.use_env_allocators", "1")  # see `_limit_memory`
        # Not the other format of ONNX Runtime, which `check_graph` does not read.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight) for weight in weights.values()]
        options.add_external_initializers(list(weights), values)
        try:
            self._session = onnxruntime.InferenceSession(
                graph,
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=False,  # it would print an error and retry with the same provider
                disabled_optimizers=["ConstantFolding"],  # done by the export, and not limited in memory
            )
        except Exception as error:  # the exceptions of ONNX Runtime have no other base class
            raise ValueError(f"ONNX Runtime refuses the graph: {_shorten(error)}") from error
        self.inputs = {node.name: tuple(node.shape) for node in self._session.get_inputs()}
        self.outputs = {node.name: tuple(node.shape) for node in self._session.get_outputs()}
        self._names = list(self.outputs)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))
        except Exception as error:
            raise CheckpointError(f"ONNX Runtime cannot run the graph: {_shorten(error)}") from error


def _wrong_output(name: str, tensor: np.ndarray) -> CheckpointError:
    return CheckpointError(f"its graph returned {name} as {tensor.dtype} {tensor.shape[:8]}. {DAMAGED}")


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@cache
def _limit_memory() -> None:
    """Make all sessions share an allocator of at most `MAX_MEMORY` bytes."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg({"max_mem": MAX_MEMORY}))


def load_onnx_engine(path: Path, threads: int | None = None) -> tuple[OnnxEngine, Header]:
    """Return the engine of a model file, and its header.

    Raises:
        CheckpointError: if the file cannot be used, or has no graphs.
    """
    try:
        with open_file(path) as file:
            header = header_of(path, file)
            if header.graphs is None:
                raise no_graphs(path)
            graphs = read_graphs(path, file, header.graphs)
            shapes = weight_shapes(file, graphs.folds)
            start, step = (check_graph(graph, shapes) for graph in graphs[:2])
            weights = read_weights(file, {*start, *step}, graphs.folds)
        by_graph = {name: weights[name] for name in start}, {name: weights[name] for name in step}
        # The file is closed before the sessions are created, because it takes memory while it is open.
        return OnnxEngine(graphs, by_graph, header, threads), header
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its graphs cannot be used: {error}. {DAMAGED}") from error
