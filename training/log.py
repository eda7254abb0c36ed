"""The log of a run: `log.jsonl`, and optionally TensorBoard."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner.files import cannot_write
from captioner.installation import require_extra


class RunLog:
    """The log in the folder of a run."""

    def __init__(self, folder: Path, *, tensorboard: bool):
        """Log to `log.jsonl`, and with `tensorboard` also to the folder `tensorboard`.

        Raises:
            MissingExtraError: if TensorBoard is not installed.
        """
        self._folder = folder
        self._file = folder / "log.jsonl"
        self._tensorboard = tensorboard
        self._board: Any = None
        if tensorboard:
            _summary_writer()

    def write(self, step: int, **values: Any) -> None:
        """Append a line.

        Raises:
            OutputError: if it cannot be written.
        """
        try:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise cannot_write(self._file, error) from error
        if self._tensorboard:
            if self._board is None:
                # Hide steps after the state from which the run resumed.
                self._board = _summary_writer()(str(self._folder / "tensorboard"), purge_step=step)
            for name, value in _numbers(values):
                self._board.add_scalar(name, value, step)

    def sync(self) -> int:
        """Flush to disk, and return the size of `log.jsonl` in bytes."""
        if self._board is not None:
            self._board.flush()
        if not self._file.exists():
            return 0
        with self._file.open("r+b") as file:  # Windows can only sync writable files
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut(self, length: int) -> None:
        """Truncate `log.jsonl` to a size in bytes."""
        if self._file.exists():
            os.truncate(self._file, min(length, self._file.stat().st_size))

    def close(self) -> None:
        """Close the file of TensorBoard; `write` opens a new one."""
        if self._board is not None:
            self._board.close()
            self._board = None


def _summary_writer() -> Any:
    with require_extra("train", "tensorboard = true"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested tables with their paths, such as `scores/flickr8k/CIDEr-D`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        else:
            yield name, value
