"""Readers of Parquet files, which hold pictures and captions: local ones, and data sets of the Hugging Face Hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from captioner import hub
from captioner.bulk import rows
from captioner.errors import DataError, ImageError, first_line
from captioner.installation import require_extra
from evaluation.datasets.files import Columns, PackedImage, Problems, Record, find_files, find_split, to_captions
from evaluation.datasets.shards import read_webdataset

MAX_GROUP = 512 << 20
"""Maximum size of the pictures of a row group, in bytes. To read a picture, its row group is read."""

GROUPS = 4
"""Number of row groups in memory."""

_LOCKS = tuple(Lock() for _ in range(64))
"""A row group is read by the first thread that needs it, while the others wait."""


@dataclass(frozen=True, slots=True)
class CellImage(PackedImage):
    """A picture in a Parquet file."""

    column: str
    group: int
    """Index of the row group."""
    row: int
    """Index in the row group."""

    def __call__(self) -> bytes:
        """Read the content.

        Raises:
            ImageError: if it cannot be read.
        """
        import pyarrow

        try:
            with _LOCKS[hash((self.file, self.group)) % len(_LOCKS)]:
                cells = _read_group(self.file, self.column, self.group)
            kind = rows.picture_kind(cells.type)
            content = rows.split_picture(str(kind), cells[self.row].as_py())[0]
        except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
            raise ImageError(f"{self.name}: cannot read this row ({first_line(error):.200}).") from error
        if content is None:
            raise ImageError(f"{self.name}: the column {self.column!r} has no picture here.")
        return content


@lru_cache(GROUPS)
def _read_group(file: Path, column: str, group: int) -> Any:
    """Return a column of a row group."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as table:
        return table.read_row_group(group, columns=[column], use_threads=False).column(0)


class _Names(NamedTuple):
    """Names of the columns of a file that are read; None: not read."""

    captions: tuple[str, ...]
    id: str | None
    split: str | None
    path: str | None
    """Of pictures, if it contains their paths."""


def read_parquet(path: Path, problems: Problems, columns: Columns = Columns()) -> list[Record]:  # noqa: B008
    """Parquet: a column of pictures (bytes, or `{bytes, path}` as on the Hugging Face Hub; or paths relative to the
    file), and one or several of captions, each a text or a list of texts.

    Without a column of ids, each row is a picture, and its id is the name of the file and the number of the row.
    The path is that of a file or a folder, or a pattern such as `train-*.parquet`.

    Raises:
        DataError: if a column is missing, or a row group too large.
        MissingExtraError: if pyarrow is not installed.
    """
    with require_extra("parquet", "reading Parquet files"):
        import pyarrow
    images: dict[
        tuple[str, str], Path | PackedImage
    ] = {}  # by id and split: pictures in two splits are found later
    captions: dict[tuple[str, str], tuple[str, ...]] = {}
    for file in find_files(path, ".parquet"):
        try:
            with rows.Table(str(file), rows.Columns(picture=columns.image or "image")) as table:
                names = _find_columns(file, table, columns)
                size = file.stat().st_size
                for number, group, row, values in _read_rows(table, names):
                    where = f"{file}, row {number}"
                    image_id = f"{file.name}#{number}" if names.id is None else str(values[names.id] or "")
                    split = values[names.split] if names.split else None
                    split = "" if split is None and columns.split else split
                    key = image_id, find_split(split, file, image_id, where, problems)
                    texts = to_captions(values[name] for name in names.captions)
                    if not image_id:
                        problems.add(f"rows without a value of {names.id}", where)
                    if not texts:
                        problems.add(f"rows without a text in {', '.join(names.captions)}", where)
                    image = (
                        file.parent / str(values[names.path])
                        if names.path
                        else CellImage(file, f"{table.picture} of row {number}", size, table.picture, group, row)
                    )
                    images.setdefault(key, image)
                    captions[key] = captions.get(key, ()) + texts
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file}: cannot read this Parquet file ({first_line(error):.200})") from error
    return [
        Record(image, image_id, captions[image_id, split], split) for (image_id, split), image in images.items()
    ]


def _find_columns(file: Path, table: rows.Table, columns: Columns) -> _Names:
    existing = table.schema.names
    captions = columns.captions or tuple(name for name in ("captions", "caption") if name in existing)[:1]
    wanted = [*(captions or ["captions"]), *filter(None, (columns.id, columns.split))]
    if missing := [name for name in wanted if name not in existing]:
        raise DataError(f"{file}: no column {missing[0]!r}. It has: {', '.join(existing)}")
    return _Names(
        captions,
        columns.id or None,
        columns.split or ("split" if "split" in existing else None),
        table.picture if table.kind == "text" else None,
    )


def _read_rows(table: rows.Table, names: _Names) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Yield the number of each row, its row group, its index there, and its values by the names of columns."""
    needed = list(dict.fromkeys([*names.captions, *filter(None, (names.id, names.split, names.path))]))
    metadata = table.file.metadata
    number = 0
    for group in range(metadata.num_row_groups):
        chunks = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
        size = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == table.picture
        )
        if size > MAX_GROUP and not names.path:
            raise DataError(
                f"{table.name}: row group {group} has {size / 1e6:,.0f} MB of pictures, all of which are read to "
                f"get any of them (limit: {MAX_GROUP / 1e6:,.0f} MB). Write it again with smaller row groups: "
                "pyarrow.parquet.write_table(table, file, row_group_size=100)"
            )
        first = number
        for batch in table.file.iter_batches(1024, row_groups=[group], columns=needed, use_threads=False):
            for values in batch.to_pylist():
                yield number, group, number - first, values
                number += 1


def read_hub(path: Path, problems: Problems, columns: Columns = Columns()) -> list[Record]:  # noqa: B008
    """A data set of the Hugging Face Hub, `hf://datasets/USER/NAME[@REVISION][/FILES]`, downloaded once.

    Its files are Parquet, or WebDataset shards if the pattern FILES ends with `.tar`; by default, they are all
    Parquet files. `refs/convert/parquet` is a revision of most data sets, also spelled `~parquet`.

    Raises:
        DataError: as `read_parquet` or `read_webdataset`; or if the download fails.
        MissingExtraError: if huggingface_hub or pyarrow is not installed.
    """
    files = hub.download_dataset(path.as_posix())
    return (read_webdataset if files.suffix == ".tar" else read_parquet)(files, problems, columns)
