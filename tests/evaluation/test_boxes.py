import json

import numpy as np
import pytest

from captioner.caption import Caption, Rectangle
from captioner.errors import DataError
from evaluation.__main__ import main
from evaluation.boxes import SIDE, Boxes, read_boxes
from evaluation.datasets import Record
from evaluation.datasets.draw_shapes import generate
from evaluation.grounding import Truth, find_nouns
from evaluation.instances import Instances


@pytest.fixture
def records(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    names = ("a.jpg", "b.jpg", "c.jpg")
    for name in names:
        (tmp_path / "set" / "images" / name).touch()
    return [Record(tmp_path / "set" / "images" / name, f"images/{name}", ("A man.",), "dev") for name in names]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_paths_of_boxes_are_relative_to_their_file(records, tmp_path):
    content = {"set/images/a.jpg": [[0, 0, 0.5, 1]], "./set/images/b.jpg": [], "other/images/c.jpg": [[0, 0, 1, 1]]}
    found = read_boxes(write(tmp_path / "boxes.json", content), records)
    assert found == {"images/a.jpg": Boxes({"person": [[0, 0, 0.5, 1]]}), "images/b.jpg": Boxes({})}


def test_a_mask_is_the_union_of_the_boxes():
    mask = Boxes({"person": [[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.5, 0.6]]}).mask("person")
    expected = np.zeros((SIDE, SIDE), bool)
    expected[200:400, 100:300] = True
    expected[300:600, 200:500] = True
    assert (mask == expected).all()


@pytest.mark.parametrize("box", [[0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [0, 0, 0.0001, 0.0001]])
def test_the_smallest_box_is_a_pixel(box):
    assert Boxes({"person": [box]}).mask("person").sum() == 1


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"set/images/a.jpg": None},
        {"set/images/a.jpg": [[0, 0, 1]]},
        {"set/images/a.jpg": [[0, 0, "1", 1]]},
        {"set/images/a.jpg": [[0, 0, 1, 1.5]]},
        {"set/images/a.jpg": [[0.6, 0, 0.5, 1]]},
        {"set/images/a.jpg": [0, 0, 1, 1]},
    ],
)
def test_malformed_files_are_rejected(records, tmp_path, content):
    file = write(tmp_path / "boxes.json", content)
    with pytest.raises(DataError, match=r"boxes\.json: expected boxes of people") as caught:
        read_boxes(file, records)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_pictures_is_rejected(records, tmp_path):
    file = write(tmp_path / "boxes.json", {"images/a.jpg": [[0, 0, 1, 1]]})
    with pytest.raises(DataError, match="contains none of these pictures"):
        read_boxes(file, records)


def caption_of(text):
    words = tuple(text.split())
    return Caption(text, words, (0.0,) * len(words), 0.0, 0.0, np.zeros((len(words), 2, 2)), Rectangle(0, 0, 1, 1))


def test_only_words_for_people_are_measured(records):
    truth = Truth({}, {}, {"images/a.jpg": Boxes({"person": [[0, 0, 1, 1]]})})
    found = find_nouns(records[0], caption_of("a man throws the girls a frisbee"), truth)
    assert [(noun.words.start, noun.name, noun.shares is not None) for noun in found] == [
        (1, "person", True),
        (4, "person", True),
        (6, "frisbee", False),
    ]
    assert find_nouns(records[1], caption_of("a man"), truth) == []


def test_boxes_take_precedence_over_instances(records):
    truth = Truth(
        {}, {"images/a.jpg": Instances((2, 2), {"dog": []})}, {"images/a.jpg": Boxes({"person": [[0, 0, 1, 1]]})}
    )
    found = find_nouns(records[0], caption_of("man dog"), truth)
    assert [noun.shares is not None for noun in found] == [True, False]


def test_run_measures_attention_with_boxes(tiny_checkpoint, tmp_path, capsys):
    generate(tmp_path / "shapes", train=1, dev=2)
    lines = [{"image": f"shapes/dev/{number:06}.png", "captions": ["a dog"], "split": "dev"} for number in range(2)]
    (tmp_path / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    boxes = write(tmp_path / "boxes.json", {"shapes/dev/000001.png": [[0, 0, 1, 1]]})
    command = ["run", str(tiny_checkpoint), "--data", f"jsonl:{tmp_path / 'captions.jsonl'}", "--device", "cpu"]
    assert main([*command, "--boxes", str(boxes), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "CHAIR-i" not in found["objects"]  # boxes contain only people
    assert found["counts"]["attention mass"].keys() == {line["image"] for line in lines}
    assert main([*command, "--boxes", str(tmp_path / "captions.jsonl")]) == 2
    assert "captions.jsonl, line 2: not JSON" in capsys.readouterr().err
