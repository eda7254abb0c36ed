"""Captions as text: a writer a format, and sidecar files.

Every file is UTF-8 with a caption a line. What UTF-8 cannot hold, such as a file name of other bytes, is
written as Python and JSON escape it: `\\udce9`.
"""

import csv
import io
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from captioner.captioning import Caption
from captioner.errors import OutputError
from captioner.files import cannot_write, exists_already, write_atomically
from captioner.images import SUFFIXES

FORMATS = ("text", "jsonl", "csv")
DIGITS = 5  # behind the point, of log-probabilities and attention weights


class Writer(ABC):
    """Write captions to a text stream as they come.

    The lines of a picture go out together and at once, so that an interrupted run keeps what it had. Errors
    of the stream (a full disk, a closed pipe) pass through as `OSError`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @abstractmethod
    def write(self, image: str, caption: Caption) -> None:
        """Write the caption of the picture named `image`, then its further candidates, best first."""

    def _send(self, text: str) -> None:
        self._stream.write(_to_unicode(text))
        self._stream.flush()


class TextWriter(Writer):
    """A caption a line, after the picture's name and a tab unless `names` is false.

    Control characters in names are escaped (a tab as `\\t`), so that a line stays a line; JSON Lines have
    every name exactly.
    """

    def __init__(self, stream: TextIO, *, names: bool = True) -> None:
        super().__init__(stream)
        self._names = names

    def write(self, image: str, caption: Caption) -> None:
        """Write a line a candidate."""
        start = f"{_one_line(image)}\t" if self._names else ""
        self._send("".join(f"{start}{_one_line(each.text)}\n" for each in _ranked(caption)))


class JsonLinesWriter(Writer):
    """An object a picture: image, caption, log_prob, words, log_probs, and candidates when there are any.

    A candidate is an object of the same kind, without image. `log_probs` are natural, one a word; `log_prob`
    is of the whole caption with its end. `visual`, where the mechanism can tell, is the share of each word's
    context that came from the picture. With `attention`, each also has `attention`, nested lists (words,
    rows, columns), and `rectangle`, the part of the picture that the grid covers: left, top, right and bottom
    in fractions of its width and height.
    """

    def __init__(self, stream: TextIO, *, attention: bool = False) -> None:
        super().__init__(stream)
        self._attention = attention

    def write(self, image: str, caption: Caption) -> None:
        """Write one line."""
        record = {"image": image, **self._record(caption)}
        if caption.candidates:
            record["candidates"] = [self._record(candidate) for candidate in caption.candidates]
        self._send(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def _record(self, caption: Caption) -> dict[str, Any]:
        record: dict[str, Any] = {
            "caption": caption.text,
            "log_prob": _number(caption.log_prob),
            "words": caption.words,
            "log_probs": [_number(log_prob) for log_prob in caption.log_probs],
        }
        if caption.visual is not None:
            record["visual"] = [_number(share) for share in caption.visual]
        if self._attention:
            record["attention"] = caption.attention.astype(float).round(DIGITS).tolist()
            record["rectangle"] = [_number(side) for side in caption.rectangle]
        return record


class CsvWriter(Writer):
    """A header, then a row a caption: image, rank (1 is the best), caption, log_prob.

    Control characters in names are escaped as in text, so that a row is a line.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._send_rows([["image", "rank", "caption", "log_prob"]])

    def write(self, image: str, caption: Caption) -> None:
        """Write a row a candidate."""
        self._send_rows(
            [_one_line(image), rank, _one_line(each.text), _number(each.log_prob)]
            for rank, each in enumerate(_ranked(caption), start=1)
        )

    def _send_rows(self, rows: Iterable[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._send(text.getvalue())


def make_writer(format: str, stream: TextIO, *, names: bool = True, attention: bool = False) -> Writer:
    """Return the writer of a format of `FORMATS`.

    Args:
        format: text, jsonl or csv.
        stream: where the lines go.
        names: whether text names the pictures; the others always do.
        attention: whether JSON Lines include the attention; the others cannot.

    Raises:
        OutputError: if there is no such format.
    """
    if format == "text":
        return TextWriter(stream, names=names)
    if format == "jsonl":
        return JsonLinesWriter(stream, attention=attention)
    if format == "csv":
        return CsvWriter(stream)
    raise OutputError(f"unknown output format {format!r}. Choose one of {', '.join(FORMATS)}.")


def open_output(path: str | Path, *, overwrite: bool = False) -> TextIO:
    """Open a file for a writer. It grows line by line: an interrupted run leaves whole lines of what it did.

    Raises:
        OutputError: if the file exists and `overwrite` is false, or cannot be written.
    """
    path = Path(path)
    try:
        return path.open("w" if overwrite else "x", encoding="utf-8", newline="\n")
    except FileExistsError as error:
        raise exists_already(path) from error
    except OSError as error:
        raise cannot_write(path, error) from error


def write_sidecar(picture: str | Path, caption: Caption, suffix: str = ".txt", *, overwrite: bool = False) -> Path:
    """Write the caption's text beside its picture, as `dog.txt` beside `dog.jpg`; return the new file's path.

    Raises:
        OutputError: if the suffix is not one, or is a picture's (no picture is ever overwritten); if the file
            exists and `overwrite` is false; or if it cannot be written.
    """
    picture = Path(picture)
    if not re.fullmatch(r"\.[^/\\\0]*[^/\\\0.]", suffix):
        raise OutputError(f"{suffix!r} is no suffix for sidecar files. Give one with its dot, such as .txt.")
    path = picture.with_suffix(suffix)
    if path.suffix.lower() in {*SUFFIXES, picture.suffix.lower()}:
        raise OutputError(f"{suffix!r} is the suffix of pictures. Give sidecar files another, such as .txt.")
    with write_atomically(path, overwrite=overwrite) as file:
        file.write(_to_unicode(f"{_one_line(caption.text)}\n").encode())
    return path


def _ranked(caption: Caption) -> tuple[Caption, ...]:
    return (caption, *caption.candidates)


def _number(value: float) -> float | None:
    """Rounded, or None for what JSON has no number for."""
    return round(float(value), DIGITS) if math.isfinite(value) else None


def _one_line(text: str) -> str:
    """The text without anything that ends a line or a column, or that steers a terminal."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: match[0].encode("unicode_escape").decode(), text
    )


def _to_unicode(text: str) -> str:
    """The text with the stand-ins that Python has for undecodable bytes escaped, as no stream takes them."""
    return text.encode("utf-8", "backslashreplace").decode()
