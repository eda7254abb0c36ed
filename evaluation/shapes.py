"""A data set that needs no download: pictures of coloured shapes, captions from a small grammar, and the truth.

Every scene is generated from a seed. One grammar, `FORMS`, writes the captions and reads any caption back, a
network's too, so whether a caption is true of its scene is known, and so is the object that each noun names.

On disk a set is `train/000000.png`..., `dev/000000.png`... and `scenes.jsonl`, a line a picture:
{"image": PATH, "split": "train" | "dev", "captions": [TEXT, ...], "objects": [SHAPE, ...]}.
"""

import functools
import itertools
import json
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from captioner.config import from_dict, to_dict
from captioner.errors import ConfigError, DataError, OutputError
from captioner.vocabulary import split
from evaluation.datasets import Record, read_jsonl, read_lines
from evaluation.datasets.files import parse_json

Kind: TypeAlias = Literal["circle", "square", "triangle", "cross"]
Colour: TypeAlias = Literal["red", "yellow", "green", "cyan", "blue", "purple"]
Size: TypeAlias = Literal["small", "large"]

SIDE = 64
"""Width and height of a picture, in pixels."""

MARGIN = 12.0
"""How many pixels the centre of one object must lie above (below, left of, right of) another's to be called so."""

ALIGNED = 6.0
"""No two centres of a generated scene are further apart than this along an axis, and nearer than `MARGIN`: no
relation is true or false by a hair's breadth."""

RELATIONS = {"left of": (0, 1), "above": (1, 1), "below": (1, -1)}
"""The axis (0: x, 1: y) along which a relation holds, and the sign of second minus first when it does.

Nothing is "right of": captions mention objects in reading order. A decoder that looks before it reads the last
word cannot tell which object that word chose; it can only follow an order.
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
"""The grammar, by how many objects a caption mentions. A letter stands for a noun phrase, "a [size] colour kind",
two letters for the relation of the first to the second."""

_COLOURS = {
    "red": (215, 30, 35),
    "yellow": (245, 215, 30),
    "green": (30, 145, 50),
    "cyan": (45, 210, 220),
    "blue": (30, 60, 205),
    "purple": (150, 45, 175),
}
_RADII = {"small": (6.0, 7.0), "large": (9.0, 10.0)}
_X = np.arange(SIDE, dtype=np.float32)[None, :] + 0.5  # the centres of the pixels: (1, 64)
_Y = np.arange(SIDE, dtype=np.float32)[:, None] + 0.5  # (64, 1)


@dataclass(frozen=True)
class Shape:
    """An object of a scene."""

    kind: Kind
    colour: Colour
    size: Size
    centre: tuple[float, float]
    """x and y of the middle of its box, in pixels from the upper left corner of the picture."""
    radius: float
    """Half the side of its square box, in pixels."""


@dataclass(frozen=True)
class Scene:
    """The objects of a picture. They do not overlap, and no two share both kind and colour when generated."""

    objects: tuple[Shape, ...]

    def mask(self, shape: Shape) -> np.ndarray:
        """Return bool (64, 64): the pixels whose centres lie in this object."""
        return _distance(shape) <= 0


@dataclass(frozen=True)
class Mention:
    """A noun phrase of a caption."""

    kind: str
    colour: str
    size: str | None
    place: int
    """Where its noun, the kind, stands among the words of the caption; the first word is 0."""

    def names(self, shape: Shape) -> bool:
        """Tell whether the phrase can name this object."""
        return (self.kind, self.colour) == (shape.kind, shape.colour) and self.size in (None, shape.size)


@dataclass(frozen=True)
class Sentence:
    """What a caption claims: that there are such objects, all different, in such relations."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...]
    """(first, relation, second): places in `mentions`."""


def holds(relation: str, first: Shape, second: Shape) -> bool:
    """Tell whether `first` is clearly, by `MARGIN`, "above" (or another of `RELATIONS`) `second`."""
    axis, sign = RELATIONS[relation]
    return sign * (second.centre[axis] - first.centre[axis]) >= MARGIN


def parse(caption: str) -> Sentence | None:
    """Return what a caption claims, or None when it is no sentence of the grammar.

    Case and punctuation do not matter: words are those of `captioner.vocabulary.split`.
    """
    text = " ".join(split(caption))
    for count, pattern in _patterns():
        if found := pattern.fullmatch(text):
            letters = "ABC"[:count]
            phrases = tuple(
                Mention(
                    found[f"{letter}_kind"],
                    found[f"{letter}_colour"],
                    found[f"{letter}_size"],
                    text.count(" ", 0, found.start(f"{letter}_kind")),
                )
                for letter in letters
            )
            relations = tuple(
                (letters.index(name[0]), relation, letters.index(name[1]))
                for name, relation in found.groupdict().items()
                if len(name) == 2
            )
            return Sentence(phrases, relations)
    return None


def is_true(caption: str, scene: Scene) -> bool:
    """Tell whether a caption is a sentence of the grammar and true: some objects are all that it claims."""
    return bool(mentions(split(caption), scene))


def mentions(words: Sequence[str], scene: Scene) -> list[tuple[int, Shape]]:
    """Return the place of each noun among the words of a caption, and the object that it names.

    Where several choices of objects make the caption true, the first in the order of the scene counts; in
    generated scenes there is but one. A caption that is not true names nothing: the list is empty.
    """
    sentence = parse(" ".join(words))
    if sentence is None:
        return []
    for objects in itertools.permutations(scene.objects, len(sentence.mentions)):
        if all(mention.names(shape) for mention, shape in zip(sentence.mentions, objects, strict=True)) and all(
            holds(relation, objects[first], objects[second]) for first, relation, second in sentence.relations
        ):
            return [(mention.place, shape) for mention, shape in zip(sentence.mentions, objects, strict=True)]
    return []


def generate(directory: Path, seed: int = 0, train: int = 4000, dev: int = 400) -> None:
    """Write a set of `train` and `dev` pictures; with the same libraries, the same seed writes the same bytes.

    A picture depends on the seed, its split and its number alone, not on how many there are. The folder appears
    when it is complete.

    Raises:
        OutputError: if the folder exists and is not empty, or cannot be written.
    """
    # Not `tempfile`: its folders are readable by their owner alone, and would stay so under the final name.
    partial = directory.parent / f".{secrets.token_hex(8)}.partial"
    pictures = [("train", number) for number in range(train)] + [("dev", number) for number in range(dev)]
    try:
        if directory.exists() and any(directory.iterdir()):
            raise OutputError(f"{directory}: exists already, and is not empty. Choose another folder.")
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
            directory.rmdir()  # not every system renames over a folder, even an empty one
        partial.rename(directory)
    except OSError as error:
        raise OutputError(f"{directory}: cannot write this folder ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # mostly gone: it has its final name by now


def read_shapes(directory: Path) -> list[Record]:
    """Return the records of a set; if the folder is missing or empty, `generate` fills it first.

    Raises:
        DataError: when `scenes.jsonl` is missing from a folder that is not empty, or malformed.
        OutputError: when the set cannot be written.
    """
    file = directory / "scenes.jsonl"
    if not directory.exists() or not any(directory.iterdir()):
        try:
            generate(directory)
        except OutputError:
            if not file.exists():  # it does if another process was quicker, and wrote the same
                raise
    return read_jsonl(file)


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


def draw_scene(random: np.random.Generator) -> Scene:
    """Return one to three objects, no two of one kind and colour, placed so that every relation is clear."""
    count = int(random.integers(1, 4))
    looks = list(itertools.product(get_args(Kind), get_args(Colour)))
    chosen = [looks[number] for number in random.choice(len(looks), count, replace=False)]
    sizes = [get_args(Size)[number] for number in random.integers(0, 2, count)]
    radii = np.array([random.uniform(*_RADII[size]) for size in sizes]).round(2)
    first, second = np.triu_indices(count, 1)
    while True:  # of three large objects, one placement of a hundred will do
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
    """Return a picture, uint8 (64, 64, 3), of the scene before a background of chance.

    The background is a slope of dim colour with grey strokes and dots; objects cover it. Noise covers all.
    """
    right, down, brightness = random.uniform((-0.5, -0.5, 80), (0.5, 0.5, 200)).tolist()
    grey = brightness + right * (_X - SIDE / 2) + down * (_Y - SIDE / 2)  # (64, 64)
    for _ in range(random.integers(3, 8)):
        start, reach = random.uniform(0, SIDE, 2).tolist(), random.normal(0, 4, 2).tolist()
        grey = _paint(grey, _stroke(*start, *reach), random.uniform(30, 240))
    picture = grey[..., None] + random.uniform(-12, 12, 3).astype(np.float32)  # (64, 64, 3)
    for shape in scene.objects:
        colour = (_COLOURS[shape.colour] + random.uniform(-12, 12, 3)).astype(np.float32)
        picture = _paint(picture, _distance(shape)[..., None], colour)
    noise = 4 * random.standard_normal(picture.shape, np.float32)
    return (picture + noise).clip(0, 255).round().astype(np.uint8)


def describe(scene: Scene, random: np.random.Generator) -> list[str]:
    """Return five different captions that are true of the scene and mention all its objects in reading order."""
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
    """Return the objects from left to right; those that stand in one column, from top to bottom."""
    return sorted(
        scene.objects,
        key=lambda shape: (sum(holds("left of", other, shape) for other in scene.objects), shape.centre[1]),
    )


def _pick(options: Sequence[str], random: np.random.Generator) -> str:
    return options[int(random.integers(len(options)))]  # `random.choice` takes ten times as long


@functools.cache
def _patterns() -> list[tuple[int, re.Pattern[str]]]:
    """Return how many objects each form mentions, and the expression that its sentences match."""
    return [
        (count, re.compile(" ".join(_expression(token) for token in form.split())))
        for count, forms in FORMS.items()
        for form in forms
    ]


def _expression(token: str) -> str:
    if not token.isupper():
        return token
    if len(token) == 2:
        return f"(?P<{token}>{'|'.join(RELATIONS)})"
    size, colour, kind = ("|".join(get_args(words)) for words in (Size, Colour, Kind))
    return f"a (?:(?P<{token}_size>{size}) )?(?P<{token}_colour>{colour}) (?P<{token}_kind>{kind})"


def _distance(shape: Shape) -> np.ndarray:
    """Return (64, 64): how far each pixel lies outside of the shape, in pixels; negative inside."""
    x, y = _X - shape.centre[0], _Y - shape.centre[1]
    across, down, radius = np.abs(x), np.abs(y), shape.radius
    if shape.kind == "circle":
        return np.hypot(x, y) - radius
    if shape.kind == "triangle":  # its tip in the middle of the box's upper side
        return np.maximum(y - radius, (2 * across - y - radius) / 5**0.5)
    box = np.maximum(across, down) - radius
    return box if shape.kind == "square" else np.maximum(box, np.minimum(across, down) - 0.35 * radius)


def _stroke(x: float, y: float, right: float, down: float) -> np.ndarray:
    """Return (64, 64): how far each pixel lies outside of a thin line from (x, y), in pixels."""
    length = right**2 + down**2
    along = ((_X - x) * (right / length) + (_Y - y) * (down / length)).clip(0, 1)  # 0 at its start, 1 at its end
    return np.hypot(_X - x - along * right, _Y - y - along * down) - 0.7


def _paint(picture: np.ndarray, distance: np.ndarray, colour: float | np.ndarray) -> np.ndarray:
    """Return the picture with the colour where the distance is negative, blended along the edge."""
    return picture + (0.5 - distance).clip(0, 1) * (colour - picture)
