"""Which pictures to caption: files, folders of them, patterns, addresses and lists.

Everything is found while it is asked for, so that millions of pictures need no more memory than one folder's names.
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
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from captioner import images
from captioner.errors import CaptionerError
from captioner.files import is_folder

LONGEST_NAME = 1 << 16
"""Characters of a name in a list, at most: more than any system takes."""

FOLDERS_OF_PROGRAMS = frozenset({"@eaDir"})
"""Folders that hold thumbnails of others' pictures though they are not hidden: Synology's."""


class Found(NamedTuple):
    """A picture to caption."""

    name: str
    """What the output calls it: its path or address as it was given."""
    source: images.Source
    place: Path
    """Where a file about it goes below a folder of such files, without suffix: as it is below its own folder."""
    kind: Literal["file", "address", "stream"] = "file"
    """A stream, such as standard input, gives another picture each time."""


class NotFound(NamedTuple):
    """A name that gives no picture."""

    name: str
    reason: str


@dataclass
class Skipped:
    """What was left out of folders and patterns, by count."""

    hidden: int = 0
    """Hidden folders, and those of `FOLDERS_OF_PROGRAMS`."""
    linked: int = 0
    """Links to folders."""
    special: int = 0
    """Broken links, FIFOs and other entries that are named like pictures and are not files."""
    formats: Counter[str] = field(default_factory=Counter)
    """Files of formats that are not read, by suffix."""


class Fetched:
    """A picture as a source whose bytes are fetched when it is read: calling it returns them.

    Addresses are such pictures where people name them on the command line. A `Captioner` and the web server never
    open addresses: what they are told may come from strangers, who must not choose what this machine asks for.
    """

    def __init__(self, name: str, fetch: Callable[[], bytes], keep: bool):
        """Name a picture, whose bytes are kept once they are fetched if it is to be read again."""
        self.name = name
        self._fetch = fetch
        self._keep = keep
        self._content: bytes | None = None

    def __call__(self) -> bytes:
        """Return the bytes of the picture.

        Raises:
            ImageError: when it cannot be fetched.
        """
        content = self._fetch() if self._content is None else self._content
        self._content = content if self._keep else None
        return content

    def forget(self) -> None:
        """Keep the bytes no longer."""
        self._content = None


def is_single(name: str) -> bool:
    """Return whether a name is that of one picture, and not of a folder or a pattern of them."""
    return not is_folder(name) and not _is_pattern(name)


def find_pictures(
    names: Iterable[str], *, overlays: Path | None = None, patterns: bool = True, skipped: Skipped | None = None
) -> Iterator[Found | NotFound]:
    """Yield every picture in the order of the names, those of a folder by path, and what cannot be found.

    Folders and patterns follow one rule. Hidden files and folders, whose names start with a dot, and `@eaDir` are
    left out unless a pattern names them so (`photos/.thumbs/*`). Links to files are followed; links to folders are
    followed where the name itself or a single part of a pattern leads through them (`photos/*/a.jpg`), and not at
    any depth (a folder's own folders, `**`), so that no link can lead in circles.

    Args:
        names: each a file; a folder, with all below it; a pattern such as `photos/**/*.jpg`, where the shell leaves
            it as it is; an address that begins with http:// or https://; or `-`, standard input.
        overlays: the folder of the overlays, if there will be any: its pictures are not among those of folders and
            patterns, and what can be fetched only once is kept to be drawn on.
        patterns: whether names may be patterns. Those of a list are not, so that every name can be listed.
        skipped: where to count what is left out of folders and patterns.
    """
    skipped = skipped or Skipped()
    left_out = os.path.realpath(overlays) if overlays else None
    keep = overlays is not None
    for name in names:
        if name == "-":
            source = Fetched("standard input", _read_standard_input, keep)
            yield Found(name, source, Path("standard-input"), "stream")
        elif re.match("https?://", name, re.IGNORECASE):
            yield Found(name, Fetched(name, partial(_fetch, name), keep), _place_of_address(name), "address")
        elif is_folder(name):
            yield from _find_in_folder(name, left_out, skipped)
        elif patterns and _is_pattern(name):
            yield from _find_by_pattern(name, left_out, skipped)
        elif _is_stream(name):
            source = Fetched(name, partial(_read_file, name), keep)
            yield Found(name, source, Path(Path(name).stem), "stream")
        else:
            yield Found(name, name, Path(Path(name).stem))


def _find_in_folder(name: str, left_out: str | None, skipped: Skipped) -> Iterator[Found | NotFound]:
    root = str(Path(name))
    if left_out and Path(os.path.realpath(root)).is_relative_to(left_out):
        yield NotFound(name, "this folder is in that of the overlays. Choose another folder for --overlay.")
        return
    start, is_empty = os.path.join(root, ""), True  # noqa: PTH118
    for found in _walk(root, ["**", "*"], left_out, skipped):
        is_empty = False
        if isinstance(found, NotFound):
            yield found
        else:
            yield Found(found, found, Path(os.path.splitext(found.removeprefix(start))[0]))  # noqa: PTH122
    if is_empty:
        yield NotFound(name, "no pictures in this folder")


def _find_by_pattern(name: str, left_out: str | None, skipped: Skipped) -> Iterator[Found | NotFound]:
    parts = list(Path(name).parts)
    start = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = str(Path(*parts[:start]))
    is_empty = True
    if is_folder(root):
        for found in _walk(root, parts[start:], left_out, skipped):
            is_empty = False
            yield found if isinstance(found, NotFound) else Found(found, found, Path(Path(found).stem))
    if is_empty:
        yield NotFound(name, "no pictures fit this pattern")


def _walk(root: str, parts: list[str], left_out: str | None, skipped: Skipped) -> Iterator[str | NotFound]:
    """Yield the paths of the pictures below a folder that fit a pattern, sorted by their parts, each once."""
    pattern = _Pattern(parts)
    levels: list[_Level] = []  # the folders that are being read, each in the one before it
    folder, states = root, pattern.start
    while True:
        try:
            levels.append(_read_level(folder, pattern, states, left_out, skipped))
        except OSError as error:
            yield NotFound(folder, f"cannot read this folder ({error.strerror or error})")
        for path, below in _rest(levels):
            if below is None:
                yield path
            else:
                folder, states = path, below
                break
        else:
            return


class _Level(NamedTuple):
    """What is still to be read of a folder."""

    folder: str
    names: list[str]
    """Pictures and folders, last to first."""
    states: dict[str, frozenset[int]]
    """Of the pattern, for the folders among them."""


def _read_level(
    folder: str, pattern: "_Pattern", states: frozenset[int], left_out: str | None, skipped: Skipped
) -> _Level:
    level = _Level(folder, [], {})
    with os.scandir(folder) as entries:
        for entry in entries:  # nothing but the names is kept: folders may have millions of them
            if _is_true(entry.is_dir):
                if reached := pattern.enter(states, entry):
                    if left_out is None or os.path.realpath(entry.path) != left_out:
                        level.names.append(entry.name)
                        level.states[entry.name] = reached
                elif pattern.is_at_any_depth(states):
                    skipped.hidden += _is_hidden(entry.name)
                    skipped.linked += not _is_hidden(entry.name) and entry.is_symlink()
            elif pattern.accepts(states, entry.name):
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                if suffix in images.OTHER_SUFFIXES:
                    skipped.formats[suffix] += 1
                elif suffix in images.SUFFIXES and _is_true(entry.is_file):
                    level.names.append(entry.name)
                elif suffix in images.SUFFIXES:
                    skipped.special += 1
    level.names.sort(reverse=True)
    return level


def _rest(levels: list[_Level]) -> Iterator[tuple[str, frozenset[int] | None]]:
    """Yield the paths that are still to be read, those of folders with their states, and drop finished folders."""
    while levels:
        folder, names, states = levels[-1]
        if names:
            name = names.pop()
            yield name if folder == "." else os.path.join(folder, name), states.get(name)  # noqa: PTH118
        else:
            levels.pop()


class _Pattern:
    """A pattern of paths that is matched part by part on the way down, as a finite automaton.

    Its states are the positions in the pattern that the path so far may have reached.
    """

    def __init__(self, parts: list[str]) -> None:
        """Take the parts of a pattern; the part `**` stands for any number of folders."""
        self._parts = [*parts, "*"] if parts[-1] == "**" else parts
        self.end = len(self._parts)
        self.start = self._close({0})

    def enter(self, states: frozenset[int], folder: os.DirEntry[str]) -> frozenset[int]:
        """Return the states below a folder; none: nothing there can fit."""
        reached = set()
        for state in states:
            if self._parts[state] == "**":
                if not _is_hidden(folder.name) and not folder.is_symlink():
                    reached.add(state)
            elif state + 1 < self.end and self._fits(state, folder.name):
                reached.add(state + 1)
        return self._close(reached)

    def accepts(self, states: frozenset[int], name: str) -> bool:
        """Return whether a file fits the whole pattern."""
        return self.end - 1 in states and self._fits(self.end - 1, name)

    def _fits(self, state: int, name: str) -> bool:
        part = self._parts[state]
        if _is_hidden(name):
            return name == part or (part.startswith(".") and fnmatch.fnmatch(name, part))
        return part == "*" or fnmatch.fnmatch(name, part)

    def is_at_any_depth(self, states: frozenset[int]) -> bool:
        """Return whether a folder would fit here whatever its name."""
        return any(self._parts[state] == "**" for state in states)

    def _close(self, states: set[int]) -> frozenset[int]:
        """Return the states with those that are reached without a part: `**` may stand for no folder."""
        closed = set()
        for state in states:
            closed.add(state)
            while self._parts[state] == "**":  # which the last part is not
                state += 1
                closed.add(state)
        return frozenset(closed)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in FOLDERS_OF_PROGRAMS


def _is_true(test: Callable[[], bool]) -> bool:
    """Return a test of a folder's entry; what the system cannot tell, as of links in a circle, is false."""
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


def _fetch(address: str) -> bytes:
    from captioner.fetch import fetch

    return fetch(address)


def _place_of_address(address: str) -> Path:
    """Return the last part of the address's path as a name that any disk takes, or the host's name without one."""
    from urllib.parse import unquote

    host, *parts = re.split("[?#]", address)[0].split("/")[2:]
    stem = Path(unquote(parts[-1]) if parts else "").stem or host
    return Path(re.sub(r"[^\w.-]+", "-", stem)[:60].strip(".-") or "picture")


@contextmanager
def open_list(file: str, *, null: bool = False) -> Iterator[Iterator[str]]:
    """Open a list of names, which are read while they are asked for.

    Args:
        file: one name a line, or `-` for standard input. Lines may end as on Windows, blank ones are left out, and
            byte-order marks of UTF-8 and UTF-16 are understood. Otherwise names are taken as they are.
        null: whether a NUL character ends each name, as `find -print0` writes them, which may contain newlines.

    Raises:
        CaptionerError: when the list cannot be opened, and, while it is read, when it is not a list of names.
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
        for text in _decode(stream, has_mark=not null):
            if "\0" in text and not null:
                raise CaptionerError(
                    f"{file}: this list contains NUL characters. If they end the names, add --null."
                )
            *names, rest = (rest + text).split(end)
            if len(rest) > LONGEST_NAME:
                raise CaptionerError(
                    f"{file}: expected a list of names, got one of more than {LONGEST_NAME:,} characters"
                )
            yield from (
                filter(None, names) if null else filter(str.strip, (name.removesuffix("\r") for name in names))
            )
    except (OSError, UnicodeError) as error:
        raise _cannot_read(file, error) from error
    name = rest if null else rest.removesuffix("\r")
    if name.strip() or (null and name):
        yield name


def fits_list(name: str) -> bool:
    """Return whether a list of one name a line gives this name back."""
    if not name.strip() or "\n" in name or name.endswith("\r"):
        return False
    return not os.fsencode(name).startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _decode(stream: BinaryIO, has_mark: bool) -> Iterator[str]:
    """Yield the text of a stream as it comes, by its byte-order mark or else as the system encodes names."""
    start = stream.read(3)
    encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    if has_mark and start.startswith(codecs.BOM_UTF8):
        start = b""
    elif has_mark and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, errors = "utf-16", "strict"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    read: Callable[[int], bytes] = stream.read1  # type: ignore[attr-defined]  # what is there, without waiting for more
    yield decoder.decode(start)
    while chunk := read(1 << 16):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _cannot_read(file: str, error: Exception) -> CaptionerError:
    return CaptionerError(
        f"{file}: cannot read this list of pictures ({getattr(error, 'strerror', None) or error})"
    )
