"""The captioner over HTTP: one page for people, and `POST /api/caption` for programs.

Whatever a request holds is untrusted. Uploads are bounded in bytes, pixels and time, and so is what waits. Pictures
are decoded from memory, nothing is written to disk, and nothing that a client names is opened.
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
from captioner.errors import CaptionerError, ImageError, ImageTooLargeError
from captioner.search import SearchSettings
from captioner.version import __version__
from captioner.web.batching import Batcher, GoneError
from captioner.web.reference import reference_page
from captioner.web.uploads import (
    FIELD,
    BusyError,
    EncodedError,
    FormError,
    RefusalResponse,
    TooLongError,
    TooSlowError,
    Uploads,
    find_picture,
    is_form,
)

STATIC = Path(__file__).parent / "static"

EXAMPLE = Path(__file__).parents[1] / "example.jpg"
"""The photograph of the package, to try the page with."""

MOST_CANDIDATES = 5
MOST_ALTERNATIVES = 10

RETRY_AFTER = "5"  # seconds

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
"""What every answer says: the page loads from here alone, runs inside no other, and nothing is kept."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WebSettings:
    """What the server permits."""

    search: SearchSettings | None = None
    """How to choose the words; a request chooses candidates and alternatives. None: the model's own settings."""
    model: str | None = None
    """Name of the model in `/health`. None: that of its file."""
    max_bytes: int = 32 << 20
    """Largest picture file."""
    max_pixels: int = 64_000_000
    """Largest picture; read from its header, before it is decoded."""
    upload_seconds: float = 30.0
    """In which a request must have been sent."""
    queue: int = 128
    """Pictures that may wait or be worked on at a time."""
    batch_size: int = 16
    """Pictures that go through the network together, at most."""
    batch_wait: float = 0.005
    """Seconds that the first picture of a batch waits for others."""
    hosts: tuple[str, ...] = ()
    """Names by which clients may call the server; empty: any."""

    @property
    def max_held(self) -> int:
        """Bytes of all uploads together that may be in memory."""
        return 16 * self.max_bytes


class _Described(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class CaptionRecord(_Described):
    """A sentence about the picture. Log-probabilities are natural, and null for those of zero."""

    caption: str
    """The words as a sentence."""
    log_prob: float | None
    """Log-probability of the whole caption, its end included."""
    score: float | None
    """What captions are ranked by: the log-probability, normalised by length."""
    words: list[str]
    log_probs: list[float | None]
    """Log-probability of each word, given those before it."""
    confidence: float | None = None
    """The calibrated probability that people would confirm every thing that the caption names, if the model has a
    calibration."""
    word_confidences: list[float | None] = Field(default_factory=list)
    """The same of each word; null for words that name nothing."""
    visual: list[float] = Field(default_factory=list)
    """The share of each word's context that came from the picture, if the model can tell."""
    alternatives: list[dict[str, float | None]] = Field(default_factory=list)
    """For each word, others that could stand in its place, with their log-probabilities there."""
    attention: list[list[list[float]]]
    """Where the network looked for each word: rows of columns of weights. Those of a word sum to 1."""
    rectangle: tuple[float, float, float, float]
    """The part of the picture that the weights cover: left, top, right and bottom, in fractions of the upright
    picture's width and height."""


class Reply(CaptionRecord):
    """The best caption of a picture."""

    width: int
    """Of the upright picture, in pixels."""
    height: int
    """Of the upright picture, in pixels."""
    candidates: list[CaptionRecord] = Field(default_factory=list)
    """Further captions, best first, if more than one was asked for."""


class Problem(_Described):
    """Why a request failed."""

    detail: str
    """One line: what is wrong, and what to do."""


class Limits(_Described):
    """What the server permits."""

    bytes: int
    """Size of the largest picture file."""
    candidates: int
    """Most captions of a picture."""


class Health(_Described):
    """How the server is."""

    status: Literal["ok"]
    version: str
    """Of the captioner."""
    model: str
    """Name of the checkpoint."""
    queue: int
    """Pictures that wait or are worked on."""


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "Not a picture that can be read, or a broken form."},
    408: {"model": Problem, "description": "The upload was too slow."},
    413: {"model": Problem, "description": "Too many bytes or pixels."},
    415: {"model": Problem, "description": "The upload has a Content-Encoding, such as gzip."},
    422: {"model": Problem, "description": "A parameter is unknown or out of its range."},
    500: {"model": Problem, "description": "The server failed; its log tells why."},
    503: {"model": Problem, "description": "Too much to do. Try again after the seconds in Retry-After."},
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
"""OpenAPI's description of the body. FastAPI cannot infer it: `Uploads` reads the body, as FastAPI's own reader has
no bounds and writes to disk."""


def create_app(captioner: Captioner, settings: WebSettings = WebSettings()) -> FastAPI:
    """Return the application, for any ASGI server; it can also be mounted in another ASGI application.

    Threads start with the first picture, and end when the server stops.

    Args:
        captioner: one thread of the application uses its network.
        settings: what is permitted.
    """
    uploads = Uploads(longest=settings.max_bytes, most=settings.max_held, seconds=settings.upload_seconds)
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
        description="Captions for pictures, and where the network looked for each word.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, hosts=settings.hosts)
    app.add_exception_handler(CaptionerError, _explain)
    app.add_exception_handler(RequestValidationError, _explain_parameters)
    app.mount("/static", StaticFiles(directory=STATIC))
    bare = [Depends(_refuse_parameters)]

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.head("/example.jpg", include_in_schema=False)
    @app.get("/example.jpg", include_in_schema=False)
    async def example() -> FileResponse:
        return FileResponse(EXAMPLE)

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def reference() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))

    @app.head("/health", include_in_schema=False, dependencies=bare)
    @app.get(
        "/health",
        summary="How the server is",
        response_description="It is well.",
        responses={422: PROBLEMS[422]},
        dependencies=bare,
    )
    async def health() -> Health:
        return Health(status="ok", version=__version__, model=model, queue=batcher.waiting)

    @app.head("/api/limits", include_in_schema=False, dependencies=bare)
    @app.get(
        "/api/limits",
        summary="What the server permits",
        response_description="The limits.",
        responses={422: PROBLEMS[422]},
        dependencies=bare,
    )
    async def limits() -> Limits:
        return Limits(bytes=settings.max_bytes, candidates=most_candidates)

    @app.post(
        "/api/caption",
        summary="Caption a picture",
        response_description="What is known of the picture.",
        response_model=Reply,
        responses=PROBLEMS,
        openapi_extra={"requestBody": BODY},
    )
    async def caption(request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
        """Send the picture as the body, or in the field `picture` of a form. It is kept no longer than it takes."""
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
    """Refuse a request that has any, of a path that takes none."""
    if request.query_params:
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": ("query", name)} for name in request.query_params]
        )


async def _disconnect(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


STATUS: dict[type[CaptionerError], int] = {
    ImageTooLargeError: 413,
    ImageError: 400,
    FormError: 400,
    TooLongError: 413,
    TooSlowError: 408,
    EncodedError: 415,
    BusyError: 503,
}
"""What to answer to each error; the first that fits."""


async def _explain(_: Request, error: Exception) -> Response:
    status = next((STATUS[kind] for kind in STATUS if isinstance(error, kind)), None)
    if status is None:
        raise error
    content = {"detail": str(error).replace(images.name(b""), "the picture", 1)}
    if isinstance(error, TooLongError):
        return RefusalResponse(content, status)
    if isinstance(error, EncodedError):
        return RefusalResponse(content, status, {"Accept-Encoding": "identity"})  # RFC 7694, section 3
    if isinstance(error, BusyError):
        return RefusalResponse(content, status, {"Retry-After": RETRY_AFTER})
    return JSONResponse(content, status, {"Connection": "close"} if isinstance(error, TooSlowError) else None)


async def _explain_parameters(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    reasons = {"extra_forbidden": "there is no such parameter"}
    problems = [
        f"{problem['loc'][-1]}: {reasons.get(problem['type']) or problem['msg']}" for problem in error.errors()
    ]
    return JSONResponse({"detail": "; ".join(problems)}, 422)


class Guard:
    """Middleware: refuse strange hosts, send `HEADERS` with every answer, and answer whatever fails as JSON.

    A web page elsewhere may give its own name the address of this machine, and so make a browser take the server
    for a part of it (DNS rebinding). The browser then calls the server by that name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        """Stand before an application.

        Args:
            app: the application.
            hosts: names by which clients may call the server, in lower case; empty: any.
        """
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            host = _host(Headers(scope=scope))
            if self._hosts and host not in self._hosts:
                detail = f"this server is not called {host!r}. Add --allow-host {host} if it should be."
                await JSONResponse({"detail": detail}, 400)(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except (ClientDisconnect, GoneError):
            pass
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if is_answered:
                raise
            detail = "the server failed; its log tells why. Try again, or try another picture."
            await JSONResponse({"detail": detail}, 500)(scope, receive, send_with_headers)


def _host(headers: Headers) -> str:
    """Return the name by which the client calls the server, without the port."""
    return re.sub(r":\d*$", "", headers.get("host", "")).lower()
