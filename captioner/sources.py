"""Which pictures to caption: files, folders of them, patterns, addresses and lists."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from captioner import images
from captioner.errors import ImageError


class Found(NamedTuple):
    """A picture to caption."""

    name: str
    """What it is called in the output: its path or address as it was given."""
    source: images.Source
    place: Path
    """Where a file about it goes below a folder of such files, without suffix: as it stood below its own folder."""


class Address:
    """A picture on the web, as a source: calling it fetches the bytes.

    Where people name pictures on the command line, this is what they mean. A `Captioner` and the web server never
    open addresses: what they are told may come from strangers, who must not choose what this machine asks for.
    """

    def __init__(self, name: str, keep: bool):
        """Name a picture, whose bytes are kept once they are fetched if it is to be read again."""
        self.name = name
        self._keep = keep
        self._content: bytes | None = None

    def __call__(self) -> bytes:
        """Return the bytes of the picture.

        Raises:
            ImageError: when it cannot be fetched.
        """
        from captioner.fetch import fetch

        content = self._content or fetch(self.name)
        self._content = content if self._keep else None
        return content

    def forget(self) -> None:
        """Keep the bytes no longer."""
        self._content = None


def find_pictures(names: Iterable[str], overlays: Path | None = None) -> tuple[list[Found], list[ImageError]]:
    """Return every picture in the order of the names, those of a folder by path, and what could not be found.

    Args:
        names: each a file; a folder, with all below it; a pattern such as `photos/**/*.jpg`, where the shell leaves
            it as it is; an `Address` that begins with http:// or https://; or `-`, whose bytes are read now.
        overlays: the folder of the overlays, if there will be any: its pictures are not among those of folders and
            patterns, and what is fetched is kept to be drawn on.
    """
    found: list[Found] = []
    missing: list[ImageError] = []
    for name in names:
        if name == "-":
            try:
                found.append(Found(name, images.open(name), Path("standard-input")))
            except ImageError as error:
                missing.append(error)
        elif re.match("https?://", name, re.IGNORECASE):
            found.append(Found(name, Address(name, keep=overlays is not None), _place_of_address(name)))
        elif Path(name).is_dir():
            paths = _only_pictures(Path(name).rglob("*"), overlays)
            found += [Found(str(path), path, path.relative_to(name).with_suffix("")) for path in paths]
            if not paths:
                missing.append(ImageError(f"{name}: no pictures in this folder"))
        elif glob.has_magic(name) and not Path(name).exists():
            paths = _only_pictures(map(Path, glob.iglob(name, recursive=True)), overlays)  # noqa: PTH207 (absolute ones, too)
            found += [Found(str(path), path, Path(path.stem)) for path in paths]
            if not paths:
                missing.append(ImageError(f"{name}: no pictures fit this pattern"))
        else:
            found.append(Found(name, name, Path(Path(name).stem)))
    return found, missing


def _place_of_address(address: str) -> Path:
    """Return the last part of the address's path as a name that any disk takes, or the host's name without one."""
    from urllib.parse import unquote

    host, *parts = re.split("[?#]", address)[0].split("/")[2:]
    stem = Path(unquote(parts[-1]) if parts else "").stem or host
    return Path(re.sub(r"[^\w.-]+", "-", stem)[:60].strip(".-") or "picture")


def _only_pictures(paths: Iterable[Path], leave_out: Path | None) -> list[Path]:
    found = sorted(path for path in paths if images.is_image_path(path) and path.is_file())
    if leave_out is None:
        return found
    folder = leave_out.resolve()
    return [path for path in found if not path.resolve().is_relative_to(folder)]


def keep_apart(places: Sequence[Path]) -> list[Path]:
    """Return the places with a number after each that another has taken: `dog`, `dog-2`."""
    taken: set[Path] = set(places)
    kept: set[Path] = set()
    found = []
    for place in places:
        free, number = place, 1
        while free in kept or (number > 1 and free in taken):
            number += 1
            free = place.with_name(f"{place.name}-{number}")
        kept.add(free)
        found.append(free)
    return found
