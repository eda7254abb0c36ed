"""What a cluster of several machines can suffer, with Ray's own processes on this one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from captioner.bulk.output import Fields
from captioner.bulk.rows import Columns, Unit
from captioner.bulk.worker import Assignment, Job, Worker
from tests.captioner.bulk.conftest import draw, write_shard

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray warns of what it does itself

ROWS = int(os.environ.get("CAPTIONER_BULK_ROWS", "600"))
"""Pictures that the cluster captions: more pictures, more faults."""

PER_SHARD = 50

LIMIT = 240
"""Seconds that the run may take, and 0.25 more for each picture."""


def test_every_row_is_written_once_when_workers_a_node_and_the_driver_die(
    ray_cluster, tiny, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for shard in range(ROWS // PER_SHARD):
        write_shard(
            tmp_path / f"{shard:04d}.tar",
            [(f"{number:06d}.png", draw(number)) for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)],
        )
    command = [sys.executable, "-m", "captioner.bulk", "*.tar", "-o", "out", "-f", "jsonl", "--workers", "3"]
    command += ["--address", ray_cluster.address, "-m", str(tiny_checkpoint), "--batch-size", "8"]
    units = ROWS // PER_SHARD
    chance = random.Random(0)
    killed = at_last_kill = interruptions = 0
    began = time.monotonic()

    def start():
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    driver = start()
    while driver.poll() is None:
        if time.monotonic() - began > LIMIT + ROWS / 4:
            driver.kill()
            pytest.fail(f"it takes too long; {killed} workers were killed. {driver.communicate()[1]}")
        time.sleep(0.2)
        done = len(list(tmp_path.glob("out/part-*")))
        if done >= at_last_kill + 2 and (workers := ray_cluster.find_workers()):  # so that there is always progress
            os.kill(chance.choice(workers), signal.SIGKILL)
            killed += 1
            at_last_kill = done
        if interruptions == 0 and done >= units // 3:
            ray_cluster.remove_node()
            interruptions += 1
        elif interruptions == 1 and done >= units // 2:
            driver.kill()
            driver.communicate()
            driver = start()
            interruptions += 1
    printed, said = driver.communicate()
    print(f"{ROWS} rows in {time.monotonic() - began:.0f} s; {killed} workers killed, one node, the driver\n{said}")
    assert (driver.returncode, printed) == (0, ""), said
    assert interruptions == 2
    assert killed >= units // 4

    def read(folder):
        parts = sorted(tmp_path.glob(f"{folder}/part-*"))
        return [json.loads(line) for part in parts for line in part.read_text().splitlines()]

    rows = read("out")
    assert Counter(row["key"] for row in rows) == Counter(f"{number:06d}" for number in range(ROWS))
    (tmp_path / "alone").mkdir()
    job = Job(str(tmp_path / "alone"), "jsonl", tiny.search_settings, Columns(), Fields(), 8)
    worker = Worker(job, lambda: tiny)
    worker.start()
    for shard in range(units):
        report = worker.step(Assignment(shard, Unit("shard", (f"{shard:04d}.tar",))))
        while not report.is_done:
            report = worker.step(None)
    assert rows == read("alone")
