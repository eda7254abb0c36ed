import csv
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from captioner import images
from captioner.errors import DataError, ImageError, MissingExtraError
from evaluation.datasets import Record, find_unreadable, read_dataset, read_lines, split_by_hash
from evaluation.datasets.draw_shapes import generate


def touch(folder: Path, *names: str) -> None:
    """Make files that are there, as reading a set asks of its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def failure(layout: str, path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(layout, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Flickr8k


@pytest.fixture
def flickr8k(tmp_path):
    texts = tmp_path / "Flickr8k_text"
    texts.mkdir()
    (texts / "Flickr8k.token.txt").write_text("a.jpg#0\tA dog .\na.jpg#1\tA brown dog .\nb.jpg#0\tA cat .\n")
    (texts / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (texts / "Flickr_8k.devImages.txt").write_text("b.jpg\n")
    touch(tmp_path / "Flicker8k_Dataset", "a.jpg", "b.jpg")
    return tmp_path


def test_flickr8k_is_read_in_the_layout_of_its_authors(flickr8k):
    first, second = read_dataset("flickr8k", flickr8k)
    assert (first.image_id, first.split, first.captions) == ("a.jpg", "train", ("A dog .", "A brown dog ."))
    assert first.image == flickr8k / "Flicker8k_Dataset" / "a.jpg"
    assert (second.image_id, second.split) == ("b.jpg", "dev")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Flickr8k.token.txt", "a.jpg A dog .\n", "lines that are not IMAGE#NUMBER, a tab and a caption: 1"),
        ("Flickr8k.token.txt", "b.jpg#0\tA cat .\n", "pictures without a caption: 1 (a.jpg)"),
        ("Flickr8k.token.txt", "a.jpg#0\t\nb.jpg#0\tA cat .\n", "pictures with an empty caption: 1 (a.jpg)"),
        ("Flickr_8k.devImages.txt", "a.jpg\n", "pictures in two splits: 1 (a.jpg in train and dev)"),
        ("Flickr_8k.devImages.txt", "b.jpg\nb.jpg\n", "duplicate pictures: 1 (b.jpg)"),
    ],
)
def test_malformed_flickr8k_is_rejected(flickr8k, name, text, message):
    (flickr8k / "Flickr8k_text" / name).write_text(text)
    assert message in failure("flickr8k", flickr8k)


def write_kaggle(folder: Path) -> Path:
    rows = [["image", "caption"], ["a.jpg", "A dog ."], ["b.jpg", 'A cat , "asleep" .'], ["a.jpg", "A brown dog ."]]
    with (folder / "captions.txt").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    touch(folder / "Images", "a.jpg", "b.jpg")
    return folder


def test_kaggles_flickr8k_is_split_by_hash(tmp_path):
    first, second = read_dataset("flickr8k", write_kaggle(tmp_path))
    assert (first.image, first.captions) == (tmp_path / "Images" / "a.jpg", ("A dog .", "A brown dog ."))
    assert second.captions == ('A cat , "asleep" .',)
    assert (first.split, second.split) == (split_by_hash("a.jpg"), split_by_hash("b.jpg"))


@pytest.mark.parametrize("folder", [".", "Flickr8k_text"])
def test_kaggles_flickr8k_uses_the_lists_of_the_authors(tmp_path, folder):
    write_kaggle(tmp_path)
    touch(tmp_path / folder)
    (tmp_path / folder / "Flickr_8k.trainImages.txt").write_text("b.jpg\n")
    (tmp_path / folder / "Flickr_8k.testImages.txt").write_text("a.jpg\n")
    assert [(record.image_id, record.split) for record in read_dataset("flickr8k", tmp_path)] == [
        ("b.jpg", "train"),
        ("a.jpg", "test"),
    ]


# Flickr30k


@pytest.mark.parametrize("gap", ["\t", "   "])
def test_flickr30k_is_read_in_the_layout_of_its_authors(tmp_path, gap):
    (tmp_path / "results_20130124.token").write_text(f"1.jpg#0\tTwo men .\n1.jpg#1{gap}A dog .\n2.jpg#0\tA cat .\n")
    touch(tmp_path / "flickr30k-images", "1.jpg", "2.jpg")
    first, second = read_dataset("flickr30k", tmp_path)
    assert first == Record(
        tmp_path / "flickr30k-images" / "1.jpg", "1.jpg", ("Two men .", "A dog ."), split_by_hash("1.jpg")
    )
    assert second.captions == ("A cat .",)


def test_kaggles_flickr30k_is_read_with_its_malformed_row(tmp_path):
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n2199200615.jpg| 3| A dog , running | fast .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    )
    touch(tmp_path / "flickr30k_images", "2199200615.jpg")
    (record,) = read_dataset("flickr30k", tmp_path)
    assert record.captions == ("A dog , running | fast .", "A dog runs across the grass .")
    assert record.image.parent.name == "flickr30k_images"


def test_a_malformed_row_of_flickr30k_is_rejected(tmp_path):
    (tmp_path / "results.csv").write_text("1.jpg| 0| A dog .\n1.jpg, 1, A dog .\n")
    touch(tmp_path / "Images", "1.jpg")
    assert "results.csv, line 2: '1.jpg, 1" in failure("flickr30k", tmp_path)


# COCO


def write_coco(directory: Path, name: str, captions: dict[int, list[str]]) -> Path:
    """COCO's annotations of numbered pictures, which are there."""
    names = {image: f"{image:012}.jpg" for image in captions}
    pairs = [(image, caption) for image, texts in captions.items() for caption in texts]
    file = directory / "annotations" / f"captions_{name}.json"
    file.parent.mkdir(exist_ok=True)
    content = {
        "images": [{"id": image, "file_name": file_name} for image, file_name in names.items()],
        "annotations": [
            {"id": number, "image_id": image, "caption": caption} for number, (image, caption) in enumerate(pairs)
        ],
    }
    file.write_text(json.dumps(content))
    touch(directory / name, *names.values())
    return file


def test_coco_is_read_without_output(tmp_path, capfd):
    write_coco(tmp_path, "train2017", {9: ["A dog.\n", "A\nbrown  dog. "]})
    write_coco(tmp_path, "val2017", {25: ["A cat."]})
    first, second = read_dataset("coco", tmp_path)
    assert first == Record(
        tmp_path / "train2017" / "000000000009.jpg", "9", ("A dog.", "A brown dog."), split="train"
    )
    assert (second.image_id, second.split) == ("25", "dev")
    assert capfd.readouterr() == ("", "")


def test_coco_without_its_library_names_the_extra(tmp_path, monkeypatch):
    write_coco(tmp_path, "val2014", {25: ["A cat."]})
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)  # what Python does where it cannot be imported
    with pytest.raises(MissingExtraError, match=r'needs pycocotools.*pip install .*\[train\]"'):
        read_dataset("coco", tmp_path)


def test_malformed_coco_is_rejected(tmp_path):
    assert "no annotations/captions_train2017.json" in failure("coco", tmp_path)
    file = write_coco(tmp_path, "val2017", {25: ["A cat."]})
    content = json.loads(file.read_text())
    content["images"].append({"id": 25, "file_name": "other.jpg"})
    content["annotations"].append({"id": 7, "image_id": 26, "caption": "Nothing."})
    file.write_text(json.dumps(content))
    message = failure("coco", tmp_path)
    assert "captions_val2017.json, image 26" in message
    assert "duplicate pictures: 1 (25)" in message
    assert f"pictures missing on disk: 1 ({tmp_path / 'val2017' / 'other.jpg'})" in message
    for bad in ({"images": [{"id": 1}]}, [], {"images": [], "annotations": [{"image_id": 1}]}):
        file.write_text(json.dumps(bad))
        assert "expected COCO's captions" in failure("coco", tmp_path)
    write_coco(tmp_path, "val2014", {25: ["A cat."]})
    assert "2014 and of 2017" in failure("coco", tmp_path)


# Karpathy


def write_karpathy(file: Path, dataset: str, rows: list[dict]) -> Path:
    sentences = [{"raw": "A dog .", "tokens": ["a", "dog"]}, {"raw": "A brown\n dog ."}]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": [{"sentences": sentences, **row} for row in rows], "dataset": dataset}))
    return file


@pytest.mark.parametrize("folder", [".", "karpathy"])
def test_karpathys_split_of_coco_is_read(tmp_path, folder):
    rows = [
        {"filename": "9.jpg", "filepath": "train2014", "cocoid": 9, "split": "train"},
        {"filename": "25.jpg", "filepath": "val2014", "cocoid": 25, "split": "restval"},
        {"filename": "26.jpg", "filepath": "val2014", "cocoid": 26, "split": "val"},
        {"filename": "27.jpg", "filepath": "val2014", "cocoid": 27, "split": "test"},
    ]
    touch(tmp_path / "train2014", "9.jpg")
    touch(tmp_path / "val2014", "25.jpg", "26.jpg", "27.jpg")
    records = read_dataset("karpathy", write_karpathy(tmp_path / folder / "dataset_coco.json", "coco", rows))
    assert [record.split for record in records] == ["train", "train", "dev", "test"]
    assert [record.image_id for record in records] == ["9", "25", "26", "27"]
    assert records[1].image == tmp_path / "val2014" / "25.jpg"
    assert records[0].captions == ("A dog .", "A brown dog .")


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [("flickr8k", "Flicker8k_Dataset"), ("flickr8k", "Images"), ("flickr30k", "flickr30k-images")],
)
def test_karpathys_splits_of_flickr_find_their_pictures(tmp_path, dataset, folder):
    touch(tmp_path / "flickr30k-images")  # both sets may lie side by side
    touch(tmp_path / folder, "1.jpg")
    file = write_karpathy(tmp_path / f"dataset_{dataset}.json", dataset, [{"filename": "1.jpg", "split": "val"}])
    (record,) = read_dataset("karpathy", file)
    assert (record.image, record.image_id, record.split) == (tmp_path / folder / "1.jpg", "1.jpg", "dev")


@pytest.mark.parametrize("row", [{"filename": "1.jpg", "split": "extra"}, {"split": "val"}, {"sentences": [1]}])
def test_a_malformed_picture_of_karpathy_is_rejected_with_its_number(tmp_path, row):
    file = write_karpathy(tmp_path / "dataset.json", "flickr8k", [{"filename": "1.jpg", "split": "val"}, row])
    assert "dataset.json, picture 2: expected Karpathy's format" in failure("karpathy", file)


# People's own


def test_json_lines_are_read(tmp_path):
    touch(tmp_path / "x", "a.jpg", "b.jpg")
    file = tmp_path / "captions.jsonl"
    file.write_text(
        json.dumps({"image": "x/a.jpg", "captions": ["a dog"], "split": "dev", "more": 1})
        + "\n\n"
        + json.dumps({"image": "x/b.jpg", "captions": ["a cat"]})
    )
    first, second = read_dataset("jsonl", file)
    assert (first.image, first.image_id, first.split) == (tmp_path / "x" / "a.jpg", "x/a.jpg", "dev")
    assert second.split == split_by_hash("x/b.jpg")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"image": "a.jpg", "captions": "a dog", "split": "train"}',
        '{"image": "a.jpg", "captions": [1], "split": "train"}',
        '{"image": "a.jpg", "captions": ["a dog"], "split": "validation"}',
        '{"image": "a.jpg", "split": "train"}',
        '{"image": 1, "captions": ["a dog"]}',
        '{"image": "a.jpg", "image": "c.jpg", "captions": ["a dog"]}',
        "[" * 100_000,
        '{"image": "a.jpg", "captions": ' + "9" * 5000 + "}",
    ],
)
def test_malformed_json_lines_are_rejected_with_the_line(tmp_path, line):
    file = tmp_path / "captions.jsonl"
    file.write_text('{"image": "b.jpg", "captions": ["a cat"], "split": "train"}\n' + line)
    message = failure("jsonl", file)
    assert 'lines that are not {"image": PATH, ' in message
    assert f": 1 ({file}, line 2: " in message


@pytest.mark.parametrize("other", ["./a.jpg", "x//../a.jpg", "link.jpg", "folder/a.jpg"])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_picture_under_two_paths_is_the_same_picture(tmp_path, other, split):
    touch(tmp_path, "a.jpg")
    (tmp_path / "x").mkdir()
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    rows = [{"image": "a.jpg", "split": "train"}, {"image": other, "split": split}]
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({**row, "captions": ["a dog"]}) + "\n" for row in rows))
    kind, where = (
        ("duplicate pictures", "") if split == "train" else ("pictures in two splits", " in train and dev")
    )
    assert f"{kind}: 1 (a.jpg and {other}{where})" in failure("jsonl", file)


def test_only_pictures_of_the_wanted_splits_must_be_on_disk(tmp_path):
    write_coco(tmp_path, "val2017", {25: ["A cat."]})
    file = write_coco(tmp_path, "train2017", {9: ["A dog."]})
    (tmp_path / "train2017" / f"{9:012}.jpg").unlink()
    assert "pictures missing on disk: 1" in failure("coco", tmp_path)
    assert [record.image_id for record in read_dataset("coco", tmp_path, ["dev"])] == ["25"]
    (train,) = read_dataset("coco", tmp_path, ["train"], on_disk=False)
    assert train.captions == ("A dog.",)
    file.unlink()
    assert [record.image_id for record in read_dataset("coco", tmp_path)] == ["25"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "images": []}', "the key 'images' occurs 2 times in one object"),
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_json_beyond_the_limits_is_rejected(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    assert message in failure("karpathy", tmp_path / "dataset.json")


@pytest.mark.parametrize(("layout", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_are_read(tmp_path, layout, delimiter):
    file = tmp_path / f"captions.{layout}"
    rows = [
        ["Split", "more", "image", "caption"],
        ["train", "1", "a.jpg", "a dog,\twith a ball"],
        ["dev", "2", "x/b.jpg", 'a cat that "sleeps"\non two lines'],
        ["train", "3", "a.jpg", "ein Hündchen"],
    ]
    with file.open("w", newline="", encoding="utf-8-sig") as stream:  # with the mark that Excel writes first
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    touch(tmp_path, "a.jpg")
    touch(tmp_path / "x", "b.jpg")
    first, second = read_dataset(layout, file)
    assert first == Record(tmp_path / "a.jpg", "a.jpg", ("a dog, with a ball", "ein Hündchen"), "train")
    assert second == Record(tmp_path / "x/b.jpg", "x/b.jpg", ('a cat that "sleeps" on two lines',), "dev")


def test_a_table_without_splits_is_split_by_hash(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\n")
    touch(tmp_path, "a.jpg")
    (record,) = read_dataset("csv", tmp_path / "captions.csv")
    assert record.split == split_by_hash("a.jpg")


def test_all_problems_of_a_table_are_reported_together(tmp_path):
    file = tmp_path / "captions.csv"
    file.write_bytes(
        b"image,caption,split\na.jpg,a dog,train\na.jpg,a dog,dev\nb.jpg,caf\xe9,train\nb.jpg, ,train\n"
        b"c.jpg,a cat,val\n,a cat,dev\nd.jpg,a dog\n" + b"".join(b"%d.jpg,a cow,dev\n" % n for n in range(5))
    )
    touch(tmp_path, "a.jpg", "b.jpg")
    message = failure("csv", file)
    for part in (
        f"{file}: lines that are not UTF-8: 1 ({file}, line 4)",
        f"splits that are not train, dev or test: 1 ({file}, line 6: 'val')",
        f"rows without an image: 1 ({file}, line 7)",
        f"rows without the 3 fields of the first row: 1 ({file}, line 8)",
        "pictures in two splits: 1 (a.jpg in train and dev)",
        "pictures with an empty caption: 1 (b.jpg)",
        f"pictures missing on disk: 5 ({tmp_path / '0.jpg'}, {tmp_path / '1.jpg'}, {tmp_path / '2.jpg'}, ...)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a first row with the columns image and caption, got []"),
        ("picture;caption\n", "expected a first row with the columns image and caption, got ['picture;caption']"),
        ('image,caption\na.jpg,"a dog\n', "line 2: malformed table"),
        ("image,caption,Caption\na.jpg,a dog,a cat\n", "duplicate column 'caption'. Rename or remove one"),
    ],
)
def test_a_malformed_table_is_rejected(tmp_path, text, message):
    (tmp_path / "captions.csv").write_text(text)
    assert message in failure("csv", tmp_path / "captions.csv")


def test_a_folder_of_pictures_with_text_files_is_read(tmp_path):
    touch(tmp_path / "dogs", "a.jpg", ".hidden.jpg")
    touch(tmp_path, "B.PNG", ".notes.txt")
    (tmp_path / "dogs" / "a.txt").write_text("a dog\n\na brown dog\n")
    (tmp_path / "B.TXT").write_text("a cat")
    first, second = read_dataset("folder", tmp_path)
    assert first == Record(tmp_path / "B.PNG", "B.PNG", ("a cat",), split_by_hash("B.PNG"))
    assert (second.image_id, second.captions) == ("dogs/a.jpg", ("a dog", "a brown dog"))


def test_a_malformed_folder_is_rejected(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg", "b.png", "c.txt", "d.jpg", "d.txt")
    (tmp_path / "b.txt").write_text("a cat")
    message = failure("folder", tmp_path)
    assert f"pictures without a .txt file: 1 ({tmp_path / 'a.jpg'})" in message
    assert f"pictures that share a .txt file with another: 1 ({tmp_path / 'b.png'})" in message
    assert f".txt files without a picture: 1 ({tmp_path / 'c.txt'})" in message
    assert "pictures without a caption: 1 (d.jpg)" in message
    assert "no such folder" in failure("folder", tmp_path / "nowhere")


def test_the_hash_splits_90_5_5_and_never_changes():
    assert [split_by_hash(name) for name in ("a.jpg", "13.jpg", "62.jpg", "dogs/ä.jpg")] == [
        "train",
        "test",
        "dev",
        "train",
    ]
    counts = Counter(split_by_hash(f"{number}.jpg") for number in range(20_000))
    assert abs(counts["train"] - 18_000) < 200
    assert abs(counts["dev"] - 1000) < 150
    assert abs(counts["test"] - 1000) < 150


def test_shapes_are_read_as_shapes_and_as_json_lines(tmp_path):
    generate(tmp_path / "shapes", train=2, dev=1)
    records = read_dataset("shapes", tmp_path / "shapes")
    assert [record.image_id for record in records] == ["train/000000.png", "train/000001.png", "dev/000000.png"]
    assert read_dataset("jsonl", tmp_path / "shapes" / "scenes.jsonl") == records


# Files


def test_missing_data_are_named(tmp_path):
    assert "Flickr8k.token.txt: no such file" in failure("flickr8k", tmp_path)
    assert "known: coco, karpathy, flickr8k" in failure("coco2099", tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert "no captioned pictures" in failure("jsonl", tmp_path / "empty.jsonl")


def test_malformed_json_is_rejected_with_its_line(tmp_path):
    file = tmp_path / "dataset.json"
    file.write_bytes(b'{"images": [\n"caf\xe9"]}')
    assert f"{file}, line 2: not UTF-8" in failure("karpathy", file)
    file.write_text('{"images": [\n')
    assert f"{file}, line 2: not JSON" in failure("karpathy", file)
    assert "no such file" in failure("karpathy", tmp_path / "nowhere.json")


def test_invalid_utf8_raises_without_a_collector_of_problems(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes(b"a\n\xff\n")
    with pytest.raises(DataError, match=r"lines that are not UTF-8: 1 \(.*lines\.txt, line 2\)"):
        list(read_lines(file))


def test_pictures_that_cannot_be_opened_are_found(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "good.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:20])
    names = ["good.png"] * 300 + ["empty.jpg", "text.jpg", "cut.png", "missing.jpg"]
    records = [Record(tmp_path / name, f"{number}", ("a",), "train") for number, name in enumerate(names)]
    found = find_unreadable(records, workers=2)
    assert [record for record, _ in found] == records[300:]
    for (record, reason), words in zip(
        found, ("is empty", "unknown format", "cannot read this image", "No such file"), strict=True
    ):
        assert str(record.image) in reason
        assert words in reason


def test_the_size_of_a_picture_is_read_without_its_pixels(tmp_path, monkeypatch):
    file = tmp_path / "wide.jpg"
    Image.new("RGB", (300, 200)).save(file)
    assert images.read_size(file) == (300, 200)
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(ImageError, match="300 x 200 pixels are too many"):
        images.read_size(file)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match="the file is too long"):
        images.read_size(file)


# Real sets


def test_the_real_sets_have_the_documented_sizes(real_data):
    flickr8k = read_dataset("flickr8k", real_data / "flickr8k")
    assert sum(record.split == "train" for record in flickr8k) == 6000
    assert sum(record.split == "dev" for record in flickr8k) == 1000
    assert all(len(record.captions) == 5 for record in flickr8k)
    general = read_dataset("jsonl", real_data / "general" / "captions.jsonl")
    assert sum(len(record.captions) for record in general) == 14_084
    assert find_unreadable([*flickr8k[::20], *general[::20]]) == []


def test_the_real_captions_of_coco_are_read(real_data, tmp_path):
    file = real_data / "coco" / "annotations" / "captions_val2017.json"
    if not file.exists():
        pytest.skip("needs coco/annotations/captions_val2017.json in CAPTIONER_DATA")
    (tmp_path / "annotations").symlink_to(file.parent)
    touch(tmp_path / "val2017", *(image["file_name"] for image in json.loads(file.read_text())["images"]))
    records = read_dataset("coco", tmp_path)
    assert (len(records), sum(len(record.captions) for record in records)) == (5000, 25_014)
    (first,) = (record.captions[0] for record in records if record.image_id == "179765")
    assert first == "A black Honda motorcycle parked in front of a garage."
    # In Karpathy's format, as pictures of val2014, each caption is the same.
    rows = [
        {
            "filename": record.image.name,
            "filepath": "val2017",
            "cocoid": int(record.image_id),
            "split": "val",
            "sentences": [{"raw": caption} for caption in record.captions],
        }
        for record in records
    ]
    assert read_dataset("karpathy", write_karpathy(tmp_path / "dataset_coco.json", "coco", rows)) == records


def test_real_captions_are_the_same_in_every_layout_of_the_flickr_sets(real_data, tmp_path):
    original = [record for record in read_dataset("flickr8k", real_data / "flickr8k") if record.split == "dev"]
    pictures = real_data / "flickr8k" / "Flicker8k_Dataset"
    for name in ("Images", "flickr30k-images"):
        (tmp_path / name).symlink_to(pictures)
    pairs = [
        (record.image_id, number, texts) for record in original for number, texts in enumerate(record.captions)
    ]

    with (tmp_path / "captions.txt").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((image, texts) for image, _, texts in pairs)])
    (tmp_path / "results_20130124.token").write_text(
        "".join(f"{image}#{n}\t{texts}\n" for image, n, texts in pairs)
    )
    bars = tmp_path / "kaggle"
    bars.mkdir()
    (bars / "Images").symlink_to(pictures)
    (bars / "results.csv").write_text(
        "image_name| comment_number| comment\n" + "".join(f"{image}| {n}| {texts}\n" for image, n, texts in pairs)
    )
    sentences = {record.image_id: [{"raw": texts} for texts in record.captions] for record in original}
    rows = [{"filename": image, "split": "val", "sentences": texts} for image, texts in sentences.items()]
    karpathy = write_karpathy(tmp_path / "dataset_flickr30k.json", "flickr30k", rows)

    expected = {record.image_id: [texts.split() for texts in record.captions] for record in original}
    for layout, path in {"flickr8k": tmp_path, "flickr30k": tmp_path, "karpathy": karpathy}.items():
        records = read_dataset(layout, path)
        assert {record.image_id: [texts.split() for texts in record.captions] for record in records} == expected, (
            layout
        )
    assert [record.captions for record in read_dataset("flickr30k", bars)] == [
        record.captions for record in original
    ]
