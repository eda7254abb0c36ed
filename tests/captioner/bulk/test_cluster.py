"""What a cluster of several machines can suffer, with Ray's own processes on this one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.captioner.bulk.conftest import draw, write_shard

ray = pytest.importorskip("ray", reason='needs the extra: pip install -e ".[bulk]"')

from captioner.bulk.output import Fields  # noqa: E402
from captioner.bulk.rows import Columns, Unit  # noqa: E402
from captioner.bulk.worker import Assignment, Job, Worker  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray warns of what it does itself

ROWS = int(os.environ.get("CAPTIONER_BULK_ROWS", "600"))
"""Pictures that the cluster captions: more of them meet with more misfortunes."""

PER_SHARD = 50


def actors() -> list[int]:
    """The workers of clusters that this process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            parents = [int((folder / "stat").read_text().rpartition(")")[2].split()[1])]
            while parents[-1] > 1:
                parents.append(int(Path(f"/proc/{parents[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
        except OSError:
            continue
        if name.startswith(b"ray::_Actor") and os.getpid() in parents:
            found.append(int(folder.name))
    return found


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    cluster.extra = [cluster.add_node(**options) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def test_every_row_is_there_once_whoever_dies(cluster, tiny, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for shard in range(ROWS // PER_SHARD):
        write_shard(
            tmp_path / f"{shard:04d}.tar",
            [(f"{number:06d}.png", draw(number)) for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)],
        )
    command = [sys.executable, "-m", "captioner.bulk", "*.tar", "-o", "out", "-f", "jsonl", "--workers", "3"]
    command += ["--address", cluster.address, "-m", str(tiny_checkpoint), "--batch-size", "8"]
    chance = random.Random(0)
    killed, interruptions = 0, 0
    began = time.monotonic()

    def start():
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    driver = start()
    while driver.poll() is None:
        assert time.monotonic() - began < max(110, ROWS / 4), "it takes too long"
        time.sleep(1 + 2 * chance.random())
        done = len(list(tmp_path.glob("out/part-*")))
        if (workers := actors()) and killed < ROWS // 100:
            os.kill(chance.choice(workers), signal.SIGKILL)
            killed += 1
        if interruptions == 0 and done >= ROWS // PER_SHARD // 3:
            cluster.remove_node(cluster.extra.pop(), allow_graceful=False)
            interruptions += 1
        elif interruptions == 1 and done >= ROWS // PER_SHARD // 2:
            driver.kill()
            driver.communicate()
            driver = start()
            interruptions += 1
    said = driver.communicate()[1]
    print(f"{ROWS} rows in {time.monotonic() - began:.0f} s; {killed} workers killed, one node, the driver\n{said}")
    assert driver.returncode == 0, said
    assert interruptions == 2
    assert killed >= 2

    rows = [json.loads(line) for path in sorted(tmp_path.glob("out/part-*")) for line in path.open()]
    assert Counter(row["key"] for row in rows) == Counter(f"{number:06d}" for number in range(ROWS))
    (tmp_path / "alone").mkdir()
    job = Job(str(tmp_path / "alone"), "jsonl", tiny.search_settings, Columns(), Fields(), 8)
    worker = Worker(job, lambda: tiny)
    worker.start()
    for shard in range(ROWS // PER_SHARD):
        report = worker.step(Assignment(shard, Unit("shard", (f"{shard:04d}.tar",))))
        while not report.is_done:
            report = worker.step(None)
    alone = [json.loads(line) for path in sorted(tmp_path.glob("alone/part-*")) for line in path.open()]
    assert rows == alone
