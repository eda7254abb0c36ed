import asyncio
import gzip
import io
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from captioner import SearchSettings
from captioner.caption import Caption
from captioner.captioning import Captioner
from captioner.cli import EXAMPLE
from captioner.errors import CaptionerError

pytest.importorskip("fastapi", reason="needs the extra web")

from captioner.web import server, uploads
from captioner.web.batching import Batcher
from captioner.web.uploads import RefusedError, find_picture

BOUNDARY = "----a boundary"
FORM = f'multipart/form-data; boundary="{BOUNDARY}"'


def form(picture, field="picture", more=b"", end=True):
    heading = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="søster.jpg"\r\n'
    close = f"\r\n--{BOUNDARY}--\r\n".encode() if end else b""
    return more + heading.encode() + b"Content-Type: image/jpeg\r\n\r\n" + picture + close


def field(name, value):
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"


def draw(size=(90, 70), seed=0, kind="PNG", **options):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def record(captioner, picture, candidates=1, alternatives=3):
    """The record of a picture on the command line."""
    caption = captioner.caption(picture, SearchSettings(candidates=candidates, alternatives=alternatives))
    return json.loads(json.dumps(caption.to_dict(attention=True)))


def same(left, other):
    """Return whether two records are equal, except for rounding in batches."""
    if isinstance(left, dict):
        return (
            isinstance(other, dict)
            and left.keys() == other.keys()
            and all(same(left[key], other[key]) for key in left)
        )
    if isinstance(left, list):
        return len(left) == len(other) and all(map(same, left, other))
    return left == pytest.approx(other, abs=1e-4) if isinstance(left, float) else left == other


class Quick(Captioner):
    """Says the same of every picture."""

    def caption_prepared(self, pictures, settings):
        attention = np.full((2, 1, 1), 1, np.float32)
        return [
            Caption("a dog", ("a", "dog"), (-1.0, -1.0), -3.0, -1.0, attention, picture.rectangle)
            for picture in pictures
        ]


class Held(Captioner):
    """A captioner that waits at the network until it may go on, and remembers its batches."""

    def __init__(self, captioner):
        super().__init__(captioner.engine, captioner.header)
        self.may_go = threading.Event()
        self.batches = []

    def caption_prepared(self, pictures, settings):
        self.batches.append(len(pictures))
        assert self.may_go.wait(20)
        return super().caption_prepared(pictures, settings)


@pytest.fixture(scope="module")
def quick(tiny, serve_long):
    """A server that is quick as the network is left out."""
    hosts = ("127.0.0.1", "here", "[::1]")
    return serve_long(Quick(tiny.engine, tiny.header), max_bytes=1 << 20, hosts=hosts)


@pytest.fixture
def held(tiny):
    captioner = Held(tiny)
    yield captioner
    captioner.may_go.set()


# The contract


@pytest.mark.parametrize("as_form", [False, True], ids=["raw", "form"])
def test_the_response_equals_the_command_line(client, tiny, pictures, as_form):
    for path in pictures[:4]:
        picture = path.read_bytes()
        headers = {"Content-Type": FORM} if as_form else {"Content-Type": "image/png"}
        answer = client.caption(form(picture) if as_form else picture, "?candidates=3&alternatives=2", **headers)
        assert answer.status == 200
        reply = json.loads(answer.content)
        with Image.open(path) as opened:
            assert (reply.pop("width"), reply.pop("height")) == opened.size
        assert same(reply, record(tiny, path, 3, 2))


def test_a_body_of_any_type_or_none_is_the_picture(client):
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "what/ever"}):
        assert client.caption(draw(), **headers).status == 200


def test_width_and_height_are_those_of_the_upright_picture(client):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    reply = json.loads(client.caption(draw((640, 300), kind="JPEG", exif=exif)).content)
    assert (reply["width"], reply["height"]) == (300, 640)


def test_the_default_is_one_caption_with_three_alternatives(client, tiny):
    reply = json.loads(client.caption(draw()).content)
    assert same({key: reply[key] for key in reply.keys() - {"width", "height"}}, record(tiny, draw()))
    assert "candidates" not in reply
    assert {len(others) for others in reply["alternatives"]} == {3}


@pytest.mark.parametrize(
    "query", ["candidates=0", "candidates=6", "alternatives=-1", "alternatives=11", "candidates=x", "candidate=3"]
)
def test_a_parameter_that_is_unknown_or_out_of_its_range_is_refused_in_one_line(client, query):
    answer = client.caption(draw(), f"?{query}")
    assert answer.status == 422
    assert json.loads(answer.content)["detail"].startswith(query.partition("=")[0] + ": ")


def test_an_unknown_parameter_is_reported(client):
    answer = client.caption(draw(), "?candidates=2&beam_size=3&x=1")
    expected = "beam_size: unknown parameter; x: unknown parameter"
    assert json.loads(answer.content) == {"detail": expected}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/health", "/api/limits"])
def test_a_path_without_parameters_refuses_them_too(client, method, path):
    answer = client.ask(method, f"{path}?model=other&verbose=")
    assert answer.status == 422
    if method == "GET":
        expected = "model: unknown parameter; verbose: unknown parameter"
        assert json.loads(answer.content) == {"detail": expected}


@pytest.mark.parametrize("path", ["/?from=mail", "/static/page.css?version=2", "/docs?x"])
def test_web_pages_ignore_query_parameters(client, path):
    assert client.ask("GET", path).status == 200


def test_the_example_is_the_photograph_of_the_package(client):
    answer = client.ask("GET", "/example.jpg")
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert answer.content == EXAMPLE.read_bytes()


def test_the_fields_of_a_reply_are_those_that_are_documented(client):
    description = json.loads(client.ask("GET", "/openapi.json").content)
    schemas = description["components"]["schemas"]
    reply = json.loads(client.caption(draw(), "?candidates=2").content)
    assert set(schemas["Reply"]["required"]) <= reply.keys() <= schemas["Reply"]["properties"].keys()
    for candidate in reply["candidates"]:
        assert candidate.keys() <= schemas["CaptionRecord"]["properties"].keys()
    server.Reply.model_validate_json(json.dumps(reply), strict=False)
    operation = description["paths"]["/api/caption"]["post"]
    assert {"200", "400", "408", "413", "415", "422", "500", "503"} == operation["responses"].keys()
    assert [item["name"] for item in operation["parameters"]] == ["candidates", "alternatives"]
    assert "multipart/form-data" in operation["requestBody"]["content"]
    assert "image/*" in operation["requestBody"]["content"]


def test_health_and_limits_describe_the_server(client):
    assert client.health() == {"status": "ok", "version": server.__version__, "model": "tiny", "queue": 0}
    assert json.loads(client.ask("GET", "/api/limits").content) == {"bytes": 1 << 20, "candidates": 5}


@pytest.mark.parametrize(
    "path", ["/", "/health", "/docs", "/api/limits", "/openapi.json", "/static/page.css", "/example.jpg"]
)
def test_head_gives_the_headers_of_get(client, path):
    got, headers = client.ask("GET", path), client.ask("HEAD", path)
    assert (headers.status, headers.content) == (200, b"")
    for name in ("Content-Length", "Content-Type", "Content-Security-Policy"):
        assert headers.headers[name] == got.headers[name]


def test_the_search_settings_of_the_model_are_the_default(serve, tiny):
    captioner = Captioner(tiny.engine, replace(tiny.header, search=SearchSettings(beam_size=1, max_words=2)))
    reply = json.loads(serve(captioner).caption(draw()).content)
    assert len(reply["words"]) <= 2
    assert reply["caption"] == captioner.caption(draw()).text


def test_the_application_can_be_mounted(serve, tiny, browser):
    from fastapi import FastAPI

    def mount(app):
        outer = FastAPI()
        outer.mount("/captions", app)
        return outer

    client = serve(tiny, mount)
    answer = client.ask("POST", "/captions/api/caption", draw())
    assert (answer.status, json.loads(answer.content)["caption"]) == (200, tiny.caption(draw()).text)
    tab = browser.new_page()
    tab.goto(f"http://127.0.0.1:{client.port}/captions")
    tab.set_input_files("#choose", {"name": "a.png", "mimeType": "image/png", "buffer": draw()})
    tab.locator("[data-state=captioned]").wait_for()
    tab.close()
    assert client.ask("GET", "/captions/docs").status == 200


def test_a_narrow_beam_allows_fewer_candidates(serve, tiny):
    client = serve(tiny, search=SearchSettings(beam_size=2))
    assert json.loads(client.ask("GET", "/api/limits").content)["candidates"] == 2
    assert client.caption(draw(), "?candidates=2").status == 200
    assert client.caption(draw(), "?candidates=3").status == 422


def test_the_reference_is_self_contained(quick):
    answer = quick.ask("GET", "/docs")
    page = answer.content.decode()
    assert answer.status == 200
    assert "POST /api/caption" in page
    assert "<script" not in page
    for address in re.findall(r'(?:href|src)="([^"#]+)"', page):
        assert not address.startswith(("http", "/"))
        assert quick.ask("GET", f"/{address.removeprefix('.')}").status == 200
    for name in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{name}"' in page


def test_the_reference_opens_in_a_browser_without_complaint(quick, browser):
    complaints = []
    tab = browser.new_page(viewport={"width": 400, "height": 800})
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(f"http://127.0.0.1:{quick.port}/docs")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") == "768px"
    tab.close()
    assert complaints == []


# Batches


def test_concurrent_pictures_are_batched(serve, held):
    client = serve(held, batch_size=4)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(client.caption, draw())
        client.wait_until(lambda: held.batches)
        rest = [threads.submit(client.caption, draw(seed=seed)) for seed in range(8)]
        client.wait_for_queue(9)
        held.may_go.set()
        assert {answer.result().status for answer in (first, *rest)} == {200}
    assert held.batches[0] == 1
    assert held.batches[1] == 4
    assert sum(held.batches) == 9


def test_a_batch_equals_its_pictures_one_by_one(serve, tiny, pictures):
    client = serve(tiny, batch_size=32, batch_wait=0.3)
    asked = [(path, 1 + number % 3, number % 4) for number, path in enumerate(pictures)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = threads.map(
            lambda left: client.caption(left[0].read_bytes(), f"?candidates={left[1]}&alternatives={left[2]}"),
            asked,
        )
    for (path, candidates, alternatives), answer in zip(asked, answers, strict=True):
        reply = json.loads(answer.content)
        del reply["width"], reply["height"]
        assert same(reply, record(tiny, path, candidates, alternatives))


def test_a_single_picture_waits_only_briefly(serve, held):
    held.may_go.set()
    client = serve(held, batch_wait=0.01)
    assert client.caption(draw()).status == 200
    assert held.batches == [1]


def test_a_full_queue_is_reported_at_once_and_recovers(serve, held):
    client = serve(held, queue=2)
    with ThreadPoolExecutor(2) as threads:
        accepted = [threads.submit(client.caption, draw(seed=seed)) for seed in range(2)]
        client.wait_for_queue(2)
        refused = client.caption(draw())
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert "Try again" in json.loads(refused.content)["detail"]
        held.may_go.set()
        assert {answer.result().status for answer in accepted} == {200}
    assert client.caption(draw()).status == 200
    assert client.health()["queue"] == 0


def test_a_disconnected_client_is_not_captioned(serve, held):
    client = serve(held)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.caption, draw())
        client.wait_until(lambda: held.batches)
        body = draw(seed=1)
        leaver = client.send(
            b"POST /api/caption HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        client.wait_for_queue(2)
        leaver.close()
        client.wait_for_queue(1)
        held.may_go.set()
        assert first.result().status == 200
    assert client.caption(draw()).status == 200
    assert held.batches == [1, 1]


def test_an_error_of_the_network_fails_its_pictures_and_no_others(serve, tiny, caplog):
    class Failing(Captioner):
        def caption_prepared(self, pictures, settings):
            if settings.alternatives == 7:
                raise RuntimeError("secret")
            return super().caption_prepared(pictures, settings)

    client = serve(Failing(tiny.engine, tiny.header))
    answer = client.caption(draw(), "?alternatives=7")
    assert answer.status == 500
    assert "secret" not in answer.content.decode()
    assert "detail" in json.loads(answer.content)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "secret" in caplog.text
    assert client.caption(draw()).status == 200


def test_a_stopping_server_finishes_accepted_requests(serve, held):
    client = serve(held, batch_size=2)
    with ThreadPoolExecutor(7) as threads:
        answers = [threads.submit(client.caption, draw(seed=seed)) for seed in range(7)]
        client.wait_for_queue(7)
        client.server.should_exit = True
        while True:  # until the queue is full
            try:
                client.health()
            except ConnectionError:
                break
        held.may_go.set()
        assert {answer.result().status for answer in answers} == {200}
    client.thread.join(20)
    assert not client.thread.is_alive()


def test_a_closed_batcher_ends_its_threads_and_can_be_used_again(tiny):
    before = set(threading.enumerate())
    batcher = Batcher(tiny, batch_size=4, wait=0, most_waiting=4)
    assert set(threading.enumerate()) == before

    async def caption():
        gone = asyncio.get_running_loop().create_future()
        return (await batcher.caption(lambda: tiny.prepare(draw()), SearchSettings(), gone))[1].text

    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:  # in the test's own there may be another loop, of a browser
            assert thread.submit(lambda: asyncio.run(caption())).result() == tiny.caption(draw()).text
        assert len(set(threading.enumerate()) - before) == 2
        batcher.close()
        assert set(threading.enumerate()) == before


# Limits


def test_too_many_bytes_are_refused_before_they_are_sent(quick):
    asking = quick.send(
        b"POST /api/caption HTTP/1.1\r\nHost: here\r\nContent-Length: 9999999\r\nExpect: 100-continue\r\n\r\n"
    )
    assert asking.recv(100).startswith(b"HTTP/1.1 413")
    asking.close()


@pytest.mark.parametrize("type", ["image/jpeg", FORM])
def test_too_many_bytes_are_refused_without_a_length_too(quick, type):
    chunks = (bytes(100_000) for _ in range(30))  # sent in chunks, without a length
    answer = quick.caption(chunks, Content_Type=type)
    assert answer.status == 413
    assert "1,048,576 bytes" in json.loads(answer.content)["detail"]


def test_a_refused_upload_is_drained_briefly(quick, monkeypatch):
    monkeypatch.setattr(uploads, "DRAINING", 0.2)
    asking = quick.send(b"POST /api/caption HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with pytest.raises(OSError, match=r"reset|pipe"):
        asking.sendall(10_000 * chunk)
    asking.close()


def test_all_uploads_together_are_bounded(serve, held):
    client = serve(held, max_bytes=100_000)  # 16 of these in all
    waiting = []
    for _ in range(17):
        waiting.append(client.send(b"POST /api/caption HTTP/1.1\r\nHost: a\r\nContent-Length: 99000\r\n\r\n"))
        waiting[-1].sendall(bytes(98_000))
    assert client.caption(bytes(99_000)).status == 503
    for connection in waiting:
        connection.close()
    wait_for_room(client)


def wait_for_room(client):
    for _ in range(200):
        if client.caption(bytes(99_000)).status == 400:
            return
    raise AssertionError("the uploads of clients that went away still count")


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate, gzip"])
def test_compressed_uploads_are_refused_with_advice(quick, encoding):
    answer = quick.caption(gzip.compress(draw()), Content_Encoding=encoding)
    assert answer.status == 415
    assert answer.headers["Accept-Encoding"] == "identity"
    expected = f"Content-Encoding {encoding.lower()!r} is not supported. Send the picture without it."
    assert json.loads(answer.content) == {"detail": expected}
    assert quick.caption(draw(), Content_Encoding="identity").status == 200


def test_a_slow_upload_times_out(serve, tiny):
    client = serve(tiny, upload_seconds=0.2)
    asking = client.send(b"POST /api/caption HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
    with asking, asking.makefile("rb") as stream:
        answer = stream.read()  # to the end: the server closes the connection
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"took longer than 0.2 seconds" in answer


def test_a_wrong_content_length_affects_no_other_client(quick):
    body = draw()
    short = quick.send(b"POST /api/caption HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\n" + body)
    assert short.recv(10_000).startswith(b"HTTP/1.1 400")
    short.close()
    long = quick.send(b"POST /api/caption HTTP/1.1\r\nHost: here\r\nContent-Length: 999999\r\n\r\n" + body)
    long.close()
    assert quick.caption(body).status == 200


def test_too_many_pixels_are_refused_before_they_are_decoded(serve, tiny):
    client = serve(tiny, max_pixels=10_000)
    answer = client.caption(draw((101, 100)))
    assert answer.status == 413
    assert json.loads(answer.content)["detail"].startswith("the picture: 101 x 100 pixels are too many")
    assert client.caption(draw((100, 100))).status == 200


def test_nothing_is_written_to_disk(quick):
    written = []
    watching = True

    def watch(event, arguments):
        if watching and event in ("open", "os.mkdir", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp"):
            path, mode, flags = (*arguments, None, None)[:3]
            if event != "open" or set(mode or "") & set("wax+") or (flags or 0) & 0b11:
                written.append((event, path))

    sys.addaudithook(watch)  # stays until the end of the process, but sleeps
    try:
        picture = draw((560, 560))
        assert 900_000 < len(picture) < 1 << 20
        assert quick.caption(picture).status == 200
        assert quick.caption(form(picture), Content_Type=FORM).status == 200
        assert quick.caption(form(bytes(900_000)), Content_Type=FORM).status == 400
    finally:
        watching = False
    assert written == []


def test_paths_and_urls_of_clients_are_never_opened(quick, tmp_path):
    path = tmp_path / "dog.png"
    path.write_bytes(draw())
    for name in (str(path), path.as_uri(), "-", "http://127.0.0.1:1/"):
        assert quick.caption(name.encode()).status == 400
        assert quick.caption(form(name.encode()), Content_Type=FORM).status == 400
    for address in (
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
    ):
        assert quick.ask("GET", address).status == 404


# Headers


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/health", None, {}, 200),
        ("GET", "/docs", None, {}, 200),
        ("GET", "/static/reference.css", None, {}, 200),
        ("GET", "/nothing", None, {}, 404),
        ("GET", "/static/nothing", None, {}, 404),
        ("GET", "/api/caption", None, {}, 405),
        ("POST", "/api/caption", draw(), {}, 200),
        ("POST", "/api/caption", b"", {}, 400),
        ("POST", "/api/caption", b"", {"Content-Type": "multipart/form-data"}, 400),
        ("POST", "/api/caption", bytes(2 << 20), {}, 413),
        ("POST", "/api/caption?candidates=99", draw(), {}, 422),
        ("GET", "/health", None, {"Host": "elsewhere.example"}, 400),
    ],
)
def test_every_response_has_the_security_headers(quick, method, path, body, headers, status):
    answer = quick.ask(method, path, body, **headers)
    assert answer.status == status
    for name, value in server.HEADERS.items():
        assert answer.headers.get_all(name) == [value]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert "Server" not in answer.headers or "uvicorn" in answer.headers["Server"]
    if status >= 400:
        detail = json.loads(answer.content)["detail"]
        assert "\n" not in detail


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("here", 200),
        ("HERE:8000", 200),
        ("[::1]:80", 200),
        ("evil.example", 400),
        ("here.evil.example", 400),
        ("", 400),
    ],
)
def test_a_local_server_accepts_local_host_names_only(quick, host, status):
    assert quick.ask("GET", "/health", Host=host).status == status


# Malformed bodies


def test_malformed_bodies_are_client_errors(quick, malformed_bodies):
    statuses = [quick.caption(body, Content_Type=type).status for body, type in malformed_bodies(400)]
    assert set(statuses) <= {200, 400, 413}
    assert statuses.count(400) > 100
    assert quick.caption(draw()).status == 200
    assert quick.health()["queue"] == 0


def test_the_picture_of_a_form_is_found():
    picture = bytes(range(256)) + b"\r\n--not the boundary\r\n\r\n--"
    many = b"".join(field(f"field {number}", b"value") for number in range(uploads.MOST_FIELDS - 1))
    for body in (
        form(picture),
        b"preamble\r\n" + form(picture),
        form(picture) + b"epilogue",
        form(picture, more=many),
    ):
        assert find_picture(body, FORM) == picture
    assert find_picture(form(b"").replace(b"\r\n\r\n", b"\r\n\r\n", 1), FORM) == b""
    assert find_picture(
        form(b"x").replace(b"picture", b"picture", 1), FORM.upper().replace(BOUNDARY.upper(), BOUNDARY)
    )


@pytest.mark.parametrize(
    ("body", "type"),
    [
        (b"", FORM),
        (form(b"x"), "multipart/form-data"),
        (form(b"x"), 'multipart/form-data; boundary=""'),
        (form(b"x"), "multipart/form-data; boundary=ö"),
        (form(b"x"), "multipart/form-data; boundary=other"),
        (form(b"x", end=False), FORM),
        (form(b"x", field="file"), FORM),
        (form(b"x", more=b"".join(field("a", b"b") for _ in range(99))), FORM),
        (form(b"x", field="picture" + "x" * 10_000), FORM),
        (f"--{BOUNDARY}--\r\n".encode() + form(b"x"), FORM),
        (f"--{BOUNDARY}\r\nno heading".encode(), FORM),
        (f"--{BOUNDARY}\r\n\xff\x00: \xff\r\n\r\nx\r\n--{BOUNDARY}--".encode("latin-1"), FORM),
        (b"\r\n--" * 1000, FORM),
    ],
)
def test_a_form_without_picture_is_reported(body, type):
    with pytest.raises(RefusedError, match=r"^the form"):
        find_picture(body, type)


def test_internal_errors_are_not_client_errors(serve, tiny, caplog):
    class Refusing(Captioner):
        def caption_prepared(self, pictures, settings):
            raise CaptionerError("ban: all words are banned")

    client = serve(Refusing(tiny.engine, replace(tiny.header)))
    assert client.caption(draw()).status == 500
