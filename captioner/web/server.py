"""The captioner over HTTP: a web page, and the API `POST /api/caption`.

Requests are untrusted. Uploads are bounded in bytes, pixels and time, and so is the queue. Pictures are decoded
from memory, nothing is written to disk, and no path or URL of a client is opened.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captioner import images
from captioner.captioning import Captioner, Prepared
from captioner.cli import EXAMPLE
from captioner.errors import CaptionerError, ImageError, ImageTooLargeError
from captioner.search import SearchSettings
from captioner.version import __version__
from captioner.web.batching import Batcher, GoneError
from captioner.web.reference import reference_page
from captioner.web.uploads import FIELD, RefusalResponse, RefusedError, Uploads, find_picture, is_form

STATIC = Path(__file__).parent / "static"

MOST_CANDIDATES = 5
MOST_ALTERNATIVES = 10

UPLOADS_HELD = 16
"""Maximum number of bytes of all uploads together, in pictures of the maximum size."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""Headers of every response: the page loads from this server only, cannot be framed, and is not cached."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WebSettings:
    """Settings of the server."""

    search: SearchSettings | None = None
    """Search settings; requests set candidates and alternatives. None: those of the model."""
    model: str | None = None
    """Name of the model in `/health`. None: the name of its file."""
    max_bytes: int = 32 << 20
    """Maximum size of a picture file."""
    max_pixels: int = 64_000_000
    """Maximum number of pixels of a picture, checked before it is decoded."""
    upload_seconds: float = 30.0
    """Maximum time of an upload."""
    queue: int = 128
    """Maximum number of pictures in work."""
    batch_size: int = 16
    """Maximum number of pictures that go through the network together."""
    batch_wait: float = 0.005
    """Time that the first picture of a batch waits for others, in seconds."""
    hosts: tuple[str, ...] = ()
    """Accepted host names in lower case. Empty: any."""


class _Described(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class CaptionRecord(_Described):
    """A caption. Log-probabilities are natural logarithms, and null for a probability of zero."""

    caption: str
    """The text."""
    log_prob: float | None
    """Log-probability of the whole caption, including its end."""
    score: float | None
    """Score by which captions are ranked: the log-probability, normalised by length."""
    words: list[str]
    log_probs: list[float | None]
    """Log-probability of each word, given the previous words."""
    confidence: float | None = None
    """Calibrated probability that people confirm everything that the caption names, if the model has a
    calibration."""
    word_confidences: list[float | None] = Field(default_factory=list)
    """The same for each word; null for words that name nothing."""
    visual: list[float] = Field(default_factory=list)
    """Share of each word's context that comes from the picture, if the model computes it."""
    alternatives: list[dict[str, float | None]] = Field(default_factory=list)
    """For each word, other likely words at its position, with their log-probabilities."""
    attention: list[list[list[float]]]
    """Attention map of each word: rows of columns of weights, which sum to 1."""
    rectangle: tuple[float, float, float, float]
    """Part of the picture that the maps cover: left, top, right and bottom, in fractions of the width and height of
    the upright picture."""


class Reply(CaptionRecord):
    """The best caption of a picture."""

    width: int
    """Width of the upright picture in pixels."""
    height: int
    """Height of the upright picture in pixels."""
    candidates: list[CaptionRecord] = Field(default_factory=list)
    """Further captions, best first, if more than one was requested."""


class Problem(_Described):
    """Why a request failed."""

    detail: str
    """The problem and the remedy, in one line."""


class Limits(_Described):
    """Limits of the server."""

    bytes: int
    """Maximum size of a picture file."""
    candidates: int
    """Maximum number of captions of a picture."""


class Health(_Described):
    """State of the server."""

    status: Literal["ok"]
    version: str
    """Version of the captioner."""
    model: str
    """Name of the model."""
    queue: int
    """Number of pictures in work."""


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The picture cannot be read, or the form is invalid."},
    408: {"model": Problem, "description": "The upload took too long."},
    413: {"model": Problem, "description": "Too many bytes or pixels."},
    415: {"model": Problem, "description": "The upload has a Content-Encoding, such as gzip."},
    422: {"model": Problem, "description": "A parameter is unknown or out of range."},
    500: {"model": Problem, "description": "Internal error; see the log of the server."},
    503: {"model": Problem, "description": "The server is busy. Try again after the seconds in Retry-After."},
}

_PICTURE = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF, BMP or TIFF."}
BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": _PICTURE},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {FIELD: _PICTURE}, "required": [FIELD]},
        },
    },
}
"""OpenAPI schema of the body. FastAPI cannot infer it, because `Uploads` reads the body: FastAPI's own reader has
no bounds and writes to disk."""


def create_app(captioner: Captioner, settings: WebSettings = WebSettings()) -> FastAPI:
    """Return the ASGI application, which can also be mounted in another application.

    Threads start with the first picture, and end when the server stops.

    Args:
        captioner: one thread of the application uses its network.
        settings: limits and search settings.
    """
    uploads = Uploads(
        longest=settings.max_bytes, most=UPLOADS_HELD * settings.max_bytes, seconds=settings.upload_seconds
    )
    batcher = Batcher(
        captioner, batch_size=settings.batch_size, wait=settings.batch_wait, most_waiting=settings.queue
    )
    search = settings.search or captioner.search_settings
    most_candidates = min(MOST_CANDIDATES, search.beam_size)
    model = settings.model or (captioner.path.stem if captioner.path else "unnamed")

    class Parameters(BaseModel):
        model_config = ConfigDict(extra="forbid")
        candidates: int = Field(1, ge=1, le=most_candidates, description="Captions, best first.")
        alternatives: int = Field(3, ge=0, le=MOST_ALTERNATIVES, description="Other words to report for each word.")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:  # not called where the application is mounted
        yield
        batcher.close()

    app = FastAPI(
        title="captioner",
        version=__version__,
        description="Captions for pictures, with the attention of the network for each word.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, hosts=settings.hosts)
    app.add_exception_handler(CaptionerError, _explain)
    app.add_exception_handler(RequestValidationError, _explain_parameters)
    app.mount("/static", StaticFiles(directory=STATIC))
    bare: dict[str, Any] = {"dependencies": [Depends(_refuse_parameters)], "responses": {422: PROBLEMS[422]}}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.api_route("/example.jpg", methods=["GET", "HEAD"], include_in_schema=False)
    async def example() -> FileResponse:
        return FileResponse(EXAMPLE)

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def reference() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))

    @app.head("/health", include_in_schema=False, **bare)
    @app.get("/health", summary="State of the server", response_description="The server is running.", **bare)
    async def health() -> Health:
        return Health(status="ok", version=__version__, model=model, queue=batcher.waiting)

    @app.head("/api/limits", include_in_schema=False, **bare)
    @app.get("/api/limits", summary="Limits of the server", response_description="The limits.", **bare)
    async def limits() -> Limits:
        return Limits(bytes=settings.max_bytes, candidates=most_candidates)

    @app.post(
        "/api/caption",
        summary="Caption a picture",
        response_description="The captions of the picture.",
        response_model=Reply,
        responses=PROBLEMS,
        openapi_extra={"requestBody": BODY},
    )
    async def caption(request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
        """Send the picture as the body, or in the field `picture` of a form. It is not stored."""
        batcher.check_room()
        chosen = replace(search, candidates=parameters.candidates, alternatives=parameters.alternatives)
        content_type = request.headers.get("content-type", "")
        async with uploads.receive(request) as body:

            def read() -> Prepared:
                content = bytes(body)
                picture = find_picture(content, content_type) if is_form(content_type) else content
                return captioner.prepare(picture, settings.max_pixels)

            gone = asyncio.ensure_future(_disconnect(request))
            try:
                picture, found = await batcher.caption(read, chosen, gone)
            finally:
                gone.cancel()
        width, height = picture.size
        return JSONResponse({"width": width, "height": height, **found.to_dict(attention=True)})

    return app


async def _refuse_parameters(request: Request) -> None:
    """Refuse query parameters of a path that has none."""
    if request.query_params:
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": ("query", name)} for name in request.query_params]
        )


async def _disconnect(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _explain(_: Request, error: Exception) -> Response:
    content = {"detail": str(error).replace(images.name(b""), "the picture", 1)}
    if isinstance(error, RefusedError):
        response = RefusalResponse if error.is_receiving else JSONResponse
        return response(content, error.status, error.headers)
    if isinstance(error, ImageError):
        return JSONResponse(content, 413 if isinstance(error, ImageTooLargeError) else 400)
    raise error


async def _explain_parameters(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    reasons = {"extra_forbidden": "unknown parameter"}
    problems = [
        f"{problem['loc'][-1]}: {reasons.get(problem['type']) or problem['msg']}" for problem in error.errors()
    ]
    return JSONResponse({"detail": "; ".join(problems)}, 422)


class Guard:
    """Middleware: refuse unknown hosts, add `HEADERS` to every response, and report every failure as JSON.

    Another web site may resolve its own name to the address of this machine, so that browsers treat this server as
    a part of that site (DNS rebinding). Their requests then have that name as host.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        """Wrap an application; `hosts` are the accepted host names in lower case, empty for any."""
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).lower()  # without the port
            if self._hosts and host not in self._hosts:
                detail = (
                    f"host name {host!r} is not allowed. To allow it, start the server with --allow-host {host}."
                )
                await JSONResponse({"detail": detail}, 400)(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except (ClientDisconnect, GoneError):
            pass
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if has_started:
                raise
            detail = "internal error; see the log of the server. Try again, or try another picture."
            await JSONResponse({"detail": detail}, 500)(scope, receive, send_with_headers)
