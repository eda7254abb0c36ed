import json

import pytest

from captioner.errors import DataError
from evaluation.datasets import read_dataset
from evaluation.shapes import generate


@pytest.fixture
def flickr8k(tmp_path):
    texts = tmp_path / "Flickr8k_text"
    texts.mkdir()
    (texts / "Flickr8k.token.txt").write_text("a.jpg#0\tA dog .\na.jpg#1\tA brown dog .\nb.jpg#0\tA cat .\n")
    (texts / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (texts / "Flickr_8k.devImages.txt").write_text("b.jpg\n")
    return tmp_path


def test_flickr8k_is_read_as_its_authors_gave_it_out(flickr8k):
    first, second = read_dataset("flickr8k", flickr8k)
    assert (first.image_id, first.split, first.captions) == ("a.jpg", "train", ("A dog .", "A brown dog ."))
    assert first.image == flickr8k / "Flicker8k_Dataset" / "a.jpg"
    assert (second.image_id, second.split) == ("b.jpg", "dev")


def test_json_lines_are_read(tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"image": "x/a.jpg", "captions": ["a dog"], "split": "dev", "more": 1}) + "\n\n")
    (record,) = read_dataset("jsonl", file)
    assert (record.image, record.image_id, record.split) == (tmp_path / "x" / "a.jpg", "x/a.jpg", "dev")


def test_shapes_are_read_in_both_layouts_that_fit(tmp_path):
    generate(tmp_path / "shapes", train=2, dev=1)
    records = read_dataset("shapes", tmp_path / "shapes")
    assert [record.image_id for record in records] == ["train/000000.png", "train/000001.png", "dev/000000.png"]
    assert read_dataset("jsonl", tmp_path / "shapes" / "scenes.jsonl") == records


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Flickr8k.token.txt", "a.jpg#0 A dog .\n", "line 1: expected IMAGE#NUMBER, a tab"),
        ("Flickr8k.token.txt", "b.jpg#0\tA cat .\n", "'a.jpg' has no caption"),
        ("Flickr_8k.devImages.txt", "a.jpg\n", "'a.jpg' stands there twice"),
    ],
)
def test_flickr8k_with_a_mistake_is_refused(flickr8k, name, text, message):
    (flickr8k / "Flickr8k_text" / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_dataset("flickr8k", flickr8k)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"image": "a.jpg", "captions": "a dog", "split": "train"}',
        '{"image": "a.jpg", "captions": [1], "split": "train"}',
        '{"image": "a.jpg", "captions": ["a dog"], "split": "validation"}',
        '{"image": "a.jpg", "split": "train"}',
    ],
)
def test_json_lines_with_a_mistake_are_refused_with_the_line(tmp_path, line):
    file = tmp_path / "captions.jsonl"
    file.write_text('{"image": "b.jpg", "captions": ["a cat"], "split": "train"}\n' + line)
    with pytest.raises(DataError, match=r"captions\.jsonl, line 2: expected"):
        read_dataset("jsonl", file)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(DataError, match=r"Flickr8k\.token\.txt: no such file"):
        read_dataset("flickr8k", tmp_path)
    with pytest.raises(DataError, match="known: flickr8k, jsonl, shapes"):
        read_dataset("coco2099", tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no captioned pictures"):
        read_dataset("jsonl", tmp_path / "empty.jsonl")


def test_the_real_sets_hold_what_their_authors_say(real_data):
    flickr8k = read_dataset("flickr8k", real_data / "flickr8k")
    assert sum(record.split == "train" for record in flickr8k) == 6000
    assert sum(record.split == "dev" for record in flickr8k) == 1000
    assert all(len(record.captions) == 5 for record in flickr8k)
    general = read_dataset("jsonl", real_data / "general" / "captions.jsonl")
    assert sum(len(record.captions) for record in general) == 14_084
    assert all(record.image.exists() for record in flickr8k + general)
