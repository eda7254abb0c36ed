import itertools
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from captioner import ImageError
from captioner.fetch import REDIRECTS, fetch

PICTURE = b"\xff\xd8\xff and so on" * 10_000


def redirect(target):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def answer_with(*headers, body=(), pause=0.0):
    """Send raw lines, then pieces of a body as long as somebody reads them."""

    def answer(handler):
        for piece in itertools.chain([header + b"\r\n" for header in (*headers, b"")], body):
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)

    return answer


OK = b"HTTP/1.1 200 OK"


def failure(website, page, **options):
    website.pages["/dog.jpg"] = page
    with pytest.raises(ImageError) as caught:
        fetch(f"{website.url}/dog.jpg", **options)
    message = str(caught.value)
    assert message.startswith(f"{website.url}/dog.jpg: ")
    assert "\n" not in message
    return message.removeprefix(f"{website.url}/dog.jpg: ")


def test_a_picture_is_downloaded_unchanged(website):
    website.pages["/dog.jpg"] = PICTURE
    assert fetch(f"{website.url}/dog.jpg") == PICTURE


@pytest.mark.parametrize(
    "headers", [[OK, b"Connection: close"], [OK, b"Transfer-Encoding: chunked"], [b"HTTP/1.0 200 OK"]]
)
def test_a_picture_of_unknown_length_is_downloaded_unchanged(website, headers):
    pieces = [b"half", b"other half"]
    if b"Transfer-Encoding: chunked" in headers:
        pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
    website.pages["/dog.jpg"] = answer_with(*headers, body=pieces)
    assert fetch(f"{website.url}/dog.jpg") == b"halfother half"


def test_a_url_may_contain_spaces_and_unicode(website):
    website.pages["/H%C3%BCndchen%201.jpg?w=%20"] = PICTURE
    assert fetch(f"{website.url}/Hündchen 1.jpg?w=%20#part") == PICTURE


def test_redirects_are_followed(website):
    for number in range(REDIRECTS):
        website.pages[f"/{number}"] = redirect(f"{website.url}/{number + 1}" if number % 2 else f"{number + 1}")
    website.pages[f"/{REDIRECTS}"] = PICTURE
    assert fetch(f"{website.url}/0") == PICTURE


def test_a_redirect_may_contain_unicode(website):
    website.pages["/dog.jpg"] = answer_with(b"HTTP/1.1 302 Found", "Location: /Hündchen.jpg".encode())
    website.pages["/H%C3%BCndchen.jpg"] = PICTURE
    assert fetch(f"{website.url}/dog.jpg") == PICTURE


def test_cyclic_redirects_end(website):
    assert failure(website, redirect("/dog.jpg")) == "more than 5 redirects."
    assert len(website.asked) == REDIRECTS + 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/dog.jpg", "data:image/png,x"])
def test_redirects_to_other_schemes_are_refused(website, target):
    assert failure(website, redirect(target)) == f"redirect to {target}. Only http and https are supported."


def test_the_body_of_a_redirect_is_not_read(website):
    website.pages["/picture"] = PICTURE
    website.pages["/dog.jpg"] = answer_with(
        b"HTTP/1.1 302 Found", b"Location: /picture", body=itertools.repeat(b"x" * 65536)
    )
    assert fetch(f"{website.url}/dog.jpg") == PICTURE


@pytest.mark.parametrize(
    "page",
    [
        answer_with(OK, b"Content-Length: 1000", body=[b"x"] * 1000, pause=0.02),
        answer_with(OK, b"Transfer-Encoding: chunked", body=[b"1"] * 1000, pause=0.02),
        answer_with(OK, *[b"X-Drop: 1"] * 50, pause=0.02),
        answer_with(*[b"HTTP/1.1 100 Continue\r\n"] * 1000, pause=0.02),
        lambda handler: time.sleep(0.6),
    ],
    ids=["body", "chunk", "headers", "continue", "silence"],
)
def test_a_slow_server_times_out(website, page):
    started = time.monotonic()
    assert failure(website, page, seconds=0.3).startswith("download failed (timeout after 0.3 s)")
    assert 0.3 <= time.monotonic() - started < 2


@pytest.mark.parametrize("headers", [[OK, b"Content-Length: 3000000"], [OK, b"Connection: close"]])
def test_a_large_file_is_not_read_completely(website, headers):
    sent = 0

    def body():
        nonlocal sent
        for _ in range(3000):
            yield b"x" * 1000
            sent += 1000

    message = failure(website, answer_with(*headers, body=body()), max_bytes=1 << 16)
    assert message == "larger than 0.0625 MB. Use a smaller version."
    assert sent < 3_000_000


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (None, "the server responded 404 Not Found."),
        (answer_with(b"HTTP/1.1 503 \x1b[31mLook"), "the server responded 503 Service Unavailable."),
        (answer_with(b"HTTP/1.1 999 What"), "the server responded 999 unknown status."),
        (answer_with(OK, b"Content-Length: 900", body=[b"x" * 200]), "connection closed after 200 of 900 bytes."),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><title>A dog</title>", "this is an HTML page, not an image."),
        (answer_with(b"\x1b[31mno HTTP at all"), r"download failed (\x1b[31mno HTTP at all"),
        (answer_with(b"x" * 5000), "download failed (xxxx"),
        (lambda handler: None, "download failed (Remote end closed connection without response)"),
    ],
)
def test_an_invalid_response_is_reported_in_one_line(website, page, message):
    found = failure(website, page)
    assert found.startswith(message)
    assert len(found) < 300


@pytest.mark.parametrize(
    "address", ["http://", "http:///dog.jpg", "http://[dog.jpg", "http://127.0.0.1:dog/", "http://a\x00b/dog.jpg"]
)
def test_an_invalid_url_is_reported_in_one_line(address):
    with pytest.raises(ImageError, match="download failed"):
        fetch(address)


def test_an_unreachable_server_is_reported_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/dog.jpg"
        with pytest.raises(ImageError, match="Connection refused"):
            fetch(address)


def test_the_proxy_of_the_environment_is_used(website, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", website.url)
    website.pages["http://xn--mnchen-3ya.invalid/dog.jpg"] = PICTURE
    assert fetch("http://münchen.invalid/dog.jpg") == PICTURE


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_an_untrusted_certificate_is_refused(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def shake_hands():
            connection, _ = listening.accept()
            with connection, pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

        server = threading.Thread(target=shake_hands)
        server.start()
        with pytest.raises(ImageError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(f"https://localhost:{listening.getsockname()[1]}/dog.jpg")
        server.join()
