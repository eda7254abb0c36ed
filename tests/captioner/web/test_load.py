"""The whole server under load, with the model that comes with it: is it right, how fast, in how much memory."""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image, ImageDraw

from captioner.model_file import SHIPPED

CLIENTS = 64
SECONDS = float(os.environ.get("CAPTIONER_LOAD_SECONDS", "24"))  # with all clients
PICTURES = 60
MALFORMED = 400

pytest.importorskip("fastapi", reason="needs the extra web")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("default" not in SHIPPED, reason="the package was built without its checkpoint"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Real photographs, or where there are none, drawings of as many sizes."""
    if folder := os.environ.get("CAPTIONER_DATA"):
        return sorted(Path(folder, "flickr8k", "Flicker8k_Dataset").glob("*.jpg"))[:PICTURES]
    draws = random.Random(0)
    paths = []
    for number in range(PICTURES):
        width, height = draws.randint(200, 900), draws.randint(200, 900)
        picture = Image.effect_noise((width, height), 40).convert("RGB")
        pen = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y, side = draws.randrange(width), draws.randrange(height), draws.randint(20, 300)
            colour = tuple(draws.choices(range(256), k=3))
            draws.choice((pen.ellipse, pen.rectangle))((x, y, x + side, y + side), fill=colour)
        paths.append(tmp_path_factory.getbasetemp() / f"picture-{number}.jpg")
        picture.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def expected(photographs):
    """The record of each picture on the command line."""
    command = [sys.executable, "-m", "captioner", *photographs, "-f", "jsonl", "--attention", "--candidates", "2"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    return {Path(record.pop("image")): record for record in map(json.loads, lines)}


def is_right(reply, record):
    """Return whether a reply equals the command line's record, except for rounding in batches."""
    for single, other in ((reply, record), (reply["candidates"][0], record["candidates"][0])):
        if (single["caption"], single["rectangle"]) != (other["caption"], other["rectangle"]):
            return False
        for key in ("log_prob", "log_probs", "attention"):
            if not np.allclose(single[key], other[key], atol=1e-3):
                return False
    return True


class Visitor:
    """Sends pictures over one connection, one after another, and keeps what came back."""

    def __init__(self, port, contents, expected, seed=0):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.contents, self.expected, self.draws = contents, expected, random.Random(seed)
        self.answered, self.wrong = 0, []

    def ask(self):
        path = self.draws.choice(list(self.contents))
        self.connection.request("POST", "/api/caption?candidates=2", self.contents[path])
        answer = self.connection.getresponse()
        content = answer.read()
        self.answered += 1
        if answer.status != 200 or not is_right(json.loads(content), self.expected[path]):
            self.wrong.append((path.name, answer.status, content[:300]))

    def ask_until(self, end):
        with closing(self.connection):
            while time.monotonic() < end:
                self.ask()


def measure(visitors, seconds):
    """Return answers a second."""
    started = time.monotonic()
    with ThreadPoolExecutor(len(visitors)) as threads:
        for done in [threads.submit(visitor.ask_until, started + seconds) for visitor in visitors]:
            done.result()
    answered = sum(visitor.answered for visitor in visitors)
    assert [wrong for visitor in visitors for wrong in visitor.wrong] == []
    return answered / (time.monotonic() - started)


class Watch:
    """Notes the memory of a process, in MB, until it is stopped."""

    def __init__(self, process):
        self.curve, self._process, self._stop = [], process, Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()

    def memory(self):
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) // 1024

    def _watch(self):
        while not self._stop.wait(SECONDS / 20):
            self.curve.append(self.memory())

    def stop(self):
        self._stop.set()
        self._thread.join()


def test_a_server_under_load_is_correct_fast_and_bounded(serve_process, photographs, expected, malformed_bodies):
    contents = {path: path.read_bytes() for path in photographs}
    client = serve_process()

    def visitors(count):
        return [Visitor(client.port, contents, expected, seed) for seed in range(count)]

    measure(visitors(1), 2)  # what is slow the first time
    single = [measure(visitors(1), SECONDS / 8)]
    watch = Watch(client.process)
    many = measure(visitors(CLIENTS), SECONDS)
    watch.stop()
    single.append(measure(visitors(1), SECONDS / 8))  # before and after: the machine may have other work
    print(f"\n1 client: {single[0]:.2f} and {single[1]:.2f} a second; {CLIENTS} clients: {many:.2f} a second")
    print(f"memory: {' '.join(map(str, watch.curve))} MB")

    before = watch.memory()
    statuses = [client.caption(body, Content_Type=type).status for body, type in malformed_bodies(MALFORMED)]
    after = watch.memory()
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    print(f"malformed bodies: {counts}, memory {before} to {after} MB")
    measure(visitors(1), 1)  # it still answers, and rightly

    with ThreadPoolExecutor(CLIENTS) as threads:
        last = visitors(CLIENTS)
        asked = [threads.submit(visitor.ask) for visitor in last]
        client.wait_for_queue(*range(CLIENTS // 2, CLIENTS + 1))
        assert client.stop(signal.SIGTERM) == (0, "")
        for item, visitor in zip(asked, last, strict=True):
            item.result()
            visitor.connection.close()
    assert [wrong for visitor in last for wrong in visitor.wrong] == []

    assert set(statuses) <= {200, 400, 413}
    assert after < before + 60
    assert max(watch.curve) < 1.2 * watch.curve[len(watch.curve) // 4] + 60
    assert many > 1.5 * sum(single) / 2
