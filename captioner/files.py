"""Files written whole or not at all."""

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
    removed, and `path` is as it was. So nobody ever reads half a file.

    Raises:
        OutputError: if `path` exists and `overwrite` is false, or if it cannot be written.
    """
    path = Path(path)
    # Not `tempfile`: its files are readable by their owner alone, and would stay so under the final name.
    partial = path.parent / f".{secrets.token_hex(8)}.partial"
    try:
        if path.exists() and not overwrite:
            raise exists_already(path)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave the new name to an empty file
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # mostly because it has its final name by now
            partial.unlink()


def exists_already(path: Path) -> OutputError:
    """Return the error for a result that would replace an existing file."""
    return OutputError(f"{path}: exists already. Choose another name, or allow overwriting (--overwrite).")


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error for a file that the system refuses to write."""
    return OutputError(
        f"{path}: cannot write this file ({error.strerror or error}). Does its folder exist, and is it yours?"
    )
