"""Pictures on the web, fetched within bounds of bytes, time and redirects. The command line alone asks for this."""

import http.client
import io
import string
import time
import urllib.request
from functools import partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from captioner.errors import ImageError
from captioner.version import __version__

MAX_BYTES = 64 << 20
"""Longest picture that is fetched."""

SECONDS = 60.0
"""Longest time for a picture, redirects included."""

CONNECT_SECONDS = 10.0
"""Longest time until a server takes a connection."""

REDIRECTS = 5
"""Most redirects that are followed."""

_HEADERS = {
    "User-Agent": f"captioner/{__version__}",
    "Accept": "image/jpeg, image/png, image/webp, image/*;q=0.5, */*;q=0.1",  # some send AVIF if they may
}


def fetch(address: str, seconds: float = SECONDS, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of the picture at an http or https address.

    Certificates are checked, and proxies are used as the environment says (`https_proxy`, `no_proxy`).

    Raises:
        ImageError: if the picture cannot be had within the bounds, or a web page comes in its place.
    """
    deadline = time.monotonic() + seconds
    try:
        url = _to_ascii(address)
        for _ in range(REDIRECTS + 1):
            with _open(url, deadline) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return _read(response, address, max_bytes)
                location = response.headers.get("Location", "")
                # Headers come as Latin-1, whatever their bytes mean.
                url = urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1"))
            if urlsplit(url).scheme not in ("http", "https"):
                raise ImageError(f"{address}: leads to {url[:200]}, and only http and https are followed.")
        raise ImageError(f"{address}: leads from one address to the next, more than {REDIRECTS} times.")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        said = "it takes too long" if isinstance(reason, TimeoutError) else str(reason) or type(reason).__name__
        said = said.encode("unicode_escape").decode()[:200]  # it may be the server that says it
        raise ImageError(f"{address}: cannot be fetched ({said}). Is it right, and the network up?") from error


def _to_ascii(address: str) -> str:
    """Return the address as servers take it: "http://example.org/Hund 1.jpg" -> "http://example.org/Hund%201.jpg"."""
    scheme, host, path, query, _ = urlsplit(address)
    if not host.isascii():
        host = host.encode("idna").decode()
    return urlunsplit((scheme, host, *(quote(part, safe=string.punctuation) for part in (path, query)), ""))


def _open(url: str, deadline: float) -> http.client.HTTPResponse:
    """Return what the server answers, whatever its status. It is not `urllib.request.urlopen`, which opens files,
    too, and reads redirects to their end."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _Handler(deadline), urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    timeout = min(CONNECT_SECONDS, max(deadline - time.monotonic(), 0.001))
    response: http.client.HTTPResponse = opener.open(urllib.request.Request(url, headers=_HEADERS), timeout=timeout)
    return response


def _read(response: http.client.HTTPResponse, address: str, max_bytes: int) -> bytes:
    if response.status != 200:
        meaning = http.client.responses.get(response.status, "unknown status")
        raise ImageError(f"{address}: the server says {response.status} {meaning}. Does a browser show it?")
    too_long = ImageError(f"{address}: longer than {max_bytes / (1 << 20):g} MB. Fetch a smaller version of it.")
    announced = response.length or 0
    if announced > max_bytes:
        raise too_long
    content = bytearray()
    while part := response.read1(1 << 16):
        content += part
        if len(content) > max_bytes:
            raise too_long
    if len(content) < announced:
        raise ImageError(
            f"{address}: the server broke off after {len(content):,} of {announced:,} bytes. Try again."
        )
    if content[:99].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # which begins no format of photographs
        raise ImageError(f"{address}: is a page, no picture. Give the address of the picture itself.")
    return bytes(content)


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """http and https, whose responses must come before a time."""

    def __init__(self, deadline: float):
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> http.client.HTTPResponse:
        """Open a connection of this class that gives such responses."""

        def connect(*arguments: Any, **more: Any) -> http.client.HTTPConnection:
            connection: http.client.HTTPConnection = http_class(*arguments, **more)
            connection.response_class = partial(_Response, self._deadline)  # type: ignore[assignment]
            return connection

        return super().do_open(connect, req, **options)


class _Response(http.client.HTTPResponse):
    """A response of which every byte, headers included, must come before a time."""

    def __init__(self, deadline: float, connection: Any, *arguments: Any, **options: Any):
        super().__init__(connection, *arguments, **options)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), connection, deadline))


class _Timed(io.RawIOBase):
    """What comes from a connection before a time. A connection's own timeout is for each of many reads."""

    def __init__(self, raw: io.RawIOBase, connection: Any, deadline: float):
        self._raw = raw
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read as the connection does, in what is left of the time."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Close the connection's file, too, or the connection stays open."""
        self._raw.close()
        super().close()
