"""Captions as text: one class for each format, and sidecar files.

All output is UTF-8 with one caption a line. What UTF-8 cannot hold, such as a file name of other bytes, is written
as Python and JSON escape it: `\\udce9`.
"""

import csv
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from captioner.caption import DIGITS, Caption, to_number
from captioner.console import escape_controls
from captioner.errors import OutputError
from captioner.files import cannot_write, write_atomically
from captioner.images import SUFFIXES


class Format(ABC):
    """A text format of captions: how lines are written, and how the picture's name is read back from them."""

    name = ""
    """Its key in `FORMATS`."""
    heading = ""
    """The text at the start of a file."""
    whole_line = False
    """Whether a picture has one line, with all its candidates, that can be seen to be complete."""

    def __init__(self, *, names: bool = True, attention: bool = False) -> None:
        """Hold the settings.

        Args:
            names: whether text contains the names of the pictures; the other formats always do.
            attention: whether JSON Lines include the attention maps; the other formats cannot.
        """
        self._names = names
        self._attention = attention

    @abstractmethod
    def lines(self, image: str, caption: Caption) -> str:
        """Return the lines of the picture named `image`: its caption and its further candidates, best first."""

    @abstractmethod
    def start(self, image: str) -> str:
        """Return the text that the lines of a picture start with, which no other picture's lines start with."""

    @abstractmethod
    def read_name(self, line: str) -> str:
        """Return the picture's name in a line without its end, as `spell` returns it; empty for the heading.

        Raises:
            ValueError: if the line is not of this format.
        """

    def spell(self, image: str) -> str:
        """Return a picture's name as its lines contain it."""
        return to_unicode(escape_controls(image))


class TextFormat(Format):
    """One caption a line, after the picture's name and a tab unless `names` is false.

    Control characters in names are escaped (a tab as `\\t`), so that a line stays one line; JSON Lines hold every
    name exactly.
    """

    name = "text"

    def lines(self, image: str, caption: Caption) -> str:
        """Return a line for each candidate."""
        start = self.start(image)
        return "".join(f"{start}{to_unicode(escape_controls(each.text))}\n" for each in _ranked(caption))

    def start(self, image: str) -> str:
        """Return the name and the tab."""
        return f"{self.spell(image)}\t" if self._names else ""

    def read_name(self, line: str) -> str:
        """Return what precedes the tab."""
        name, tab, _ = line.partition("\t")
        if not tab:
            raise ValueError("no tab")
        return name


class JsonLinesFormat(Format):
    """One object for each picture: `image`, then what `Caption.to_dict` returns."""

    name = "jsonl"
    whole_line = True

    def lines(self, image: str, caption: Caption) -> str:
        """Return one line."""
        record = json.dumps(caption.to_dict(attention=self._attention), ensure_ascii=False, allow_nan=False)
        return to_unicode(f"{self.start(image)}{record.removeprefix('{')}\n")

    def start(self, image: str) -> str:
        """Return the object up to and including the comma after `image`."""
        return to_unicode(f'{{"image": {json.dumps(image, ensure_ascii=False)}, ')

    def read_name(self, line: str) -> str:
        """Return `image`."""
        try:
            return to_unicode(json.loads(line)["image"])
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError("no image") from error

    def spell(self, image: str) -> str:
        """Return the name exactly."""
        return to_unicode(image)


class CsvFormat(Format):
    """A header, then one row for each caption: image, rank (1 is the best), caption and the numbers of `COLUMNS`.

    `log_prob` is that of the whole caption with its end; `log_probs` are those of its words, separated by spaces.
    `word_confidences` are, too, with a hyphen for words that name nothing; without a calibration, there are none.
    Control characters in names are escaped as in text, so that a row is a line.
    """

    name = "csv"
    COLUMNS = ("image", "rank", "caption", "log_prob", "log_probs", "confidence", "word_confidences")
    heading = ",".join(COLUMNS) + "\n"

    def lines(self, image: str, caption: Caption) -> str:
        """Return a row for each candidate."""
        return "".join(
            _csv_row(
                [
                    self.spell(image),
                    rank,
                    to_unicode(escape_controls(each.text)),
                    to_number(each.log_prob),
                    " ".join(str(round(log_prob, DIGITS)) for log_prob in each.log_probs),
                    "" if each.confidence is None else to_number(each.confidence),
                    " ".join(
                        "-" if confidence is None else str(round(confidence, DIGITS))
                        for confidence in each.word_confidences or ()
                    ),
                ]
            )
            for rank, each in enumerate(_ranked(caption), start=1)
        )

    def start(self, image: str) -> str:
        """Return the first column and its comma."""
        return _csv_row([self.spell(image), ""]).removesuffix("\n")

    def read_name(self, line: str) -> str:
        """Return the first column."""
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


FORMATS: dict[str, type[Format]] = {"text": TextFormat, "jsonl": JsonLinesFormat, "csv": CsvFormat}
"""The formats by name. To add a format, write its class and add it here."""


class Sidecars:
    """The text files beside pictures: `dog.txt` for `dog.jpg`, as the data layout `folder` reads them.

    The suffix of a picture (one of `captioner.images.SUFFIXES`) is replaced, and any other name is extended:
    `dog.v2` has `dog.v2.txt`. So the name follows from the picture's alone, for writing, resuming and reading.
    Pictures that would share a file have none: nobody could say whose caption it holds.
    """

    def __init__(self, suffix: str) -> None:
        """Check the suffix.

        Raises:
            OutputError: if it is not a suffix, or is one of pictures: no picture is ever overwritten.
        """
        if not re.fullmatch(r"\.[^/\\\0]*[^/\\\0.]", suffix):
            raise OutputError(f"{suffix!r} is not a suffix for sidecar files. Give one with its dot, such as .txt.")
        if Path(f"picture{suffix}").suffix.lower() in SUFFIXES:
            raise OutputError(f"{suffix!r} is a suffix of pictures. Give sidecar files another, such as .txt.")
        self._suffix = suffix
        self._shared_stems = lru_cache(maxsize=256)(_shared_stems)

    def path(self, picture: str | Path) -> Path:
        """Return the path of a picture's file.

        Raises:
            OutputError: if another picture of the folder, such as `dog.png`, would have the same.
        """
        path = Path(picture)
        if path.suffix.lower() in SUFFIXES:
            stem = path.stem
            rivals = [name for name in self._shared_stems(path.parent).get(stem, ()) if name != path.name]
        else:
            stem = path.name
            rivals = [stem + suffix for suffix in SUFFIXES if os.path.lexists(f"{path}{suffix}")]
        if rivals:
            raise OutputError(
                f"{picture}: {min(rivals)} in the same folder would have the same file {stem}{self._suffix}. "
                "Rename one of them, or write the captions with --output."
            )
        return path.with_name(stem + self._suffix)


def _shared_stems(folder: Path) -> dict[str, list[str]]:
    """Return the names of a folder's pictures that differ in their suffix alone, by the name without suffix."""
    names: dict[str, list[str]] = {}
    with suppress(OSError):  # a folder that cannot be listed
        for name in os.listdir(folder):  # noqa: PTH208 (the names alone)
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 (a hundred thousand of them)
            if suffix.lower() in SUFFIXES:
                names.setdefault(stem, []).append(name)
    return {stem: shared for stem, shared in names.items() if len(shared) > 1}


def write_sidecar(path: Path, caption: Caption, existing: str = "refuse") -> None:
    """Write the caption's text to a file of its own; `append` adds a line to one that exists.

    Raises:
        OutputError: if the file exists and `existing` is neither `overwrite` nor `append`, or cannot be written.
    """
    before = b""
    if existing == "append" and path.is_file():
        try:
            before = path.read_bytes()
        except OSError as error:
            raise cannot_write(path, error) from error
        before += b"\n" * (not before.endswith(b"\n") and before != b"")
    with write_atomically(path, overwrite=existing != "refuse") as file:
        file.write(before + to_unicode(f"{escape_controls(caption.text)}\n").encode())


def _ranked(caption: Caption) -> tuple[Caption, ...]:
    return (caption, *caption.candidates)


def _csv_row(cells: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def to_unicode(text: str) -> str:
    """Return the text with the stand-ins that Python has for undecodable bytes escaped, as no stream takes them."""
    return text.encode("utf-8", "backslashreplace").decode()
