import json
from pathlib import Path
from typing import Any

import pytest

from captioner.errors import DataError
from evaluation.captions import References, number_images, read_candidates, read_references, to_results

ANNOTATIONS = {
    "images": [{"id": 42, "file_name": "000042.jpg"}, {"id": 7, "file_name": "000007.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 42, "caption": "A dog."},
        {"id": 2, "image_id": 7, "caption": "A cat."},
        {"id": 3, "image_id": 42, "caption": "A brown dog."},
    ],
}
CAPTIONS = {"42": ["A dog.", "A brown dog."], "7": ["A cat."]}
REFERENCES = References(CAPTIONS, {"000042.jpg": "42", "000007.jpg": "7"})


def write(folder: Path, content: Any) -> Path:
    path = folder / "captions"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_references_are_read_from_coco_annotations(tmp_path):
    assert read_references(write(tmp_path, ANNOTATIONS)) == REFERENCES


@pytest.mark.parametrize(
    "content",
    [
        CAPTIONS,
        lines({"image": "42", "captions": CAPTIONS["42"], "split": "dev"}, {"image": 7, "captions": CAPTIONS["7"]}),
        "\ufeff" + json.dumps(CAPTIONS, indent=2),
        {"annotations": ANNOTATIONS["annotations"]},
    ],
    ids=["object", "lines", "indented with a byte order mark", "annotations without images"],
)
def test_references_are_read_from(content, tmp_path):
    assert read_references(write(tmp_path, content)).captions == CAPTIONS


@pytest.mark.parametrize(
    "content",
    [
        [{"image_id": 42, "caption": "a dog"}, {"image_id": 7, "caption": "a cat"}],
        {"42": "a dog", "7": "a cat"},
        lines(
            {"image": "photos/000042.jpg", "caption": "a dog", "words": ["a"]}, {"image": "7", "caption": "a cat"}
        ),
        {"000042.jpg": "a dog", "../000007.jpg": "a cat"},
    ],
    ids=["results", "object", "lines", "file names"],
)
def test_candidates_are_read_from(content, tmp_path):
    assert read_candidates(write(tmp_path, content), REFERENCES) == {"42": "a dog", "7": "a cat"}


def test_one_line_of_json_lines_is_a_record(tmp_path):
    references = read_references(write(tmp_path, lines({"image": "a/dog.jpg", "captions": ["A dog."]})))
    assert references.captions == {"a/dog.jpg": ["A dog."]}
    candidates = read_candidates(write(tmp_path, lines({"image": "b/dog.jpg", "caption": "a dog"})), references)
    assert candidates == {"a/dog.jpg": "a dog"}


def test_an_ambiguous_file_name_matches_no_image(tmp_path):
    references = read_references(write(tmp_path, {"a/dog.jpg": ["A dog."], "b/dog.jpg": ["Another dog."]}))
    assert read_candidates(write(tmp_path, {"dog.jpg": "a dog"}), references) == {"dog.jpg": "a dog"}
    assert read_candidates(write(tmp_path, {"b/dog.jpg": "a dog"}), references) == {"b/dog.jpg": "a dog"}


def test_float_ids_of_pandas_are_integers(tmp_path):
    rows = [{"image_id": 42.0, "caption": "a dog"}, {"image_id": 7.0, "caption": "a cat"}]
    assert read_candidates(write(tmp_path, rows), REFERENCES) == {"42": "a dog", "7": "a cat"}
    assert read_candidates(write(tmp_path, [{"image_id": 7.5, "caption": "a"}]), REFERENCES) == {"7.5": "a"}


def test_duplicate_captions_are_rejected_by_name(tmp_path):
    twice = [{"image_id": image, "caption": "a dog"} for image in (42, 7, "42")]
    with pytest.raises(DataError, match="duplicate captions for 42;"):
        read_candidates(write(tmp_path, twice), REFERENCES)
    with pytest.raises(DataError, match="duplicate captions for 7;"):
        read_candidates(write(tmp_path, {"7": "a cat", "000007.jpg": "a cat"}), REFERENCES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"7": "a dog", "7": "a cat"}', "the key '7' occurs 2 times in one object"),
        (
            lines({"image": "7", "caption": "a"}) + '\n{"image": "8", "caption": "a", "caption": "b"}',
            "line 3: cannot use this JSON .the key 'caption' occurs 2 times",
        ),
        ("[" * 100_000, "nested too deep"),
        ("[" * 900 + "]" * 900, r"record 1: expected 'image' and 'caption', got "),
        ('{"7": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("a dog", r"neither JSON nor JSON Lines \(Expecting value in line 1\)"),
        ('{"7": "a cat",\n', r"neither JSON nor JSON Lines \(Expecting .* in line 2\)"),
        (lines({"image": "7", "caption": "a cat"}) + "\n{", "neither JSON nor JSON Lines .* in line 3"),
        ("", "no captions; expected an object"),
        ([], "no captions; expected an object"),
        ("42", "no captions; expected .* got 42"),
        ({"7": 5}, "image 7: expected a caption, got 5"),
        ([{"image_id": 7, "caption": None}], "image 7: expected a caption, got None"),
        ([{"image_id": 7}], "record 1: expected 'image_id' and 'caption', got {'image_id': 7}"),
        (["a dog"], "record 1: expected 'image' and 'caption', got 'a dog'"),
    ],
)
def test_malformed_candidates_are_rejected(content, message, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        read_candidates(path, REFERENCES)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"7": "A cat."}, "image 7: expected a list of captions, got 'A cat.'"),
        ({"7": [5]}, "image 7: expected a caption, got 5"),
        ({"annotations": 5}, "expected a list of objects with 'image_id' and 'caption', got 5"),
        ([{"image_id": 7, "caption": "A cat."}], "record 1: expected 'image' and 'captions'"),
    ],
)
def test_malformed_references_are_rejected(content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_references(write(tmp_path, content))


def test_unreadable_files_are_rejected(tmp_path):
    with pytest.raises(DataError, match=r"none: cannot read this file \(No such file"):
        read_references(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b'{"7": "caf\xe9"}')
    with pytest.raises(DataError, match=r"latin: cannot read this file \(not UTF-8\)"):
        read_references(tmp_path / "latin")


@pytest.mark.parametrize(
    ("captions", "ids"),
    [({"42": "a", "0": "b"}, [42, 0]), ({"42": "a", "007": "b"}, ["42", "007"]), ({"dog.jpg": "a"}, ["dog.jpg"])],
)
def test_results_have_numeric_ids_if_all_are_numeric(captions, ids):
    assert to_results(captions) == [
        {"image_id": image, "caption": text} for image, text in zip(ids, captions.values(), strict=True)
    ]


def test_coco_image_ids_come_from_file_names():
    names = ["test2014/COCO_test2014_000000000042.jpg", "000000000007.jpg", "700"]
    assert number_images({name: name for name in names}) == dict(zip(("42", "7", "700"), names, strict=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["000000000042.jpg", "dog2.jpg", "a/b.jpg"], r"^a/b.jpg, dog2.jpg: not a file name of COCO"),
        (["a/000000000042.jpg", "b/000000000042.jpg"], r"duplicate captions for 42; expected one"),
        (["000000000042.jpg"], r"no caption for 7 of .*info\.json"),
        (["42", "7", "8"], r"^8: not in .*info\.json"),
    ],
)
def test_incomplete_and_invalid_results_are_rejected(tmp_path, names, message):
    (tmp_path / "info.json").write_text(json.dumps({"images": ANNOTATIONS["images"]}))
    with pytest.raises(DataError, match=message):
        number_images(dict.fromkeys(names, "a dog"), tmp_path / "info.json")
