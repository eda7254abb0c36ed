import hashlib
import io
import json
import os
import shutil
import threading
import tomllib
import zipfile
from collections import namedtuple
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from captioner.errors import DataError, OutputError
from evaluation.datasets import READERS, read_dataset
from training.__main__ import main
from training.download import MAX_RATIO, SOURCES, Archive, download, fetch_archive, unpack


@dataclass
class Server:
    """Files on the loopback, and how badly they are served."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    tag: str | None = '"1"'
    ranges: bool = True
    """Whether it keeps to Range."""
    if_range: bool = True
    """Whether it keeps to If-Range."""
    length: bool = True
    """Whether it says how long a file is."""
    stop: int | None = None
    """Break off after so many bytes of each answer."""
    hang: threading.Event | None = None
    """Wait for this before an answer."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Name and Range of each request."""


@pytest.fixture
def server(serve_http):
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name, asked = self.path.strip("/"), self.headers["Range"]
            served.asked.append((name, asked))
            if served.hang:
                served.hang.wait(10)
            if name not in served.files:
                self.send_error(404)
                return
            content = served.files[name]
            fresh = served.if_range and self.headers["If-Range"] != served.tag
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and served.ranges and not fresh else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if served.length:
                self.send_header("Content-Length", str(len(content) - start))
            if served.tag:
                self.send_header("ETag", served.tag)
            self.end_headers()
            self.wfile.write(content[start:][: served.stop])

    served.url = serve_http(Handler)
    yield served
    if served.hang:
        served.hang.set()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


CONTENT = os.urandom(300_000)


def interrupt(server: Server, file: Path, after: int = 100_000) -> None:
    """Fetch the beginning of a file."""
    server.stop = after
    with pytest.raises(
        DataError, match=r"closed the connection after 100,000 of 300,000 bytes\. Run the command again"
    ):
        fetch_archive(Archive(f"{server.url}/{file.name}", ""), file)
    server.stop = None
    assert not file.exists()


# Fetching


def test_an_interrupted_download_resumes(server, tmp_path):
    server.files["a.zip"] = CONTENT
    file = tmp_path / "new" / "a.zip"
    interrupt(server, file)
    fetch_archive(Archive(f"{server.url}/a.zip", "", size=300_000, md5=hashlib.md5(CONTENT).hexdigest()), file)
    assert file.read_bytes() == CONTENT
    assert server.asked == [("a.zip", None), ("a.zip", "bytes=100000-")]
    assert [path.name for path in file.parent.iterdir()] == ["a.zip"]
    fetch_archive(Archive(f"{server.url}/a.zip", ""), file)  # nothing to do
    assert len(server.asked) == 2


def test_a_complete_partial_file_is_not_downloaded_again(server, tmp_path):
    server.files["a.zip"] = CONTENT
    interrupt(server, tmp_path / "a.zip")
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    fetch_archive(Archive(f"{server.url}/a.zip", ""), tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert len(server.asked) == 1


@pytest.mark.parametrize("change", ["no ranges", "another tag", "no tag at first", "unknown part"])
def test_a_partial_file_that_cannot_be_completed_is_downloaded_again(server, tmp_path, change):
    server.files["a.zip"] = CONTENT
    server.tag = None if change == "no tag at first" else '"1"'
    interrupt(server, tmp_path / "a.zip")
    server.ranges = change != "no ranges"
    if change == "another tag":
        server.tag, server.files["a.zip"] = '"2"', CONTENT[::-1]
    if change == "unknown part":
        (tmp_path / "a.zip.part.json").unlink()
    fetch_archive(Archive(f"{server.url}/a.zip", ""), tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == server.files["a.zip"]


def test_the_rest_of_another_file_is_never_appended(server, tmp_path):
    server.files["a.zip"] = CONTENT
    server.if_range = False
    interrupt(server, tmp_path / "a.zip")
    server.tag, server.files["a.zip"] = '"2"', CONTENT[::-1]
    with pytest.raises(DataError, match="has changed since the download started"):
        fetch_archive(Archive(f"{server.url}/a.zip", ""), tmp_path / "a.zip")
    fetch_archive(Archive(f"{server.url}/a.zip", ""), tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT[::-1]


def test_a_checksum_mismatch_removes_the_file(server, tmp_path):
    server.files["a.zip"] = CONTENT
    with pytest.raises(DataError, match=f"MD5 {hashlib.md5(CONTENT).hexdigest()}, expected 0123"):
        fetch_archive(Archive(f"{server.url}/a.zip", "", md5="0123"), tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()
    assert not (tmp_path / "a.zip.part").exists()


def test_a_size_mismatch_fails_before_the_download(server, tmp_path):
    server.files["a.zip"] = CONTENT
    with pytest.raises(DataError, match="size mismatch: 300,000 bytes, expected 300,001"):
        fetch_archive(Archive(f"{server.url}/a.zip", "", size=300_001), tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_unknown_size_is_rejected(server, tmp_path):
    server.files["a.zip"], server.length = CONTENT, False
    with pytest.raises(DataError, match="does not send the size"):
        fetch_archive(Archive(f"{server.url}/a.zip", ""), tmp_path / "a.zip")


def test_servers_that_do_not_answer_are_named(server, tmp_path):
    with pytest.raises(DataError, match=r"/b\.zip: the server answered 404 Not Found"):
        fetch_archive(Archive(f"{server.url}/b.zip", ""), tmp_path / "b.zip")
    with pytest.raises(DataError, match=r"cannot be downloaded .*refused"):
        fetch_archive(Archive("http://127.0.0.1:9/b.zip", ""), tmp_path / "b.zip")
    server.hang = threading.Event()
    with pytest.raises(DataError, match=r"cannot be downloaded .*timed out"):
        fetch_archive(Archive(f"{server.url}/b.zip", ""), tmp_path / "b.zip", timeout=0.1)


def test_a_full_disk_is_reported_before_writing(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    server.files["a.zip"] = CONTENT
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, 599_999))
    with pytest.raises(OutputError, match=r"0\.0 GB are free, but the archive and its contents need"):
        fetch_archive(Archive(f"{server.url}/a.zip", ""), tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.zip").write_bytes(zipped({"x/a": CONTENT, "x/b": CONTENT}))
    with pytest.raises(OutputError, match=r"but the contents of b\.zip need"):
        unpack(tmp_path / "b.zip", tmp_path, "x/")
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "b.zip").exists()


def test_a_folder_that_cannot_be_created_is_an_error(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write this file or folder"):
        fetch_archive(Archive(f"{server.url}/a.zip", ""), tmp_path / "file" / "a.zip")


# Unpacking


def test_only_selected_members_are_unpacked(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"x/a.txt": b"1", "x/y/b.txt": b"2", "z.txt": b"3", "x/": b""}))
    unpack(tmp_path / "a.zip", tmp_path / "to", "x/")
    found = {
        path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*") if path.is_file()
    }
    assert found == {"x/a.txt", "x/y/b.txt"}


def test_unpacking_resumes(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"x/a.txt": b"first", "x/b.txt": b"second"}))
    unpack(tmp_path / "a.zip", tmp_path, "x/")
    (tmp_path / "x" / "a.txt").write_bytes(b"FIRST")  # shows whether it is written again
    (tmp_path / "x" / "b.txt").write_bytes(b"sec")
    unpack(tmp_path / "a.zip", tmp_path, "x/")
    assert (tmp_path / "x" / "a.txt").read_bytes() == b"FIRST"
    assert (tmp_path / "x" / "b.txt").read_bytes() == b"second"


@pytest.mark.parametrize("name", ["x/../../evil", "x/..\\..\\evil", "/x/evil", "\\x\\evil", "C:/x/evil", "../x"])
def test_path_traversal_is_rejected(tmp_path, name):
    (tmp_path / "a.zip").write_bytes(zipped({"x/good": b"1", name: b"2"}))
    with pytest.raises(DataError, match="is outside of the folder; nothing is unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "in" / "to", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["a.zip"]


def test_symbolic_links_are_rejected(tmp_path):
    link = zipfile.ZipInfo("x/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(DataError, match="is outside of the folder"):
        unpack(tmp_path / "a.zip", tmp_path, "x/")


def test_a_zip_bomb_is_rejected(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"x/bomb": bytes(1_000_000)}))
    assert (tmp_path / "a.zip").stat().st_size < 1_000_000 / MAX_RATIO
    with pytest.raises(DataError, match="exceed 100 times its size"):
        unpack(tmp_path / "a.zip", tmp_path, "x/")


def test_a_damaged_archive_is_removed(tmp_path):
    content = bytearray(zipped({"x/a": CONTENT}))
    content[200_000] ^= 1
    for damaged in (bytes(content), b"no archive"):
        (tmp_path / "a.zip").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.zip: damaged archive .* It is removed"):
            unpack(tmp_path / "a.zip", tmp_path, "x/")
        assert not (tmp_path / "a.zip").exists()
        assert not (tmp_path / "x" / "a").exists()


def test_an_unrelated_archive_is_reported(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"x/a": b"1"}))
    with pytest.raises(DataError, match=r"contains no member train2017/"):
        unpack(tmp_path / "a.zip", tmp_path, "train2017/")


# Data sets


def coco(name: str, image: int) -> bytes:
    """COCO's annotations of one picture."""
    content = {
        "images": [{"id": image, "file_name": f"{image}.jpg"}],
        "annotations": [{"id": image, "image_id": image, "caption": f"A dog of {name}."}],
    }
    return json.dumps(content).encode()


SETS = {
    "flickr8k": {
        "Flickr8k_text.zip": {
            "Flickr8k.token.txt": b"a.jpg#0\tA dog .\nb.jpg#0\tA cat .\n",
            "Flickr_8k.trainImages.txt": b"a.jpg\n",
            "Flickr_8k.testImages.txt": b"b.jpg\n",
            "__MACOSX/._Flickr8k.token.txt": b"",
        },
        "Flickr8k_Dataset.zip": {"Flicker8k_Dataset/a.jpg": b"a", "Flicker8k_Dataset/b.jpg": b"b"},
    },
    "coco2014": {
        "caption_datasets.zip": {
            "dataset_coco.json": json.dumps(
                {
                    "images": [
                        {
                            "filename": f"{number}.jpg",
                            "filepath": "train2014" if split == "train" else "val2014",
                            "cocoid": number,
                            "split": split,
                            "sentences": [{"raw": "A dog."}],
                        }
                        for number, split in enumerate(("train", "restval", "val", "test"))
                    ],
                    "dataset": "coco",
                }
            ).encode(),
            "dataset_flickr8k.json": b"{}",
        },
        "annotations_trainval2014.zip": {
            "annotations/captions_train2014.json": coco("train", 0),
            "annotations/captions_val2014.json": coco("val", 1),
            "annotations/instances_train2014.json": b"{}",
        },
        "val2014.zip": {f"val2014/{number}.jpg": b"x" for number in (1, 2, 3)},
        "train2014.zip": {"train2014/0.jpg": b"x"},
    },
    "coco2017": {
        "annotations_trainval2017.zip": {
            "annotations/captions_train2017.json": coco("train", 0),
            "annotations/captions_val2017.json": coco("val", 1),
        },
        "val2017.zip": {"val2017/1.jpg": b"x"},
        "train2017.zip": {"train2017/0.jpg": b"x"},
    },
}
SPLITS = {
    "flickr8k": ["train", "test"],
    "coco2014": ["train", "train", "dev", "test"],
    "coco2017": ["train", "dev"],
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_downloaded_set_is_readable_with_the_printed_settings(server, tmp_path, capsys, name):
    server.files = {file: zipped(members) for file, members in SETS[name].items()}
    folder = tmp_path / 'with "quotes" and ä'
    assert main(["download", name, str(folder), "--from", server.url + "/"]) == 0
    (settings,) = tomllib.loads(capsys.readouterr().out)["datasets"]
    assert settings["name"] == name
    records = read_dataset(settings["layout"], Path(settings["path"]))
    assert [record.split for record in records] == SPLITS[name]
    assert not list(folder.glob("*.zip"))
    asked = len(server.asked)
    assert main(["download", name, str(folder), "--from", server.url]) == 0  # all is there
    assert len(server.asked) == asked == len(SETS[name])


def test_a_download_resumes_after_any_archive(server, tmp_path):
    server.files = {file: zipped(members) for file, members in SETS["coco2017"].items()}
    train = server.files.pop("train2017.zip")
    with pytest.raises(DataError, match=r"train2017\.zip: the server answered 404"):
        download("coco2017", tmp_path, server.url)
    server.files = {"train2017.zip": train}
    download("coco2017", tmp_path, server.url)
    assert len(read_dataset("coco", tmp_path)) == 2


def test_a_download_that_fails_is_a_message_and_exit_code_2(tmp_path, capsys):
    assert main(["download", "flickr8k", str(tmp_path), "--from", "file:///etc"]) == 2
    assert "expected a URL that starts with http" in capsys.readouterr().err


def test_every_source_has_a_reader_and_archives_that_can_be_checked():
    for source in SOURCES.values():
        assert source.layout in READERS
        for archive in source.archives:
            assert archive.size or archive.md5
            assert archive.md5 is None or len(archive.md5) == 32
            assert archive.url.startswith("https://") or archive.md5
