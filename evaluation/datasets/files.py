"""Common parts of the readers: records, collected problems, and text files that may be malformed."""

import codecs
import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.bulk.plan import expand_braces
from captioner.errors import DataError
from captioner.files import is_file, is_folder

SPLITS = ("train", "dev", "test")

SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "restval": "train",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
}
"""The split for each name that published data sets use."""


@dataclass(frozen=True, slots=True)
class PackedImage:
    """A picture inside a larger file. Calling it returns its content, as `captioner.images.Source` requires."""

    file: Path
    member: str
    """Its name in the file."""
    size: int
    """Number of bytes of the picture or, if it is compressed, of the file."""

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"{self.file}: {self.member}"

    def __call__(self) -> bytes:
        """Read the content.

        Raises:
            ImageError: if it cannot be read.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Columns:
    """Columns of a Parquet file, or keys of the JSON objects of a WebDataset shard. Empty: the default names."""

    image: str = ""
    """Column of pictures (bytes, `{bytes, path}`, or paths relative to the file); in a shard, their suffix.
    Default: `image`; in a shard, the only supported suffix of each key."""
    captions: tuple[str, ...] = ()
    """Columns of captions, each a text or a list of texts. Default: `captions`, or else `caption`; in a shard, or
    else the lines of the `.txt` member."""
    id: str = ""
    """Column of image ids; rows with the same id are captions of one picture. Default: each row is a picture."""
    split: str = ""
    """Column of train, val (or dev, validation) and test. Default: `split` if it exists, or else by the first word
    of the file name (`train-00001.tar`) or the name of its folder, or else by a hash of the image id."""


@dataclass(frozen=True)
class Record:
    """A picture and its reference captions."""

    image: Path | PackedImage
    image_id: str  # unique in its data set
    captions: tuple[str, ...]
    split: str  # train, dev or test


class Problems:
    """The problems of a data set, collected to report them together."""

    def __init__(self) -> None:
        self._details: dict[str, list[str]] = {}

    def add(self, kind: str, detail: str) -> None:
        """Add a problem: its kind, in the plural, and the picture or line."""
        self._details.setdefault(kind, []).append(detail)

    def raise_any(self, source: str | Path) -> None:
        """Raise if there are problems.

        Raises:
            DataError: with the count and the first details of each kind of problem.
        """
        if self._details:
            kinds = "; ".join(
                f"{kind}: {len(details)} ({', '.join(details[:3])}{', ...' if len(details) > 3 else ''})"
                for kind, details in self._details.items()
            )
            raise DataError(f"{source}: {kinds}. Correct or remove them.")


def split_by_hash(image_id: str) -> str:
    """Return a split by the hash of an image id: 90 % train, 5 % dev, 5 % test.

    It depends only on the id, so adding or removing pictures moves no other picture to another split.
    """
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
    value = int.from_bytes(digest[:8], "big") / 2**64  # in 0..1
    return "train" if value < 0.90 else "dev" if value < 0.95 else "test"


def find_split(value: Any, file: Path, image_id: str, where: str, problems: Problems) -> str:
    """Return the split of a row of a file, which names it `value`; an unknown name is a problem of the row `where`.

    None: by the first word of the name of the file, such as `train-00001.tar`, or else by the name of its folder,
    or else by the hash of the image id.
    """
    if value is None:
        names = re.split(r"[^a-z]", file.name.lower())[0], file.absolute().parent.name.lower()
        return next((SPLIT_NAMES[name] for name in names if name in SPLIT_NAMES), split_by_hash(image_id))
    if not isinstance(value, str) or value not in SPLIT_NAMES:
        problems.add(f"splits other than {', '.join(SPLIT_NAMES)}", f"{where}: {value!r:.40}")
        return "train"
    return SPLIT_NAMES[value]


def to_captions(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the captions in values, each a text, a list of texts, or None; empty if one is something else."""
    captions: list[str] = []
    for value in filter(None, values):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return ()
        captions += map(one_line, texts)
    return tuple(captions)


def find_files(path: Path, suffix: str) -> list[Path]:
    """Return the files of a folder (recursive, sorted) or of a pattern: `train-{000..146}.tar`, `data/*.tar`.

    Raises:
        DataError: if there are none, or one that braces name is missing.
    """
    files: list[Path] = []
    if is_folder(path):
        below = (file for file in path.rglob(f"*{suffix}") if file.is_file())
        files += sorted(file for file in below if not file.name.startswith("."))
    else:
        try:
            for pattern in expand_braces(str(path)):
                found = [pattern] if is_file(pattern) else glob.glob(pattern)  # noqa: PTH207
                matches = sorted(filter(is_file, found))
                files += map(Path, matches)
                if not matches:
                    raise DataError(f"{pattern}: no such file. Is this the path of the data set?")
        except ValueError as error:
            raise DataError(f"{path}: cannot use this pattern ({error})") from error
    if not files:
        raise DataError(f"{path}: no {suffix} files in this folder")
    return list(dict.fromkeys(files))


def shorten_names(names: Iterable[Hashable]) -> str:
    """Return the first few names, sorted, and the number of the others, for messages."""
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def one_line(text: str) -> str:
    """Return the text with runs of white space replaced by a space, stripped."""
    return " ".join(text.split())


def first_folder(folders: Sequence[Path]) -> Path:
    """Return the first folder that exists, or the first if none does."""
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def decode_lines(file: Path, problems: Problems) -> Iterator[str]:
    """Yield the lines of a text file; invalid UTF-8 is reported as a problem, and replaced.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    yield line.decode()
                except UnicodeDecodeError:
                    problems.add("lines that are not UTF-8", f"{file}, line {number}")
                    yield line.decode(errors="replace")
    except OSError as error:
        raise cannot_read(file, error) from error


def read_lines(file: Path, problems: Problems | None = None) -> Iterator[tuple[str, str]]:
    """Yield the position of each line that is not blank, for messages, and its stripped text.

    Raises:
        DataError: if the file cannot be read or, after the last line and without `problems`, is not UTF-8.
    """
    found = Problems() if problems is None else problems
    for number, line in enumerate(decode_lines(file, found), start=1):
        if line.strip():
            yield f"{file}, line {number}", line.strip()
    if problems is None:
        found.raise_any(file)


def parse_json(text: str) -> Any:
    """Parse JSON; unlike `json.loads`, reject duplicate keys.

    Raises:
        ValueError: if it is not JSON, an object has a duplicate key, or it exceeds Python's limits of nesting or of
            digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_to_dict)
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {key[:60]!r} occurs {counts[key]} times in one object")
    return found


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: if it cannot be read, or is not JSON in UTF-8; see `parse_json`.
    """
    try:
        content = file.read_bytes()
        return parse_json(content.decode("utf-8-sig"))
    except OSError as error:
        raise cannot_read(file, error) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8. Is this a file of the data set?") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg}). Is the file complete?") from error
    except ValueError as error:
        raise DataError(f"{file}: cannot use this JSON ({error})") from error


def read_tokens(file: Path, problems: Problems) -> dict[str, list[str]]:
    """Return the captions of each picture from lines of the Flickr sets: NAME.jpg#NUMBER, white space, caption.

    Raises:
        DataError: if the file cannot be read.
    """
    captions: dict[str, list[str]] = {}
    for where, line in read_lines(file, problems):
        # One line of Flickr30k has spaces instead of a tab.
        if found := re.fullmatch(r"(.+?)#\d+(?:\s+(.*))?", line):
            captions.setdefault(found[1], []).append(found[2] or "")
        else:
            problems.add("lines that are not IMAGE#NUMBER, a tab and a caption", f"{where}: {line[:60]!r}")
    return captions


def cannot_read(file: Path, error: OSError) -> DataError:
    """Return the error of a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{file}: no such file. Is this the path of the data set?")
    return DataError(f"{file}: cannot read this file ({error.strerror or error})")
