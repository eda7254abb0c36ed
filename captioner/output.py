"""Text formats of captions, and sidecar files.

All output is UTF-8 with one caption per line. What UTF-8 cannot encode, such as undecodable bytes of a file name,
is escaped as in Python and JSON: `\\udce9`.
"""

import csv
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from captioner.caption import DIGITS, Caption, to_number
from captioner.console import escape_controls
from captioner.errors import DataError, OutputError, first_line
from captioner.files import cannot_write, write_atomically
from captioner.images import SUFFIXES


class Format(ABC):
    """A text format of captions: writes lines, and reads the names of pictures back from them."""

    name = ""
    """Its key in `FORMATS`."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of output files that choose it."""
    heading = ""
    """The first line of a file."""
    whole_line = False
    """Whether all candidates of a picture are on one line, whose completeness can be checked."""

    def __init__(self, *, names: bool = True, attention: bool = False) -> None:
        """Set the options.

        Args:
            names: whether text includes the names of pictures; the other formats always do.
            attention: whether JSON Lines include the attention maps; the other formats never do.
        """
        self._names = names
        self._attention = attention

    @abstractmethod
    def lines(self, image: str, caption: Caption) -> str:
        """Return the lines of the picture named `image`: its caption and its further candidates, best first."""

    @abstractmethod
    def start(self, image: str) -> str:
        """Return the start of the lines of a picture, which is different for every picture."""

    @abstractmethod
    def read_name(self, line: str) -> str:
        """Return the picture's name in a line without its newline, as `spell` returns it; empty for the heading.

        Raises:
            ValueError: if the line is not of this format.
        """

    def spell(self, image: str) -> str:
        """Return a picture's name as its lines contain it."""
        return to_unicode(escape_controls(image))


class TextFormat(Format):
    """One caption per line, after the picture's name and a tab unless `names` is false.

    Control characters in names are escaped (a tab as `\\t`), so that a name never breaks a line; JSON Lines store
    names exactly.
    """

    name = "text"

    def lines(self, image: str, caption: Caption) -> str:
        start = self.start(image)
        return "".join(f"{start}{self.spell(candidate.text)}\n" for candidate in _ranked(caption))

    def start(self, image: str) -> str:
        return f"{self.spell(image)}\t" if self._names else ""

    def read_name(self, line: str) -> str:
        name, tab, _ = line.partition("\t")
        if not tab:
            raise ValueError("no tab")
        return name


class JsonLinesFormat(Format):
    """One object per picture: `image`, then the fields of `Caption.to_dict`."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")
    whole_line = True

    def lines(self, image: str, caption: Caption) -> str:
        record = json.dumps(caption.to_dict(attention=self._attention), ensure_ascii=False, allow_nan=False)
        return to_unicode(f"{self.start(image)}{record.removeprefix('{')}\n")

    def start(self, image: str) -> str:
        return to_unicode(f'{{"image": {json.dumps(image, ensure_ascii=False)}, ')

    def read_name(self, line: str) -> str:
        try:
            return to_unicode(json.loads(line)["image"])
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError("no image") from error

    def spell(self, image: str) -> str:
        return to_unicode(image)


def read_captions(file: str | os.PathLike[str]) -> Iterator[tuple[str, Caption]]:
    """Yield the picture's name and the caption of each line of a file that `caption --format jsonl` wrote.

    The captions refer to their pictures (`Caption.picture`) by this name. They have attention maps if the file was
    written with `--attention`.

    Raises:
        DataError: if the file cannot be read, or a line is not such a record.
    """
    try:
        with Path(file).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    image = record["image"]
                    if not isinstance(image, str):
                        raise ValueError("image: expected a name")
                    caption = Caption.from_dict(record)
                except (ValueError, TypeError, KeyError, RecursionError, DataError) as error:
                    reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
                    raise DataError(
                        f"{os.fspath(file)}: line {number}: {reason}. Expected a line of caption --format jsonl."
                    ) from error
                yield image, caption.with_picture(image)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{os.fspath(file)}: cannot read this file ({first_line(error)})") from error


class CsvFormat(Format):
    """A header, then one row per caption: image, rank (1 is the best), caption and the numbers of `COLUMNS`.

    `log_prob` is that of the whole caption with its end; `log_probs` are those of its words, separated by spaces.
    `word_confidences` are too, with a hyphen for words without one; they are empty without a calibration. Control
    characters in names are escaped as in text.
    """

    name = "csv"
    suffixes = (".csv",)
    COLUMNS = ("image", "rank", "caption", "log_prob", "log_probs", "confidence", "word_confidences")
    """Names of the columns."""
    heading = ",".join(COLUMNS) + "\n"

    def lines(self, image: str, caption: Caption) -> str:
        def spell_numbers(values: Iterable[float | None]) -> str:
            return " ".join("-" if value is None else str(round(value, DIGITS)) for value in values)

        return "".join(
            _csv_row(
                [
                    self.spell(image),
                    rank,
                    self.spell(candidate.text),
                    to_number(candidate.log_prob),
                    spell_numbers(candidate.log_probs),
                    "" if candidate.confidence is None else to_number(candidate.confidence),
                    spell_numbers(candidate.word_confidences or ()),
                ]
            )
            for rank, candidate in enumerate(_ranked(caption), start=1)
        )

    def start(self, image: str) -> str:
        return _csv_row([self.spell(image), ""]).removesuffix("\n")

    def read_name(self, line: str) -> str:
        try:
            (row,) = csv.reader([line], strict=True)
        except csv.Error as error:
            raise ValueError(str(error)) from error
        if len(row) != len(self.COLUMNS):
            raise ValueError(f"{len(row)} columns, not {', '.join(self.COLUMNS)}")
        if row == list(self.COLUMNS):
            return ""
        if not row[1].isdecimal():
            raise ValueError(f"rank {row[1]!r}")
        return row[0]


FORMATS: dict[str, type[Format]] = {format.name: format for format in (TextFormat, JsonLinesFormat, CsvFormat)}
"""The formats by name. To add a format: write its class and add it here."""


class Sidecars:
    """Sidecar files: `dog.txt` for `dog.jpg`, as the data layout `folder` reads them.

    The suffix of a picture (one of `captioner.images.SUFFIXES`) is replaced, and any other name is extended:
    `dog.v2` has `dog.v2.txt`. So the name depends on the picture's name only, for writing, resuming and reading.
    Pictures that would share a file are refused: the file would be ambiguous.
    """

    def __init__(self, suffix: str) -> None:
        """Check the suffix.

        Raises:
            OutputError: if it is not a suffix, or is a suffix of pictures: pictures are never overwritten.
        """
        if not re.fullmatch(r"\.[^/\\\0]*[^/\\\0.]", suffix):
            raise OutputError(f"{suffix!r} is not a suffix. Include the dot, such as .txt.")
        if Path(f"picture{suffix}").suffix.lower() in SUFFIXES:
            raise OutputError(
                f"{suffix!r} is a suffix of pictures. Choose another for sidecar files, such as .txt."
            )
        self._suffix = suffix
        self._shared_stems = lru_cache(maxsize=256)(_shared_stems)

    def path(self, picture: str | Path) -> Path:
        """Return the path of a picture's sidecar file.

        Raises:
            OutputError: if another picture of the folder, such as `dog.png`, would have the same file.
        """
        path = Path(picture)
        if path.suffix.lower() in SUFFIXES:
            stem = path.stem
            conflicts = [name for name in self._shared_stems(path.parent).get(stem, ()) if name != path.name]
        else:
            stem = path.name
            conflicts = [stem + suffix for suffix in SUFFIXES if os.path.lexists(f"{path}{suffix}")]
        if conflicts:
            raise OutputError(
                f"{picture}: {min(conflicts)} in the same folder would have the same file {stem}{self._suffix}. "
                "Rename one of them, or write the captions with --output."
            )
        return path.with_name(stem + self._suffix)


def _shared_stems(folder: Path) -> dict[str, list[str]]:
    """Return the names of a folder's pictures that differ in their suffix only, by the name without suffix."""
    names: dict[str, list[str]] = {}
    with suppress(OSError):  # a folder that cannot be listed
        for name in os.listdir(folder):  # noqa: PTH208 (names only)
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 (faster)
            if suffix.lower() in SUFFIXES:
                names.setdefault(stem, []).append(name)
    return {stem: shared for stem, shared in names.items() if len(shared) > 1}


def write_sidecar(path: Path, caption: Caption, existing: str = "refuse") -> None:
    """Write the text of a caption to a file; `append` adds a line to an existing file.

    Raises:
        OutputError: if the file exists and `existing` is neither `overwrite` nor `append`, or cannot be written.
    """
    content = b""
    if existing == "append" and path.is_file():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise cannot_write(path, error) from error
        content += b"\n" * (not content.endswith(b"\n") and content != b"")
    with write_atomically(path, overwrite=existing != "refuse") as file:
        file.write(content + to_unicode(f"{escape_controls(caption.text)}\n").encode())


def _ranked(caption: Caption) -> tuple[Caption, ...]:
    return (caption, *caption.candidates)


def _csv_row(cells: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def to_unicode(text: str) -> str:
    """Return the text with surrogates, which Python uses for undecodable bytes, escaped: UTF-8 has none."""
    return text.encode("utf-8", "backslashreplace").decode()
