"""Pictures inside larger files: WebDataset shards, and Parquet files, local or of the Hugging Face Hub."""

import gzip
import importlib
import io
import json
import sys
import tarfile

import pytest
from PIL import Image

from captioner import images
from captioner.errors import DataError, ImageError, MissingExtraError
from evaluation.datasets import (
    Columns,
    Record,
    find_unreadable,
    parquet,
    read_dataset,
    resolve_paths,
    split_by_hash,
)


@pytest.fixture
def records(tmp_path):
    """Seven pictures of various colours, in three splits."""
    folder = tmp_path / "files"
    folder.mkdir()
    found = []
    for number in range(7):
        image = folder / f"{number}.png"
        Image.new("RGB", (8 + number, 8), (30 * number, 0, 99)).save(image)
        split = ("train", "train", "dev", "test")[number % 4]
        found.append(Record(image, image.name, (f"picture {number}", "a  colour"), split))
    return found


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def png(colour="red"):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "png")
    return content.getvalue()


def failure(layout, path, **options):
    with pytest.raises(DataError) as caught:
        read_dataset(layout, path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same(found, records):
    assert [(record.captions, record.split) for record in found] == [
        (tuple(" ".join(text.split()) for text in record.captions), record.split) for record in records
    ]
    for record, expected in zip(found, records, strict=True):
        assert record.image() == expected.image.read_bytes()
        assert images.read_size(record.image) == images.read_size(expected.image)


# WebDataset


def test_shards_hold_the_pictures_and_captions_of_files(records, write_shards, tmp_path):
    folder = write_shards(tmp_path / "shards", records, 3)
    found = read_dataset("webdataset", folder)
    assert_same(found, records)
    assert [record.image_id for record in found] == [record.image.stem for record in records]
    assert [path.name for path in sorted(folder.iterdir())] == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]
    pattern = read_dataset("webdataset", folder / "shard-{000..002}.tar")
    assert pattern == found == read_dataset("webdataset", folder / "*.tar")
    assert read_dataset("webdataset", folder / "shard-{000,001}.tar") == found[:6]
    assert len(set(resolve_paths(found))) == 7
    assert not find_unreadable(found)


def test_lines_of_a_text_are_captions_and_members_of_a_key_need_not_be_adjacent(tmp_path):
    members = [
        ("x/a.PNG", png()),
        ("x/b.png", png("blue")),
        ("x/a.txt", b"A dog.\r\n\n A cat. "),
        ("x/b.txt", b"B"),
    ]
    file = write_tar(tmp_path / "s.tar", [("x/.hidden.png", b""), *members, ("x/b.cls", b"7"), ("readme", b"text")])
    first, second = read_dataset("webdataset", file)
    assert (first.image_id, first.captions, first.split) == ("x/a", ("A dog.", "A cat."), split_by_hash("x/a"))
    assert second.captions == ("B",)
    assert second.image() == png("blue")


def test_captions_of_json_take_precedence_and_columns_name_its_keys(tmp_path):
    row = {"caption": "From JSON", "alt": ["One", "Two"], "uid": 12, "part": "val"}
    members = [
        ("a.png", png()),
        ("a.mask.png", png()),
        ("a.txt", b"From text"),
        ("a.json", json.dumps(row).encode()),
    ]
    file = write_tar(tmp_path / "train-0.tar", members)
    (record,) = read_dataset("webdataset", file)
    assert (record.image_id, record.captions, record.split) == ("a", ("From JSON",), "train")
    columns = Columns(image="mask.png", captions=("alt",), id="uid", split="part")
    (record,) = read_dataset("webdataset", file, columns=columns)
    assert (record.image_id, record.captions, record.split) == ("12", ("One", "Two"), "dev")
    assert record.image.member == "a.mask.png"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], "keys without captions in .json (captions, or lines in .txt): 1 (FILE: a)"),
        ([("a.png", b"x"), ("a.txt", b" \n")], "keys without captions in .json (captions, or lines in .txt): 1"),
        ([("a.png", b"x"), ("a.json", b'{"captions": [7]}')], "keys without captions in .json"),
        ([("a.txt", b"A dog.")], "keys without a picture: 1 (FILE: a)"),
        ([("a.png", b"x"), ("a.txt", b"A"), ("a.png", b"y")], "duplicate members: 1 (FILE: a.png)"),
        (
            [("a.png", b"x"), ("a.jpg", b"x"), ("a.txt", b"A")],
            "columns.image can name the suffix: 1 (FILE: a with ",
        ),
        ([("a.png", b"x"), ("a.json", b"{")], "members that are not a JSON object: 1 (FILE: a.json)"),
        ([("a.png", b"x"), ("a.json", b"[]")], "members that are not a JSON object: 1 (FILE: a.json)"),
        ([("a.png", b"x"), ("a.txt", b"\xff")], "members that are not UTF-8: 1 (FILE: a.txt)"),
        ([("a.png", b"x"), ("a.json", b'{"caption": "A", "split": "extra"}')], "FILE: a: 'extra'"),
        ([("readme", b"x")], "no captioned pictures found"),
    ],
)
def test_malformed_shards_are_rejected_with_the_key(tmp_path, members, message):
    file = write_tar(tmp_path / "s.tar", members)
    assert message.replace("FILE", str(file)) in failure("webdataset", file)


def test_a_key_in_two_shards_is_a_duplicate(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("dog.png", png()), ("dog.txt", b"A dog.")])
    expected = f"keys in two shards: 1 (dog in {tmp_path / 'a.tar'} and {tmp_path / 'b.tar'})"
    assert expected in failure("webdataset", tmp_path)


def test_a_shard_that_is_truncated_anywhere_or_compressed_is_rejected(records, write_shards, tmp_path):
    folder = write_shards(tmp_path / "shards", records[:3], 3)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for length in (0, 100, 512, 700, 1024, end // 2, end // 2 + 300, end - 100, end):
        file.write_bytes(content[:length])
        message = failure("webdataset", folder)
        assert f"shards that are not complete and uncompressed tar archives: 1 ({file} after" in message, length
    file.write_bytes(gzip.compress(content))
    assert "not complete and uncompressed" in failure("webdataset", folder)


def test_a_shard_that_changes_after_it_was_indexed_is_an_error_of_the_picture(records, write_shards, tmp_path):
    (found,) = read_dataset("webdataset", write_shards(tmp_path / "shards", records[:1], 3))
    found.image.file.write_bytes(b"")
    with pytest.raises(ImageError, match=r"shard-000\.tar: 0\.png: the shard has become shorter"):
        found.image()
    found.image.file.unlink()
    with pytest.raises(ImageError, match=r"shard-000\.tar: 0\.png: cannot read this file"):
        images.open(found.image)


@pytest.mark.parametrize(("layout", "suffix"), [("webdataset", ".tar"), ("parquet", ".parquet")])
def test_missing_files_of_a_pattern_are_named(tmp_path, layout, suffix):
    pytest.importorskip("pyarrow")
    assert f"no {suffix} files in this folder" in failure(layout, tmp_path)
    for name in (f"x-*{suffix}", f"x{suffix}", f"x-{{00..99}}{suffix}"):
        assert "no such file" in failure(layout, tmp_path / name)
    assert "counts down" in failure(layout, tmp_path / f"x-{{9..0}}{suffix}")


def test_an_unreadable_picture_of_a_shard_is_named(tmp_path):
    file = write_tar(tmp_path / "s.tar", [("a.png", png()[:20]), ("a.txt", b"A dog.")])
    ((record, reason),) = find_unreadable(read_dataset("webdataset", file))
    assert record.image_id == "a"
    assert reason.startswith(f"{file}: a.png: ")


# Parquet


def test_parquet_holds_the_pictures_and_captions_of_files(records, write_parquet, tmp_path):
    file = write_parquet(tmp_path / "data.parquet", records, 3)
    found = read_dataset("parquet", file)
    assert_same(found, records)
    assert [record.image_id for record in found] == [f"data.parquet#{number}" for number in range(7)]
    named = read_dataset("parquet", tmp_path / "*.parquet", columns=Columns(id="name"))
    assert [record.image_id for record in named] == [record.image.stem for record in records]
    assert len(set(resolve_paths(found))) == 7
    assert not find_unreadable(found)


@pytest.fixture
def write_table(tmp_path):
    """Write columns to a Parquet file."""
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: the extra `parquet`")
    module = importlib.import_module("pyarrow.parquet")

    def write(columns, name="data.parquet"):
        module.write_table(arrow.table(columns), tmp_path / name)
        return tmp_path / name

    return write


def test_captions_may_be_in_several_columns_or_rows(write_table):
    file = write_table(
        {
            "picture": [png(), png(), png("blue")],
            "caption_0": ["A dog.", "A brown dog.", "The sky."],
            "caption_1": ["Dogs.", None, "Blue."],
            "id": [7, 7, 8],
        },
        "val-00000.parquet",
    )
    columns = Columns(image="picture", captions=("caption_0", "caption_1"), id="id")
    first, second = read_dataset("parquet", file, columns=columns)
    assert (first.image_id, first.captions, first.split) == ("7", ("A dog.", "Dogs.", "A brown dog."), "dev")
    assert (second.image_id, second.captions, second.image()) == ("8", ("The sky.", "Blue."), png("blue"))


def test_a_column_of_paths_names_files(write_table, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (record,) = read_dataset("parquet", write_table({"image": ["a.png"], "caption": ["A dog."]}))
    assert record.image == tmp_path / "a.png"
    missing = write_table({"image": ["b.png"], "caption": ["A dog."]})
    assert "pictures missing on disk: 1" in failure("parquet", missing)


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ({"photo": [b"x"], "captions": ["A"]}, {}, "no column 'image'. It has: photo, captions"),
        ({"image": [b"x"], "text": ["A"]}, {}, "no column 'captions'. It has: image, text"),
        ({"image": [b"x"], "captions": ["A"]}, {"id": "cocoid"}, "no column 'cocoid'"),
        ({"image": [b"x"], "captions": ["A"]}, {"split": "part"}, "no column 'part'"),
        ({"image": [7], "captions": ["A"]}, {}, "column 'image' has no pictures"),
        ({"image": [b"x"], "captions": [7]}, {}, "rows without a text in captions: 1 (FILE, row 0)"),
        ({"image": [b"x", b"x"], "captions": [["A"], []]}, {}, "rows without a text in captions: 1 (FILE, row 1)"),
        ({"image": [b"x"], "captions": ["A"], "split": ["x"]}, {}, "FILE, row 0: 'x'"),
        ({"image": [b"x"], "captions": ["A"], "id": [None]}, {"id": "id"}, "rows without a value of id: 1"),
        (
            {"image": [b"x"] * 2, "captions": ["A"] * 2, "id": [1, 1], "split": ["train", "test"]},
            {"id": "id"},
            "pictures in two splits: 1 (1 in train and test)",
        ),
    ],
)
def test_malformed_parquet_is_rejected_with_the_row(write_table, table, columns, message):
    file = write_table(table)
    assert message.replace("FILE", str(file)) in failure("parquet", file, columns=Columns(**columns))


def test_a_damaged_parquet_file_is_rejected(records, write_parquet, tmp_path):
    file = write_parquet(tmp_path / "data.parquet", records, 3)
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"PAR1" + bytes(100) + b"PAR1"):
        file.write_bytes(damaged)
        assert "data.parquet: cannot read this Parquet file" in failure("parquet", file)
    (record, *_) = (file.write_bytes(content), read_dataset("parquet", file))[1]
    parquet._read_group.cache_clear()
    file.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    with pytest.raises(ImageError, match=r"data\.parquet: image of row 0: cannot read this row"):
        images.open(record.image)


def test_a_row_without_a_picture_is_named(write_table):
    file = write_table({"image": [png(), None], "captions": ["A", "B"]})
    ((record, reason),) = find_unreadable(read_dataset("parquet", file))
    assert record.image_id == "data.parquet#1"
    assert reason == f"{file}: image of row 1: the column 'image' has no picture here."


def test_row_groups_that_are_too_large_are_rejected_with_advice(records, write_parquet, tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "data.parquet", records, 4)
    monkeypatch.setattr(parquet, "MAX_GROUP", 50)
    assert "Write it again with smaller row groups: pyarrow" in failure("parquet", file)


def test_few_row_groups_are_in_memory(records, write_parquet, tmp_path):
    parquet._read_group.cache_clear()
    found = read_dataset("parquet", write_parquet(tmp_path / "data.parquet", records, 1))
    for record in found:
        record.image()
    assert parquet._read_group.cache_info().currsize == parquet.GROUPS < len(found)


def test_without_its_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"needs pyarrow.*pip install .*\[parquet\]"):
        read_dataset("parquet", tmp_path)
