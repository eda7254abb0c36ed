import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner.caption import Caption, Rectangle
from captioner.captioning import Captioner
from evaluation.__main__ import main
from evaluation.bootstrap import intervals
from evaluation.datasets import Record
from evaluation.datasets.draw_shapes import generate
from evaluation.datasets.scenes import Scene, Shape
from evaluation.grounding import Truth, tally, tally_hallucinations
from evaluation.instances import read_instances
from evaluation.metrics import Scores
from evaluation.tables import objects_to_text

pytestmark = pytest.mark.usefixtures("without_java")

WHOLE = Rectangle(0, 0, 1, 1)
IMAGES = {1: ["A dog on grass.", "A brown dog beside a frisbee."], 2: ["A man eats a hot dog."], 3: ["Blue sky."]}
CATEGORIES = {18: "dog", 1: "person", 64: "potted plant"}
# The left half of picture 1 is the dog, the lower quarter of picture 2 the person; picture 3 is empty.
OBJECTS = [(1, 18, (0, 0, 10, 10)), (2, 1, (0, 9, 20, 12)), (2, 64, (10, 0, 20, 6))]
SIZES = {1: (10, 20), 2: (12, 20), 3: (5, 5)}


@pytest.fixture
def coco(tmp_path):
    """A folder as COCO's archives make it, of three drawn pictures."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    pictures = [{"id": image, "file_name": f"{image:012}.jpg"} for image in IMAGES]
    for picture in pictures:
        Image.new("RGB", SIZES[picture["id"]][::-1], "green").save(tmp_path / "val2017" / picture["file_name"])
    captions = [{"image_id": image, "caption": item} for image, several in IMAGES.items() for item in several]
    sized = [{**item, "height": SIZES[item["id"]][0], "width": SIZES[item["id"]][1]} for item in pictures]
    objects = [
        {"image_id": image, "category_id": category, "segmentation": [[x, y, right, y, right, bottom, x, bottom]]}
        for image, category, (x, y, right, bottom) in OBJECTS
    ]
    for name, content in {
        "captions": {"images": pictures, "annotations": _numbered(captions)},
        "instances": {
            "images": sized,
            "annotations": _numbered(objects),
            "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
        },
    }.items():
        (tmp_path / "annotations" / f"{name}_val2017.json").write_text(json.dumps(content))
    return tmp_path


def _numbered(rows):
    return [{"id": number, **row} for number, row in enumerate(rows)]


@pytest.fixture
def instances(coco):
    return read_instances([coco / "annotations" / "instances_val2017.json"], ["1", "2", "3"])


REFERENCES = {str(image): captions for image, captions in IMAGES.items()}


def caption_of(text, attention=None, rectangle=WHOLE):
    words = tuple(text.split())
    attention = np.full((len(words), 2, 2), 0.25) if attention is None else attention
    return Caption(text, words, (0.0,) * len(words), 0.0, 0.0, attention, rectangle)


def results_of(*captions):
    return [
        (Record(Path(f"{number}.jpg"), str(number), tuple(IMAGES[number]), "dev"), caption)
        for number, caption in enumerate(captions, start=1)
    ]


def test_hallucinations_match_a_manual_count(instances):
    captions = {
        "1": "Two dogs and a cat, with a frisbee and a cat.",  # marked; neither; a reference has it; neither
        "2": "A woman with hot dogs near house plants.",  # marked; a reference has it; no name
        "3": "A kite in the sky.",  # nothing is marked there
    }
    tallies = tally_hallucinations(captions, REFERENCES, instances)
    assert tallies == {
        "CHAIR-i": {"1": (2, 4), "2": (0, 2), "3": (1, 1)},
        "CHAIR-s": {"1": (1, 1), "2": (0, 1), "3": (1, 1)},
    }
    assert Scores(tallies).corpus == {"CHAIR-i": 3 / 7, "CHAIR-s": 2 / 3}
    low, high = intervals(Scores(tallies))["CHAIR-i"]
    assert low <= 3 / 7 <= high


def test_a_hot_dog_is_not_a_dog_and_vice_versa(instances):
    captions = {"1": "a hot dog", "2": "a dog", "3": "grass"}
    assert tally_hallucinations(captions, REFERENCES, instances)["CHAIR-i"] == {
        "1": (1, 1),
        "2": (1, 1),
        "3": (0, 0),
    }


def test_attention_is_that_of_the_words_that_name_marked_objects(instances):
    first = np.zeros((3, 2, 2))
    first[:, 0, 1] = 1  # elsewhere
    first[1] = [[0.5, 0], [0.2, 0.3]]  # "dog": its left half is the dog's
    second = np.full((6, 4, 4), 1 / 16)
    second[1] = [[0, 0, 0, 0.25]] * 4  # "man": one cell of four lies on the person
    second[3] = 0  # "potted": all on the plant
    second[3, 0, 3] = 1
    second[4] = 0  # "plant": none on it
    second[4, 3, 0] = 1
    # "kite" is not marked: its attention tells nothing.
    tallies = tally(
        results_of(
            caption_of("a dog runs", first), caption_of("a man with potted plant kite", second), caption_of("a dog")
        ),
        Truth({}, instances, {}),
    )
    assert tallies["attention mass"]["1"] == pytest.approx((0.7, 1))
    assert tallies["attention mass"]["2"] == pytest.approx((0.25 + 0.5, 2))
    assert tallies["attention mass"]["3"] == (0, 0)
    # The peak of "dog" is on it, that of "man", the first of four, is not, and the pair's first is the plant's.
    assert tallies["pointing"] == {"1": (1, 1), "2": (1, 2), "3": (0, 0)}
    assert tallies["CHAIR-i"]["2"] == (1, 3)


def test_captions_of_shapes_are_compared_with_their_scenes():
    red = Shape("circle", "red", "small", (16.0, 16.0), 6.5)
    blue = Shape("square", "blue", "large", (48.0, 48.0), 9.5)
    green = Shape("cross", "green", "large", (48.0, 16.0), 9.5)
    scenes = {"1": Scene((red,)), "2": Scene((red, blue)), "3": Scene((red, blue, green))}
    maps = np.zeros((3, 4, 4))
    maps[:, 0, 0] = 1
    maps[2] = 0
    maps[2, 1, 1] = 1  # pixels 16 to 32, where the circle has a quarter
    results = results_of(caption_of("a red circle", maps), caption_of("a blue circle"), caption_of("a red circle"))
    tallies = tally(results, Truth(scenes, {}, {}))
    assert tallies["true"] == {"1": (1, 1), "2": (0, 1), "3": (1, 1)}
    assert tallies["true of three"] == {"1": (0, 0), "2": (0, 0), "3": (1, 1)}
    quarter = scenes["1"].mask(red)[16:32, 16:32].mean()
    assert tallies["attention mass"]["1"] == pytest.approx((quarter, 1))
    assert tallies["attention mass"]["2"] == (0, 0)
    assert tallies["pointing"] == {"1": (1, 1), "2": (0, 0), "3": (0, 0)}


def test_the_text_shows_counts_and_missing_values():
    tallies = {
        "CHAIR-i": {1: (0, 0), 2: (0, 0)},
        "CHAIR-s": {1: (1, 1), 2: (1, 1)},
        "pointing": {1: (0, 0), 2: (1, 2)},
    }
    lines = objects_to_text(Scores(tallies), intervals(Scores(tallies))).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["CHAIR-i", "none"],
        ["CHAIR-s", "100.0", "100.0", "to", "100.0", "of", "2", "captions"],
        ["pointing", "50.0", "50.0", "to", "50.0", "of", "2", "nouns"],
    ]
    assert {line.index("%") for line in lines[:1]} == {line.index("0 ") for line in lines[2:]} | {19}


@pytest.fixture
def captions(monkeypatch):
    """Captions by hand instead of the network's."""
    dog = np.zeros((2, 2, 2))
    dog[:, 0, 0] = 1
    written = [caption_of("a dog", dog), caption_of("a dog", dog), caption_of("a man", dog)]
    monkeypatch.setattr(
        Captioner, "caption_batches", lambda self, pictures, *_: zip(pictures, written, strict=True)
    )


def shares_of(printed):
    """Value and tallies by name, of those in `OBJECT_SHARES`."""
    found = json.loads(printed)
    return {name: [found["objects"][name]["value"], found["counts"][name]] for name in OBJECT_SHARES}


OBJECT_SHARES = {
    "CHAIR-i": [2 / 3, {"1": [0, 1], "2": [1, 1], "3": [1, 1]}],
    "CHAIR-s": [2 / 3, {"1": [0, 1], "2": [1, 1], "3": [1, 1]}],
    "attention mass": [pytest.approx(1), {"1": [pytest.approx(1), 1], "2": [0, 0], "3": [0, 0]}],
    "pointing": [1, {"1": [1, 1], "2": [0, 0], "3": [0, 0]}],
}


def test_run_reads_the_instances_beside_cocos_captions(tiny_checkpoint, coco, captions, capsys):
    command = ["run", str(tiny_checkpoint), "--data", f"coco:{coco}", "--device", "cpu"]
    assert main([*command, "--json", "-"]) == 0
    assert shares_of(capsys.readouterr().out) == OBJECT_SHARES
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    chair = lines.index(next(line for line in lines if line.startswith("CHAIR-i")))
    assert [line.split()[:2] for line in lines[chair : chair + 2]] == [["CHAIR-i", "66.7"], ["CHAIR-s", "66.7"]]
    (pointing,) = (line for line in lines if line.startswith("pointing  "))
    assert pointing.split() == ["pointing", "100.0", "100.0", "to", "100.0", "of", "1", "nouns"]
    assert lines[-1].startswith("faithfulness, nats  ")


def test_run_reads_instances_of_another_path_or_none(tiny_checkpoint, coco, captions, capsys):
    moved = (coco / "annotations" / "instances_val2017.json").rename(coco / "elsewhere.json")
    command = ["run", str(tiny_checkpoint), "--data", f"coco:{coco}", "--device", "cpu", "--json", "-"]
    assert main(command) == 0
    assert "objects" not in json.loads(capsys.readouterr().out)
    assert main([*command, "--instances", str(moved)]) == 0
    assert shares_of(capsys.readouterr().out) == OBJECT_SHARES


def test_run_reports_truth_and_attention_of_shapes(tiny_checkpoint, tmp_path, capsys):
    generate(tmp_path / "shapes", train=1, dev=3)
    command = ["run", str(tiny_checkpoint), "--data", f"shapes:{tmp_path / 'shapes'}", "--device", "cpu"]
    assert main([*command, "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    found = numbers["objects"]
    assert list(found)[:3] == ["true", "true of three", "attention mass"]
    assert list(found)[-1] == "faithfulness, nats"
    assert (found["true"]["value"], list(numbers["counts"]["true"].values())) == (0, [[0, 1]] * 3)
    assert found["attention mass"]["value"] is None
    assert main(["report", *command[1:], "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Objects</h2>" in page
    assert '<th scope="row">True of three</th>' in page or found["true of three"]["value"] is None
    assert "Attention mass" not in page  # no value


def test_score_counts_hallucinations(coco, capsys):
    (coco / "results.json").write_text(
        json.dumps([{"image_id": image, "caption": caption} for image, caption in zip(IMAGES, "abc", strict=True)])
    )
    references, instances = (
        str(coco / "annotations" / f"{name}_val2017.json") for name in ("captions", "instances")
    )
    command = ["score", references, str(coco / "results.json"), "--instances", instances]
    assert main([*command, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: item["value"] for name, item in found["objects"].items()} == {"CHAIR-i": None, "CHAIR-s": 0}
    assert list(found["counts"]["CHAIR-s"].values()) == [[0, 1]] * 3
    assert main([*command[:3], "--instances", references]) == 2
    assert f"{references}: expected COCO's instances" in capsys.readouterr().err


def test_instances_of_other_pictures_fail_before_captioning(tiny_checkpoint, coco, monkeypatch, capsys):
    generate(coco / "shapes", train=1, dev=1)
    monkeypatch.setattr(Captioner, "caption_batches", pytest.fail)
    command = ["run", str(tiny_checkpoint), "--data", f"shapes:{coco / 'shapes'}", "--device", "cpu"]
    assert main([*command, "--instances", str(coco / "annotations" / "instances_val2017.json")]) == 2
    assert "instances_val2017.json: no image dev/000000.png" in capsys.readouterr().err
