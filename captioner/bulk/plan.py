"""What there is to caption, cut into units: blocks of pictures, WebDataset shards, and parts of Parquet tables.

A unit is read by one worker, and its results are one file of the output. The plan of a run is written once, so that
a resumed run has the same units, whatever was added to the input meanwhile.
"""

import glob
import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Literal

from captioner import images
from captioner.bulk import storage
from captioner.bulk.rows import Columns, Table, Unit
from captioner.errors import DataError

SHARDS = (".tar", ".tar.gz", ".tgz")
TABLE = ".parquet"

AT_ONCE = 16
"""Files that are looked at together while a plan is made."""


def write_plan(url: str, units: Iterable[Unit]) -> tuple[int, int | None]:
    """Write units to a file, whole or not at all, and return the number of units and of rows.

    The file has one JSON object a line, compressed.

    Raises:
        CaptionerError: if the input cannot be read, or the file cannot be written.
    """
    count, rows = 0, 0
    is_known = True
    with storage.create(url) as file, gzip.open(file, "wt", encoding="ascii", compresslevel=3) as text:
        for unit in units:
            text.write(json.dumps(asdict(unit)) + "\n")
            count += 1
            rows += unit.rows or 0
            is_known = is_known and unit.rows is not None
    return count, rows if is_known else None


def read_plan(url: str) -> Iterator[Unit]:
    """Yield the units of a file in the order of their numbers.

    Raises:
        StorageError: if the file cannot be read.
    """
    with storage.open_to_read(url, streams=True) as file, gzip.open(file, "rt", encoding="ascii") as text:
        for line in text:
            values = json.loads(line)
            yield Unit(**{**values, "files": tuple(values["files"])})


def make_plan(names: Iterable[str], columns: Columns, size: int) -> Iterator[Unit]:
    """Yield the units of an input.

    Args:
        names: each a picture, a shard, a table, an address of one, a folder or prefix of them, or a pattern with
            `*`, `?`, `[...]`, `{a,b}` or `{000..123}`.
        columns: that every table must have.
        size: number of pictures of a unit, and about that of rows of a table.

    Raises:
        CaptionerError: if a name leads to nothing, or a table has no such columns.
    """
    found = itertools.chain.from_iterable(map(_expand, names))
    for kind, files in itertools.groupby(found, key=_kind_of):
        if kind == "pictures":
            while block := tuple(itertools.islice(files, size)):
                yield Unit("pictures", block, rows=len(block))
            continue
        with ThreadPoolExecutor(AT_ONCE) as pool:
            while some := list(itertools.islice(files, 4 * AT_ONCE)):
                if kind == "shard":
                    for file, is_there in zip(some, pool.map(storage.exists, some), strict=True):
                        if not is_there:
                            raise DataError(f"{file}: no such file")
                        yield Unit("shard", (file,))
                else:
                    for units in pool.map(lambda file: _cut_table(file, columns, size), some):
                        yield from units


def _kind_of(name: str) -> Literal["pictures", "shard", "table"]:
    lowered = name.lower()
    return "shard" if lowered.endswith(SHARDS) else "table" if lowered.endswith(TABLE) else "pictures"


def _is_file_name(name: str) -> bool:
    lowered = name.lower()
    return lowered.endswith((*SHARDS, TABLE)) or lowered.endswith(tuple(images.SUFFIXES | images.OTHER_SUFFIXES))


def _expand(name: str) -> Iterator[str]:
    """Yield the files that a name of the input stands for."""
    if re.match("https?://", name):
        yield from expand_braces(name)
        return
    if storage.is_local(name) and not glob.has_magic(name) and "{" not in name and storage.exists(name):
        yield name  # whatever it is called
        return
    for pattern in expand_braces(name):
        if glob.has_magic(pattern):
            files = storage.find_matches(pattern)
        elif _is_file_name(pattern):
            files = iter([pattern])
        else:
            files = _find_in_folder(pattern)
        first = next(files, None)
        if first is None:
            raise DataError(f"{pattern}: no pictures, shards (.tar) or tables (.parquet) here")
        yield first
        yield from files


def _find_in_folder(folder: str) -> Iterator[str]:
    """Yield the files in a folder or below a prefix, which must be of one kind."""
    if not storage.is_folder(folder):
        raise DataError(f"{folder}: no such file or folder")
    kinds = set()
    for file in storage.find(folder):
        kind = _kind_of(file)
        last = file.rpartition("/")[2]
        if (kind == "pictures" and not images.is_image_path(last)) or last.startswith("_"):
            continue
        kinds.add(kind)
        if len(kinds) > 1:
            raise DataError(
                f"{folder}: this folder has {' and '.join(sorted(_PLURALS[k] for k in kinds))}. "
                f"Name those that you mean, such as '{storage.join(folder, '*.tar')}'."
            )
        yield file


_PLURALS = {"pictures": "pictures", "shard": "shards", "table": "tables"}


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern such as `train-{000..146}.tar` or `{train,dev}.tar` stands for.

    Braces may stand several times, and not in each other. Numbers keep their leading zeros.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    if numbers := re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", match[1]):
        first, last = map(int, numbers.groups())
        width = len(numbers[1])
        choices: Iterable[str] = (f"{number:0{width}d}" for number in range(first, last + 1))
        if last < first:
            raise DataError(f"{pattern}: {{{match[1]}}} counts down. Write the smaller number first.")
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        choices = [match[0].replace("{", "\0").replace("}", "\1")]  # a name that contains braces
    for choice in choices:
        for name in expand_braces(before + choice + after):
            yield name.replace("\0", "{").replace("\1", "}")


def _cut_table(file: str, columns: Columns, size: int) -> list[Unit]:
    """Return units of about `size` rows, or one for a damaged table, which the worker reports.

    Small row groups go together. Large ones are cut where they hold paths alone: to reach the middle of a row
    group, all before it is read.

    Raises:
        DataError: if there is no such table, or it lacks a column.
    """
    try:
        with Table(file, columns) as table:
            metadata = table.file.metadata
            groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            is_cut = table.kind == "text"
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file") from error
    except OSError:
        return [Unit("table", (file,))]
    units = []
    start = rows = 0
    for count in groups:
        rows += count
        while rows >= size:
            part = size if is_cut else rows
            units.append(Unit("table", (file,), start, part))
            start, rows = start + part, rows - part
    if rows:
        units.append(Unit("table", (file,), start, rows))
    return units


def describe(unit: Unit) -> str:
    """Return what messages call a unit."""
    if unit.kind == "pictures":
        return unit.files[0] if len(unit.files) == 1 else f"{unit.files[0]} to {unit.files[-1]}"
    if unit.kind == "table" and unit.rows is not None:
        return f"{unit.files[0]}, rows {unit.start:,} to {unit.start + unit.rows - 1:,}"
    return unit.files[0]
