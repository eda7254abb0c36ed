"""Scripts of the checkout."""

import json

from evaluation.datasets import read_dataset
from scripts.make_general import main, read_ids


def test_the_known_part_of_general_is_made_from_coco(tmp_path):
    ids = read_ids()
    assert {name: len(each) for name, each in ids.items()} == {
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
