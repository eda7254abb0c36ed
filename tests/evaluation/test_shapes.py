import dataclasses
import functools
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from captioner.errors import DataError, OutputError
from captioner.vocabulary import split
from evaluation.datasets import draw_shapes, shapes
from evaluation.datasets.draw_shapes import (
    ALIGNED,
    MARGIN,
    RELATIONS,
    describe,
    draw_scene,
    generate,
    holds,
    render,
)
from evaluation.datasets.scenes import Scene, Shape
from evaluation.datasets.shapes import read_scenes, read_shapes
from evaluation.shapes import is_true, mentions, parse

CIRCLE = Shape("circle", "red", "large", (16.0, 14.0), 11.5)
SQUARE = Shape("square", "blue", "small", (44.0, 18.0), 7.5)
TRIANGLE = Shape("triangle", "green", "small", (20.0, 50.0), 7.5)
SCENE = Scene((CIRCLE, SQUARE, TRIANGLE))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "shapes"
    generate(directory, seed=3, train=20, dev=8)
    return directory


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng(seed)) for seed in range(150)]


def test_captions_are_true_of_their_scenes_and_fit_the_grammar(scenes):
    for number, scene in enumerate(scenes):
        captions = describe(scene, np.random.default_rng(number))
        assert len(set(captions)) == 5
        for caption in captions:
            assert is_true(caption, scene), caption
            assert re.fullmatch("[a-z]+( [a-z]+)*", caption)
            assert split(caption) == caption.split()
            assert len(caption.split()) <= 20


def test_captions_mention_every_object_in_reading_order_and_relate_them(scenes):
    captions = {1: [], 2: [], 3: []}
    for number, scene in enumerate(scenes):
        order = []
        for caption in describe(scene, np.random.default_rng(number)):
            captions[len(scene.objects)].append(caption)
            order.append([shape for _, shape in mentions(split(caption), scene)])
        assert all(shapes == order[0] for shapes in order)
        for first, second in itertools.pairwise(order[0]):
            assert holds("left of", first, second) or (
                not holds("left of", second, first) and holds("above", first, second)
            )
    for count, texts in captions.items():
        assert all(len(parse(text).mentions) == count for text in texts)
    related = [bool(parse(text).relations) for text in captions[2] + captions[3]]
    assert np.mean(related) > 0.7


def test_scenes_are_unambiguous(scenes):
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        masks = [scene.mask(shape) for shape in scene.objects]
        assert np.sum(masks, axis=0).max() == 1, "objects overlap"
        assert len({(shape.kind, shape.colour) for shape in scene.objects}) == len(scene.objects)
        for first, second in itertools.combinations(scene.objects, 2):
            away = np.abs(np.subtract(first.centre, second.centre))
            assert ((away <= ALIGNED) | (away >= MARGIN)).all()
            assert any(holds(name, first, second) or holds(name, second, first) for name in RELATIONS)


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle",
        "there is a small blue square",
        "the picture shows a large red circle left of a blue square",
        "a blue square and a red circle",
        "a green triangle is below a red circle",
        "a red circle is left of a blue square and above a green triangle",
        "a red circle above a small green triangle that is left of a blue square",
        "A red circle, left of a blue square!",
    ],
)
def test_true_captions_are_recognized(caption):
    assert is_true(caption, SCENE)


@pytest.mark.parametrize(
    "caption",
    [
        "a green circle",
        "a small red circle",
        "there is a red cross",
        "a blue square left of a red circle",
        "a red circle above a blue square",  # by 4 pixels, which is less than the margin
        "a red circle is left of a blue square and below a green triangle",
        "a red circle above a green triangle that is above a blue square",
        "a red circle and a red circle",
        "a red circle and a blue square and a purple cross",
    ],
)
def test_false_captions_are_recognized(caption):
    assert parse(caption) is not None
    assert not is_true(caption, SCENE)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a circle",
        "red circle",
        "a red large circle",
        "a red circle above",
        "a red circle a blue square",
        "a red circle that is above a blue square",
        "a red circle left a blue square",
        "there is a red circle is above a green triangle",
        "a red circle above a green triangle <unk>",
    ],
)
def test_other_sentences_are_not_of_the_grammar(caption):
    assert parse(caption) is None
    assert not is_true(caption, SCENE)


def test_a_caption_is_true_if_any_choice_of_objects_makes_it_so():
    twins = Scene((CIRCLE, dataclasses.replace(CIRCLE, size="small", centre=(16.0, 44.0), radius=7.5)))
    assert is_true("a red circle below a large red circle", twins)
    assert is_true("a red circle and a red circle", twins)
    assert not is_true("a red circle below a small red circle", twins)
    assert mentions(split("a red circle below a red circle"), twins) == [
        (2, twins.objects[1]),
        (6, twins.objects[0]),
    ]


def test_nouns_are_resolved_to_their_objects():
    words = split("there is a small green triangle below a red circle that is left of a blue square")
    found = mentions(words, SCENE)
    assert found == [(5, TRIANGLE), (9, CIRCLE), (16, SQUARE)]
    assert [words[index] for index, _ in found] == ["triangle", "circle", "square"]
    assert mentions(split("a yellow circle"), SCENE) == []
    assert mentions(split("two dogs"), SCENE) == []


@pytest.mark.parametrize(
    ("kind", "area"), [("circle", np.pi), ("square", 4), ("triangle", 2), ("cross", 4 * (2 * 0.35 - 0.35**2))]
)
def test_masks_fill_the_area_of_the_shape(kind, area):
    shape = Shape(kind, "red", "large", (30.2, 25.3), 11.5)
    mask = Scene((shape,)).mask(shape)
    assert mask.shape == (64, 64)
    assert mask.sum() == pytest.approx(area * 11.5**2, rel=0.06)
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    assert (columns.min(), columns.max()) == pytest.approx((30.2 - 11.5, 30.2 + 11.5 - 1), abs=1)
    assert (rows.min(), rows.max()) == pytest.approx((25.3 - 11.5, 25.3 + 11.5 - 1), abs=1)


def test_colours_match_the_masks(scenes):
    agreement = []
    for number, scene in enumerate(scenes[:50]):
        picture = render(scene, np.random.default_rng(number)).astype(int)
        coloured = np.ptp(picture, axis=2) > 80
        painted = np.any([scene.mask(shape) for shape in scene.objects], axis=0)
        agreement.append((coloured == painted).mean())
    assert min(agreement) > 0.97  # but for pixels that an edge cuts


def test_a_generated_set_is_readable(directory):
    records = read_shapes(directory)
    assert [record.split for record in records] == ["train"] * 20 + ["dev"] * 8
    assert records[0].image == directory / "train" / "000000.png"
    scenes = read_scenes(directory)
    for record in records:
        with Image.open(record.image) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGB")
        assert all(is_true(caption, scenes[record.image_id]) for caption in record.captions)


def test_scenes_round_trip(directory):
    assert read_scenes(directory)["dev/000007.png"] == draw_scene(np.random.default_rng((3, 1, 7)))


def test_a_seed_gives_the_same_bytes_for_any_size(directory, tmp_path):
    generate(tmp_path / "fewer", seed=3, train=5, dev=8)
    generate(tmp_path / "other", seed=4, train=5, dev=8)
    for name in ("train/000004.png", "dev/000007.png"):
        same = (directory / name).read_bytes()
        assert (tmp_path / "fewer" / name).read_bytes() == same
        assert (tmp_path / "other" / name).read_bytes() != same
    lines = (directory / "scenes.jsonl").read_bytes().splitlines()
    assert (tmp_path / "fewer" / "scenes.jsonl").read_bytes().splitlines() == lines[:5] + lines[20:]


def test_a_missing_or_empty_folder_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "generate", functools.partial(generate, train=4, dev=2))
    (tmp_path / "empty").mkdir()
    assert len(read_shapes(tmp_path / "new" / "shapes")) == len(read_shapes(tmp_path / "empty")) == 6


def test_an_interrupted_generation_leaves_no_files(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(draw_shapes, "describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []


def test_a_set_of_a_concurrent_process_is_read(tmp_path, monkeypatch):
    def lose(target):
        generate(target, train=2, dev=1)  # by the other process, so that this one finds the folder full
        generate(target)

    monkeypatch.setattr(shapes, "generate", lose)
    assert len(read_shapes(tmp_path / "shapes")) == 3


def test_an_unrelated_folder_is_not_changed(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        generate(tmp_path)
    with pytest.raises(DataError, match=r"scenes\.jsonl: no such file"):
        read_shapes(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "change", [{"kind": "hexagon"}, {"colour": 3}, {"centre": [1.0]}, {"radius": "7"}, {"weight": 2}]
)
def test_a_malformed_object_is_rejected_with_its_line(tmp_path, change):
    row = {"image": "a.png", "objects": [dataclasses.asdict(CIRCLE)]}
    bad = {"image": "b.png", "objects": [dataclasses.asdict(CIRCLE) | change]}
    (tmp_path / "scenes.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(bad)}\n")
    with pytest.raises(DataError, match=rf"scenes\.jsonl, line 2: objects\[0\]\.{next(iter(change))}"):
        read_scenes(tmp_path)


@pytest.mark.parametrize(
    "line", ["no JSON", "[]", '{"image": "a.png"}', '{"objects": []}', '{"image": [], "objects": []}']
)
def test_a_malformed_line_is_rejected(tmp_path, line):
    (tmp_path / "scenes.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"scenes\.jsonl, line 1: expected"):
        read_scenes(tmp_path)
