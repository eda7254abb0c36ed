"""Files on disks, in object stores and on web servers, through fsspec. Errors that may pass are retried."""

import errno
import io
import os
import random
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from captioner.errors import CaptionerError, MissingExtraError, OutputError
from captioner.files import write_atomically
from captioner.installation import install_hint
from captioner.sources import FOLDERS_OF_PROGRAMS

Result = TypeVar("Result")

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""The package that fsspec needs for a protocol."""

ATOMIC = frozenset({"file", "memory", "s3", "gs", "gcs", "az", "abfs"})
"""Protocols of output: a file appears there whole or not at all."""

TRIES = 6
"""How often an operation is tried; with the waits in between, for about 15 seconds."""

WAIT = 0.5
"""Seconds before the second try. Each further wait is twice as long."""

FINAL = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""Errors of names that no file can have."""

BLOCK = 8 << 20
"""Bytes that are requested at a time of a file that is read from start to end."""


class StorageError(CaptionerError):
    """A storage that fails although the file may exist: it may work later, and says nothing about a picture."""


def is_local(url: str) -> bool:
    """Return whether a name is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def join(folder: str, name: str) -> str:
    """Return the name of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if folder.strip("/") else f"{folder}{name}"


def retry(action: Callable[[], Result], name: str) -> Result:
    """Return what an action returns, after several tries if it must be.

    Raises:
        OSError: if the file is missing, not a file, or forbidden, which further tries would not change.
        StorageError: if every try failed in another way.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        try:
            return action()
        except (CaptionerError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:  # every storage has errors of its own
            if isinstance(error, OSError) and error.errno in FINAL:
                raise
            last = error
    reason = " ".join(str(last).split())[:300] or type(last).__name__
    raise StorageError(f"{name}: the storage failed {TRIES} times ({reason})") from last


def locate(url: str) -> tuple[Any, str]:
    """Return the file system of a name, and its path there.

    Raises:
        CaptionerError: if there is no such protocol.
        MissingExtraError: if a package is missing that reads it.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        from fsspec.core import url_to_fs

        # A listing is used once, and one of millions of names is not to be kept.
        system, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        if package is None or getattr(error, "name", "") == "fsspec":
            raise MissingExtraError(f"reading data sets needs {error.name}. Run: {install_hint('bulk')}") from error
        raise MissingExtraError(
            f"{url}: {protocol}:// needs the package {package}: pip install {package}"
        ) from error
    except ValueError as error:
        raise CaptionerError(f"{url}: {error}. Use a path, or one of {', '.join(PACKAGES)}.") from error
    return system, path


def exists(url: str) -> bool:
    """Return whether there is a file of this name."""
    system, path = locate(url)
    return retry(lambda: bool(system.isfile(path)), url)


def is_folder(url: str) -> bool:
    """Return whether a name is that of a folder, or the prefix of some names in an object store."""
    system, path = locate(url)
    return retry(lambda: bool(system.isdir(path)), url)


def find(url: str) -> Iterator[str]:
    """Yield all files below a folder or prefix, each folder sorted, without what is hidden (`.name`, `@eaDir`)."""
    system, root = locate(url)
    pending = [root]
    while pending:
        folder = pending.pop()
        names = sorted(retry(partial(system.ls, folder, detail=True), url), key=lambda entry: entry["name"])
        below = []
        for entry in names:
            name = entry["name"].rstrip("/")
            last = name.rpartition("/")[2]
            if last.startswith(".") or last in FOLDERS_OF_PROGRAMS or name == folder.rstrip("/"):
                continue
            if entry["type"] == "directory" and not entry.get("islink"):
                below.append(name)
            elif entry["type"] == "file" or (entry.get("islink") and system.isfile(name)):
                yield _spell(url, root, name)
        pending += reversed(below)


def find_matches(pattern: str) -> Iterator[str]:
    """Yield the files that fit a pattern such as `s3://bucket/train/*.tar`, sorted."""
    system, path = locate(pattern)
    magic = min(pattern.find(sign) for sign in "*?[" if sign in pattern)
    prefix = pattern[: pattern.rfind("/", 0, magic) + 1]
    root = locate(prefix or ".")[1]
    for name in sorted(retry(lambda: system.glob(path), pattern)):
        if not name.rpartition("/")[2].startswith("."):
            yield _spell(prefix, root, name)


def _spell(given: str, root: str, name: str) -> str:
    """Return a file's name as that of its folder was given: `photos/a.jpg` for `photos`."""
    below = name.removeprefix(root).lstrip("/")
    return join(given, below) if given else below


def read(url: str, most: int) -> bytes:
    """Return the first bytes of a file, at most this many and one more: so its reader sees that it is longer.

    Raises:
        OSError: if the file is missing, not a file, or forbidden.
        StorageError: if the storage fails.
    """
    system, path = locate(url)

    def action() -> bytes:
        if is_local(url):
            if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a FIFO would wait
                raise IsADirectoryError(errno.EISDIR, "not a regular file", path)
            with Path(path).open("rb") as file:
                return file.read(most + 1)
        try:
            return bytes(system.cat_file(path, start=0, end=most + 1))  # one request
        except OSError as error:
            if error.errno == errno.EINVAL and system.size(path) == 0:  # S3 has no such range of an empty object
                return b""
            raise

    return retry(action, url)


def open_to_read(url: str, *, streams: bool) -> BinaryIO:
    """Open a file whose reads are retried.

    Args:
        url: of the file.
        streams: whether it is read from start to end, so that it is requested in long parts.

    Raises:
        OSError: if the file is missing, not a file, or forbidden.
        StorageError: if the storage fails, now or in a later read.
    """
    file = _Retrying(url, streams)
    return io.BufferedReader(file, 1 << 16) if streams else cast(BinaryIO, file)


class _Retrying(io.RawIOBase):
    """A file that is opened again where a read failed, and read on from there."""

    def __init__(self, url: str, streams: bool) -> None:
        self._url = url
        self._system, self._path = locate(url)
        self._cache = "readahead" if streams else "none"
        self._position = 0
        self._file: Any = None
        self._size = retry(self._open, url)

    def _open(self) -> int | None:
        self._file = self._system.open(self._path, "rb", block_size=BLOCK, cache_type=self._cache)
        size = getattr(self._file, "size", None)
        return int(size) if size is not None else None  # of a server that does not say it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size or 0}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:

        def action() -> bytes:
            try:
                if self._file is None:
                    self._open()
                if self._file.tell() != self._position:
                    self._file.seek(self._position)
                part = bytes(self._file.read(len(buffer)))
                if not part and len(buffer) and self._position < (self._size or 0):
                    raise OSError(f"ended after {self._position:,} of {self._size:,} bytes")
                return part
            except BaseException:
                self._close_file()
                raise

        part = retry(action, self._url)
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        if not self.closed:
            self._close_file()
        super().close()


@contextmanager
def create(url: str) -> Iterator[BinaryIO]:
    """Give a file to write to, which becomes `url` when the block ends well, in place of one that exists.

    What goes to an object store is written to a temporary file first, and uploaded at the end: a file object of
    fsspec would upload what it has when the block fails, too.

    Raises:
        OutputError: if it cannot be written.
        StorageError: if the storage fails.
    """
    system, path = locate(url)
    if is_local(url):
        with write_atomically(path, overwrite=True) as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="caption-bulk-") as folder:
        whole = Path(folder) / "whole"
        with whole.open("wb") as file:
            yield file
        try:
            retry(lambda: system.put_file(str(whole), path), url)
        except OSError as error:
            raise OutputError(f"{url}: cannot write this file ({error})") from error


def check_output(url: str) -> None:
    """Create a folder for output if it is on this machine.

    Raises:
        OutputError: if it cannot be created, or files do not appear there whole or not at all.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    if protocol not in ATOMIC:
        raise OutputError(f"{url}: output to {protocol}:// is not supported. Use a folder, s3://, gs:// or az://.")
    _, path = locate(url)
    if is_local(url):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{url}: cannot create this folder ({error.strerror or error}).") from error


def list_names(url: str) -> list[str]:
    """Return the names of the files in a folder, without its path; none if there is no such folder."""
    system, path = locate(url)
    try:
        names = retry(lambda: system.ls(path, detail=False), url)
    except FileNotFoundError:
        return []
    return [name.rstrip("/").rpartition("/")[2] for name in names]


def remove(urls: list[str]) -> None:
    """Delete files."""
    for url in urls:
        system, path = locate(url)
        retry(partial(system.rm_file, path), url)
