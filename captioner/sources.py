"""Find the pictures to caption: files, folders, patterns, URLs and lists.

Names are found lazily, so that millions of pictures need no more memory than the names of one folder.
"""

import codecs
import fnmatch
import glob
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from captioner import images
from captioner.errors import CaptionerError
from captioner.files import is_folder

MAX_NAME = 1 << 16
"""Maximum number of characters of a name in a list: more than any file system allows."""

FOLDERS_OF_PROGRAMS = frozenset({"@eaDir"})
"""Folders of thumbnails that are not hidden, which are skipped as hidden ones: Synology's."""


class Found(NamedTuple):
    """A picture to caption."""

    name: str
    """Its name in the output: its path or URL as given."""
    source: images.Source
    stem: Path
    """Path of a file about it in a folder of such files, without suffix: its path relative to its own folder."""
    kind: Literal["file", "address", "stream"] = "file"
    """A stream, such as standard input, has a different picture each time."""


class NotFound(NamedTuple):
    """A name without pictures."""

    name: str
    reason: str


@dataclass
class Skipped:
    """Number of entries of folders and patterns that were skipped."""

    hidden: int = 0
    """Hidden folders, and `FOLDERS_OF_PROGRAMS`."""
    linked: int = 0
    """Links to folders."""
    special: int = 0
    """Broken links, FIFOs and others with a name of a picture that are not files."""
    formats: Counter[str] = field(default_factory=Counter)
    """Files of unsupported formats, by suffix."""


class Fetched:
    """A picture whose content is read or downloaded when it is needed: calling the object returns it.

    Only the command line opens URLs. A `Captioner` and the web server never do: untrusted input must not choose
    what this machine requests.
    """

    def __init__(self, name: str, fetch: Callable[[], bytes], keep: bool):
        """Set the name, how to get the content, and whether to keep it, to read it again."""
        self.name = name
        self._fetch = fetch
        self._keep = keep
        self._content: bytes | None = None

    def __call__(self) -> bytes:
        """Return the content.

        Raises:
            ImageError: if the download fails.
        """
        content = self._fetch() if self._content is None else self._content
        self._content = content if self._keep else None
        return content

    def forget(self) -> None:
        """Release the content."""
        self._content = None


def is_single(name: str) -> bool:
    """Return whether a name is one picture, not a folder or a pattern."""
    return not is_folder(name) and not _is_pattern(name)


def find_pictures(
    names: Iterable[str], *, overlays: Path | None = None, patterns: bool = True, skipped: Skipped | None = None
) -> Iterator[Found | NotFound]:
    """Yield the pictures in the order of the names, those of a folder sorted by path, and names without pictures.

    Hidden files and folders, whose names start with a dot, and `@eaDir` are skipped unless a pattern names them
    (`photos/.thumbs/*`). Links to files are followed. Links to folders are followed if the name itself or a single
    part of a pattern matches them (`photos/*/a.jpg`), but not recursively (subfolders, `**`), so that no link leads
    to a cycle.

    Args:
        names: each a file; a folder (recursive); a pattern such as `photos/**/*.jpg`; a URL that starts with
            http:// or https://; or `-`, standard input.
        overlays: the folder of overlays: its pictures are skipped in folders and patterns, and streams and
            downloads are kept to draw on.
        patterns: whether names may be patterns. Names of a list are not, so that every name can be listed.
        skipped: counts what is skipped.
    """
    skipped = skipped or Skipped()
    excluded = os.path.realpath(overlays) if overlays else None
    keep = overlays is not None
    for name in names:
        if name == "-":
            source = Fetched("standard input", _read_standard_input, keep)
            yield Found(name, source, Path("standard-input"), "stream")
        elif re.match("https?://", name, re.IGNORECASE):
            yield Found(name, Fetched(name, partial(_fetch, name), keep), _stem_of_url(name), "address")
        elif is_folder(name):
            yield from _find_in_folder(name, excluded, skipped)
        elif patterns and _is_pattern(name):
            yield from _find_by_pattern(name, excluded, skipped)
        elif _is_stream(name):
            source = Fetched(name, partial(_read_file, name), keep)
            yield Found(name, source, Path(Path(name).stem), "stream")
        else:
            yield Found(name, name, Path(Path(name).stem))


def _find_in_folder(name: str, excluded: str | None, skipped: Skipped) -> Iterator[Found | NotFound]:
    root = str(Path(name))
    if excluded and Path(os.path.realpath(root)).is_relative_to(excluded):
        yield NotFound(name, "this folder is in the folder of --overlay. Choose another folder for the overlays.")
        return
    start, found = os.path.join(root, ""), None  # noqa: PTH118
    for found in _walk(root, ["**", "*"], excluded, skipped):
        if isinstance(found, NotFound):
            yield found
        else:
            yield Found(found, found, Path(os.path.splitext(found.removeprefix(start))[0]))  # noqa: PTH122
    if found is None:
        yield NotFound(name, "no pictures in this folder")


def _find_by_pattern(name: str, excluded: str | None, skipped: Skipped) -> Iterator[Found | NotFound]:
    parts = list(Path(name).parts)
    start = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = str(Path(*parts[:start]))
    found = None
    if is_folder(root):
        for found in _walk(root, parts[start:], excluded, skipped):
            yield found if isinstance(found, NotFound) else Found(found, found, Path(Path(found).stem))
    if found is None:
        yield NotFound(name, "no pictures match this pattern")


def _walk(root: str, parts: list[str], excluded: str | None, skipped: Skipped) -> Iterator[str | NotFound]:
    """Yield the pictures below a folder that match a pattern, sorted by the parts of their paths, each once."""
    pattern = _Pattern(parts)
    levels = [_list_folder(root, pattern, pattern.start, excluded, skipped)]  # folders may be nested very deeply
    while levels:
        for path, states in levels[-1]:
            if isinstance(path, str) and states:
                levels.append(_list_folder(path, pattern, states, excluded, skipped))
                break
            yield path
        else:
            levels.pop()


def _list_folder(
    folder: str, pattern: "_Pattern", states: frozenset[int], excluded: str | None, skipped: Skipped
) -> Iterator[tuple[str | NotFound, frozenset[int] | None]]:
    """Yield the sorted paths of a folder's pictures and subfolders, the latter with the states of the pattern."""
    names: list[str] = []  # not entries: a folder may have millions
    below: dict[str, frozenset[int]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_true(entry.is_dir):
                    if reached := pattern.enter(states, entry):
                        if excluded is None or os.path.realpath(entry.path) != excluded:
                            names.append(entry.name)
                            below[entry.name] = reached
                    elif pattern.is_at_any_depth(states):
                        skipped.hidden += _is_hidden(entry.name)
                        skipped.linked += not _is_hidden(entry.name) and entry.is_symlink()
                elif pattern.accepts(states, entry.name):
                    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                    if suffix in images.OTHER_SUFFIXES:
                        skipped.formats[suffix] += 1
                    elif suffix in images.SUFFIXES and _is_true(entry.is_file):
                        names.append(entry.name)
                    elif suffix in images.SUFFIXES:
                        skipped.special += 1
    except OSError as error:
        yield NotFound(folder, f"cannot read this folder ({error.strerror or error})"), None
        return
    names.sort()
    for name in names:
        yield name if folder == "." else os.path.join(folder, name), below.get(name)  # noqa: PTH118


class _Pattern:
    """A finite automaton that matches a path part by part. Its states are positions in the pattern."""

    def __init__(self, parts: list[str]) -> None:
        """Take the parts of a pattern; the part `**` matches any number of folders."""
        self._parts = [*parts, "*"] if parts[-1] == "**" else parts
        self.end = len(self._parts)
        self.start = self._close({0})

    def enter(self, states: frozenset[int], folder: os.DirEntry[str]) -> frozenset[int]:
        """Return the states in a folder; empty if nothing in it can match."""
        reached = set()
        for state in states:
            if self._parts[state] == "**":
                if not _is_hidden(folder.name) and not folder.is_symlink():
                    reached.add(state)
            elif state + 1 < self.end and self._matches(state, folder.name):
                reached.add(state + 1)
        return self._close(reached)

    def accepts(self, states: frozenset[int], name: str) -> bool:
        """Return whether a file matches the whole pattern."""
        return self.end - 1 in states and self._matches(self.end - 1, name)

    def _matches(self, state: int, name: str) -> bool:
        part = self._parts[state]
        if _is_hidden(name):
            return name == part or (part.startswith(".") and fnmatch.fnmatch(name, part))
        return part == "*" or fnmatch.fnmatch(name, part)

    def is_at_any_depth(self, states: frozenset[int]) -> bool:
        """Return whether a folder of any name would match here."""
        return any(self._parts[state] == "**" for state in states)

    def _close(self, states: set[int]) -> frozenset[int]:
        """Return the closure of states: `**` may match no folder."""
        closed = set()
        for state in states:
            closed.add(state)
            while self._parts[state] == "**":  # the last part is not `**`
                state += 1
                closed.add(state)
        return frozenset(closed)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in FOLDERS_OF_PROGRAMS


def _is_true(test: Callable[[], bool]) -> bool:
    """Return the result of a test of a directory entry; false if it fails, as for cyclic links."""
    try:
        return test()
    except OSError:
        return False


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and not os.path.lexists(name)


def _is_stream(name: str) -> bool:
    try:
        mode = Path(name).stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def _read_standard_input() -> bytes:
    return images.standard_input().read(images.MAX_BYTES + 1)


def _read_file(name: str) -> bytes:
    with Path(name).open("rb") as file:
        return file.read(images.MAX_BYTES + 1)


def _fetch(url: str) -> bytes:
    from captioner.fetch import fetch

    return fetch(url)


def _stem_of_url(url: str) -> Path:
    """Return the last part of a URL's path, or its host, as a name that is valid in any file system."""
    from urllib.parse import unquote

    host, *parts = re.split("[?#]", url)[0].split("/")[2:]
    stem = Path(unquote(parts[-1]) if parts else "").stem or host
    return Path(re.sub(r"[^\w.-]+", "-", stem)[:60].strip(".-") or "picture")


@contextmanager
def open_list(file: str, *, null: bool = False) -> Iterator[Iterator[str]]:
    """Open a list of names, which is read lazily.

    Args:
        file: one name per line, or `-` for standard input. Windows line ends, blank lines, and byte-order marks of
            UTF-8 and UTF-16 are removed.
        null: whether names end with a NUL character, as `find -print0` writes them, and may contain newlines.

    Raises:
        CaptionerError: if the list cannot be opened or, while it is read, is not a list of names.
    """
    if file == "-":
        if sys.stdin is None:
            raise CaptionerError("standard input is closed. Redirect the list of pictures to it.")
        yield _read_names(sys.stdin.buffer, "standard input", null)
        return
    try:
        stream = Path(file).open("rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise _cannot_read(file, error) from error
    with stream:
        yield _read_names(stream, file, null)


def _read_names(stream: BinaryIO, file: str, null: bool) -> Iterator[str]:
    end = "\0" if null else "\n"
    rest = ""
    try:
        for text in chain(_decode(stream, has_bom=not null), [end]):  # the last name may have no end
            if "\0" in text and not null:
                raise CaptionerError(
                    f"{file}: this list contains NUL characters. If names end with NUL, add --null."
                )
            *names, rest = (rest + text).split(end)
            if len(rest) > MAX_NAME:
                raise CaptionerError(
                    f"{file}: expected a list of names, got one of more than {MAX_NAME:,} characters"
                )
            if not null:
                names = [name.removesuffix("\r") for name in names if name.strip()]
            yield from filter(None, names)
    except (OSError, UnicodeError) as error:
        raise _cannot_read(file, error) from error


def fits_list(name: str) -> bool:
    """Return whether a list with one name per line can contain this name."""
    if not name.strip() or "\n" in name or name.endswith("\r"):
        return False
    return not os.fsencode(name).startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _decode(stream: BinaryIO, has_bom: bool) -> Iterator[str]:
    """Yield the text of a stream, decoded by its byte-order mark or the encoding of file names."""
    start = stream.read(3)
    encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    if has_bom and start.startswith(codecs.BOM_UTF8):
        start = b""
    elif has_bom and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, errors = "utf-16", "strict"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    read: Callable[[int], bytes] = stream.read1  # type: ignore[attr-defined]  # without waiting for a full chunk
    yield decoder.decode(start)
    while chunk := read(1 << 16):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _cannot_read(file: str, error: Exception) -> CaptionerError:
    return CaptionerError(
        f"{file}: cannot read this list of pictures ({getattr(error, 'strerror', None) or error})"
    )
