"""Coloured shapes: a data set that is drawn from a seed, with the objects of each picture.

On disk a set is `train/000000.png`..., `dev/000000.png`... and `scenes.jsonl`, one line per picture:
{"image": PATH, "split": "train" | "dev", "captions": [TEXT, ...], "objects": [SHAPE, ...]}.
"""

from pathlib import Path

from captioner.config import from_dict
from captioner.errors import ConfigError, DataError, OutputError
from evaluation.datasets.draw_shapes import generate
from evaluation.datasets.files import Problems, Record, parse_json, read_lines
from evaluation.datasets.own import read_jsonl
from evaluation.datasets.scenes import Scene


def read_shapes(directory: Path, problems: Problems | None = None) -> list[Record]:
    """Coloured shapes; if the folder is missing or empty, the set is drawn first.

    Raises:
        DataError: if `scenes.jsonl` is malformed, or missing from a folder that is not empty.
        OutputError: if the set cannot be written.
    """
    file = directory / "scenes.jsonl"
    if not directory.exists() or not any(directory.iterdir()):
        try:
            generate(directory)
        except OutputError:
            if not file.exists():  # another process may have written the same set meanwhile
                raise
    return read_jsonl(file, problems)


def read_scenes(directory: Path) -> dict[str, Scene]:
    """Return the scene of each picture of a set, by the `image_id` of its record.

    Raises:
        DataError: when `scenes.jsonl` is missing or malformed.
    """
    scenes = {}
    for where, line in read_lines(directory / "scenes.jsonl"):
        try:
            row = parse_json(line)
            scenes[row["image"]] = from_dict(Scene, {"objects": row["objects"]}, where)
        except ConfigError as error:
            raise DataError("; ".join(str(error).splitlines())) from error
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{where}: expected {{"image": PATH, "objects": [SHAPE, ...], ...}}, got {line[:60]!r}'
            ) from None
    return scenes
