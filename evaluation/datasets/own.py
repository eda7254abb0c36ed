"""Readers of your own pictures: JSON Lines, tables, and folders of pictures with text files."""

import csv
import os
from pathlib import Path

from captioner.errors import DataError
from captioner.images import is_image_path
from evaluation.datasets.files import (
    SPLITS,
    Problems,
    Record,
    decode_lines,
    one_line,
    parse_json,
    read_lines,
    split_by_hash,
)


def read_jsonl(file: Path, problems: Problems | None = None) -> list[Record]:
    """JSON Lines: {"image": PATH, "captions": [TEXT, ...], "split": "train" | "dev" | "test"} per picture.

    Paths are relative to the file. Without "split", the split is by hash. Other keys are ignored. Malformed lines
    are problems; without `problems`, they are an error at the end.
    """
    found = Problems() if problems is None else problems
    records = []
    for where, line in read_lines(file, found):
        try:
            row = parse_json(line)
            image, captions = row["image"], row["captions"]
            split = row["split"] if "split" in row else split_by_hash(image)
            valid = isinstance(image, str) and all(isinstance(caption, str) for caption in captions)
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if valid and isinstance(captions, list) and split in SPLITS:
            records.append(Record(file.parent / image, image, tuple(captions), split))
        else:
            expected = '{"image": PATH, "captions": [TEXT, ...], "split": "train|dev|test"}'
            found.add(f"lines that are not {expected}", f"{where}: {line[:60]!r}")
    if problems is None:
        found.raise_any(file)
    return records


def read_table(file: Path, problems: Problems, delimiter: str = ",", pictures: Path | None = None) -> list[Record]:
    """A table with the columns `image` and `caption`, one caption per row, and optionally `split`.

    The first row names the columns; others are ignored. Fields are quoted as in CSV. Without the column `split`,
    splits are by hash. Paths are relative to the folder `pictures`, by default that of the file.
    """
    captions: dict[tuple[str, str], list[str]] = {}  # by picture and split: pictures in two splits are found later
    rows = csv.reader(decode_lines(file, problems), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if not {"image", "caption"} <= set(header):
            raise DataError(
                f"{file}: expected a first row with the columns image and caption"
                f"{', between tabs' if delimiter == chr(9) else ''}, got {header[:5]}"
            )
        if duplicates := {"image", "caption", "split"} & {name for name in header if header.count(name) > 1}:
            raise DataError(f"{file}: duplicate column {min(duplicates)!r}. Rename or remove one of them")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                problems.add(f"rows without the {len(header)} fields of the first row", where)
                continue
            cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
            image = cells["image"]
            split = cells["split"] if "split" in cells else split_by_hash(image)
            if not image:
                problems.add("rows without an image", where)
            elif split not in SPLITS:
                problems.add("splits that are not train, dev or test", f"{where}: {split!r}")
            else:
                captions.setdefault((image, split), []).append(one_line(cells["caption"]))
    except csv.Error as error:
        raise DataError(
            f"{file}, line {rows.line_num}: malformed table ({error}). Are all quotes closed?"
        ) from error
    folder = file.parent if pictures is None else pictures
    return [Record(folder / image, image, tuple(texts), split) for (image, split), texts in captions.items()]


def read_folder(directory: Path, problems: Problems) -> list[Record]:
    """A folder of pictures, searched recursively; beside each `dog.jpg` is `dog.txt`, with one caption per line.

    The image id is the path in the folder, and the split is its hash.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder")
    pictures: dict[Path, Path] = {}  # by paths without suffix
    texts: dict[Path, Path] = {}
    for parent, folders, names in os.walk(directory):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for path in sorted(Path(parent, name) for name in names if not name.startswith(".")):
            stem = path.with_suffix("")
            if path.suffix.lower() == ".txt":
                texts[stem] = path
            elif is_image_path(path) and pictures.setdefault(stem, path) != path:
                problems.add("pictures that share a .txt file with another", str(path))
    records = []
    for stem, path in pictures.items():
        if stem in texts:
            image_id = path.relative_to(directory).as_posix()
            captions = tuple(line for _, line in read_lines(texts[stem], problems))
            records.append(Record(path, image_id, captions, split_by_hash(image_id)))
        else:
            problems.add("pictures without a .txt file", str(path))
    for stem in sorted(texts.keys() - pictures.keys()):
        problems.add(".txt files without a picture", str(texts[stem]))
    return records
