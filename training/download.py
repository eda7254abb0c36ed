"""Fetch the data sets that their publishers let one fetch, to where the readers of `evaluation.datasets` look.

Each archive is fetched to NAME.zip.part, checked, renamed to NAME.zip, unpacked beside it, noted in NAME.zip.done,
and removed. Whatever was interrupted goes on from there when run again.
"""

import hashlib
import http.client
import json
import os
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from tqdm import tqdm

from captioner.errors import DataError, OutputError

TIMEOUT = 60.0
"""Seconds without a byte after which a server is given up."""

MAX_RATIO = 100
"""An archive that claims to unpack to more times its size is not one of ours."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A zip file on a server, and what of it belongs where."""

    url: str
    members: str
    """What the names of the wanted members begin with."""
    folder: str = "."
    """Where they are unpacked, inside of the data set's folder."""
    size: int | None = None
    """Bytes; None: not known, so what the server says is taken."""
    md5: str | None = None
    """No publisher gives one: it is what several other projects hold this file to. None: not known."""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A data set that can be fetched."""

    archives: tuple[Archive, ...]
    layout: str
    """Its reader."""
    path: str
    """What the reader reads, inside of the data set's folder."""
    terms: str
    """On what terms it is given out."""


_COCO = "http://images.cocodataset.org"  # it has no certificate of its own, so not https: the checksums protect
_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"  # the authors' own place is gone
_COCO_TERMS = "annotations: CC BY 4.0; the photographs belong to those who took them (cocodataset.org/#termsofuse)"

SOURCES = {
    "flickr8k": Source(
        (
            Archive(
                f"{_FLICKR8K}/Flickr8k_text.zip", "Flickr", "Flickr8k_text", md5="bf6c1abcb8e4a833b7f922104de18627"
            ),
            Archive(
                f"{_FLICKR8K}/Flickr8k_Dataset.zip", "Flicker8k_Dataset/", md5="f18a1e2920de5bd84dae7cf08ec78978"
            ),
        ),
        layout="flickr8k",
        path=".",
        terms="for research and teaching; the photographs belong to those who took them",
    ),
    "coco2014": Source(
        (
            Archive(
                "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
                "dataset_coco.json",
                size=36_745_453,
            ),
            Archive(
                f"{_COCO}/annotations/annotations_trainval2014.zip",
                "annotations/captions_",
                size=252_872_794,
                md5="0a379cfc70b0e71301e0f377548639bd",
            ),
            Archive(
                f"{_COCO}/zips/val2014.zip",
                "val2014/",
                size=6_645_013_297,
                md5="a3d79f5ed8d289b7a7554ce06a5782b3",
            ),
            Archive(
                f"{_COCO}/zips/train2014.zip",
                "train2014/",
                size=13_510_573_713,
                md5="0da8c0bd3d6becc4dcb32757491aca88",
            ),
        ),
        layout="karpathy",
        path="dataset_coco.json",
        terms=_COCO_TERMS,
    ),
    "coco2017": Source(
        (
            Archive(
                f"{_COCO}/annotations/annotations_trainval2017.zip",
                "annotations/captions_",
                size=252_907_541,
                md5="f4bbac642086de4f52a3fdda2de5fa2c",
            ),
            Archive(
                f"{_COCO}/zips/val2017.zip",
                "val2017/",
                size=815_585_330,
                md5="442b8da7639aecaf257c1dceb8ba8c80",
            ),
            Archive(
                f"{_COCO}/zips/train2017.zip",
                "train2017/",
                size=19_336_861_798,
                md5="cced6f7f71b7629ddf16f17bbcfab6b2",
            ),
        ),
        layout="coco",
        path=".",
        terms=_COCO_TERMS,
    ),
}


def download(name: str, directory: Path, base: str | None = None) -> str:
    """Fetch a data set and return what to write into a configuration to train on it.

    Args:
        name: one of `SOURCES`.
        directory: the data set's folder; what is there already is not fetched again.
        base: take the archives from this address, under their own names; as they may be others, they are not
            compared with what the publisher says of his.

    Raises:
        DataError: when a server does not answer, or sends something else than was announced.
        OutputError: when the disk is too full, or cannot be written.
    """
    if base is not None and not base.startswith(("http://", "https://")):
        raise DataError(f"--from {base}: expected an address that begins with http:// or https://")
    source = SOURCES[name]
    for archive in source.archives:
        if base is not None:
            archive = Archive(f"{base.rstrip('/')}/{archive.name}", archive.members, archive.folder)
        file, done = directory / archive.name, directory / f"{archive.name}.done"
        if done.exists():
            continue
        fetch(archive, file)
        unpack(file, directory / archive.folder, archive.members)
        try:
            if hasattr(os, "sync"):
                os.sync()  # the archive goes only when its contents are on the disk
            done.write_text(f"{archive.url}\n")
            file.unlink()
        except OSError as error:
            raise _cannot_write(done, error) from error
    path = (directory / source.path).as_posix()
    return (
        f"# {name}, {source.terms}\n"
        f'[[datasets]]\nname = "{name}"\nlayout = "{source.layout}"\npath = {json.dumps(path, ensure_ascii=False)}'
    )


def fetch(archive: Archive, file: Path, timeout: float = TIMEOUT) -> None:
    """Fetch the archive to `file`, with a progress bar on a terminal; do nothing if it is there.

    A part from before is completed if the server can send the rest of that very file, and fetched anew otherwise.

    Raises:
        DataError: when the server does not answer within `timeout` seconds or breaks off, and what came is kept; or
            when size or checksum are not those that were announced.
        OutputError: when the disk is too full, or cannot be written.
    """
    if file.exists():
        return
    part, state = file.with_name(f"{file.name}.part"), file.with_name(f"{file.name}.part.json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        before = _read_state(part, state)
        if before is None or before.had < before.size:
            _transfer(archive, part, state, before, timeout)
        if archive.md5 is not None and (md5 := _md5(part)) != archive.md5:
            part.unlink()
            raise DataError(
                f"{archive.url}: damaged on its way, or another file than published: its MD5 is {md5}, expected "
                f"{archive.md5}. What was fetched is removed; run this again."
            )
        part.replace(file)
        state.unlink()
    except OSError as error:
        raise _cannot_write(file, error) from error


class _Part(NamedTuple):
    """What is there of a file."""

    had: int  # bytes
    size: int  # bytes of the whole file
    validator: str  # what tells this version of the file from others: its strong ETag, or its date


def _read_state(part: Path, state: Path) -> _Part | None:
    """Return what an earlier transfer left; None: nothing that can be completed."""
    try:
        noted = json.loads(state.read_text())
        found = _Part(part.stat().st_size, int(noted["size"]), str(noted["validator"] or ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.validator and 0 < found.had <= found.size else None


def _transfer(archive: Archive, part: Path, state: Path, before: _Part | None, timeout: float) -> None:
    """Append what is missing to the part, or write it anew, until it is whole."""
    # If-Range: the server sends all of the file if it is not the same as then.
    headers = {"Range": f"bytes={before.had}-", "If-Range": before.validator} if before else {}
    with _open(archive.url, headers, timeout) as response:
        tag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
        start, size = _span(response, archive.url)
        if start != 0 and (start, size, validator) != before:  # a server that does not keep to If-Range
            part.unlink()
            raise DataError(f"{archive.url}: has changed since its beginning was fetched. Run this again.")
        if archive.size not in (None, size):
            raise DataError(f"{archive.url}: has {size:,} bytes, expected {archive.size:,}. {_ADVICE}")
        _need_space(part.parent, size - start + size, "the archive and what is in it")
        if start == 0:
            part.unlink(missing_ok=True)  # before the state says what it is a part of
            state.write_text(json.dumps({"size": size, "validator": validator}))
        had = start
        with (
            part.open("ab") as stream,
            tqdm(total=size, initial=start, desc=archive.name, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := _read(response, min(_CHUNK, size - had), archive.url):
                stream.write(chunk)
                had += len(chunk)
                bar.update(len(chunk))
    if had < size:
        raise DataError(
            f"{archive.url}: the server broke off after {had:,} of {size:,} bytes. Run this again to go on."
        )


_ADVICE = "Is the network up? Run this again to go on, or name another server with --from."


def _open(url: str, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "captioner", **headers})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"{url}: the server says {error.code} {error.reason}. {_ADVICE}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be fetched ({getattr(error, 'reason', error)}). {_ADVICE}") from error


def _read(response: http.client.HTTPResponse, count: int, url: str) -> bytes:
    """Return some of the bytes that come next, at most `count`; none at the end."""
    try:
        return response.read1(count) if count else b""
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: the connection failed ({error}). {_ADVICE}") from error


def _span(response: http.client.HTTPResponse, url: str) -> tuple[int, int]:
    """Return where the bytes that come begin in the file, and the size of the whole file."""
    try:
        if response.status == 206:
            span = response.headers.get("Content-Range", "").removeprefix("bytes ").replace("-", "/")
            start, _, size = span.split("/")
            return int(start), int(size)
        return 0, int(response.headers.get("Content-Length", ""))
    except ValueError as error:
        raise DataError(f"{url}: the server does not say how long the file is. {_ADVICE}") from error


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(file: Path, folder: Path, members: str) -> None:
    """Unpack the members whose names begin with `members`, with a progress bar on a terminal.

    Files that are there with their size are left alone, as each appears when it is complete.

    Raises:
        DataError: when the archive is damaged (it is then removed), would write outside of the folder, or claims to
            unpack to more than `MAX_RATIO` times its size.
        OutputError: when the disk is too full, or cannot be written.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            wanted = [
                info for info in archive.infolist() if info.filename.startswith(members) and not info.is_dir()
            ]
            if not wanted:
                raise DataError(f"{file}: holds nothing named {members}... Is it another archive? Remove it.")
            for info in wanted:
                _check_member(file, info)
            if sum(info.file_size for info in wanted) > MAX_RATIO * file.stat().st_size:
                raise DataError(
                    f"{file}: claims to unpack to over {MAX_RATIO} times its size; not unpacked. Remove it."
                )
            missing = [info for info in wanted if not _is_there(folder / info.filename, info.file_size)]
            folder.mkdir(parents=True, exist_ok=True)
            _need_space(folder, sum(info.file_size for info in missing), f"the contents of {file.name}")
            for info in tqdm(missing, desc=f"unpack {file.name}", unit="file", disable=None):
                _unpack_member(archive, info, folder / info.filename)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        with suppress(OSError):
            file.unlink()
        raise DataError(f"{file}: damaged archive ({error}). It is removed; run this again to fetch it.") from error
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _check_member(file: Path, info: zipfile.ZipInfo) -> None:
    windows = PureWindowsPath(info.filename)  # knows all that can lead elsewhere on any system
    outside = windows.drive or windows.root or ".." in windows.parts or ".." in PurePosixPath(info.filename).parts
    if outside or stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(
            f"{file}: its member {info.filename!r} would lead outside of the folder; nothing is unpacked."
        )


def _is_there(target: Path, size: int) -> bool:
    try:
        return target.stat().st_size == size
    except FileNotFoundError:
        return False


def _unpack_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with archive.open(info) as source, part.open("wb") as stream:
        shutil.copyfileobj(source, stream, _CHUNK)  # never more bytes than `file_size`
    part.replace(target)


def _need_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: the disk has {free / 1e9:.1f} GB free, but {what} need {needed / 1e9:.1f} GB. Make room, "
            "or choose a folder on another disk."
        )


def _cannot_write(file: Path, error: OSError) -> OutputError:
    return OutputError(f"{file}: cannot write here ({error.strerror or error}). Is there room, and is it yours?")
