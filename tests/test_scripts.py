"""Scripts of the checkout."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.errors import CaptionerError
from captioner.network.checkpoint import load_checkpoint, save_checkpoint
from captioner.overlay import GAP, group_words
from evaluation.datasets import read_dataset
from scripts import gallery
from scripts.gallery import TITLE_HEIGHT, WIDTH, draw_gallery
from scripts.make_general import LIST, main, read_ids
from scripts.mix_weights import mix


def test_the_known_part_of_general_is_made_from_coco(tmp_path):
    ids = read_ids()
    assert {name: len(numbers) for name, numbers in ids.items()} == {
        "train2017": 1318,
        "val2017": 245,
        "VOC2008-2012": 329,
    }
    coco = tmp_path / "coco2017"
    (coco / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        numbers = [int(min(ids[name])), 999_990 + len(name)]  # the second is another picture of COCO
        content = {
            "images": [{"id": number, "file_name": f"{number:012}.jpg"} for number in numbers],
            "annotations": [{"id": number, "image_id": number, "caption": "A dog."} for number in numbers],
        }
        (coco / "annotations" / f"captions_{name}.json").write_text(json.dumps(content))
        (coco / name).mkdir()
        for number in numbers:
            (coco / name / f"{number:012}.jpg").touch()
    main(coco, tmp_path / "general" / "captions.jsonl")
    records = read_dataset("jsonl", tmp_path / "general" / "captions.jsonl")
    assert [record.split for record in records] == ["train", "dev"]
    assert [record.image.resolve().parent.name for record in records] == ["train2017", "val2017"]


def test_everyday_is_made_from_coco(tmp_path):
    file = LIST.with_name("everyday-pictures.txt")
    ids = read_ids(file)
    assert {name: len(numbers) for name, numbers in ids.items()} == {"train2017": 4176, "train2017 as dev": 476}
    assert not set.union(*ids.values()) & set.union(*read_ids().values())
    numbers = [int(min(found)) for found in ids.values()]
    content = {
        "images": [{"id": number, "file_name": f"{number:012}.jpg"} for number in numbers],
        "annotations": [{"id": number, "image_id": number, "caption": "A dog."} for number in numbers],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    main(tmp_path, tmp_path / "captions.jsonl", file)
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train", "dev"]
    assert rows[0]["image"] == f"train2017/{numbers[0]:012}.jpg"


def test_a_row_of_the_gallery_shows_a_photograph_and_reads_as_its_caption(tiny):
    photographs = [Image.new("RGB", (400, 200), "green"), Image.new("RGB", (200, 200), "red")]
    figure = np.asarray(draw_gallery(tiny, photographs))
    counts = [1 + len(group_words(tiny.caption(photograph).words)) for photograph in photographs]
    assert figure.shape[1] == GAP + max(counts) * (WIDTH + GAP)
    tops = (GAP, GAP + WIDTH // 2 + TITLE_HEIGHT)
    for count, top, colour in zip(counts, tops, ((0, 128, 0), (255, 0, 0)), strict=True):
        assert (figure[top + 5, GAP + 5] == colour).all()  # the photograph itself, and panels to its right
        line = figure[top + 5, GAP + WIDTH // 2 :: WIDTH + GAP]
        assert (line != 255).any(axis=1).tolist() == [column < count for column in range(max(counts))]


def test_the_gallery_is_written_as_one_picture(tmp_path, tiny_checkpoint):
    file = tmp_path / "gallery.jpg"
    gallery.main(file, str(tiny_checkpoint))
    with Image.open(file) as figure:
        assert figure.format == "JPEG"
        assert figure.height > 4 * TITLE_HEIGHT


def test_mixed_weights_are_the_sum_of_weights_times_factors(tmp_path, tiny_checkpoint):
    network, header = load_checkpoint(tiny_checkpoint)
    for weight in network.parameters():
        weight.data += 1
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, network, header)
    mixture, mixed_header = mix({tiny_checkpoint: 1.5, other: -0.5})
    expected, _ = load_checkpoint(tiny_checkpoint)
    for weight, start in zip(mixture.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, start - 0.5)
    assert list(mixed_header.card["mixture"].values()) == [1.5, -0.5]


def test_factors_of_a_mixture_sum_to_one(tiny_checkpoint):
    with pytest.raises(CaptionerError, match=r"must sum to 1, got 0\.5"):
        mix({tiny_checkpoint: 0.5})


def test_the_reference_finds_public_names_without_a_docstring(tmp_path, monkeypatch):
    pytest.importorskip("pdoc", reason="needs pdoc")
    from scripts.reference import find_undocumented

    code = """'''A module.'''
from dataclasses import dataclass

@dataclass
class Documented:
    '''A class.'''
    field: int
    '''A field.'''
    other: int
    def __init__(self, value):
        self.assigned = value
    def method(self): pass
    def _private(self): pass

def function(): pass
number: int = 3
"""
    (tmp_path / "undocumented.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert set(find_undocumented("undocumented")) == {
        "undocumented.Documented.other",
        "undocumented.Documented.method",
        "undocumented.function",
        "undocumented.number",
    }
