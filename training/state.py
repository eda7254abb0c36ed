"""The state that a run is resumed from: one file, replaced whole, and nothing in it can run code."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.errors import ConfigError
from captioner.files import cannot_write, write_atomically

FORMAT = 2
"""Of `state.pt`; that of another version is refused."""


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Save tensors, numbers, and lists and dictionaries of them; a file that is there is replaced.

    Raises:
        OutputError: when it cannot be written; the former file is then as it was.
    """
    with write_atomically(file, overwrite=True) as partial:
        try:
            torch.save({"format": FORMAT, **state}, partial)
        except RuntimeError as error:  # torch's own, of a write that failed
            raise cannot_write(file, OSError("the disk may be full")) from error


def read_state(file: Path, device: torch.device) -> dict[str, Any]:
    """Return what was saved, tensors on the device.

    Raises:
        ConfigError: when there is no such state, it is damaged, or another version of this program wrote it.
    """
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except OSError as error:
        raise ConfigError(f"{file}: no state to resume from ({error.strerror}). Start the run again") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise damaged(file, error) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"{file}: written by another version, which has to finish this run; or start it again")
    return state


def damaged(file: Path, error: Exception) -> ConfigError:
    """Return the error for a state that cannot be used."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ConfigError(f"{file}: damaged, or not of this run ({reason:.200}). Start the run again")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return where this process's random numbers are."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Let the random numbers of this process go on from there."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
