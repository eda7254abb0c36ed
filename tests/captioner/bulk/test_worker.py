import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from captioner.bulk import worker as worker_module
from captioner.bulk.output import FORMATS, Fields
from captioner.bulk.plan import make_plan
from captioner.bulk.rows import Columns, Unit
from captioner.bulk.storage import StorageError
from captioner.bulk.worker import Assignment, Job, Worker
from captioner.search import SearchSettings
from tests.captioner.bulk.conftest import draw, draw_bomb, write_shard


@pytest.fixture
def work(tiny, tmp_path):
    """Caption a unit, and return the file and the last report."""

    def work(unit, format="jsonl", keep=(), fields=None, search=None, **assignment):
        (tmp_path / "out").mkdir(exist_ok=True)
        fields = fields or Fields(keep)
        job = Job(
            str(tmp_path / "out"), format, search or SearchSettings(), Columns(keep=keep), fields, batch_size=4
        )
        worker = Worker(job, lambda: tiny)
        worker.start()
        reports = [worker.step(Assignment(7, unit, **assignment))]
        while not reports[-1].is_done:
            reports.append(worker.step(None))
        return tmp_path / "out" / f"part-00000007{FORMATS[format].suffix}", reports

    return work


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def shard(tmp_path):
    members = []
    for number in range(10):
        members += [(f"{number:04d}.png", draw(number)), (f"{number:04d}.txt", f"text {number}".encode())]
    write_shard(tmp_path / "in.tar", members)
    return Unit("shard", (str(tmp_path / "in.tar"),))


def test_captions_are_those_of_caption(work, shard, tiny, run, tmp_path):
    for number in range(10):
        (tmp_path / f"{number:04d}.png").write_bytes(draw(number))
    assert run(*sorted(tmp_path.glob("*.png")), "-o", tmp_path / "captions.jsonl")[0] == 0
    expected = lines(tmp_path / "captions.jsonl")
    path, reports = work(shard)
    found = lines(path)
    assert reports[-1].rows == 10
    for line, other in zip(found, expected, strict=True):
        assert Path(other.pop("image")).name == f"{line.pop('key')}.png"
        assert line.pop("source") == shard.files[0]
        assert line == other


def test_a_table_has_columns_for_all_that_is_asked_for(work, shard, tiny):
    search = SearchSettings(candidates=3)
    path, _ = work(shard, "parquet", ("txt",), Fields(("txt",), True, True, True), search)
    table = parquet.read_table(path)
    captions = tiny.caption([draw(number) for number in range(10)], search)
    names = "key source caption log_prob score confidence words log_probs word_confidences candidates attention"
    assert table.column_names == [*names.split(), "error", "txt"]
    for number, (row, caption) in enumerate(zip(table.to_pylist(), captions, strict=True)):
        assert row["txt"] == f"text {number}"
        assert (row["caption"], row["words"], row["error"]) == (caption.text, list(caption.words), None)
        assert [record["caption"] for record in row["candidates"]] == list(map(str, caption.candidates))
        np.testing.assert_array_equal(np.array(row["attention"], np.float16), caption.attention.astype(np.float16))
    assert str(table.schema.field("attention").type).count("halffloat") == 1


def test_a_shard_of_output_is_a_shard_to_read(work, shard):
    path, _ = work(shard, "webdataset")
    first = lines(work(shard)[0])
    path = path.rename(path.with_name("in.tar"))
    again, _ = work(Unit("shard", (str(path),)), keep=("txt",))
    for line, other in zip(lines(again), first, strict=True):
        assert (line["key"], line["caption"], line["txt"]) == (
            other["key"],
            other["caption"],
            other["caption"] + "\n",
        )


def test_pictures_with_paths_get_keys_without_dots_in_shards(work, tmp_path):
    (tmp_path / "a.b.png").write_bytes(draw(1))
    path, _ = work(Unit("pictures", (f"{tmp_path}/a.b.png",), rows=1), "webdataset")
    again, _ = work(Unit("shard", (str(path),)), keep=("json",))
    (row,) = lines(again)
    assert row["key"] == "00000000"
    assert json.loads(row["json"])["key"] == f"{tmp_path}/a.b.png"


def test_what_is_wrong_with_a_picture_costs_its_row_alone(work, tmp_path, pictures):
    write_shard(
        tmp_path / "in.tar",
        [("a.png", draw(1)), ("b.png", draw(2)[:300]), ("c.jpg", b"no picture"), ("d.png", draw_bomb()),
         ("e.png", b""), ("f.txt", b""), ("g.png", draw(4))],
    )  # fmt: skip
    path, reports = work(Unit("shard", (f"{tmp_path}/in.tar",)))
    found = {row["key"]: row for row in lines(path)}
    assert list(found) == list("abcdefg")
    assert ["caption" in row for row in found.values()] == [True, False, False, False, False, False, True]
    for key, said in (("b", "incomplete|damaged|truncated"), ("c", "unknown format"), ("d", "pixels|large")):
        assert re.search(said, found[key]["error"]), found[key]
    assert (reports[-1].rows, reports[-1].failed, len(reports[-1].errors)) == (7, 5, 3)


@pytest.mark.parametrize("format", FORMATS)
def test_a_unit_without_rows_has_a_file(format, work, tmp_path):
    write_shard(tmp_path / "in.tar", [])
    path, reports = work(Unit("shard", (f"{tmp_path}/in.tar",)), format)
    assert path.exists()
    assert reports[-1].rows == 0
    if format == "parquet":
        assert parquet.read_table(path).num_rows == 0


def test_rows_that_end_their_process_are_left_out_and_have_an_error(work, shard):
    rows = lines(work(shard, bad=frozenset({3}))[0])
    assert len(rows) == 10
    assert ["error" in row for row in rows].index(True) == 3
    assert "ended the process" in rows[3]["error"]


@pytest.mark.parametrize("careful_from", [0, 6])
def test_a_careful_worker_reports_each_row_before_it_reads_the_next(
    careful_from, tiny, shard, tmp_path, monkeypatch
):
    read = []
    monkeypatch.setattr(
        tiny, "prepare", lambda source: read.append(source.name) or type(tiny).prepare(tiny, source)
    )
    worker = Worker(Job(str(tmp_path), "jsonl", SearchSettings(), Columns(), Fields(), 4), lambda: tiny)
    worker.start()
    report = worker.step(Assignment(0, shard, careful_from=careful_from))
    rows = report.rows
    while rows < 10:
        assert (report.rows, report.is_done) == (1 if rows > careful_from else {4: 4, 6: 2}[rows], False)
        if rows >= careful_from:
            assert len(read) == rows
        report = worker.step(None)
        rows += report.rows
    assert (report.rows, report.is_done) == (1, False)
    assert worker.step(None).is_done
    assert len(set(read)) == len(read) == 10


def test_a_worker_reports_after_some_seconds(tiny, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "STEP_SECONDS", 0)
    worker = Worker(Job(str(tmp_path), "jsonl", SearchSettings(), Columns(), Fields(), 4), lambda: tiny)
    worker.start()
    reports = [worker.step(Assignment(0, shard)), *(worker.step(None) for _ in range(3))]
    assert [(report.rows, report.is_done) for report in reports] == [(4, False), (4, False), (2, False), (0, True)]


def test_a_unit_whose_storage_fails_leaves_no_file(work, shard, tmp_path, monkeypatch):
    def fail(*_):
        raise StorageError("the storage failed")
        yield

    monkeypatch.setattr(worker_module, "read_rows", fail)
    with pytest.raises(StorageError):
        work(shard)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_unit_of_which_nothing_may_be_read_fails_as_when_credentials_expire(work, tmp_path, ordinary_user):
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(draw(number))
        file.chmod(0)
    unit = Unit("pictures", tuple(map(str, files)), rows=3)
    with pytest.raises(StorageError, match="no permission to read any of 3"):
        work(unit)
    files[0].chmod(0o600)
    assert ["error" in row for row in lines(work(unit)[0])] == [False, True, True]


def test_pictures_at_addresses_are_fetched(work, website, tmp_path):
    website.pages["/a.png"] = draw(1)
    units = list(make_plan([f"{website.url}/a.png", f"{website.url}/b.png"], Columns(), 10))
    found = lines(work(units[0])[0])
    assert "caption" in found[0]
    assert "404" in found[1]["error"]
