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
from typing import Any, NamedTuple, TextIO

from captioner.captioning import Caption
from captioner.errors import OutputError
from captioner.files import cannot_write, exists_already, write_atomically
from captioner.images import SUFFIXES

FORMATS = ("text", "jsonl", "csv")
_COLUMNS = ["image", "rank", "caption", "log_prob", "log_probs"]  # of csv
EXISTING = ("skip", "overwrite", "append", "refuse")
"""What to do with output that exists."""

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

    @staticmethod
    @abstractmethod
    def read_name(line: str) -> str:
        """Return the picture's name in a line that `write` wrote, as `spell` gives it; empty in a heading.

        Raises:
            ValueError: when it is no such line.
        """

    @staticmethod
    def spell(image: str) -> str:
        """Return a picture's name as a line has it."""
        return _to_unicode(_one_line(image))

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

    @staticmethod
    def read_name(line: str) -> str:
        """Return what stands before the tab."""
        name, tab, _ = line.partition("\t")
        if not tab:
            raise ValueError("no tab")
        return name


class JsonLinesWriter(Writer):
    """An object a picture: image, then what `to_record` tells."""

    def __init__(self, stream: TextIO, *, attention: bool = False) -> None:
        super().__init__(stream)
        self._attention = attention

    def write(self, image: str, caption: Caption) -> None:
        """Write one line."""
        record = {"image": image, **to_record(caption, attention=self._attention)}
        self._send(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    @staticmethod
    def read_name(line: str) -> str:
        """Return `image`."""
        try:
            return _to_unicode(json.loads(line)["image"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("no image") from error

    @staticmethod
    def spell(image: str) -> str:
        """Return the name exactly."""
        return _to_unicode(image)


def to_record(caption: Caption, *, attention: bool = False) -> dict[str, Any]:
    """Return what JSON Lines tell of a caption: caption, log_prob, words, log_probs, and candidates if any.

    A candidate is a record of the same kind. `log_probs` are natural, one a word; `log_prob` is of the whole
    caption with its end. `visual`, where the mechanism can tell, is the share of each word's context that came
    from the picture. `alternatives`, if they were asked for, has for each word an object of others to their
    log-probabilities in its place. With `attention`, each also has `attention`, nested lists (words, rows,
    columns), and `rectangle`, the part of the picture that the grid covers: left, top, right and bottom in
    fractions of its width and height.
    """
    record: dict[str, Any] = {
        "caption": caption.text,
        "log_prob": _number(caption.log_prob),
        "words": caption.words,
        "log_probs": [_number(log_prob) for log_prob in caption.log_probs],
    }
    if caption.visual is not None:
        record["visual"] = [_number(share) for share in caption.visual]
    if caption.alternatives:
        record["alternatives"] = [
            {word: _number(log_prob) for word, log_prob in others.items()} for others in caption.alternatives
        ]
    if attention:
        record["attention"] = caption.attention.astype(float).round(DIGITS).tolist()
        record["rectangle"] = [_number(side) for side in caption.rectangle]
    if caption.candidates:
        record["candidates"] = [to_record(candidate, attention=attention) for candidate in caption.candidates]
    return record


class CsvWriter(Writer):
    """A header, then a row a caption: image, rank (1 is the best), caption, log_prob, log_probs.

    `log_prob` is of the whole caption with its end; `log_probs` are of its words, with spaces between them.
    Control characters in names are escaped as in text, so that a row is a line.
    """

    def __init__(self, stream: TextIO, *, heading: bool = True) -> None:
        super().__init__(stream)
        if heading:
            self._send_rows([_COLUMNS])

    def write(self, image: str, caption: Caption) -> None:
        """Write a row a candidate."""
        self._send_rows(
            [
                _one_line(image),
                rank,
                _one_line(each.text),
                _number(each.log_prob),
                " ".join(str(round(log_prob, DIGITS)) for log_prob in each.log_probs),
            ]
            for rank, each in enumerate(_ranked(caption), start=1)
        )

    @staticmethod
    def read_name(line: str) -> str:
        """Return the first column."""
        (row,) = csv.reader([line])
        if len(row) != len(_COLUMNS):
            raise ValueError(f"{len(row)} columns, not {', '.join(_COLUMNS)}")
        return "" if row == _COLUMNS else row[0]

    def _send_rows(self, rows: Iterable[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._send(text.getvalue())


_WRITERS: dict[str, type[Writer]] = {"text": TextWriter, "jsonl": JsonLinesWriter, "csv": CsvWriter}


def make_writer(
    format: str, stream: TextIO, *, names: bool = True, attention: bool = False, heading: bool = True
) -> Writer:
    """Return the writer of a format of `FORMATS`.

    Args:
        format: text, jsonl or csv.
        stream: where the lines go.
        names: whether text names the pictures; the others always do.
        attention: whether JSON Lines include the attention; the others cannot.
        heading: whether CSV begins with one; a file that is gone on with has it.

    Raises:
        OutputError: if there is no such format.
    """
    if format == "text":
        return TextWriter(stream, names=names)
    if format == "jsonl":
        return JsonLinesWriter(stream, attention=attention)
    if format == "csv":
        return CsvWriter(stream, heading=heading)
    raise OutputError(f"unknown output format {format!r}. Choose one of {', '.join(FORMATS)}.")


def spell(image: str, format: str) -> str:
    """Return a picture's name as a line in a format of `FORMATS` has it."""
    return _WRITERS[format].spell(image)


class Output(NamedTuple):
    """A file of captions that is to be begun, or to be gone on with."""

    path: Path
    kept: int
    """How many of its bytes stay, all of them whole captions; 0: it is begun anew."""
    done: frozenset[str]
    """The pictures that need not be written again, as `Writer.spell` gives their names."""

    def open(self) -> TextIO:
        """Open it for a writer. It grows line by line: an interrupted run leaves whole lines of what it did.

        Raises:
            OutputError: if it cannot be written.
        """
        try:
            stream = self.path.open("r+" if self.kept else "w", encoding="utf-8", newline="\n")
            stream.truncate(self.kept)
            stream.seek(0, io.SEEK_END)
            return stream
        except OSError as error:
            raise cannot_write(self.path, error) from error


def plan_output(path: str | Path, format: str = "text", existing: str = "refuse", candidates: int = 1) -> Output:
    """Look at what a file of captions holds, and leave it as it is.

    Args:
        path: the file.
        format: of `FORMATS`.
        existing: of `EXISTING`, for a file that exists: `skip` goes on after the last picture that it has whole,
            and `append`, too, which tells of no picture that it is done.
        candidates: how many captions a whole picture has.

    Raises:
        OutputError: if the file exists and may not be used, or holds anything but captions in this format.
    """
    path = Path(path)
    if existing == "overwrite" or not path.exists():
        return Output(path, 0, frozenset())
    if existing == "refuse":
        raise exists_already(path)
    try:
        done, length = _read_done(path, format, 1 if format == "jsonl" else candidates)
    except OSError as error:
        raise cannot_write(path, error) from error
    return Output(path, length, done if existing == "skip" else frozenset())


def _read_done(path: Path, format: str, lines: int) -> tuple[frozenset[str], int]:
    """Return the pictures that a file has whole, in `lines` each, and where in it, in bytes, the next one goes."""
    names: set[str] = set()
    last, count, begun, end = "", 0, 0, 0  # the last picture: its lines, where they begin and where they end
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                name = _WRITERS[format].read_name(line.decode().removesuffix("\n"))
            except (ValueError, csv.Error) as error:
                raise OutputError(
                    f"{path}: line {number} is no caption of --format {format} ({error}), and nothing was added. "
                    "Choose another file, or --existing overwrite."
                ) from error
            if name != last or count == lines:
                last, count, begun = name, 0, end
            names.add(name)
            count += 1
            end += len(line)
    if last and count < lines:
        return frozenset(names - {last}), begun
    return frozenset(names), end


def sidecar_path(picture: str | Path, suffix: str) -> Path:
    """Return the path of the file beside a picture, as `dog.txt` beside `dog.jpg`.

    Raises:
        OutputError: if the suffix is not one, or is a picture's: no picture is ever overwritten.
    """
    picture = Path(picture)
    if not re.fullmatch(r"\.[^/\\\0]*[^/\\\0.]", suffix):
        raise OutputError(f"{suffix!r} is no suffix for sidecar files. Give one with its dot, such as .txt.")
    path = picture.with_suffix(suffix)
    if path.suffix.lower() in {*SUFFIXES, picture.suffix.lower()}:
        raise OutputError(f"{suffix!r} is the suffix of pictures. Give sidecar files another, such as .txt.")
    return path


def write_sidecar(path: Path, caption: Caption, existing: str = "refuse") -> None:
    """Write the caption's text to a file of its own; `append` adds a line to one that exists.

    Raises:
        OutputError: if the file exists and `existing` is neither `overwrite` nor `append`, or cannot be written.
    """
    before = b""
    if existing == "append" and path.exists():
        try:
            before = path.read_bytes()
        except OSError as error:
            raise cannot_write(path, error) from error
        before += b"\n" * (not before.endswith(b"\n") and before != b"")
    with write_atomically(path, overwrite=existing != "refuse") as file:
        file.write(before + _to_unicode(f"{_one_line(caption.text)}\n").encode())


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
