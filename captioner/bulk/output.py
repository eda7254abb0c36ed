"""The files that captions go to: Parquet, JSON Lines or WebDataset shards, each one class.

Each row of the input has one row here, with a caption or with an error.
"""

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from captioner.bulk.rows import Row
from captioner.caption import Caption, to_number
from captioner.output import to_unicode

Captioned = tuple[Row, bytes | None, Caption | str]
"""A row, the contents of its picture if the writer needs them, and its caption or error."""


@dataclass(frozen=True)
class Fields:
    """What is written of each row, besides key, source, caption, log_prob, score, confidence and error."""

    keep: tuple[str, ...] = ()
    """Columns of the input."""
    words: bool = False
    """The words of the caption and their log-probabilities."""
    candidates: bool = False
    """Further captions, best first."""
    attention: bool = False
    """The maps of the words, (T, rows, columns), as float16."""


class Writer(ABC):
    """Writes the rows of a unit to an open file."""

    suffix = ""
    """Of the file's name."""
    needs_content = False
    """Whether the pictures themselves are written."""

    def __init__(self, file: BinaryIO, fields: Fields) -> None:
        """Start the file."""
        self.file = file
        self.fields = fields

    @abstractmethod
    def add(self, rows: Sequence[Captioned]) -> None:
        """Write rows."""

    def close(self) -> None:  # noqa: B027 (most have nothing to end)
        """End the file; it stays open."""


class ParquetWriter(Writer):
    """A table; https://parquet.apache.org."""

    suffix = ".parquet"
    GROUP = 4096
    """Rows of a row group."""

    def __init__(self, file: BinaryIO, fields: Fields) -> None:
        super().__init__(file, fields)
        self._writer: Any = None
        self._rows: list[Captioned] = []

    def add(self, rows: Sequence[Captioned]) -> None:
        self._rows += rows
        if len(self._rows) >= self.GROUP:
            self._write_group()

    def close(self) -> None:
        if self._rows or self._writer is None:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        columns = {
            "key": arrow.array([_text(row.key) for row, _, _ in self._rows], arrow.string()),
            "source": arrow.array([_text(row.source) for row, _, _ in self._rows], arrow.string()),
            **caption_columns([result for _, _, result in self._rows], self.fields),
        }
        for name in self.fields.keep:
            values = [row.kept.get(name) for row, _, _ in self._rows]
            kind = next((value.type for value in values if isinstance(value, arrow.Scalar)), arrow.string())
            if self._writer is not None:
                kind = self._writer.schema.field(name).type
            columns[name] = arrow.array(values, kind)
        table = arrow.table(columns)
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self.file, table.schema)
        self._writer.write_table(table)
        self._rows = []


class JsonLinesWriter(Writer):
    """One object per row: `key`, `source`, then what `Caption.to_dict` returns or `error`, and the kept columns."""

    suffix = ".jsonl"

    def add(self, rows: Sequence[Captioned]) -> None:
        for row, _, result in rows:
            self.file.write(_json_line(row, result, self.fields))


class WebDatasetWriter(Writer):
    """A shard: each picture beside a `.txt` with its caption and a `.json` with all that is known of it."""

    suffix = ".tar"
    needs_content = True

    def __init__(self, file: BinaryIO, fields: Fields) -> None:
        super().__init__(file, fields)
        self._tar = tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._count = 0

    def add(self, rows: Sequence[Captioned]) -> None:
        for row, content, result in rows:
            self._count += 1
            if row.source is not None and row.key is not None and not row.source.lower().endswith(".parquet"):
                key = row.key  # of a shard
            else:
                key = f"{self._count - 1:08d}"  # a path has dots, which end keys
            if content is not None:
                self._write(f"{key}.{_suffix_of(content)}", content)
            if isinstance(result, Caption):
                self._write(f"{key}.txt", (result.text + "\n").encode())
            self._write(f"{key}.json", _json_line(row, result, self.fields))

    def _write(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))

    def close(self) -> None:
        self._tar.close()


FORMATS: dict[str, type[Writer]] = {
    "parquet": ParquetWriter,
    "jsonl": JsonLinesWriter,
    "webdataset": WebDatasetWriter,
}
"""The formats by name. To add a format, write its class and add it here."""


def caption_columns(results: Sequence[Caption | str], fields: Fields) -> dict[str, Any]:
    """Return Arrow arrays of captions and errors by the names of their columns, without those of the input.

    The columns are `caption`, `log_prob`, `score`, `confidence` (null without a calibration) and `error`, and after
    `fields` also `words`, `log_probs` and `word_confidences`, `candidates` (a list of
    `{caption, log_prob, score}`) and `attention` (float16; words, rows, columns).
    """
    import pyarrow as arrow

    captions = [result if isinstance(result, Caption) else None for result in results]
    floats = arrow.float64()

    def column(get: Any, kind: Any) -> Any:
        return arrow.array([None if caption is None else get(caption) for caption in captions], kind)

    columns = {
        "caption": column(lambda caption: caption.text, arrow.string()),
        "log_prob": column(lambda caption: to_number(caption.log_prob), floats),
        "score": column(lambda caption: to_number(caption.score), floats),
        "confidence": column(
            lambda caption: None if caption.confidence is None else to_number(caption.confidence), floats
        ),
    }
    if fields.words:
        columns["words"] = column(lambda caption: caption.words, arrow.list_(arrow.string()))
        columns["log_probs"] = column(lambda caption: list(map(to_number, caption.log_probs)), arrow.list_(floats))
        columns["word_confidences"] = column(lambda caption: caption.word_confidences, arrow.list_(floats))
    if fields.candidates:
        kind = arrow.struct({"caption": arrow.string(), "log_prob": floats, "score": floats})
        columns["candidates"] = column(
            lambda caption: [
                {
                    "caption": candidate.text,
                    "log_prob": to_number(candidate.log_prob),
                    "score": to_number(candidate.score),
                }
                for candidate in caption.candidates
            ],
            arrow.list_(kind),
        )
    if fields.attention:
        maps = arrow.list_(arrow.list_(arrow.list_(arrow.float16())))
        columns["attention"] = column(lambda caption: caption.attention.astype(np.float16).tolist(), maps)
    columns["error"] = arrow.array(
        [None if isinstance(result, Caption) else to_unicode(result) for result in results], arrow.string()
    )
    return columns


def _json_line(row: Row, result: Caption | str, fields: Fields) -> bytes:
    """Return a row as a JSON object; Arrow scalars of the input become what Python has for them."""
    found = result.to_dict(attention=fields.attention) if isinstance(result, Caption) else {"error": result}
    kept = {name: row.kept.get(name) for name in fields.keep}
    record = {"key": row.key, "source": row.source, **found, **kept}

    def to_json(value: Any) -> Any:
        return value.as_py() if hasattr(value, "as_py") else str(value)

    return to_unicode(json.dumps(record, ensure_ascii=False, default=to_json) + "\n").encode()


def _text(value: str | None) -> str | None:
    return None if value is None else to_unicode(value)


_SUFFIXES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
}


def _suffix_of(content: bytes) -> str:
    """Return the suffix of a picture's file by its first bytes."""
    if content[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((suffix for start, suffix in _SUFFIXES.items() if content.startswith(start)), "bin")
