"""Draw pictures of coloured shapes from a seed, and write captions of them by a small grammar.

The same grammar, `FORMS`, parses captions (`evaluation.shapes`), so that any caption can be checked for its truth.
"""

import itertools
import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from captioner.config import to_dict
from captioner.errors import OutputError
from evaluation.datasets.scenes import SIDE, Colour, Kind, Scene, Shape, Size, X, Y, distance

MARGIN = 12.0
"""Minimum distance of centres along an axis, in pixels, for a relation to hold."""

ALIGNED = 6.0
"""Distances along an axis between this and `MARGIN` are not generated, so that every relation is clear."""

RELATIONS = {"left of": (0, 1), "above": (1, 1), "below": (1, -1)}
"""The axis (0: x, 1: y) of a relation, and the sign of second minus first.

There is no "right of": captions mention objects in reading order. A decoder that attends before it reads the last
word does not know which object that word chose; it can only follow an order.
"""

FORMS = {
    1: ("A", "there is A", "the picture shows A"),
    2: ("A and B", "A AB B", "A is AB B", "there is A AB B", "the picture shows A AB B"),
    3: (
        "A and B and C",
        "A AB B and AC C",
        "A is AB B and AC C",
        "A AB B that is BC C",
        "A is AB B that is BC C",
        "there is A AB B that is BC C",
    ),
}
"""The grammar, by number of objects. A letter is a noun phrase, "a [size] colour kind"; two letters are the
relation of the first to the second."""

_COLOURS = {
    "red": (215, 30, 35),
    "yellow": (245, 215, 30),
    "green": (30, 145, 50),
    "cyan": (45, 210, 220),
    "blue": (30, 60, 205),
    "purple": (150, 45, 175),
}
_RADII = {"small": (6.0, 7.0), "large": (9.0, 10.0)}


def holds(relation: str, first: Shape, second: Shape) -> bool:
    """Return whether `first` is "above" (or another of `RELATIONS`) `second` by at least `MARGIN`."""
    axis, sign = RELATIONS[relation]
    return sign * (second.centre[axis] - first.centre[axis]) >= MARGIN


def generate(directory: Path, seed: int = 0, train: int = 4000, dev: int = 400) -> None:
    """Write a set of `train` and `dev` pictures; the same seed and libraries write the same bytes.

    A picture depends only on the seed, its split and its number. The folder appears when it is complete.

    Raises:
        OutputError: if the folder exists and is not empty, or cannot be written.
    """
    # Folders of `tempfile` are readable by their owner only.
    partial = directory.parent / f".{secrets.token_hex(8)}.partial"
    pictures = [("train", number) for number in range(train)] + [("dev", number) for number in range(dev)]
    try:
        if directory.exists() and any(directory.iterdir()):
            raise OutputError(f"{directory}: exists and is not empty. Choose another folder.")
        for name in ("train", "dev"):
            (partial / name).mkdir(parents=True)
        with (partial / "scenes.jsonl").open("x", newline="\n") as lines:
            for name, number in tqdm(pictures, desc="shapes", unit="picture", disable=None):
                random = np.random.default_rng((seed, ("train", "dev").index(name), number))
                scene = draw_scene(random)
                image = f"{name}/{number:06}.png"
                Image.fromarray(render(scene, random)).save(partial / image)
                row = {"image": image, "split": name, "captions": describe(scene, random), **to_dict(scene)}
                lines.write(f"{json.dumps(row)}\n")
        if directory.exists():
            directory.rmdir()  # not every system can rename over an empty folder
        partial.rename(directory)
    except OSError as error:
        raise OutputError(f"{directory}: cannot write this folder ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed if successful


def draw_scene(random: np.random.Generator) -> Scene:
    """Return one to three objects of distinct kinds and colours, with clear relations."""
    count = int(random.integers(1, 4))
    kinds = list(itertools.product(get_args(Kind), get_args(Colour)))
    chosen = [kinds[index] for index in random.choice(len(kinds), count, replace=False)]
    sizes = [get_args(Size)[index] for index in random.integers(0, 2, count)]
    radii = np.array([random.uniform(*_RADII[size]) for size in sizes]).round(2)
    first, second = np.triu_indices(count, 1)
    while True:  # about one of a hundred placements of three large objects is valid
        centres = random.uniform(radii[:, None] + 1, SIDE - 1 - radii[:, None], (64, count, 2)).round(2)
        away = np.abs(centres[:, first] - centres[:, second])  # (64, pairs, 2)
        clear = ((away <= ALIGNED) | (away >= MARGIN)).all(axis=(1, 2))
        apart = (away.max(axis=2) >= radii[first] + radii[second] + 2).all(axis=1)
        if (good := clear & apart).any():
            break
    return Scene(
        tuple(
            Shape(kind, colour, size, (x, y), radius)
            for (kind, colour), size, (x, y), radius in zip(
                chosen, sizes, centres[good.argmax()].tolist(), radii.tolist(), strict=True
            )
        )
    )


def render(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """Return a picture of the scene on a random background, uint8 (64, 64, 3).

    The background is a colour gradient with grey strokes. Noise is added to all pixels.
    """
    right, down, brightness = random.uniform((-0.5, -0.5, 80), (0.5, 0.5, 200)).tolist()
    grey = brightness + right * (X - SIDE / 2) + down * (Y - SIDE / 2)  # (64, 64)
    for _ in range(random.integers(3, 8)):
        start, reach = random.uniform(0, SIDE, 2).tolist(), random.normal(0, 4, 2).tolist()
        grey = _paint(grey, _stroke(*start, *reach), random.uniform(30, 240))
    picture = grey[..., None] + random.uniform(-12, 12, 3).astype(np.float32)  # (64, 64, 3)
    for shape in scene.objects:
        colour = (_COLOURS[shape.colour] + random.uniform(-12, 12, 3)).astype(np.float32)
        picture = _paint(picture, distance(shape)[..., None], colour)
    noise = 4 * random.standard_normal(picture.shape, np.float32)
    return (picture + noise).clip(0, 255).round().astype(np.uint8)


def describe(scene: Scene, random: np.random.Generator) -> list[str]:
    """Return five distinct true captions of the scene, which mention all objects in reading order."""
    captions: list[str] = []
    while len(captions) < 5:
        caption = _caption(scene, random)
        if caption not in captions:
            captions.append(caption)
    return captions


def _caption(scene: Scene, random: np.random.Generator) -> str:
    named = dict(zip("ABC", _reading_order(scene), strict=False))
    words = []
    for token in _pick(FORMS[len(named)], random).split():
        shapes = [named[letter] for letter in token if letter in named]
        if len(shapes) == 2:
            words.append(_pick([relation for relation in RELATIONS if holds(relation, *shapes)], random))
        elif shapes:
            size = [shapes[0].size] if random.random() < 0.3 else []
            words += ["a", *size, shapes[0].colour, shapes[0].kind]
        else:
            words.append(token)
    return " ".join(words)


def _reading_order(scene: Scene) -> list[Shape]:
    """Return the objects from left to right, those of a column from top to bottom."""
    return sorted(
        scene.objects,
        key=lambda shape: (sum(holds("left of", other, shape) for other in scene.objects), shape.centre[1]),
    )


def _pick(options: Sequence[str], random: np.random.Generator) -> str:
    return options[int(random.integers(len(options)))]  # ten times as fast as `random.choice`


def _stroke(x: float, y: float, right: float, down: float) -> np.ndarray:
    """Return the distance of each pixel to a thin line from (x, y), in pixels: (64, 64)."""
    length = right**2 + down**2
    along = ((X - x) * (right / length) + (Y - y) * (down / length)).clip(0, 1)  # 0 at its start, 1 at its end
    return np.hypot(X - x - along * right, Y - y - along * down) - 0.7


def _paint(picture: np.ndarray, distance: np.ndarray, colour: float | np.ndarray) -> np.ndarray:
    """Return the picture with the colour where the distance is negative, with antialiasing."""
    return picture + (0.5 - distance).clip(0, 1) * (colour - picture)
