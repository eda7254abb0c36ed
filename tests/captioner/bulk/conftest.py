import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason='needs the extra: pip install -e ".[bulk]"')
pytest.importorskip("fsspec", reason='needs the extra: pip install -e ".[bulk]"')


def draw(number: int, side: int = 48) -> bytes:
    """The file of a picture that no other number has."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 60, (side, side + number % 7, 3)) + random.integers(0, 190, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def draw_bomb() -> bytes:
    """The file of a picture that says that it has 3.6 billion pixels."""
    whole = draw(3)
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + whole[24:29]
    return whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]


def write_shard(path, members, mode="w"):
    """Write an archive of names and contents."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    from captioner.bulk import storage

    monkeypatch.setattr(storage, "WAIT", 0.001)


@pytest.fixture
def bulk(tiny_checkpoint, tmp_path):
    """Run the command in a folder, on one core, and return its exit code and messages."""

    def bulk(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "captioner.bulk", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "CAPTIONER_MODEL": str(tiny_checkpoint), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
            preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]),
        )
        assert done.stdout == ""
        return done.returncode, done.stderr

    return bulk


START_SECONDS = 240
"""Time that Ray has to start, on a machine that may be busy."""


class RayCluster:
    """A Ray cluster in a process of its own: `ray_cluster.py`."""

    def __init__(self, process, folder):
        self.process = process
        self.folder = folder
        self.address = self.read_line(START_SECONDS)

    def read_line(self, seconds):
        """Return the next line of the process; its messages are the error when none comes in time."""
        timer = Timer(seconds, self.kill)
        timer.start()
        line = self.process.stdout.readline().strip()
        timer.cancel()
        if not line:
            self.kill()
            pytest.fail(f"Ray does not work here: {(self.folder / 'messages').read_text()[-3000:]}")
        return line

    def remove_node(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.read_line(60)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)

    def find_workers(self):
        """Return the ids of the processes of `caption-bulk`'s workers."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                name, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::_Actor") and str(self.folder).encode() in environment:
                found.append(int(process.name))
        return found


@pytest.fixture(scope="session")
def ray_cluster():
    """Three nodes with a CPU each, which all tests share."""
    pytest.importorskip("ray", reason='needs the extra: pip install -e ".[bulk]"')
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, as names of sockets are
    environment = {
        **os.environ,
        "RAY_raylet_start_wait_time_s": "200",
        "RAY_TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "messages").open("w") as messages:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("ray_cluster.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            start_new_session=True,
        )
    try:
        cluster = RayCluster(process, folder)
        yield cluster
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
