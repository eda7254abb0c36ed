"""What becomes of work when workers die and storage fails, with actors that run in this process."""

import collections
import itertools
from typing import NamedTuple

import pytest

ray = pytest.importorskip("ray", reason='needs the extra: pip install -e ".[bulk]"')

from captioner.bulk import pool as pool_module  # noqa: E402
from captioner.bulk.pool import Pool  # noqa: E402
from captioner.bulk.rows import Unit  # noqa: E402
from captioner.bulk.storage import StorageError  # noqa: E402
from captioner.bulk.worker import Progress  # noqa: E402
from captioner.errors import CaptionerError, OutputError  # noqa: E402
from captioner.version import __version__  # noqa: E402


class Call:
    def __init__(self, action):
        self.action = action


class Method(NamedTuple):
    function: object

    def remote(self, *arguments):
        return Call(lambda: self.function(*arguments))


class FakeWorker:
    """Reports batches of 4 rows, and single rows from where it must be careful; `rows` says what each row does."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.start = Method(lambda: cluster.version)
        self.step = Method(self.take_step)
        self.work = None

    def take_step(self, assignment):
        if self in self.cluster.killed:
            raise ray.exceptions.ActorDiedError
        if assignment:
            self.assignment, self.at = assignment, 0
            self.cluster.assigned.append(assignment)
        number = self.assignment.number
        rows = self.cluster.rows[number]
        trusted = len(rows) if self.assignment.careful_from is None else self.assignment.careful_from
        count = max(1, min(4, trusted - self.at))
        part = list(enumerate(rows))[self.at : self.at + count]
        for index, row in part:
            if isinstance(row, Exception):
                if not isinstance(row, CaptionerError):
                    raise row
                raise ray.exceptions.RayTaskError("step", "traceback", row)
            if row == "poison" and index not in self.assignment.bad:
                raise ray.exceptions.ActorDiedError
            if callable(row):
                row(self)
        self.at += len(part)
        is_done = self.at >= len(rows)
        if is_done:
            self.cluster.committed.append(number)
        failed = [f"row {index}" for index, _ in part if index in self.assignment.bad]
        return Progress(len(part), len(failed), tuple(failed), is_done)


class Cluster:
    version = __version__

    def __init__(self):
        self.killed, self.committed, self.assigned, self.said = [], [], [], []
        self.started = 0

    def start(self):
        self.started += 1
        return FakeWorker(self)

    def run(self, *rows, count=2, **options):
        self.rows = rows
        pool = Pool(self.start, count, self.said.append, **options)
        pool.run((number, Unit("shard", (f"{number}.tar",))) for number in range(len(rows)))
        return pool.counts

    def wait(self, calls, *, num_returns=1, timeout):
        return calls[:1], calls[1:]

    def get(self, call):
        return call.action()

    def kill(self, worker):
        self.killed.append(worker)


@pytest.fixture
def cluster(monkeypatch):
    cluster = Cluster()
    for name in ("wait", "get", "kill"):
        monkeypatch.setattr(pool_module.ray, name, getattr(cluster, name))
    return cluster


def test_each_unit_is_done_once(cluster):
    counts = cluster.run(*[["ok"] * 5] * 7, count=3)
    assert sorted(cluster.committed) == list(range(7))
    assert (counts.rows, counts.units, counts.failed, counts.deaths, counts.undone) == (35, 7, 0, 0, 0)
    assert cluster.started == 3


def test_no_more_workers_are_started_than_there_is_work(cluster):
    cluster.run(["ok"], count=5)
    assert cluster.started == 1


def test_a_worker_that_dies_costs_its_unit_a_retry(cluster):
    def die_once(worker):
        if cluster.started <= 2:
            raise ray.exceptions.ActorUnavailableError("gone", None)

    counts = cluster.run(["ok"] * 4 + [die_once], ["ok"] * 9)
    assert sorted(cluster.committed) == [0, 1]
    assert (counts.rows, counts.deaths) == (14, 1)  # no row is counted twice


def test_a_row_that_ends_its_worker_is_found_and_left_out(cluster):
    rows = ["ok"] * 20
    rows[13] = rows[15] = "poison"
    counts = cluster.run(rows, ["ok"] * 3)
    assert sorted(cluster.committed) == [0, 1]
    assert cluster.assigned[-1].bad == {13, 15}
    assert (counts.rows, counts.failed, counts.undone) == (23, 2, 0)
    assert counts.deaths == 2 + 2 + 2


def test_a_unit_whose_workers_are_killed_from_outside_gets_further_each_time(cluster):
    reports = collections.defaultdict(set)
    lives = collections.defaultdict(itertools.cycle((3, 7, 11, 16)).__next__)

    def live(worker):
        reports[worker].add(worker.at)
        if len(reports[worker]) > lives[worker]:
            raise ray.exceptions.ActorDiedError

    counts = cluster.run([live] * 56, count=1)
    assert (counts.undone, counts.rows, counts.failed) == (0, 56, 0)
    assert counts.deaths > 12


def test_a_unit_that_ends_its_workers_whatever_is_left_out_is_left_undone(cluster):
    counts = cluster.run(["ok", ray.exceptions.ActorDiedError()], ["ok"], count=8)
    assert cluster.committed == [1]
    assert (counts.undone, counts.rows) == (1, 1)
    assert any("0.tar: left undone: " in line for line in cluster.said)


def test_a_unit_whose_storage_fails_is_tried_again_and_then_left_undone(cluster):
    counts = cluster.run([StorageError("slow")], ["ok"])
    assert [unit.number for unit in cluster.assigned].count(0) == 3
    assert cluster.committed == [1]
    assert counts.undone == 1
    assert cluster.said == ["error: 0.tar: left undone: slow"]


@pytest.mark.parametrize("problem", [StorageError("down"), ray.exceptions.ActorDiedError()])
def test_a_run_in_which_nothing_works_ends(problem, cluster):
    with pytest.raises(CaptionerError, match="too many failures"):
        cluster.run(*[[problem]] * 40)


def test_an_output_that_cannot_be_written_ends_the_run(cluster):
    with pytest.raises(CaptionerError, match="disk full"):
        cluster.run([OutputError("disk full")], ["ok"])


def test_workers_of_another_version_are_refused(cluster):
    cluster.version = "0.0.1"
    with pytest.raises(CaptionerError, match=r"a worker has version 0\.0\.1"):
        cluster.run(["ok"])


def test_a_silent_worker_is_killed_and_replaced(cluster, monkeypatch):
    waits = []

    def wait(calls, *, num_returns=1, timeout):
        if (
            not cluster.killed
            and any(call.action.__closure__ for call in calls)
            and cluster.started
            and len(waits) < 9
        ):
            waits.append(1)
            if len(waits) > 1:
                return [], calls  # nothing comes
        return calls[:1], calls[1:]

    monkeypatch.setattr(pool_module.ray, "wait", wait)
    counts = cluster.run(["ok"], count=1, stalled=0)
    assert cluster.committed == [0]
    assert counts.deaths == 1
    assert "silent" in cluster.said[0]


def test_ten_errors_are_printed_and_no_more(cluster):
    rows = ["poison"] * 12
    cluster.run(rows, count=1)
    assert len([line for line in cluster.said if line.startswith("error: row")]) == 10
