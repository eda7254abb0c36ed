"""A run over many pictures: find them, skip what is done, and write the results.

A picture's job is planned just before it is read, and dropped when its results are written. So a run over millions
of pictures starts at once, and needs memory for two batches, the names of one folder, and 8 bytes for each picture
that is in the output file already.
"""

import errno
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from captioner.caption import Caption
from captioner.errors import CaptionerError, ImageError, OutputError
from captioner.files import cannot_write, is_file, is_folder, write_atomically
from captioner.images import Source
from captioner.output import FORMATS, Sidecars, write_sidecar
from captioner.resume import Output, open_output
from captioner.search.settings import SearchSettings
from captioner.sources import Fetched, Found, NotFound, Skipped, find_pictures, fits_list, is_single, open_list

if TYPE_CHECKING:
    from captioner.captioning import Captioner

Results = Iterable[tuple[Source, Caption | ImageError]]
Show = Callable[[Results], Results]


@dataclass(frozen=True)
class Selection:
    """The pictures to caption."""

    names: tuple[str, ...] = ()
    """Files, folders, patterns, URLs, and `-` for standard input."""
    list_file: str | None = None
    """A file of further names, not patterns; `-` is standard input."""
    null: bool = False
    """Whether names in the list, and in that of failures, end with NUL characters instead of newlines."""
    shard: tuple[int, int] = (1, 1)
    """(K, N): take every Nth picture, starting at the Kth."""

    @property
    def is_single(self) -> bool:
        """Whether it is one picture, whose caption is printed without a name."""
        return self.list_file is None and len(self.names) == 1 and is_single(self.names[0])


@dataclass(frozen=True)
class OverlaySettings:
    """How to draw the attention."""

    folder: Path
    format: str = "png"
    """`png`, `gif` or `html`."""
    colours: str = "white"
    """One of `captioner.overlay.COLOURS`."""
    head: int | None = None
    """The attention head to draw, from 0. None: the mean of all heads."""


@dataclass(frozen=True)
class Destination:
    """Where and how to write the captions."""

    output: str | None = None
    """A file or a stream. None: standard output."""
    format: str = "text"
    """A key of `captioner.output.FORMATS`."""
    attention: bool = False
    """Whether JSON Lines include the attention maps."""
    sidecar: str | None = None
    """Suffix of sidecar files. None: write none."""
    overlay: OverlaySettings | None = None
    existing: str = "skip"
    """`skip`, `overwrite` or `append`: what to do with existing results."""
    prefix: str = ""
    suffix: str = ""
    min_confidence: float = 0.0
    """Withhold captions with less confidence: the line of the picture has no words, and nothing else is written."""
    failures: str | None = None
    """File to list the pictures that failed."""


class Job(NamedTuple):
    """A picture and its missing results."""

    picture: Found
    line: bool
    sidecar: Path | None
    overlay: bool


@dataclass
class Counts:
    """Statistics of a run."""

    pictures: int = 0
    done: int = 0
    """Pictures whose results all exist from earlier runs."""
    failed: int = 0
    """Pictures that could not be captioned, or whose results could not all be written."""
    withheld: int = 0
    """Pictures whose caption was withheld."""
    listed: int = 0
    """Names in the list."""
    not_found: int = 0
    """Names without pictures, and folders that cannot be read."""
    skipped: Skipped = field(default_factory=Skipped)


class Run:
    """A run over many pictures. In its context, the list and the output are open, and the output is locked."""

    def __init__(
        self, selection: Selection, destination: Destination, candidates: int, report: Callable[[str], None]
    ) -> None:
        """Prepare a run with `candidates` captions of each picture; `report` gets a line for each failure.

        Raises:
            OutputError: if the suffix of sidecar files is invalid.
        """
        self.counts = Counts()
        self._selection = selection
        self._destination = destination
        self._candidates = candidates
        self._report = report
        self._skips = destination.existing == "skip"
        self._format = FORMATS[destination.format](names=not selection.is_single, attention=destination.attention)
        self._nameless = destination.format == "text" and selection.is_single  # lines without names
        self._sidecars = Sidecars(destination.sidecar) if destination.sidecar else None
        self._overlays = Overlays(destination.overlay, destination.existing) if destination.overlay else None

    def __enter__(self) -> Self:
        """Open the list of pictures and the output.

        Raises:
            CaptionerError: if the list cannot be read, or the output must not or cannot be written.
        """
        selection, destination = self._selection, self._destination
        with ExitStack() as stack:
            self._listed: Iterator[str] = iter(())
            if selection.list_file is not None:
                _check_not_same(selection.list_file, destination.output)
                self._listed = stack.enter_context(open_list(selection.list_file, null=selection.null))
            self._failures = stack.enter_context(_Failures(destination.failures, null=selection.null))
            existing = "refuse" if self._nameless and destination.existing != "overwrite" else destination.existing
            self._output: Output = stack.enter_context(
                open_output(destination.output, self._format, existing, self._candidates)
            )
            self._context = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the list and the output."""
        self._context.close()

    def execute(
        self, load: "Callable[[], Captioner]", settings: SearchSettings, batch_size: int, show: Show = iter
    ) -> None:
        """Caption the pictures whose results are missing, and write the results.

        Args:
            load: returns the model; called when there is a first picture to caption.
            settings: search settings.
            batch_size: number of pictures that go through the network together.
            show: wraps the iterator of results, to show the progress.

        Raises:
            CaptionerError: if the list, the output, the model or a setting is invalid. Pictures that fail are
                reported and counted instead.
            BrokenPipeError: if the reader of the output has closed it.
        """
        jobs = self._plan_jobs()
        first = next(jobs, None)
        if first is not None:
            model = load()
            pending: deque[Job] = deque()

            def sources() -> Iterator[Source]:
                for job in chain([first], jobs):
                    pending.append(job)
                    yield job.picture.source

            for _, result in show(model.caption_batches(sources(), settings, batch_size)):
                self._finish_job(pending.popleft(), result)
        if not (self.counts.failed or self.counts.not_found):
            self._output.finish()
        self._failures.write()
        if self._failures.unlisted:
            self._report(
                f"not listed in {self._destination.failures}, because their names contain line breaks: "
                f"{self._failures.unlisted:,}. Add --null to list all."
            )

    def _plan_jobs(self) -> Iterator[Job]:
        """Yield the pictures of the shard with missing results."""
        shard, shards = self._selection.shard
        position = 0
        for found in self._find():
            if isinstance(found, NotFound):
                self.counts.not_found += 1
                self._report(f"error: {found.name}: {found.reason}")
                if is_folder(found.name):  # not a pattern, which a list cannot contain
                    self._failures.add(found.name)
                continue
            position += 1
            if (position - shard) % shards:
                continue
            self.counts.pictures += 1
            try:
                job = self._plan_job(found)
            except OutputError as error:
                self._fail(found, error)
                continue
            if job is None:
                self.counts.done += 1
                continue
            if job.line:
                self._output.expect(found.name)
            yield job

    def _find(self) -> Iterator[Found | NotFound]:
        overlay, skipped = self._destination.overlay, self.counts.skipped
        folder = overlay.folder if overlay else None
        yield from find_pictures(self._selection.names, overlays=folder, skipped=skipped)
        yield from find_pictures(self._count_listed(), overlays=folder, skipped=skipped, patterns=False)

    def _count_listed(self) -> Iterator[str]:
        for name in self._listed:
            self.counts.listed += 1
            yield name

    def _plan_job(self, picture: Found) -> Job | None:
        """Return the results of a picture to write: missing ones, or those to replace; None without any."""
        line = picture.kind == "stream" or not self._output.has(picture.name)
        sidecar = self._find_sidecar(picture)
        overlay = self._overlays is not None and not self._overlays.has(picture)
        if self._destination.output is None and (self._sidecars or self._overlays):
            line = sidecar is not None or overlay  # a line that is only printed is not captioned for
        return Job(picture, line, sidecar, overlay) if line or sidecar or overlay else None

    def _find_sidecar(self, picture: Found) -> Path | None:
        if self._sidecars is None:
            return None
        if picture.kind != "file":
            raise OutputError(f"{picture.name}: --sidecar needs files; nothing can be written beside this.")
        path = self._sidecars.path(picture.name)
        return None if self._skips and os.path.lexists(path) else path

    def _finish_job(self, job: Job, result: Caption | ImageError) -> None:
        """Write the results of a picture."""
        picture, destination = job.picture, self._destination
        if isinstance(result, ImageError):
            self._fail(picture, result)
        else:
            caption = result.withhold(destination.min_confidence)
            caption = _enclose(destination.prefix, caption, destination.suffix)
            is_withheld = caption.confidence is not None and caption.confidence < destination.min_confidence
            self.counts.withheld += is_withheld
            if job.line and not (is_withheld and self._nameless):
                self._output.append(self._format.lines(picture.name, caption))
            try:
                # Sidecars and overlays are captions, too.
                if job.sidecar and not is_withheld and not (self._skips and os.path.lexists(job.sidecar)):
                    write_sidecar(job.sidecar, caption, "refuse" if self._skips else destination.existing)
                if job.overlay and not is_withheld and self._overlays:
                    self._overlays.save(picture, caption)
            except (ImageError, OutputError) as error:
                self._fail(picture, error)
        if isinstance(picture.source, Fetched):
            picture.source.forget()

    def _fail(self, picture: Found, error: CaptionerError) -> None:
        self.counts.failed += 1
        self._failures.add(picture.name)
        self._report(f"error: {error}")


class Overlays:
    """Overlays, one file per picture in a folder.

    An overlay is named after its picture, `dog.png` for `photos/dog.jpg`, in the same subfolder as the picture. If
    another file has that name, the name gets the start of a hash of the picture's path (`dog-1f2e3d4c.png`). Each
    overlay contains the hash, so that it is recognised, and no other file is ever replaced.
    """

    def __init__(self, settings: OverlaySettings, existing: str) -> None:
        """Set the options; existing overlays are kept unless `existing` is `overwrite`."""
        self._settings = settings
        self._keeps = existing != "overwrite"

    def has(self, picture: Found) -> bool:
        """Return whether the overlay of a picture exists and is kept.

        Raises:
            OutputError: if other files have its possible names.
        """
        return self._keeps and picture.kind != "stream" and self._locate(picture, _identify(picture))[1]

    def save(self, picture: Found, caption: Caption) -> None:
        """Draw the overlay of a picture, and write it unless it exists and is kept.

        Raises:
            OutputError: if it cannot be written.
            ImageError: if the picture cannot be read.
            CaptionerError: if the attention has no such head.
        """
        identity = _identify(picture)
        content = self._draw(picture, caption, _MARK + identity)
        path, exists = self._locate(picture, identity)
        if exists and self._keeps:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        with write_atomically(path, overwrite=exists) as file:
            file.write(content)

    def _locate(self, picture: Found, identity: str) -> tuple[Path, bool]:
        """Return the path of a picture's overlay, and whether it exists."""
        suffix = f".{self._settings.format}"
        plain = self._settings.folder / picture.stem.with_name(picture.stem.name + suffix)
        stem = os.fsencode(picture.stem.name)[:_MAX_STEM]
        hashed = plain.with_name(f"{os.fsdecode(stem)}-{identity[:8]}{suffix}")
        paths = [plain, hashed] if len(os.fsencode(plain.name)) <= _MAX_FILE_NAME else [hashed]
        for path in paths:
            if _read_mark(path) == identity:
                return path, True
        for path in paths:
            if not os.path.lexists(path):
                return path, False
        raise OutputError(f"{hashed}: exists, but is not the overlay of {picture.name}. Choose another folder.")

    def _draw(self, picture: Found, caption: Caption, mark: str) -> bytes:
        from PIL.PngImagePlugin import PngInfo

        from captioner import overlay, page

        settings = self._settings
        if settings.head is not None:
            caption = overlay.pick_head(caption, settings.head)
        file = io.BytesIO()
        if settings.format == "png":
            metadata = PngInfo()
            metadata.add_text("Comment", mark)
            figure = overlay.draw_attention(picture.source, caption, colours=settings.colours)
            figure.save(file, "PNG", pnginfo=metadata)
        elif settings.format == "gif":
            frames = overlay.animate_attention(picture.source, caption, settings.colours)
            frames[0].info["comment"] = mark
            overlay.save_animation(frames, file)
        else:
            content = page.overlay_page(picture.source, caption, Path(picture.name).name, settings.colours)
            content = content.replace("<head>", f"<head><!-- {mark} -->", 1)
            file.write(content.encode("utf-8", "backslashreplace"))  # names may contain surrogates
        return file.getvalue()


_MARK = "captioner overlay of "
_MAX_FILE_NAME = 255  # bytes, of most file systems
_MAX_STEM = 200


def _read_mark(path: Path) -> str | None:
    """Return the hash of the picture in an overlay; None for any other file."""
    if not is_file(path):  # opening a FIFO would block
        return None
    try:
        with path.open("rb") as file:
            match = re.search(_MARK.encode() + b"([0-9a-f]{16})", file.read(1 << 12))
    except OSError:
        return None
    return match[1].decode() if match else None


def _identify(picture: Found) -> str:
    """Return a hash of a picture in 16 hexadecimal digits: of its absolute path or URL, or of the content of a
    stream.

    The path itself would disclose folder names to everyone who sees the overlay.
    """
    if callable(picture.source) and picture.kind == "stream":
        content = picture.source()
    else:
        content = os.fsencode(os.path.realpath(picture.name) if picture.kind == "file" else picture.name)
    return hashlib.sha256(content).hexdigest()[:16]


class _Failures:
    """The list of failed pictures, written when the run ends: until then, the run may read the previous list."""

    def __init__(self, path: str | None, *, null: bool) -> None:
        """Check that the folder exists, so that the list can be written at the end."""
        self.unlisted = 0
        """Number of names that contain line breaks."""
        self._path = path
        self._null = null
        if path is not None and not Path(path).parent.is_dir():
            raise cannot_write(Path(path), FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))

    def __enter__(self) -> Self:
        self._names = tempfile.TemporaryFile() if self._path is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._names:
            self._names.close()

    def add(self, name: str) -> None:
        """Add a name."""
        if self._names and not (self._null or fits_list(name)):
            self.unlisted += 1
        elif self._names:
            self._names.write(os.fsencode(name) + (b"\0" if self._null else b"\n"))

    def write(self) -> None:
        """Write the list.

        Raises:
            OutputError: if it cannot be written.
        """
        if self._names and self._path is not None:
            self._names.seek(0)
            with write_atomically(self._path, overwrite=True) as file:
                shutil.copyfileobj(self._names, file)


def _enclose(prefix: str, caption: Caption, suffix: str) -> Caption:
    """Return the caption and its candidates with text before and after each that is not empty."""
    candidates = tuple(_enclose(prefix, candidate, suffix) for candidate in caption.candidates)
    if not caption.words:
        return replace(caption, candidates=candidates)
    return replace(caption, text=f"{prefix}{caption.text}{suffix}", candidates=candidates)


def _check_not_same(list_file: str, output: str | None) -> None:
    if output and is_file(output) and is_file(list_file) and Path(list_file).samefile(output):
        raise OutputError(f"{output}: this is the list of pictures. Write the captions to another file.")
