import http.client
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra web")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra web")


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

    def wait_for_queue(self, length):
        wait_until(lambda: self.health()["queue"] == length)

    def send(self, text):
        """Send bytes as they are, and return the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(text)
        return connection


def wait_until(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


@contextmanager
def running(captioner, settings):
    from captioner.web.server import WebSettings, create_app

    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        client = Client(listener.getsockname()[1])
        app = create_app(captioner, WebSettings(**settings))
        server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        wait_until(lambda: server.started)
        client.server, client.thread = server, thread
        yield client
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve():
    """Start the real server on a free port, and return a client of it."""
    with ExitStack() as stack:
        yield lambda captioner, **settings: stack.enter_context(running(captioner, settings))


@pytest.fixture(scope="module")
def client(tiny):
    with running(tiny, {"max_bytes": 1 << 20, "upload_seconds": 20.0, "hosts": ("127.0.0.1", "here", "[::1]")}) as one:
        yield one
