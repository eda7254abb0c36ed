"""Pictures as clients send them: bounded in bytes and in time, and never on disk."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from email.message import Message
from email.parser import BytesHeaderParser
from itertools import pairwise

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from captioner.errors import CaptionerError

FIELD = "picture"
"""The field of a form that holds the picture."""

MOST_FIELDS = 20
"""Fields of a form among which the picture is looked for."""

HEADING_BYTES = 1 << 13
"""Longest heading of a field."""

FORM_BYTES = 1 << 16
"""How much longer a form may be than a picture."""

DRAINING = 2.0
"""Seconds for which the rest of a refused upload is read and forgotten."""


class BusyError(CaptionerError):
    """There is no room for a picture now."""


class TooLongError(CaptionerError):
    """An upload of too many bytes."""


class TooSlowError(CaptionerError):
    """An upload that took too long."""


class EncodedError(CaptionerError):
    """An upload with a Content-Encoding."""


class FormError(CaptionerError):
    """A form that is broken, or holds no picture."""


class Uploads:
    """The bodies of requests in memory, bounded one by one and together."""

    def __init__(self, *, longest: int, most: int, seconds: float) -> None:
        """Hold the settings.

        Args:
            longest: bytes of a picture, at most.
            most: bytes of all bodies together, at most.
            seconds: in which a body must have come.
        """
        self.held = 0
        """Bytes of all bodies together now."""
        self._longest = longest
        self._most = most
        self._seconds = seconds

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytearray]:
        """Read the body of a request, which counts as held until the end of the context.

        Raises:
            EncodedError: if it is compressed. Pictures are compressed already, and decoding would need bounds.
            TooLongError: as soon as it is too long.
            TooSlowError: when its time is over.
            BusyError: if too much is held.
        """
        body = bytearray()
        try:
            await self._fill(body, request)
            yield body
        finally:
            self.held -= len(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        encoding = request.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise EncodedError(f"Content-Encoding {encoding!r} is not supported. Send the picture as it is.")
        longest = self._longest + (FORM_BYTES if is_form(request.headers.get("content-type", "")) else 0)
        too_long = TooLongError(f"the picture is larger than {self._longest:,} bytes. Send a smaller one.")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > longest):
            raise too_long
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    self.held += len(chunk)
                    body += chunk
                    if len(body) > longest:
                        raise too_long
                    if self.held > self._most:
                        raise BusyError("too much is being sent already. Try again in a moment.")
        except TimeoutError:
            raise TooSlowError(
                f"the picture was still coming after {self._seconds:g} seconds. Send a smaller one."
            ) from None


def is_form(content_type: str) -> bool:
    """Tell whether a body of this type is a form, or else the picture itself."""
    return content_type.lower().startswith("multipart/")


def find_picture(form: bytes, content_type: str) -> bytes:
    """Return the field `FIELD` of a form, multipart/form-data (RFC 7578).

    The form is in memory and stays there. Parsers that take a form as it comes write what is large to disk.

    Raises:
        FormError: if the form is broken or incomplete, or has no such field.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    if not boundary or not boundary.isascii():
        raise FormError("the form's Content-Type names no boundary. Leave that header to the HTTP library.")
    _, *parts = (b"\r\n" + form).split(b"\r\n--" + boundary.encode(), MOST_FIELDS + 1)
    for part, _ in pairwise(parts):  # one that no boundary follows is incomplete
        heading, _, content = part.partition(b"\r\n\r\n")
        if part.startswith(b"--") or len(heading) > HEADING_BYTES:
            break
        fields = BytesHeaderParser().parsebytes(heading.lstrip())
        if fields.get_param("name", header="Content-Disposition") == FIELD:
            return content
    raise FormError(f"the form is incomplete, or has no field {FIELD!r}. Send the picture in a field of this name.")


class RefusalResponse(JSONResponse):
    """An answer to an upload that may still be coming.

    It goes out at once, and the connection is closed after it. In between, the client may send on for a while: one
    whose connection is closed while it sends often tells of just that, and does not read the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, then read on for `DRAINING` seconds at most."""
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAINING):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})
