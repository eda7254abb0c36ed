"""Input from and output to an S3 server on the loopback, through a proxy that slows, refuses and breaks answers."""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from tests.captioner.bulk.conftest import draw, write_shard

pytest.importorskip("s3fs", reason="needs the file system of S3: pip install s3fs")
pytest.importorskip("ray", reason='needs the extra: pip install -e ".[bulk]"')
moto = pytest.importorskip("moto.server", reason='needs a server of S3: pip install "moto[server]"')

from captioner.bulk import storage  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def faults():
    """What the proxy does, by the number of times that it did it."""
    return Counter()


@pytest.fixture
def bucket(serve_http, faults, monkeypatch):
    """The name of a bucket behind the proxy."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    chance, lock = random.Random(0), threading.Lock()
    faults.rate, faults.kinds = 0.0, ["slow", "refused", "lost", "reset"]

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                fault = chance.choice(faults.kinds) if chance.random() < faults.rate else ""
                faults[fault] += 1
            if fault == "slow":
                time.sleep(0.5)
            elif fault == "refused":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            elif fault == "lost":  # the server never sees it
                self.drop()
                return
            connection = http.client.HTTPConnection(host, port)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if fault == "reset":  # the server has done it, and half the answer is lost
                self.wfile.write(content[: len(content) // 2])
                self.drop()
                return
            self.wfile.write(content)

        def drop(self):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            self.close_connection = True
            self.rfile = self.wfile = None

        def finish(self):
            if self.wfile is not None:
                super().finish()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

    url = serve_http(Proxy)
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # the server's state is the process's
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_loses_nothing_when_its_storage_fails_now_and_then(bucket, faults, bulk, tiny, tmp_path):
    system, _ = storage.locate(bucket)
    for number in range(2):
        path = tmp_path / f"{number}.tar"
        write_shard(path, [(f"{number}{index:03d}.png", draw(100 * number + index)) for index in range(40)])
        system.put_file(str(path), f"bucket/in/shards/{path.name}")
    table = arrow.table({"image": [draw(200 + number) for number in range(40)]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    system.put_file(str(tmp_path / "t.parquet"), "bucket/in/t.parquet")
    for number in range(40):
        system.pipe_file(f"bucket/in/photos/{number:03d}.png", draw(300 + number))
    system.pipe_file("bucket/in/photos/empty.png", b"")
    names = [f"{bucket}/in/{name}" for name in ("shards/*.tar", "t.parquet", "photos", "missing.png")]
    command = (*names, "-o", f"{bucket}/out", "-f", "jsonl", "--unit-size", 20, "--batch-size", 8)

    faults.rate = 0.3
    code, said = bulk(*command)
    assert (code, "162 rows in " in said) == (1, True), said  # the last two are bad
    assert bulk(*command) == (0, "caption-bulk: 7 of 7 units are done already\n")
    print(dict(faults), said)
    faults.rate = 0.0
    assert min(faults[fault] for fault in faults.kinds) >= 3

    parts = [f"part-{number:08d}.jsonl" for number in range(7)]
    assert sorted(storage.list_names(f"{bucket}/out")) == ["_captioner", *parts]
    found = [json.loads(line) for part in parts for line in system.cat_file(f"bucket/out/{part}").splitlines()]
    expected = tiny.caption([draw(number) for start in (0, 100, 200, 300) for number in range(start, start + 40)])
    assert [row["caption"] for row in found[:160]] == [caption.text for caption in expected]
    assert [row["key"] for row in found[160:]] == [f"{bucket}/in/photos/empty.png", f"{bucket}/in/missing.png"]
    assert ["error" in row for row in found[160:]] == [True, True]


def test_a_storage_that_is_gone_is_an_error_of_one_line(bucket, faults, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 2)
    faults.rate, faults.kinds = 1.0, ["refused"]
    with pytest.raises(storage.StorageError, match="the storage failed 2 times") as caught:
        storage.read(f"{bucket}/x", 100)
    assert "\n" not in str(caught.value)
