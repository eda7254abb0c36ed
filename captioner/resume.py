"""The output of captions: a stream, or a file that a later run resumes."""

import itertools
import os
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

MAX_LINE = 1 << 26
"""Maximum length of a line in bytes: far above a caption with the attention of many candidates."""


class StreamOutput:
    """Output to a stream, such as standard output, with the methods of `FileOutput`, but nothing to resume."""

    def __init__(self, write: Callable[[str], None], format: Format) -> None:
        self._write = write
        self._pending = format.heading

    def has(self, image: str) -> bool:
        """Return false."""
        return False

    def expect(self, image: str) -> None:
        """Do nothing."""

    def append(self, lines: str) -> None:
        """Write the lines.

        Raises:
            BrokenPipeError: if the reader has closed the stream.
        """
        self._write(self._pending + lines)
        self._pending = ""

    def finish(self) -> None:
        """Write the heading if nothing was written."""
        if self._pending:
            self.append("")


class FileOutput:
    """Output to a file of captions, locked against other runs, that a run starts or resumes.

    A run that was killed, or whose disk was full, may leave the lines of its last picture incomplete. The run that
    resumes it starts with that picture and replaces those lines. Otherwise the whole content is kept, and a missing
    newline at the end is added. A file with other content is refused. Nothing is changed before the first lines are
    appended.
    """

    def __init__(self, path: Path, descriptor: int, format: Format, existing: str, candidates: int) -> None:
        """Lock the file and read the names of its pictures. `open_output` passes the arguments.

        Raises:
            OutputError: if another run writes to the file, or it must not or cannot be resumed.
        """
        self._path = path
        self._file = descriptor
        self._format = format
        self._resumes = existing == "skip"
        self._lines = 1 if format.whole_line else candidates  # of a complete picture
        self._done = np.zeros(0, np.uint64)  # sorted digests of names: 8 bytes each
        self._last: str | None = None  # the last picture, if its lines may be incomplete
        self._last_start = 0
        self._tail = b""  # after the last newline
        self._tail_is_line = False
        _lock(path, descriptor)
        size = os.fstat(descriptor).st_size
        if size and existing == "refuse":
            raise exists_already(path)
        self._end = 0 if existing == "overwrite" else size  # number of bytes to keep
        self._pending = "" if self._end else format.heading  # written before the next lines
        self._is_first = self._end > 0  # whether the next expected picture is the first
        if self._is_first:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                self._read(file)

    def has(self, image: str) -> bool:
        """Return whether the file has the captions of a picture from an earlier run, and the run skips these."""
        name = self._format.spell(image)
        if not self._resumes or (self._is_first and name == self._last):
            return False
        digest = _digest(name)
        index = int(np.searchsorted(self._done, np.uint64(digest)))
        return index < len(self._done) and int(self._done[index]) == digest

    def expect(self, image: str) -> None:
        """Announce the picture whose lines are appended next. The first decides what to do with an incomplete end.

        Raises:
            OutputError: if the end of the file is not of the format.
        """
        if not self._is_first:
            return
        self._is_first = False
        complete = self._end - len(self._tail)
        if self._tail and not self._tail_is_line:
            expected = ((self._format.heading if complete == 0 else "") or self._format.start(image)).encode()
            if not (expected.startswith(self._tail) or self._tail.startswith(expected)):
                raise self._other_content(f"its last line, {self._tail[:40]!r}, is not")
        if self._resumes and self._last == self._format.spell(image):
            self._end = self._last_start
        elif self._tail_is_line:
            self._pending = "\n"
        else:
            self._end = complete
        if self._end == 0:
            self._pending = self._format.heading

    def append(self, lines: str) -> None:
        """Write all lines of a picture at once, so that an interrupted run keeps its results.

        Raises:
            OutputError: if they cannot be written completely; then they are removed.
        """
        try:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
            written = _write_all(self._file, self._pending + lines)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise cannot_write(self._path, error) from error
        self._end, self._pending = self._end + written, ""

    def finish(self) -> None:
        """Create the file, empty but for its heading, if there was no picture. Called if no picture failed."""
        if self._end == 0:
            self.append("")

    def _read(self, file: BinaryIO) -> None:
        """Read the names of the pictures in the file, and whether its last lines are complete."""
        digests = array("Q")
        name, start, count = "", 0, 0  # the last picture, the position of its lines, and their number
        position = 0
        for number in itertools.count(1):
            line = file.readline(MAX_LINE)
            if not line:
                break
            is_complete = line.endswith(b"\n")
            try:
                image = self._format.read_name(line.decode().removesuffix("\n"))
            except ValueError as error:
                if is_complete or len(line) == MAX_LINE:
                    raise self._other_content(f"line {number} is not ({error})") from error
                self._tail = line
                break
            if not is_complete:
                self._tail, self._tail_is_line = line, True
            if image != name or count == self._lines:
                name, start, count = image, position, 0
            count += 1
            digests.append(_digest(image))
            position += len(line)
        if name and (count < self._lines or (self._tail_is_line and not self._format.whole_line)):
            self._last, self._last_start = name, start
        self._done = np.unique(np.frombuffer(digests, np.uint64))

    def _other_content(self, reason: str) -> OutputError:
        return OutputError(
            f"{self._path}: expected captions of --format {self._format.name}, but {reason}. Nothing was changed. "
            "Choose another file, or --existing overwrite."
        )


Output = StreamOutput | FileOutput


@contextmanager
def open_output(
    path: str | None, format: Format, existing: str = "refuse", candidates: int = 1
) -> Iterator[Output]:
    """Open the output of captions.

    Args:
        path: a file; a stream such as `/dev/stdout` or a FIFO; None for standard output.
        format: format of the lines.
        existing: what to do with an existing file: `skip` (resume it: pictures in it are skipped), `overwrite`,
            `append` or `refuse`. An empty file is never refused.
        candidates: number of captions of each picture.

    Raises:
        OutputError: if it cannot be written, another run writes to it, or it must not or cannot be resumed.
    """
    if path is None:
        require_stdout()
        yield StreamOutput(write_stdout, format)
        return
    file = Path(path)
    try:
        stream = open_stream(file)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        descriptor = os.open(file, flags, 0o666) if stream is None else stream
    except OSError as error:
        raise cannot_write(file, error) from error
    try:
        if stream is None:
            yield FileOutput(file, descriptor, format, existing, candidates)
        else:
            yield StreamOutput(partial(_write_stream, file, descriptor), format)
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
    """Write a text completely and return its number of bytes."""
    content = text.encode()
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    return len(content)


def _lock(path: Path, descriptor: int) -> None:
    """Lock a file against other runs until its descriptor is closed, where the file system has locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"{path}: another run is writing to this file. Wait until it ends, or choose another file."
        ) from error
    except (ImportError, OSError):  # Windows; a file system without locks
        pass


def _digest(name: str) -> int:
    """Return a 64-bit hash of a name. The probability of a collision among 100 million names is 0.03 %."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
