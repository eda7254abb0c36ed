import json
import sys

import numpy as np
import pytest
from pycocotools import mask as codes

from captioner.errors import DataError, MissingExtraError
from evaluation.instances import read_instances

DOG, CAT, PERSON = 18, 17, 1


def drawn(rows, columns):
    mask = np.zeros((8, 10), bool)
    mask[rows, columns] = True
    return mask


def runs(mask):
    """The code of a mask as COCO has it for crowds: lengths of runs of 0 and 1 in turn, down the columns."""
    lengths, last = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != last:
            lengths.append(0)
            last = pixel
        lengths[-1] += 1
    return {"counts": lengths, "size": list(mask.shape)}


def compressed(mask):
    code = codes.encode(np.asfortranarray(mask, np.uint8))
    return {**code, "counts": code["counts"].decode()}


def box(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


CONTENT = {
    "images": [{"id": number, "height": 8, "width": 10, "file_name": f"{number}.jpg"} for number in (1, 2, 3)],
    "categories": [{"id": DOG, "name": "dog"}, {"id": CAT, "name": "cat"}, {"id": PERSON, "name": "person"}],
    "annotations": [
        {"id": 11, "image_id": 1, "category_id": DOG, "iscrowd": 0, "segmentation": box(1, 2, 4, 5)},
        {"id": 12, "image_id": 1, "category_id": CAT, "iscrowd": 0, "segmentation": box(0, 0, 2, 2)},
        {"id": 13, "image_id": 1, "category_id": DOG, "iscrowd": 0, "segmentation": box(3, 4, 6, 7)},
        {"id": 21, "image_id": 2, "category_id": PERSON, "iscrowd": 1, "segmentation": runs(drawn(1, slice(2, 9)))},
        {"id": 22, "image_id": 2, "category_id": PERSON, "iscrowd": 0, "segmentation": compressed(drawn(5, 0))},
        {"id": 23, "image_id": 2, "category_id": CAT, "iscrowd": 0, "segmentation": [[1, 1, 2, 2]]},
    ],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "instances_val2017.json"
    path.write_text(json.dumps(CONTENT))
    return path


def test_a_mask_is_the_union_of_all_objects_of_a_category(file):
    current = read_instances([file], ["1"])["1"]
    assert current.size == (8, 10)
    assert set(current.outlines) == {"dog", "cat"}
    dog = drawn(slice(2, 5), slice(1, 4)) | drawn(slice(4, 7), slice(3, 6))
    assert current.mask("dog").dtype == bool
    assert (current.mask("dog") == dog).all()
    assert (current.mask("cat") == drawn(slice(0, 2), slice(0, 2))).all()


def test_crowds_and_run_length_codes_are_read(file):
    mask = read_instances([file], ["2"])["2"].mask("person")
    assert (mask == (drawn(1, slice(2, 9)) | drawn(5, 0))).all()


def test_an_object_without_area_is_present(file):
    mask = read_instances([file], ["2"])["2"].mask("cat")
    assert mask.shape == (8, 10)
    assert not mask.any()


def test_only_requested_images_are_read_and_may_have_no_object(file):
    found = read_instances([file], ["3", "1"])
    assert set(found) == {"1", "3"}
    assert found["3"].outlines == {}


def test_images_may_be_in_several_files(file, tmp_path):
    other = tmp_path / "instances_train2017.json"
    other.write_text(json.dumps({**CONTENT, "images": [{"id": 9, "height": 4, "width": 4}]}))
    found = read_instances([file, other], ["1", "9"])
    assert (set(found["1"].outlines), found["9"].size) == ({"dog", "cat"}, (4, 4))


def test_missing_images_are_named(file):
    with pytest.raises(DataError, match=r"instances_val2017.json: no image 7, dog.jpg\. Use the instances"):
        read_instances([file], ["1", "7", "dog.jpg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": [{"id": DOG, "name": "wolf"}]}, "expected COCO's 80 categories, got wolf"),
        ({"categories": None}, "expected COCO's instances"),
        ({"annotations": [{"id": 5, "image_id": 1, "caption": "A dog."}]}, "`categories` with id and name"),
        ({"images": [{"id": 1, "file_name": "1.jpg"}]}, "expected COCO's instances"),
    ],
)
def test_malformed_files_are_rejected(file, change, message):
    file.write_text(json.dumps({**CONTENT, **change}))
    with pytest.raises(DataError, match=message) as caught:
        read_instances([file], ["1"])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        "polygon",
        [["a"] * 6],
        ["polygon"],
        [5],
        {"counts": "zzzzzzzzzzzz", "size": [8, 10]},
        {"counts": [3, 4], "size": [8, 10]},
        {"counts": [90, -10], "size": [8, 10]},
        {"counts": [80], "size": [10, 8]},
        {"size": [8, 10]},
    ],
)
def test_a_malformed_mask_is_rejected_with_its_annotation(file, segmentation):
    row = {"id": 77, "image_id": 1, "category_id": DOG, "segmentation": segmentation}
    file.write_text(json.dumps({**CONTENT, "annotations": [row]}))
    with pytest.raises(DataError, match="annotation 77: expected polygons"):
        read_instances([file], ["1"])


def test_missing_and_malformed_files_are_rejected(file, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_instances([tmp_path / "none.json"], ["1"])
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DataError, match="not JSON"):
        read_instances([file], ["1"])


def test_without_its_library_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)  # what Python does where it cannot be imported
    with pytest.raises(MissingExtraError, match=r'needs pycocotools.*pip install .*\[train\]"'):
        read_instances([file], ["1"])
