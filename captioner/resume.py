"""Where the lines of captions go: a stream, or a file that a later run resumes."""

import itertools
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from captioner.console import require_stdout, write_stdout
from captioner.errors import OutputError
from captioner.files import cannot_write, exists_already, open_stream
from captioner.output import Format

EXISTING = ("skip", "overwrite", "append", "refuse")
"""What to do with a file of captions that exists: `skip` resumes it, and leaves out the pictures that it has."""

LONGEST_LINE = 1 << 26
"""Bytes of a line, at most: far above a caption with the attention of many candidates."""


class Output(ABC):
    """Where the lines of captions go."""

    @abstractmethod
    def has(self, image: str) -> bool:
        """Return whether the captions of a picture are there from an earlier run."""

    @abstractmethod
    def expect(self, image: str) -> None:
        """Announce the picture whose lines will be appended next, before the work for it begins.

        Raises:
            OutputError: if nothing can be appended.
        """

    @abstractmethod
    def append(self, lines: str) -> None:
        """Write the lines of a picture together and at once, so that an interrupted run keeps what it did.

        Raises:
            OutputError: if they cannot be written.
            BrokenPipeError: if the reader of a stream is gone.
        """

    @abstractmethod
    def finish(self) -> None:
        """End a run that was not interrupted and in which no picture failed."""


class StreamOutput(Output):
    """A stream, such as standard output: nothing is there from an earlier run."""

    def __init__(self, write: Callable[[str], None], format: Format) -> None:
        """Take the function that writes text to the stream at once."""
        self._write = write
        self._before = format.heading

    def has(self, image: str) -> bool:
        """Return false."""
        return False

    def expect(self, image: str) -> None:
        """Accept every picture."""

    def append(self, lines: str) -> None:
        """Write the lines."""
        self._write(self._before + lines)
        self._before = ""

    def finish(self) -> None:
        """Write the heading if there was nothing else."""
        if self._before:
            self.append("")


class FileOutput(Output):
    """A file of captions, locked against other runs, that a run starts or resumes.

    A run that was killed, or whose disk was full, may leave the lines of its last picture incomplete. The run that
    resumes it starts with that very picture, and replaces those lines. In every other case all that the file
    contains is kept, and a last line without newline gets one. A file with other content is refused. Nothing is
    changed before the first lines are appended.
    """

    def __init__(self, path: Path, descriptor: int, format: Format, existing: str, candidates: int) -> None:
        """Lock the file and read which pictures it has. `open_output` makes the arguments.

        Raises:
            OutputError: if another run writes to the file, or it must not or cannot be resumed.
        """
        self._path = path
        self._file = descriptor
        self._format = format
        self._resumes = existing == "skip"
        self._lines = 1 if format.whole_line else candidates  # of a complete picture
        self._done = np.zeros(0, np.uint64)  # sorted digests of names: 8 bytes for each, however long it is
        self._last: str | None = None  # the picture at the end, if its lines may be incomplete
        self._last_start = 0
        self._rest = b""  # what follows the last newline
        self._rest_is_line = False
        _lock(path, descriptor)
        size = os.fstat(descriptor).st_size
        if size and existing == "refuse":
            raise exists_already(path)
        self._end = 0 if existing == "overwrite" else size  # the bytes that are kept; the rest is removed
        self._before = "" if self._end else format.heading  # what is to precede the next lines
        self._expects_first = self._end > 0
        self._is_cut = False
        if self._expects_first:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                self._read(file)

    def has(self, image: str) -> bool:
        """Return whether the file has the captions of a picture and is not to get them once more (`append`)."""
        name = self._format.spell(image)
        if not self._resumes or (self._expects_first and name == self._last):
            return False
        digest = _digest(name)
        position = int(np.searchsorted(self._done, np.uint64(digest)))
        return position < len(self._done) and int(self._done[position]) == digest

    def expect(self, image: str) -> None:
        """Decide what becomes of the end of the file, when the first picture is announced."""
        if not self._expects_first:
            return
        self._expects_first = False
        whole = self._end - len(self._rest)
        if self._rest and not self._rest_is_line:
            start = (self._format.heading if whole == 0 else "") or self._format.start(image)
            expected = start.encode()
            if not (expected.startswith(self._rest) or self._rest.startswith(expected)):
                raise self._other_content(f"its last line, {self._rest[:40]!r}, is not")
        if self._resumes and self._last == self._format.spell(image):
            self._end = self._last_start
        elif self._rest_is_line:
            self._before = "\n"
        else:
            self._end = whole
        if self._end == 0:
            self._before = self._format.heading

    def append(self, lines: str) -> None:
        """Write the lines at the end of the file; if they cannot be written completely, remove them again."""
        try:
            if not self._is_cut:
                os.ftruncate(self._file, self._end)
                self._is_cut = True
            os.lseek(self._file, self._end, os.SEEK_SET)
            written = _write_all(self._file, self._before + lines)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise cannot_write(self._path, error) from error
        self._end, self._before = self._end + written, ""

    def finish(self) -> None:
        """Leave a file, empty but for its heading, also if there was no picture."""
        if self._end == 0:
            self.append("")

    def _read(self, file: BinaryIO) -> None:
        """Read the names of the pictures that the file has, and whether it ends with complete lines.

        Raises:
            OutputError: if a line is not of the format.
        """
        digests = array("Q")
        name, start, count = "", 0, 0  # the last picture, where its lines start, and how many there are
        position = 0
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE)
            if not line:
                break
            is_ended = line.endswith(b"\n")
            try:
                image = self._format.read_name(line.decode().removesuffix("\n"))
            except ValueError as error:
                if is_ended or len(line) == LONGEST_LINE:
                    raise self._other_content(f"line {number} is not ({error})") from error
                self._rest = line
                break
            if not is_ended:
                self._rest, self._rest_is_line = line, True
            if image != name or count == self._lines:
                name, start, count = image, position, 0
            count += 1
            digests.append(_digest(image))
            position += len(line)
        if name and (count < self._lines or (self._rest_is_line and not self._format.whole_line)):
            self._last, self._last_start = name, start
        self._done = np.unique(np.frombuffer(digests, np.uint64))

    def _other_content(self, reason: str) -> OutputError:
        return OutputError(
            f"{self._path}: expected captions of --format {self._format.name}, but {reason}. Nothing was changed. "
            "Choose another file, or --existing overwrite."
        )


@contextmanager
def open_output(
    path: str | None, format: Format, existing: str = "refuse", candidates: int = 1
) -> Iterator[Output]:
    """Open what captions are written to.

    Args:
        path: a file; a stream such as `/dev/stdout` or a FIFO; None for standard output.
        format: of the lines.
        existing: one of `EXISTING`, for a file that exists. An empty file is never refused.
        candidates: number of captions of a complete picture.

    Raises:
        OutputError: if it cannot be written, or another run writes to it, or it must not or cannot be resumed.
    """
    if path is None:
        require_stdout()
        yield StreamOutput(write_stdout, format)
        return
    file = Path(path)
    try:
        descriptor = open_stream(file)
        is_stream = descriptor is not None
        if descriptor is None:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise cannot_write(file, error) from error
    try:
        if is_stream:
            yield StreamOutput(partial(_write_stream, file, descriptor), format)
        else:
            yield FileOutput(file, descriptor, format, existing, candidates)
    finally:
        os.close(descriptor)


def _write_stream(path: Path, descriptor: int, text: str) -> None:
    try:
        _write_all(descriptor, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error


def _write_all(descriptor: int, text: str) -> int:
    """Write a text and return the number of its bytes; the system may take it in parts."""
    content = text.encode()
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    return len(content)


def _lock(path: Path, descriptor: int) -> None:
    """Keep other runs from writing to a file until its descriptor is closed, where files can be locked."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"{path}: another run is writing to this file. Wait until it ends, or choose another file."
        ) from error
    except (ImportError, OSError):  # Windows; a disk without locks
        pass


def _digest(name: str) -> int:
    """Return a short key of a name. Among 100 million names, two have the same with a probability of 0.03 %."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
