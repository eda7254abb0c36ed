"""Download pictures from the web, bounded in bytes, time and redirects. Only the commands open URLs."""

import http.client
import string
import time
import urllib.request
from concurrent.futures import Future
from threading import Thread
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from captioner.errors import ImageError
from captioner.version import __version__

MAX_BYTES = 64 << 20
"""Maximum size of a picture."""

SECONDS = 60.0
"""Maximum time for a picture, redirects included."""

READ_SECONDS = 10.0
"""Maximum time to connect, and between two packets."""

REDIRECTS = 5
"""Maximum number of redirects."""

_HEADERS = {
    "User-Agent": f"captioner/{__version__}",
    "Accept": "image/jpeg, image/png, image/webp, image/*;q=0.5, */*;q=0.1",  # or some servers send AVIF
}


def fetch(url: str, seconds: float = SECONDS, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of the picture at an http or https URL.

    Certificates are verified, and the proxies of the environment are used (`https_proxy`, `no_proxy`).

    Raises:
        ImageError: if the picture cannot be downloaded within the bounds, or is an HTML page.
    """
    result: Future[bytes] = Future()

    def download() -> None:
        try:
            result.set_result(_download(url, time.monotonic() + seconds, max_bytes))
        except Exception as error:
            result.set_exception(error)

    # A thread, because timeouts of sockets bound neither name resolution nor headers that arrive byte by byte.
    Thread(target=download, name="download", daemon=True).start()
    try:
        return result.result(seconds)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = f"timeout after {seconds:g} s" if isinstance(reason, TimeoutError) else str(reason)
        text = text or type(reason).__name__
        text = text.encode("unicode_escape").decode()[:200]  # the server may have sent it
        raise ImageError(f"{url}: download failed ({text}). Check the URL and the network connection.") from error


def _download(url: str, deadline: float, max_bytes: int) -> bytes:
    location = _to_ascii(url)
    for _ in range(REDIRECTS + 1):
        with _open(location, deadline) as response:
            if response.status not in (301, 302, 303, 307, 308):
                return _read(response, url, deadline, max_bytes)
            # http.client decodes headers as Latin-1, whatever their encoding.
            target = quote(response.headers.get("Location", ""), safe=string.punctuation, encoding="latin-1")
            location = urljoin(location, target)
        if urlsplit(location).scheme not in ("http", "https"):
            raise ImageError(f"{url}: redirect to {location[:200]}. Only http and https are supported.")
    raise ImageError(f"{url}: more than {REDIRECTS} redirects.")


def _to_ascii(url: str) -> str:
    """Return the URL in ASCII: "http://example.org/Hund 1.jpg" -> "http://example.org/Hund%201.jpg"."""
    scheme, host, path, query, _ = urlsplit(url)
    if not host.isascii():
        host = host.encode("idna").decode()
    return urlunsplit((scheme, host, *(quote(part, safe=string.punctuation) for part in (path, query)), ""))


def _open(url: str, deadline: float) -> http.client.HTTPResponse:
    """Return the response, whatever its status. `urlopen` would also open files, and read the body of redirects."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    timeout = min(READ_SECONDS, max(deadline - time.monotonic(), 0.001))
    response: http.client.HTTPResponse = opener.open(urllib.request.Request(url, headers=_HEADERS), timeout=timeout)
    return response


def _read(response: http.client.HTTPResponse, url: str, deadline: float, max_bytes: int) -> bytes:
    if response.status != 200:
        reason = http.client.responses.get(response.status, "unknown status")
        raise ImageError(f"{url}: the server responded {response.status} {reason}. Does a browser open it?")
    too_large = ImageError(f"{url}: larger than {max_bytes / (1 << 20):g} MB. Use a smaller version.")
    length = response.length or 0
    if length > max_bytes:
        raise too_large
    content = bytearray()
    while chunk := response.read1(1 << 16):
        content += chunk
        if len(content) > max_bytes:
            raise too_large
        if time.monotonic() > deadline:
            raise TimeoutError
    if len(content) < length:
        raise ImageError(f"{url}: connection closed after {len(content):,} of {length:,} bytes. Try again.")
    if content[:99].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # no format of photographs starts like this
        raise ImageError(f"{url}: this is an HTML page, not an image. Use the image's direct URL.")
    return bytes(content)
