"""Files written whole or not at all."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from captioner.errors import OutputError


@contextmanager
def write_atomically(path: str | Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write bytes to, which becomes `path` when the block ends well.

    Until then it stands under another name in the same folder; if the block fails or is interrupted it is
    removed, and `path` is as it was. So nobody ever reads half a file. What a process that was killed left under
    the other name is written over by the next that writes `path`.

    Raises:
        OutputError: if `path` exists and `overwrite` is false, or if it cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and not overwrite:
            raise exists_already(path)
        with _reserve_partial(path) as partial:
            try:
                with partial.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())  # or a power cut might leave the new name to an empty file
                partial.replace(path)
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


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
