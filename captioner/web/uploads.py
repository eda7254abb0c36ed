"""Uploads of pictures: bounded in bytes and time, and never on disk."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from email.message import Message
from email.parser import BytesHeaderParser
from itertools import pairwise

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from captioner.errors import CaptionerError

FIELD = "picture"
"""The form field of the picture."""

MOST_FIELDS = 20
"""Maximum number of fields of a form."""

HEADING_BYTES = 1 << 13
"""Maximum length of the headers of a field."""

FORM_BYTES = 1 << 16
"""Maximum length of a form in addition to its picture."""

DRAINING = 2.0
"""Maximum time to read and discard the rest of a refused upload, in seconds."""


class RefusedError(CaptionerError):
    """A refused upload."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
        *,
        is_receiving: bool = False,
    ) -> None:
        """Set the response.

        Args:
            message: the problem and the remedy.
            status: HTTP status of the response.
            headers: headers of the response.
            is_receiving: whether the rest of the upload may still be coming.
        """
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.is_receiving = is_receiving


class BusyError(RefusedError):
    """The server has no room for an upload now."""

    def __init__(self, reason: str) -> None:
        """Ask the client to wait for some seconds."""
        super().__init__(f"{reason}. Try again later.", 503, {"Retry-After": "5"}, is_receiving=True)


class Uploads:
    """The bodies of requests in memory, with bounds for each and for all together."""

    def __init__(self, *, longest: int, most: int, seconds: float) -> None:
        """Set the bounds.

        Args:
            longest: maximum number of bytes of a picture.
            most: maximum number of bytes of all bodies together.
            seconds: maximum time to receive a body.
        """
        self.held = 0
        """Number of bytes of all bodies together now."""
        self._longest = longest
        self._most = most
        self._seconds = seconds

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytearray]:
        """Read the body of a request, which counts towards `most` until the context ends.

        Raises:
            RefusedError: as soon as it is too long; if it takes too long; or if it is compressed. Pictures are
                compressed already, and decompression would need bounds.
            BusyError: if all bodies together are too long.
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
            raise RefusedError(
                f"Content-Encoding {encoding!r} is not supported. Send the picture without it.",
                415,
                {"Accept-Encoding": "identity"},  # RFC 7694, section 3
                is_receiving=True,
            )
        longest = self._longest + (FORM_BYTES if is_form(request.headers.get("content-type", "")) else 0)
        too_long = RefusedError(
            f"the picture is larger than {self._longest:,} bytes. Send a smaller one.", 413, is_receiving=True
        )
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
                        raise BusyError("the server is receiving too many uploads")
        except TimeoutError:
            raise RefusedError(
                f"the upload took longer than {self._seconds:g} seconds. Send a smaller picture.",
                408,
                {"Connection": "close"},
            ) from None


def is_form(content_type: str) -> bool:
    """Return whether a body of this type is a form, not the picture itself."""
    return content_type.lower().startswith("multipart/")


def find_picture(form: bytes, content_type: str) -> bytes:
    """Return the field `FIELD` of a form, multipart/form-data (RFC 7578).

    Starlette's parser (python-multipart), which FastAPI's `UploadFile` uses, writes parts above 1 MB to disk and
    parses on the event loop; this runs in memory, in a thread.

    Raises:
        RefusedError: if the form is invalid or incomplete, or has no such field.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    if not boundary or not boundary.isascii():
        raise RefusedError("the form's Content-Type has no boundary. Let the HTTP library set this header.")
    _, *parts = (b"\r\n" + form).split(b"\r\n--" + boundary.encode(), MOST_FIELDS + 1)
    for part, _ in pairwise(parts):  # a part without a following boundary is incomplete
        heading, _, content = part.partition(b"\r\n\r\n")
        if part.startswith(b"--") or len(heading) > HEADING_BYTES:
            break
        fields = BytesHeaderParser().parsebytes(heading.lstrip())
        if fields.get_param("name", header="Content-Disposition") == FIELD:
            return content
    raise RefusedError(f"the form is incomplete, or has no field {FIELD!r}. Send the picture in this field.")


class RefusalResponse(JSONResponse):
    """A response to an upload that is still being received.

    It is sent at once, and the connection is closed after some time: many clients do not read the response if the
    connection is closed while they send.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, then read for at most `DRAINING` seconds."""
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAINING):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})
