"""What a run writes of its progress: `log.jsonl`, a line of JSON at a time, and the same for TensorBoard."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner.errors import MissingExtraError
from captioner.files import cannot_write
from captioner.installation import install_hint


class RunLog:
    """The log of a run's folder."""

    def __init__(self, folder: Path, *, tensorboard: bool):
        """Write to `log.jsonl` there, and with `tensorboard` to the folder of this name, too.

        Raises:
            MissingExtraError: when TensorBoard is not installed.
        """
        self._folder = folder
        self._file = folder / "log.jsonl"
        self._tensorboard = tensorboard
        self._board: Any = None
        if tensorboard:
            _summary_writer()

    def write(self, step: int, **values: Any) -> None:
        """Add a line.

        Raises:
            OutputError: when it cannot be written.
        """
        try:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise cannot_write(self._file, error) from error
        if self._tensorboard:
            if self._board is None:
                # What an interrupted run wrote after the state it was resumed from is not shown.
                self._board = _summary_writer()(str(self._folder / "tensorboard"), purge_step=step)
            for name, value in _numbers(values):
                self._board.add_scalar(name, value, step)

    def sync(self) -> int:
        """Bring all that was written to the disk, and return the length of `log.jsonl` in bytes."""
        if self._board is not None:
            self._board.flush()
        if not self._file.exists():
            return 0
        with self._file.open("r+b") as file:  # Windows syncs only files that can be written
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut(self, length: int) -> None:
        """Forget what was written after the log was this long, such as half a line."""
        if self._file.exists():
            os.truncate(self._file, min(length, self._file.stat().st_size))

    def close(self) -> None:
        """Let go of TensorBoard's file; to write opens another."""
        if self._board is not None:
            self._board.close()
            self._board = None


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "tensorboard = true needs TensorBoard, which is not installed. "
            f"Install it with: {install_hint('train')}"
        ) from error
    return SummaryWriter


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested tables by their paths, such as `scores/flickr8k/CIDEr-D`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        else:
            yield name, value
