import io
import tarfile

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from captioner.bulk import storage
from captioner.bulk.rows import Columns, DeniedError, Unit, read_picture, read_rows
from captioner.errors import ImageError
from tests.captioner.bulk.conftest import draw, write_shard


def rows(kind, path, start=0, count=None, **columns):
    return list(read_rows(Unit(kind, (str(path),), start, count), Columns(**columns)))


def contents(found):
    """Key and content of each row, and the error's text for those that have one."""
    return [
        (row.key, str(row.picture) if isinstance(row.picture, ImageError) else row.picture)
        if not callable(row.picture)
        else (row.key, row.picture())
        for row in found
    ]


def test_members_of_a_shard_with_one_key_are_a_row(tmp_path):
    members = [("x/a.txt", b"A dog."), ("x/a.png", b"1"), ("x/b.b.jpg", b"0"), ("x/b.jpg", b"2"), ("._x", b"")]
    write_shard(tmp_path / "s.tar", members)
    found = rows("shard", tmp_path / "s.tar", keep=("txt",))
    assert contents(found) == [("x/a", b"1"), ("x/b", b"2")]
    assert [row.kept for row in found] == [{"txt": "A dog."}, {}]
    assert {row.source for row in found} == {str(tmp_path / "s.tar")}
    assert contents(rows("shard", tmp_path / "s.tar", picture="b.jpg"))[1] == ("x/b", b"0")


def test_compressed_shards_are_read(tmp_path):
    write_shard(tmp_path / "s.tar.gz", [("a.png", b"1")], mode="w:gz")
    assert contents(rows("shard", tmp_path / "s.tar.gz")) == [("a", b"1")]


def test_an_empty_shard_has_no_rows(tmp_path):
    write_shard(tmp_path / "s.tar", [])
    assert rows("shard", tmp_path / "s.tar") == []


def test_keys_without_a_picture_or_with_several_and_keys_that_occur_twice_are_errors(tmp_path):
    write_shard(
        tmp_path / "s.tar",
        [("a.txt", b""), ("b.png", b"1"), ("b.jpg", b"2"), ("c.png", b"3"), ("d.png", b"4"), ("c.png", b"5")],
    )
    found = dict(enumerate(contents(rows("shard", tmp_path / "s.tar"))))
    assert found[0] == ("a", "a: no picture has this key")
    assert found[1] == ("b", "b: several pictures have this key (png, jpg); name one")
    assert found[2] == ("c", b"3")
    assert found[3] == ("d", b"4")
    assert found[4][0] == "c"
    assert "occurs twice" in found[4][1]


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between members"])
def test_a_truncated_shard_gives_its_rows_and_one_error(cut, tmp_path):
    write_shard(tmp_path / "whole.tar", [(f"{number}.png", bytes([number]) * 700) for number in range(4)])
    whole = (tmp_path / "whole.tar").read_bytes()
    member = 512 + 1024  # the header, and the content in blocks of 512
    length = {"in a member": 2 * member + 900, "in a header": 2 * member + 100, "between members": 2 * member}[cut]
    (tmp_path / "s.tar").write_bytes(whole[:length])
    *good, bad = contents(rows("shard", tmp_path / "s.tar"))
    assert good == [("0", b"\0" * 700), ("1", b"\1" * 700)]
    assert bad[0] is None
    assert "damaged after 2 rows" in bad[1]


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    write_shard(tmp_path / "s.tar", [(f"{number}.png", b"x" * 512) for number in range(4)])
    with (tmp_path / "s.tar").open("r+b") as file:
        file.seek(2 * 1024 + 148)  # checksum of the third
        file.write(b"999999")
    *good, bad = contents(rows("shard", tmp_path / "s.tar"))
    assert [key for key, _ in good] == ["0", "1"]
    assert "damaged after 2 rows" in bad[1]


def test_a_file_that_is_no_archive_and_one_that_is_missing_are_one_error(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"no archive" * 1000)
    for path in (tmp_path / "s.tar", tmp_path / "missing.tar", tmp_path / "missing.parquet"):
        ((key, error),) = contents(rows("shard" if path.suffix == ".tar" else "table", path))
        assert key is None
        assert str(path) in error


def test_a_name_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, 1 << 33
        tar.fileobj.write(header.tobuf(tarfile.GNU_FORMAT))
    assert "a name of 8,589,934,592 bytes" in contents(rows("shard", tmp_path / "s.tar"))[-1][1]


def test_the_forms_of_pictures_in_tables(tmp_path):
    (tmp_path / "a.png").write_bytes(draw(1))
    columns = {
        "bytes": [b"1", None, b""],
        "both": [{"bytes": b"1", "path": "x"}, {"bytes": None, "path": "a.png"}, None],
        "text": ["a.png", str(tmp_path / "a.png"), None],
        "name": ["p", "q", "r"],
        "at": arrow.array([1, 2, 3], arrow.timestamp("ns")),
    }
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table(columns), path)
    assert contents(rows("table", path, picture="bytes", key="name")) == [
        ("p", b"1"),
        ("q", f"{path}: row 1 has no picture."),
        ("r", b""),
    ]
    assert contents(rows("table", path, picture="both")) == [
        ("x", b"1"),
        ("a.png", draw(1)),
        ("2", f"{path}: row 2 has no picture."),
    ]
    found = rows("table", path, picture="text", keep=("at",))
    assert [row.key for row in found] == ["a.png", str(tmp_path / "a.png"), "2"]
    assert [row.picture() for row in found[:2]] == [draw(1)] * 2
    assert [row.kept["at"].value for row in found] == [1, 2, 3]


def test_parts_of_tables_have_every_row_once(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"path": list(map(str, range(100)))}), path, row_group_size=37)
    for size in (1, 7, 50, 100):
        parts = [
            row.key for start in range(0, 100, size) for row in rows("table", path, start, min(size, 100 - start))
        ]
        assert parts == list(map(str, range(100)))


def test_a_damaged_row_group_is_an_error_for_each_of_its_rows_and_for_no_others(tmp_path):
    path = tmp_path / "t.parquet"
    pictures = arrow.table({"image": [bytes([number]) * 3000 for number in range(9)]})
    parquet.write_table(pictures, path, row_group_size=3, compression="snappy", use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * 40)
    found = contents(rows("table", path, 0, 9))
    assert [key for key, _ in found] == list(map(str, range(9)))
    assert [isinstance(value, bytes) for _, value in found] == [True] * 3 + [False] * 3 + [True] * 3
    assert "row 4 is damaged" in found[4][1]


def test_pictures_that_are_missing_or_not_files_are_errors(tmp_path):
    for name, said in ((tmp_path / "missing.jpg", "No such file"), (tmp_path, "not a regular file")):
        with pytest.raises(ImageError, match=said):
            read_picture(str(name))


def test_a_picture_without_permission_is_denied(tmp_path, ordinary_user):
    path = tmp_path / "a.jpg"
    path.touch()
    path.chmod(0)
    with pytest.raises(DeniedError, match="permission denied"):
        read_picture(str(path))


class Flaky(io.BytesIO):
    """A file whose reads fail every other time."""

    reads = 0

    def read(self, size=-1):
        Flaky.reads += 1
        if Flaky.reads % 2:
            raise ConnectionResetError("reset")
        return super().read(size)


@pytest.mark.parametrize("streams", [True, False])
def test_reads_that_fail_are_tried_again_where_they_were(streams, tmp_path, monkeypatch):
    content = bytes(range(256)) * 1000
    (tmp_path / "f").write_bytes(content)
    system, _ = storage.locate(str(tmp_path / "f"))
    opened = []

    def open_flaky(path, mode, **options):
        opened.append(Flaky(content))
        opened[-1].size = len(content)
        return opened[-1]

    monkeypatch.setattr(system, "open", open_flaky)
    monkeypatch.setattr(storage, "locate", lambda url: (system, url))
    with storage.open_to_read(str(tmp_path / "f"), streams=streams) as file:
        file.seek(5)
        assert b"".join(iter(lambda: file.read(70_000), b"")) == content[5:]
    assert len(opened) > 2


def test_a_storage_that_keeps_failing_is_an_error_of_the_storage():
    calls = []

    def fail():
        calls.append(1)
        raise TimeoutError("slow")

    with pytest.raises(storage.StorageError, match=r"x: the storage failed 6 times \(slow\)"):
        storage.retry(fail, "x")
    assert len(calls) == 6


def test_a_file_that_is_missing_is_not_asked_for_again():
    calls = []

    def fail():
        calls.append(1)
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        storage.retry(fail, "x")
    assert len(calls) == 1
