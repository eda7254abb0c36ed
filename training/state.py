"""The state of a run, to resume it: one file, replaced atomically, which cannot execute code."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.errors import ConfigError, first_line
from captioner.files import cannot_write, write_atomically

FORMAT = 3
"""Version of `state.pt`."""


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers, and lists and dictionaries of them; an existing file is replaced.

    Raises:
        OutputError: if it cannot be written; an existing file is then unchanged.
    """
    with write_atomically(file, overwrite=True) as partial:
        try:
            torch.save({"format": FORMAT, **state}, partial)
        except RuntimeError as error:  # raised by torch if writing fails
            raise cannot_write(file, OSError("the disk may be full")) from error


def read_state(file: Path, device: torch.device) -> dict[str, Any]:
    """Return a saved state, with tensors on the device.

    Raises:
        ConfigError: if the file is missing, damaged, or of another version.
    """
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except OSError as error:
        raise ConfigError(f"{file}: no state to resume from ({error.strerror}). Restart the run") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can raise any exception
        raise damaged(file, error) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"{file}: written by another version. Finish the run with that version, or restart it")
    return state


def damaged(file: Path, error: Exception) -> ConfigError:
    """Return the error of an unusable state."""
    reason = first_line(error)
    return ConfigError(f"{file}: damaged, or not of this run ({reason:.200}). Restart the run")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of the random number generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore the random number generators of this process."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
