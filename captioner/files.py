"""Atomic writes, and streams in place of files."""

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from captioner.errors import OutputError

_DESCRIPTORS = {"/dev/stdout": 1, "/dev/stderr": 2}


@contextmanager
def write_atomically(path: str | Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block succeeds.

    It is a temporary file in the same folder, which is removed if the block fails or is interrupted, so no reader
    ever sees an incomplete file. A temporary file that a killed process left is overwritten by the next process
    that writes `path`. A symbolic link is kept and its target replaced. A stream (see `open_stream`) is not
    replaced: the bytes are written to it when the block succeeds.

    Raises:
        OutputError: if `path` exists and `overwrite` is false, or if it cannot be written.
    """
    path = Path(path)
    try:
        stream = open_stream(path)
        if stream is not None:
            with os.fdopen(stream, "wb") as file:
                content = BytesIO()
                yield content
                file.write(content.getbuffer())
            return
        if os.path.lexists(path) and not overwrite:
            raise exists_already(path)
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        with _reserve_partial(target) as partial:
            try:
                with partial.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())  # otherwise a power failure might leave an empty file
                partial.replace(target)
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def open_stream(path: str | Path) -> int | None:
    """Return a new descriptor to write to if `path` is a stream, None if it is a file, a folder or missing.

    Streams are FIFOs, sockets, character devices such as `/dev/null`, and the descriptors of this process
    (`/dev/stdout`, `/dev/fd/3`), whatever they are redirected to. They cannot be resumed or replaced.

    Raises:
        OutputError: if it is a block device, whose file system would be destroyed.
        OSError: if it cannot be opened.
    """
    number = _DESCRIPTORS.get(str(path))
    if match := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", str(path)):
        number = int(match[1])
    if number is not None:
        return os.dup(number)
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISBLK(mode):
        raise OutputError(f"{path}: this is a disk, not a file. Choose another name.")
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return os.open(path, os.O_WRONLY)


@contextmanager
def _reserve_partial(path: Path) -> Iterator[Path]:
    """Yield the path of the temporary file for `path`, which no other process uses meanwhile.

    It is always the same, so that files of killed processes do not accumulate; it is random while another process
    uses that, and where files cannot be locked.
    """
    # Not `tempfile`: its files are readable by their owner only, and would stay so under the final name.
    default = path.parent / f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial"
    lock = _lock(default)
    try:
        yield path.parent / f".{secrets.token_hex(8)}.partial" if lock is None else default
    finally:
        if lock is not None:
            os.close(lock)


def _lock(partial: Path) -> int | None:
    """Return a descriptor that locks a file, created if missing, until it is closed; None if that fails."""
    try:
        import fcntl

        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except (ImportError, OSError):  # Windows; a missing folder; another user's file
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), partial.lstat()):  # otherwise it was renamed in between
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks: our own empty file
        with suppress(OSError):
            partial.unlink()
    os.close(handle)
    return None


def exists_already(path: Path) -> OutputError:
    """Return the error for a result that would replace an existing file."""
    return OutputError(f"{path}: exists already. Choose another name, or allow overwriting (--overwrite).")


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error for a file that cannot be written."""
    return OutputError(
        f"{path}: cannot write this file ({error.strerror or error}). Check that its folder exists and is writable."
    )


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a regular file; unlike `Path.is_file`, false for invalid names."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder; unlike `Path.is_dir`, false for invalid names."""
    return os.path.isdir(path)  # noqa: PTH112
