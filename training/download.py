"""Download published data sets, in the layouts of `evaluation.datasets`.

Each archive is downloaded to NAME.zip.part, verified, renamed to NAME.zip, unpacked, recorded in NAME.zip.done, and
removed. An interrupted download resumes when it is run again.
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

from tqdm.auto import tqdm

from captioner.errors import DataError, OutputError

TIMEOUT = 60.0
"""Timeout of a read, in seconds."""

MAX_RATIO = 100
"""Maximum compression ratio of an archive."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A zip file on a server, and the members to unpack."""

    url: str
    members: str
    """Prefix of the names of the members to unpack."""
    size: int | None = None
    """Size in bytes; None: unknown."""
    md5: str | None = None
    """Checksum that several other projects use, as publishers give none; None: unknown."""
    folder: str = "."
    """Target folder, relative to that of the data set."""

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class PublishedDataset:
    """A data set that can be downloaded."""

    archives: tuple[Archive, ...]
    layout: str
    """Its layout, a key of `evaluation.datasets.READERS`."""
    path: str
    """The path for the reader, relative to the folder of the data set."""
    terms: str
    """Its licence terms."""


_COCO = "http://images.cocodataset.org"  # no https, as it has no certificate; the checksums protect
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent"
_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"  # the authors' server is offline
_COCO_TERMS = "annotations: CC BY 4.0; the photographs belong to those who took them (cocodataset.org/#termsofuse)"

SOURCES = {
    "flickr8k": PublishedDataset(
        (
            Archive(
                f"{_FLICKR8K}/Flickr8k_text.zip",
                "Flickr",
                md5="bf6c1abcb8e4a833b7f922104de18627",
                folder="Flickr8k_text",
            ),
            Archive(
                f"{_FLICKR8K}/Flickr8k_Dataset.zip", "Flicker8k_Dataset/", md5="f18a1e2920de5bd84dae7cf08ec78978"
            ),
        ),
        layout="flickr8k",
        path=".",
        terms="for research and teaching; the photographs belong to those who took them",
    ),
    "coco2014": PublishedDataset(
        (
            Archive(f"{_KARPATHY}/caption_datasets.zip", "dataset_coco.json", 36_745_453),
            Archive(
                f"{_COCO}/annotations/annotations_trainval2014.zip",
                "annotations/captions_",
                252_872_794,
                "0a379cfc70b0e71301e0f377548639bd",
            ),
            Archive(f"{_COCO}/zips/val2014.zip", "val2014/", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
            Archive(
                f"{_COCO}/zips/train2014.zip", "train2014/", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"
            ),
        ),
        layout="karpathy",
        path="dataset_coco.json",
        terms=_COCO_TERMS,
    ),
    "coco2017": PublishedDataset(
        (
            Archive(
                f"{_COCO}/annotations/annotations_trainval2017.zip",
                "annotations/captions_",
                252_907_541,
                "f4bbac642086de4f52a3fdda2de5fa2c",
            ),
            Archive(f"{_COCO}/zips/val2017.zip", "val2017/", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
            Archive(
                f"{_COCO}/zips/train2017.zip", "train2017/", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"
            ),
        ),
        layout="coco",
        path=".",
        terms=_COCO_TERMS,
    ),
}


def download(name: str, directory: Path, base: str | None = None) -> str:
    """Download a data set, and return its lines for a configuration.

    Args:
        name: a key of `SOURCES`.
        directory: folder of the data set; existing files are not downloaded again.
        base: download the archives from this URL instead, without verification.

    Raises:
        DataError: if a server does not answer, or sizes or checksums do not match.
        OutputError: if the disk is full, or cannot be written.
    """
    if base is not None and not base.startswith(("http://", "https://")):
        raise DataError(f"--from {base}: expected a URL that starts with http:// or https://")
    source = SOURCES[name]
    for archive in source.archives:
        if base is not None:
            archive = Archive(f"{base.rstrip('/')}/{archive.name}", archive.members, folder=archive.folder)
        file, done = directory / archive.name, directory / f"{archive.name}.done"
        if done.exists():
            continue
        fetch_archive(archive, file)
        unpack(file, directory / archive.folder, archive.members)
        try:
            if hasattr(os, "sync"):
                os.sync()  # before the archive is removed
            done.write_text(f"{archive.url}\n")
            file.unlink()
        except OSError as error:
            raise _cannot_write(done, error) from error
    path = (directory / source.path).as_posix()
    return (
        f"# {name}, {source.terms}\n"
        f'[[datasets]]\nname = "{name}"\nlayout = "{source.layout}"\npath = {json.dumps(path, ensure_ascii=False)}'
    )


def fetch_archive(archive: Archive, file: Path, timeout: float = TIMEOUT) -> None:
    """Download an archive, with a progress bar on a terminal; do nothing if the file exists.

    A partial file is completed if the server supports it and the file has not changed, otherwise downloaded again.

    Raises:
        DataError: if the server does not answer within `timeout` seconds or closes the connection (the partial file
            is kept), or if size or checksum do not match.
        OutputError: if the disk is full, or cannot be written.
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
                f"{archive.url}: checksum mismatch: MD5 {md5}, expected {archive.md5}. The file is removed; run "
                "the command again"
            )
        part.replace(file)
        state.unlink()
    except OSError as error:
        raise _cannot_write(file, error) from error


class _Part(NamedTuple):
    """A partial file."""

    had: int  # bytes
    size: int  # bytes of the whole file
    validator: str  # strong ETag or date of this version of the file


def _read_state(part: Path, state: Path) -> _Part | None:
    """Return the partial file of an earlier transfer; None if it cannot be completed."""
    try:
        noted = json.loads(state.read_text())
        found = _Part(part.stat().st_size, int(noted["size"]), str(noted["validator"] or ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.validator and 0 < found.had <= found.size else None


def _transfer(archive: Archive, part: Path, state: Path, before: _Part | None, timeout: float) -> None:
    """Download the rest of a partial file, or all of it."""
    # If-Range: the server sends the whole file if it has changed.
    headers = {"Range": f"bytes={before.had}-", "If-Range": before.validator} if before else {}
    with _open(archive.url, headers, timeout) as response:
        tag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
        start, size = _span(response, archive.url)
        if start != 0 and (start, size, validator) != before:  # a server that ignores If-Range
            part.unlink()
            raise DataError(f"{archive.url}: has changed since the download started. Run the command again")
        if archive.size not in (None, size):
            raise DataError(f"{archive.url}: size mismatch: {size:,} bytes, expected {archive.size:,}. {_ADVICE}")
        _need_space(part.parent, size - start + size, "the archive and its contents")
        if start == 0:
            part.unlink(missing_ok=True)  # before the state describes the new file
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
            f"{archive.url}: the server closed the connection after {had:,} of {size:,} bytes. Run the command "
            "again to resume"
        )


_ADVICE = "Check the network and run the command again to resume, or choose another server with --from"


def _open(url: str, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "captioner", **headers})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"{url}: the server answered {error.code} {error.reason}. {_ADVICE}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be downloaded ({getattr(error, 'reason', error)}). {_ADVICE}") from error


def _read(response: http.client.HTTPResponse, count: int, url: str) -> bytes:
    """Return at most `count` of the next bytes; empty at the end."""
    try:
        return response.read1(count) if count else b""
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: the connection failed ({error}). {_ADVICE}") from error


def _span(response: http.client.HTTPResponse, url: str) -> tuple[int, int]:
    """Return the offset of the response in the file, and the size of the whole file."""
    try:
        if response.status == 206:
            span = response.headers.get("Content-Range", "").removeprefix("bytes ").replace("-", "/")
            start, _, size = span.split("/")
            return int(start), int(size)
        return 0, int(response.headers.get("Content-Length", ""))
    except ValueError as error:
        raise DataError(f"{url}: the server does not send the size of the file. {_ADVICE}") from error


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(file: Path, folder: Path, members: str) -> None:
    """Unpack the members whose names start with `members`, with a progress bar on a terminal.

    Files that exist with the right size are skipped, as each appears when it is complete.

    Raises:
        DataError: if the archive is damaged (it is then removed), would write outside of the folder, or unpacks to
            more than `MAX_RATIO` times its size.
        OutputError: if the disk is full, or cannot be written.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            wanted = [
                info for info in archive.infolist() if info.filename.startswith(members) and not info.is_dir()
            ]
            if not wanted:
                raise DataError(f"{file}: contains no member {members}*. Remove the file if it is another archive")
            for info in wanted:
                _check_member(file, info)
            if sum(info.file_size for info in wanted) > MAX_RATIO * file.stat().st_size:
                raise DataError(
                    f"{file}: not unpacked, because its contents exceed {MAX_RATIO} times its size. Remove the file"
                )
            missing = [info for info in wanted if not _is_there(folder / info.filename, info.file_size)]
            folder.mkdir(parents=True, exist_ok=True)
            _need_space(folder, sum(info.file_size for info in missing), f"the contents of {file.name}")
            for info in tqdm(missing, desc=f"unpack {file.name}", unit="file", disable=None):
                _unpack_member(archive, info, folder / info.filename)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        with suppress(OSError):
            file.unlink()
        raise DataError(f"{file}: damaged archive ({error}). It is removed; run the command again") from error
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _check_member(file: Path, info: zipfile.ZipInfo) -> None:
    windows = PureWindowsPath(info.filename)  # covers absolute paths and drives of any system
    outside = windows.drive or windows.root or ".." in windows.parts or ".." in PurePosixPath(info.filename).parts
    if outside or stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(f"{file}: the member {info.filename!r} is outside of the folder; nothing is unpacked")


def _is_there(target: Path, size: int) -> bool:
    try:
        return target.stat().st_size == size
    except FileNotFoundError:
        return False


def _unpack_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with archive.open(info) as source, part.open("wb") as stream:
        shutil.copyfileobj(source, stream, _CHUNK)  # at most `file_size` bytes
    part.replace(target)


def _need_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: {free / 1e9:.1f} GB are free, but {what} need {needed / 1e9:.1f} GB. Free some space, or "
            "choose a folder on another disk"
        )


def _cannot_write(file: Path, error: OSError) -> OutputError:
    return OutputError(f"{file}: cannot write this file or folder ({error.strerror or error})")
