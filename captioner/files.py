"""Files written whole or not at all, and streams that stand where a file may be named."""

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
    """Give a file to write bytes to, which becomes `path` when the block ends well.

    Until then it has another name in the same folder; if the block fails or is interrupted it is removed, and
    `path` is as it was. So nobody ever reads half a file. What a process that was killed left under the other name
    is overwritten by the next process that writes `path`. A link keeps pointing to its file, which is replaced. A
    stream (see `open_stream`) is never replaced: it receives the bytes when the block ends well.

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
                    os.fsync(file.fileno())  # or a power cut might leave the new name to an empty file
                partial.replace(target)
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def open_stream(path: str | Path) -> int | None:
    """Return a new descriptor to write to if `path` is a stream, and None if it is a file, a folder or not there.

    Streams are FIFOs, sockets, character devices such as `/dev/null`, and the descriptors of this process
    (`/dev/stdout`, `/dev/fd/3`), whatever they were redirected to. They have no end to resume at, and nothing of
    them is kept or replaced.

    Raises:
        OutputError: if it is a block device, which would lose its file system.
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
    """Give a name for what is to become `path`, at which no other process writes meanwhile.

    It is always the same, so that files of killed processes do not pile up; but a new one while another process
    has it, and where files cannot be locked.
    """
    # Not `tempfile`: its files are readable by their owner alone, and would stay so under the final name.
    usual = path.parent / f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial"
    lock = _lock(usual)
    try:
        yield path.parent / f".{secrets.token_hex(8)}.partial" if lock is None else usual
    finally:
        if lock is not None:
            os.close(lock)


def _lock(partial: Path) -> int | None:
    """Return a handle that keeps a file, new or left behind, from other processes until it is closed.

    None: another process has it, or it cannot be had.
    """
    try:
        import fcntl

        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except (ImportError, OSError):  # Windows; a folder that is missing; a file of somebody else
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), partial.lstat()):  # or it got its final name in between
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a disk without locks: the file is no other process's, but ours, and of no use
        with suppress(OSError):
            partial.unlink()
    os.close(handle)
    return None


def exists_already(path: Path) -> OutputError:
    """Return the error for a result that would replace an existing file."""
    return OutputError(f"{path}: exists already. Choose another name, or allow overwriting (--overwrite).")


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error for a file that the system refuses to write."""
    return OutputError(
        f"{path}: cannot write this file ({error.strerror or error}). Does its folder exist, and is it yours?"
    )


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a regular file of this name; unlike `Path.is_file`, also for impossible names."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a folder of this name; unlike `Path.is_dir`, also for impossible names."""
    return os.path.isdir(path)  # noqa: PTH112
