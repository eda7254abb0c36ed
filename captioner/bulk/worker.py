"""One worker: reads a unit, captions its pictures, and writes its file. It knows nothing of Ray."""

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from captioner.ahead import one_ahead
from captioner.bulk import storage
from captioner.bulk.output import FORMATS, Fields, Writer
from captioner.bulk.rows import Columns, DeniedError, Row, Unit, read_rows
from captioner.caption import Caption
from captioner.errors import ImageError
from captioner.search.settings import SearchSettings
from captioner.sources import Fetched
from captioner.version import __version__

if TYPE_CHECKING:
    from captioner.captioning import Captioner, Prepared

READERS = 8
"""Threads that read and decode pictures in a worker: they wait for storage most of the time."""

BATCH_BYTES = 64 << 20
"""Bytes of picture files after which a batch is full, however few they are."""

ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}
"""Variables of a worker's process: its threads and Ray's would otherwise spread what they free over many heaps of
the C library, which grow by about 1.5 KB a picture."""

STEP_SECONDS = 5.0
"""Time after which a worker reports."""


@dataclass(frozen=True)
class Job:
    """What is the same for all units of a run."""

    output: str
    """The folder."""
    format: str
    """A key of `captioner.bulk.output.FORMATS`."""
    search: SearchSettings
    columns: Columns
    fields: Fields
    batch_size: int = 32
    """Pictures that go through the network together."""

    def file(self, number: int) -> str:
        """Return the file of a unit's results."""
        return storage.join(self.output, f"part-{number:08d}{FORMATS[self.format].suffix}")


class Assignment(NamedTuple):
    """A unit for a worker."""

    number: int
    unit: Unit
    bad: frozenset[int] = frozenset()
    """Indices of rows that end the process that reads them, and so are not read."""
    careful_from: int | None = None
    """Index of the first row to read and report alone, so that a row that ends the process is found."""


class Progress(NamedTuple):
    """What a worker did since its last report."""

    rows: int
    failed: int
    errors: tuple[str, ...]
    """Of the first failed rows."""
    is_done: bool
    """Whether the unit is finished, and its file is there."""


class Worker:
    """Works on one unit at a time, in short steps, each of which reports progress."""

    def __init__(self, job: Job, load: "Callable[[], Captioner]") -> None:
        """Hold the settings."""
        self._job = job
        self._load = load
        self._steps: Iterator[list[tuple[Row, Caption | str]]] = iter(())
        self._seconds = STEP_SECONDS

    def start(self) -> str:
        """Load the model, and return the version of this package.

        Raises:
            CaptionerError: if the model cannot be used here.
        """
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities in files that it then reads well
        self._model = self._load()
        del self._load  # it holds the contents of the file
        self._readers = ThreadPoolExecutor(READERS)  # for all units: threads of each unit would leave memory behind
        return __version__

    def step(self, assignment: Assignment | None) -> Progress:
        """Begin a unit, or with None continue the one that was begun, for some seconds.

        Raises:
            StorageError: if the storage fails. The unit can be begun again.
            CaptionerError: if the model or the settings cannot be used, or nothing can be written.
        """
        if assignment is not None:
            self._steps = self._caption(assignment)
            self._seconds = STEP_SECONDS if assignment.careful_from is None else 0
        rows = failed = 0
        errors: list[str] = []
        deadline = time.monotonic() + self._seconds
        for batch in self._steps:
            rows += len(batch)
            for _, result in batch:
                if isinstance(result, str):
                    failed += 1
                    errors += [result] * (len(errors) < 3)
            if time.monotonic() >= deadline:
                return Progress(rows, failed, tuple(errors), False)
        return Progress(rows, failed, tuple(errors), True)

    def _caption(self, assignment: Assignment) -> Iterator[list[tuple[Row, Caption | str]]]:
        """Yield the rows of a unit with their results, in batches. The file is complete after the last."""
        job = self._job
        writer_class: type[Writer] = FORMATS[job.format]
        denied = rows = 0
        with storage.create(job.file(assignment.number)) as file:
            writer = writer_class(file, job.fields)
            for batch in self._prepare(assignment, writer_class.needs_content):
                prepared = [item.picture for item in batch if not isinstance(item.picture, ImageError)]
                captions = iter(self._model.caption_prepared(prepared, job.search))
                results = [
                    str(it.picture) if isinstance(it.picture, ImageError) else next(captions) for it in batch
                ]
                writer.add([(it.row, it.content, result) for it, result in zip(batch, results, strict=True)])
                rows += len(batch)
                denied += sum(isinstance(it.picture, DeniedError) for it in batch)
                yield [(it.row, result) for it, result in zip(batch, results, strict=True)]
            if rows and denied == rows:
                raise storage.StorageError(
                    f"no permission to read any of {rows:,} pictures. Renew the credentials."
                )
            writer.close()

    def _prepare(self, assignment: Assignment, keep: bool) -> "Iterator[list[_Item]]":
        """Yield batches of pictures that were read.

        The next batch is read while one is used, up to the row from which the worker must be careful.
        """
        rows = enumerate(read_rows(assignment.unit, self._job.columns))

        def load(rows: Iterator[tuple[int, Row]], size: int) -> "list[_Item]":
            return list(self._readers.map(partial(self._read, keep=keep), _take(rows, size, assignment.bad)))

        trusted = itertools.islice(rows, assignment.careful_from)
        size = self._job.batch_size
        yield from itertools.takewhile(bool, one_ahead(lambda _: load(trusted, size), itertools.count()))
        if assignment.careful_from is not None:
            yield from itertools.takewhile(bool, (load(rows, 1) for _ in itertools.count()))

    def _read(self, row: Row, keep: bool) -> "_Item":
        if isinstance(row.picture, ImageError):
            return _Item(row, None, row.picture)
        picture = row.picture
        source = Fetched(row.key or "", picture if callable(picture) else lambda: picture, keep)
        content = None
        try:
            content = source() if keep else None
            prepared: Prepared | ImageError = self._model.prepare(source)
        except ImageError as error:
            prepared = error
        return _Item(row._replace(picture=b""), content, prepared)


class _Item(NamedTuple):
    """A row whose picture was read."""

    row: Row
    content: bytes | None
    """The picture's file, if it is to be written."""
    picture: "Prepared | ImageError"


def _take(rows: Iterator[tuple[int, Row]], size: int, bad: frozenset[int]) -> Iterator[Row]:
    """Yield the rows of a batch."""
    length = 0
    for index, row in itertools.islice(rows, size):
        if index in bad:
            row = row._replace(picture=ImageError(f"{row.key}: ended the process that reads it, several times."))
        length += len(row.picture) if isinstance(row.picture, bytes) else 0
        yield row
        if length >= BATCH_BYTES:
            return


def load_model(name: str, content: bytes, device: str, threads: int) -> "Captioner":
    """Return a captioner of the contents of a model file, which messages call by its name.

    Raises:
        CaptionerError: if it cannot be used on this device.
    """
    from captioner.captioning import load

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        model = load(file.name, device, threads=threads)
    model.path = Path(name)
    return model
