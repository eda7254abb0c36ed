import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from captioner.errors import CaptionerError
from captioner.web.site import open_runtime


class Client:
    """Asks a server on this machine."""

    def __init__(self, port):
        self.port = port

    def ask(self, method, path, body=None, **headers):
        """Return status, headers and content of the answer, each on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return SimpleNamespace(status=answer.status, headers=answer.headers, content=answer.read())
        finally:
            connection.close()

    def caption(self, picture, query="", **headers):
        return self.ask("POST", f"/api/caption{query}", picture, **headers)

    def health(self):
        return json.loads(self.ask("GET", "/health").content)

    @staticmethod
    def wait_until(is_so):
        end = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < end, "it never came to be"
            time.sleep(0.01)

    def wait_for_queue(self, *lengths):
        self.wait_until(lambda: self.health()["queue"] in lengths)

    def send(self, text):
        """Send bytes as they are, and return the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(text)
        return connection


class Process(Client):
    """Runs `caption-web` on a free port, and asks it."""

    def __init__(self, *options, without=()):
        """Start it. Modules that are named in `without` cannot be imported, as if they were not installed."""
        code = f"import sys, runpy; sys.modules |= dict.fromkeys({without!r}); runpy.run_module('captioner.web')"
        start = ["-c", code] if without else ["-m", "captioner.web"]
        command = [sys.executable, *start, "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        output = self.process.stderr.readline()
        address = re.fullmatch(r"caption-web: open http://127\.0\.0\.1:(\d+) .*\n", output)
        if not address:
            output += self.process.stderr.read()
            self.close()
            raise AssertionError(output)
        super().__init__(int(address[1]))

    def stop(self, number):
        """Send a signal, and return the exit code and the remaining output."""
        self.process.send_signal(number)
        output = self.process.stderr.read()
        return self.process.wait(60), output

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


@pytest.fixture
def serve_process():
    """Start `caption-web` with options, and return a client of it."""
    with ExitStack() as stack:
        yield lambda *options, **more: stack.enter_context(closing(Process(*options, **more)))


@contextmanager
def running(captioner, settings, wrap=lambda app: app):
    import uvicorn

    from captioner.web.server import WebSettings, create_app

    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        client = Client(listener.getsockname()[1])
        app = wrap(create_app(captioner, WebSettings(**settings)))
        server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        client.wait_until(lambda: server.started)
        client.server, client.thread = server, thread
        yield client
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve():
    """Start a server on a free port, and return a client of it. `wrap` puts the application into another one."""
    with ExitStack() as stack:
        yield lambda captioner, wrap=lambda app: app, **settings: stack.enter_context(
            running(captioner, settings, wrap)
        )


@pytest.fixture(scope="module")
def serve_long():
    """The same, for several tests."""
    with ExitStack() as stack:
        yield lambda captioner, **settings: stack.enter_context(running(captioner, settings))


@pytest.fixture(scope="module")
def client(tiny, serve_long):
    return serve_long(tiny, max_bytes=1 << 20)


@pytest.fixture(scope="session")
def onnxruntime_web(tmp_path_factory):
    """The folder of the npm package onnxruntime-web: that of a variable, or what npm fetches."""
    named = os.environ.get("ONNXRUNTIME_WEB")
    if named:
        return Path(named)
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    try:
        with open_runtime(None) as files:
            shutil.copytree(files, folder / "dist")
    except CaptionerError as error:
        pytest.skip(f"needs onnxruntime-web: set ONNXRUNTIME_WEB to the folder of that npm package ({error})")
    return folder


@pytest.fixture(scope="session")
def malformed_bodies():
    """Give bodies with their types: pictures and forms with bytes changed, cut out, doubled and cut off."""
    picture = Image.effect_noise((60, 50), 90).convert("RGB")
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    whole = []
    for kind in kinds:
        file = io.BytesIO()
        picture.save(file, kind, **({"progressive": True} if kind == "JPEG" else {}))
        whole.append(file.getvalue())
    heading = b'--edge\r\nContent-Disposition: form-data; name="picture"; filename="a.jpg"\r\n\r\n'

    def malformed_bodies(count):
        draws = random.Random(0)
        for number in range(count):
            is_form = number % 2 == 1
            body = draws.choice(whole)
            body = bytearray(heading + body + b"\r\n--edge--\r\n" if is_form else body)
            for _ in range(draws.randint(1, 6)):
                index = draws.randrange(min(len(body), draws.choice((40, 400, len(body)))))
                match draws.randrange(4):
                    case 0:
                        body[index] = draws.randrange(256)
                    case 1:
                        del body[index + 1 : index + draws.randint(2, 50)]
                    case 2:
                        body[index:index] = body[index : index + draws.randint(1, 500)]
                    case 3 if draws.random() < 0.3:
                        del body[index + 1 :]
            yield bytes(body), "multipart/form-data; boundary=edge" if is_form else "image/jpeg"

    return malformed_bodies
