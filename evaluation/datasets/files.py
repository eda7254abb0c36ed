"""What all readers need: the record, the list of what is wrong, and text files of unknown quality."""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.errors import DataError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Record:
    """A picture and what people said of it."""

    image: Path
    image_id: str  # unique in its data set
    captions: tuple[str, ...]
    split: str  # train, dev or test


class Problems:
    """What is wrong with a data set, gathered so that all of it is told at once."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, kind: str, place: str) -> None:
        """Note a problem: what is wrong, in the plural, and with which picture or line."""
        self._places.setdefault(kind, []).append(place)

    def raise_any(self, source: str | Path) -> None:
        """Tell each kind of problem with its count and its first places.

        Raises:
            DataError: if there is any.
        """
        if self._places:
            kinds = "; ".join(
                f"{kind}: {len(places)} ({', '.join(places[:3])}{', ...' if len(places) > 3 else ''})"
                for kind, places in self._places.items()
            )
            raise DataError(f"{source}: {kinds}. Correct these, or take them out of the data set.")


def split_by_hash(image_id: str) -> str:
    """Return the split of a picture that nobody has put into one: 90 % train, 5 % dev, 5 % test.

    It depends on the id alone, so another picture more or less moves no picture from one split to another.
    """
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # in 0..1
    return "train" if place < 0.90 else "dev" if place < 0.95 else "test"


def shorten_names(names: Iterable[Hashable]) -> str:
    """Return the first few names, sorted, and the number of the others, for messages."""
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def one_line(text: str) -> str:
    """Return the text with each run of white space as one space, and none around it."""
    return " ".join(text.split())


def first_folder(places: Sequence[Path]) -> Path:
    """Return the first of the folders that exists, or else the first."""
    return next((place for place in places if place.is_dir()), places[0])


def decode_lines(file: Path, problems: Problems) -> Iterator[str]:
    """Yield every line of a text file with its end; what is not UTF-8 is noted, and yielded with marks in it.

    Raises:
        DataError: when the file is missing or cannot be read.
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
        raise _cannot_read(file, error) from error


def read_lines(file: Path, problems: Problems | None = None) -> Iterator[tuple[str, str]]:
    """Yield where each line that is not blank stands, for messages, and its text without space around it.

    Args:
        file: a text file.
        problems: where to note lines that are not UTF-8; if None, they are an error after the last line.

    Raises:
        DataError: when the file is missing or cannot be read.
    """
    found = Problems() if problems is None else problems
    for number, line in enumerate(decode_lines(file, found), start=1):
        if line.strip():
            yield f"{file}, line {number}", line.strip()
    if problems is None:
        found.raise_any(file)


def parse_json(text: str) -> Any:
    """Return what a JSON text holds; unlike `json.loads`, refuse an object that has a key twice.

    Raises:
        ValueError: when it is not JSON; when an object has two values for a key, of which all but the last would be
            lost; and beyond Python's limits, at lists in lists in lists or a number of thousands of digits.
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
    """Return what a JSON file holds.

    Raises:
        DataError: when it is missing, cannot be read, or is not JSON in UTF-8; see `parse_json`.
    """
    try:
        content = file.read_bytes()
        return parse_json(content.decode("utf-8-sig"))
    except OSError as error:
        raise _cannot_read(file, error) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8. Is this the file of the data set?") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg}). Is the file complete?") from error
    except ValueError as error:
        raise DataError(f"{file}: cannot use this JSON ({error})") from error


def read_tokens(file: Path, problems: Problems) -> dict[str, list[str]]:
    """Return the captions of each picture from lines of the Flickr sets: NAME.jpg#NUMBER, white space, caption.

    Raises:
        DataError: when the file is missing or cannot be read.
    """
    captions: dict[str, list[str]] = {}
    for where, line in read_lines(file, problems):
        # Not a tab alone: one line of Flickr30k has spaces instead.
        if found := re.fullmatch(r"(.+?)#\d+(?:\s+(.*))?", line):
            captions.setdefault(found[1], []).append(found[2] or "")
        else:
            problems.add("lines that are not IMAGE#NUMBER, a tab and a caption", f"{where}: {line[:60]!r}")
    return captions


def _cannot_read(file: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{file}: no such file. Is this the place of the data set?")
    return DataError(f"{file}: cannot read this file ({error.strerror or error})")
