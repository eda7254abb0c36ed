"""The rows of a unit: pictures with their keys, as a worker reads them."""

import itertools
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Self

from captioner import images
from captioner.bulk import storage
from captioner.errors import DataError, ImageError
from captioner.images import SUFFIXES
from captioner.installation import require_extra

MAX_TEXT = 16 << 20
"""Longest text of a shard that is carried along."""

MAX_NAME = 1 << 20
"""Longest name, or list of attributes, of a member of a shard. `tarfile` reads them whole."""


@dataclass(frozen=True)
class Unit:
    """A part of the input, which one worker reads. Its results are one file of the output."""

    kind: Literal["pictures", "shard", "table"]
    files: tuple[str, ...]
    """Paths or addresses: the pictures, or the one shard or table."""
    start: int = 0
    """First row of a table."""
    rows: int | None = None
    """Number of rows. None: unknown before it is read."""


@dataclass(frozen=True)
class Columns:
    """What is read of a row."""

    picture: str | None = None
    """The column of a table, or the suffix in a shard, that holds the picture. None finds it."""
    key: str | None = None
    """The column of a table that names the row. None: the path of the picture if the table has it, or else the
    number of the row."""
    keep: tuple[str, ...] = ()
    """Columns of a table, or suffixes in a shard, that are carried along."""


class DeniedError(ImageError):
    """A picture that must not be read: its own permissions, or the credentials of the whole run."""


class Row(NamedTuple):
    """A row of the input. Each has one row of the output."""

    key: str | None
    """None: not a row, but the rest of a damaged file, with an unknown number of rows."""
    source: str | None
    """The shard or table that it is in. None for a picture with a file of its own."""
    picture: Callable[[], bytes] | bytes | ImageError
    """The contents of the picture's file, a function that returns them, or the error."""
    kept: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """Arrow scalars of a table, or texts of a shard, by the names of `Columns.keep`."""


def read_rows(unit: Unit, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a unit, in constant memory.

    Raises:
        StorageError: if the storage fails. What is damaged, or missing, gives rows that say so.
    """
    if unit.kind == "pictures":
        for name in unit.files:
            yield Row(name, None, partial(read_picture, name))
        return
    file = unit.files[0]
    try:
        yield from _read_shard(file, columns) if unit.kind == "shard" else _read_table(unit, columns)
    except OSError as error:
        yield Row(None, file, ImageError(f"{file}: cannot read this file ({error.strerror or error})."))


def read_picture(name: str) -> bytes:
    """Return the contents of a picture's file, or of an address.

    Raises:
        ImageError: if there is no such picture.
        StorageError: if the storage fails; a web server that fails is an `ImageError`, as there are so many.
    """
    if name.startswith(("http://", "https://")):
        from captioner.fetch import fetch

        return fetch(name)
    try:
        return storage.read(name, images.MAX_BYTES)
    except PermissionError as error:
        raise DeniedError(f"{name}: cannot read this file (permission denied).") from error
    except OSError as error:
        raise ImageError(f"{name}: cannot read this file ({error.strerror or error}).") from error


DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged shard raises."""


class TarMember(tarfile.TarInfo):
    """A member of a shard. `tarfile` takes a damaged header for the end of the archive, and this reports it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """Return the next member.

        Raises:
            tarfile.ReadError: if its header is damaged or, as at the end of a truncated archive, missing.
        """
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end, as it should be
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # documented in `tarfile` as to be overridden
        extended = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type in (*extended, tarfile.SOLARIS_XHDTYPE) and self.size > MAX_NAME:
            raise tarfile.ReadError(f"a name of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def split_member_name(name: str) -> tuple[str, str]:
    """Return the key and the lower-case suffix (`jpg`, `seg.png`) of the name of a member, or two empty texts.

    A key is the path up to the first dot of its last part (https://github.com/webdataset/webdataset).
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else ("", "")


def _read_shard(file: str, columns: Columns) -> Iterator[Row]:
    """Yield a row for each key. Members with the same key stand together, and one of them is the picture."""
    seen: set[str] = set()
    try:
        with (
            storage.open_to_read(file, streams=True) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=TarMember) as tar,
        ):
            for key, members in itertools.groupby(_members(tar), key=lambda member: member[0]):
                fields = {suffix: _content(tar, info, suffix, columns) for _, suffix, info in members}
                if key is None:
                    raise tarfile.ReadError(*fields)
                row = _row_of_fields(file, key, fields, columns)
                if key in seen:
                    row = row._replace(picture=ImageError(f"{file}: {key}: this key occurs twice"))
                seen.add(key)
                yield row
    except DAMAGE as error:
        yield Row(None, file, ImageError(f"{file}: damaged after {len(seen):,} rows ({error})."))


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str | None, str, tarfile.TarInfo]]:
    """Yield key, suffix (`jpg`, `seg.png`) and member; where the archive is damaged, None and the reason, last."""
    try:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
            key, suffix = split_member_name(info.name)
            if info.isreg() and key:
                yield key, suffix, info
    except DAMAGE as error:
        yield None, str(error), tarfile.TarInfo()


def _is_picture(suffix: str, columns: Columns) -> bool:
    return suffix == columns.picture if columns.picture else f".{suffix}" in SUFFIXES


def _content(
    tar: tarfile.TarFile, info: tarfile.TarInfo, suffix: str, columns: Columns
) -> bytes | ImageError | None:
    """Return the contents of a member; None if they are not needed."""
    is_picture = _is_picture(suffix, columns)
    if not is_picture and suffix not in columns.keep:
        return None
    if info.size > (images.MAX_BYTES if is_picture else MAX_TEXT):
        return ImageError(f"{info.name}: a file of {info.size:,} bytes is too long.")
    stream = tar.extractfile(info)
    return stream.read() if stream else b""


def _row_of_fields(file: str, key: str, fields: dict[str, bytes | ImageError | None], columns: Columns) -> Row:
    kept: dict[str, Any] = {}
    problem = None
    for name in columns.keep:
        value = fields.get(name)
        if isinstance(value, ImageError):
            problem = value
        elif value is not None:
            kept[name] = value.decode("utf-8", "replace")
    pictures = [suffix for suffix in fields if _is_picture(suffix, columns)]
    if len(pictures) == 1 and problem is None:
        return Row(key, file, fields[pictures[0]] or b"", kept)
    if not pictures:
        problem = problem or ImageError(f"{key}: no picture has this key")
    names = ", ".join(pictures)
    return Row(key, file, problem or ImageError(f"{key}: several pictures have this key ({names}); name one"), kept)


def picture_kind(of: Any) -> Literal["bytes", "text", "struct"] | None:
    """Return how a column of an Arrow type stores pictures: as bytes, paths or `{bytes, path}`; None if it stores
    none."""
    from pyarrow import types

    if types.is_dictionary(of):
        of = of.value_type
    if types.is_binary(of) or types.is_large_binary(of) or types.is_binary_view(of):
        return "bytes"
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return "text"
    is_struct = types.is_struct(of) and {"bytes", "path"} & {of.field(i).name for i in range(of.num_fields)}
    return "struct" if is_struct else None


def split_picture(kind: str, value: Any) -> tuple[bytes | None, str | None]:
    """Return the contents of a picture's file, or else its path, of a value of a column of this kind."""
    if kind == "struct":
        value = value or {}
        return value.get("bytes"), value.get("path")
    return (None, value) if kind == "text" else (value, None)


class Table:
    """An open Parquet file."""

    def __init__(self, name: str, columns: Columns) -> None:
        """Open a file and find its columns.

        Raises:
            DataError: if it has no such columns.
            OSError: if there is no such file, or it is damaged.
            StorageError: if the storage fails.
        """
        with require_extra("bulk", "reading tables"):
            import pyarrow as arrow
            import pyarrow.parquet as parquet

        self.name = name
        self._stream = storage.open_to_read(name, streams=False)
        try:
            # Pages are read one after another: a row group may be larger than the memory.
            self.file = parquet.ParquetFile(self._stream, buffer_size=storage.BLOCK, pre_buffer=False)
            self.schema = self.file.schema_arrow
        except (arrow.ArrowException, ValueError) as error:
            self._stream.close()
            raise OSError(f"damaged: {' '.join(str(error).split())[:200]}") from error
        self.picture = columns.picture or self._find_picture()
        self.needed = list(dict.fromkeys([self.picture, *([columns.key] if columns.key else []), *columns.keep]))
        for column in self.needed:
            if column not in self.schema.names:
                raise DataError(f"{name}: no column {column!r}. It has: {', '.join(self.schema.names)}")
        kind = picture_kind(self.schema.field(self.picture).type)
        if kind is None:
            raise DataError(
                f"{name}: column {self.picture!r} has no pictures: expected bytes, text (a path or an address) or "
                f"{{bytes, path}}, got {self.schema.field(self.picture).type}"
            )
        self.kind = kind

    def __enter__(self) -> Self:
        """Return the table."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.file.close()
        self._stream.close()

    def _find_picture(self) -> str:
        kinds = {field.name: picture_kind(field.type) for field in self.schema}
        found = [name for name, kind in kinds.items() if kind in ("bytes", "struct")]
        found = found or [name for name in kinds if name.lower() in ("image", "path", "url", "file_name")]
        if len(found) != 1:
            raise DataError(
                f"{self.name}: which column has the pictures? Name it with --column. It has: "
                f"{', '.join(self.schema.names)}"
            )
        return found[0]


def _read_table(unit: Unit, columns: Columns) -> Iterator[Row]:
    import pyarrow as arrow

    name = unit.files[0]
    folder = name.rpartition("/")[0]
    with Table(name, columns) as table:
        number = unit.start
        stop = table.file.metadata.num_rows if unit.rows is None else unit.start + unit.rows
        first = 0  # row of the group
        for group in range(table.file.metadata.num_row_groups):
            at, first = first, first + table.file.metadata.row_group(group).num_rows
            end = min(stop, first)
            if end <= number:
                continue
            try:
                batches = table.file.iter_batches(32, row_groups=[group], columns=table.needed, use_threads=False)
                for batch in batches:
                    for index in range(max(number - at, 0), min(end - at, batch.num_rows)):
                        yield _row_of_batch(table, batch, index, number, folder, columns)
                        number += 1
                    at += batch.num_rows
                    if number == end:
                        break
            except (arrow.ArrowException, OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                for rest in range(number, end):
                    yield Row(str(rest), name, ImageError(f"{name}: row {rest} is damaged ({reason})."))
                number = end
            if number == stop:
                break


def _row_of_batch(table: Table, batch: Any, index: int, number: int, folder: str, columns: Columns) -> Row:
    content, path = split_picture(table.kind, batch.column(table.picture)[index].as_py())
    key = batch.column(columns.key)[index].as_py() if columns.key else path
    key = str(number) if key is None else str(key)
    kept = {column: batch.column(column)[index] for column in columns.keep}
    if content is not None:
        return Row(key, table.name, content, kept)
    if path:
        is_whole = "://" in path or path.startswith("/") or not folder
        return Row(key, table.name, partial(read_picture, path if is_whole else storage.join(folder, path)), kept)
    return Row(key, table.name, ImageError(f"{table.name}: row {number} has no picture."), kept)
