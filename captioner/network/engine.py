"""The PyTorch engine: the reference, for training and GPUs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.cores import count_cores
from captioner.engine import AttentionMaps, StepResult
from captioner.errors import CaptionerError, first_line
from captioner.model_file import Header
from captioner.network.checkpoint import load_checkpoint
from captioner.network.decoder import State
from captioner.network.fold import fold_batch_norms
from captioner.network.model import CaptioningNetwork

if hasattr(os, "register_at_fork"):
    # A forked process does not inherit the threads of OpenMP, and would wait for them forever.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass(frozen=True)
class TorchState:
    """The state of `TorchEngine`, on its device."""

    state: State
    """The state of the decoder."""

    def select(self, images: np.ndarray, rows: np.ndarray) -> "TorchState":
        """Return the state of some images and rows; see `captioner.engine.State`."""
        device = self.state.images.annotations.device
        with torch.inference_mode():
            indices = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (images, rows))
            return TorchState(self.state.select(*indices))

    def annotations(self) -> np.ndarray:
        """Return the mean annotation of each image (B, D); see `captioner.engine.State`."""
        with torch.inference_mode():
            return self.state.images.annotations.mean(dim=1).float().cpu().numpy()

    def replace_cells(self, cells: np.ndarray) -> "TorchState":
        """Return the state with the content of some cells (B, L) removed; see `captioner.engine.State`."""
        with torch.inference_mode():
            mask = torch.from_numpy(np.ascontiguousarray(cells)).to(self.state.images.annotations.device)
            return TorchState(self.state.replace_cells(mask))


class TorchEngine:
    """A captioning network in PyTorch. Threads may share it."""

    def __init__(self, network: CaptioningNetwork):
        """Take a network in eval mode."""
        self.network = network
        self.grid = network.grid
        self.device = next(network.parameters()).device

    @property
    def name(self) -> str:
        """Library and device."""
        device = f"{self.device}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else self.device
        return f"PyTorch {torch.__version__} on {device}"

    def start(self, pixels: np.ndarray) -> TorchState:
        """Encode images (B, 3, S, S); see `captioner.engine.Engine`."""
        with torch.inference_mode():
            annotations, _ = self.network.encoder(torch.from_numpy(pixels).to(self.device))
        return self.start_from(annotations)

    def start_from(self, annotations: Tensor) -> TorchState:
        """Return the state before the first word from annotations (B, L, D)."""
        with torch.inference_mode():
            return TorchState(self.network.decoder.start(annotations))

    def step(self, words: np.ndarray, state: TorchState) -> StepResult:
        """Read the previous words (B, K) and predict the next; see `captioner.engine.Engine`."""
        with torch.inference_mode():
            log_probs, new_state, attended = self.network.decoder.step(
                torch.from_numpy(words).to(self.device), state.state
            )

        def to_numpy(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.float().cpu().numpy()

        maps = AttentionMaps(to_numpy(attended.weights), to_numpy(attended.visual), to_numpy(attended.heads))
        return StepResult(to_numpy(log_probs), TorchState(new_state), maps)


def choose_device(name: str) -> torch.device:
    """Return a device by its name. `auto` is an accelerator if there is one, otherwise the CPU.

    Raises:
        CaptionerError: if the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CaptionerError(
            f"device {name!r} cannot be used ({first_line(error)}). Try 'cpu' or 'auto'."
        ) from error
    if device.type == "meta":
        raise CaptionerError("device 'meta' cannot compute. Try 'cpu' or 'auto'.")
    return device


def limit_threads() -> None:
    """Limit the threads of PyTorch to the available cores, unless `OMP_NUM_THREADS` is set.

    By default PyTorch uses all cores of the machine, also in a container with a CPU quota.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), count_cores()))


def load_torch_engine(path: Path, device: str = "auto") -> tuple[TorchEngine, Header]:
    """Return the engine of a model file, and its header.

    Raises:
        CheckpointError: if the file cannot be used.
        CaptionerError: if there is no such device.
    """
    limit_threads()
    network, header = load_checkpoint(path, choose_device(device))
    fold_batch_norms(network.encoder)
    return TorchEngine(network), header
