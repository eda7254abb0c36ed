"""`caption-web`: a page to caption pictures on, and the same for programs; with `--static`, the page as files.

Exit code 0: the files are written, or the server was stopped by Ctrl-C or SIGTERM, after everything that was
accepted had its answer; 2: wrong usage, no usable model, or no such address.
"""

import argparse
import ipaddress
import logging
import shlex
import signal
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioner.captioning import load
from captioner.cli import (
    DONE,
    INTERRUPTED,
    MODEL_HELP,
    MOST_AT_ONCE,
    USAGE,
    add_engine_options,
    model_name,
    search_settings,
)
from captioner.console import Parser, open_standard_streams, say, text, whole_number
from captioner.errors import CaptionerError, MissingExtraError
from captioner.installation import install_hint
from captioner.version import __version__
from captioner.web.site import RUNTIME, RUNTIME_VERSION, write_site

BACKLOG = 1024
"""Connections that may wait to be accepted."""

PATIENCE = 60
"""Seconds in which a stopping server must have answered what it accepted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    open_standard_streams()
    # Pillow tells of oddities in files, which are the clients' and no news.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        options = make_parser().parse_args(arguments)
        if options.static is None and options.onnxruntime_web is None:
            _serve(options)
        else:
            _write(options)
    except BrokenPipeError:  # the reader of --help has seen enough
        return DONE
    except CaptionerError as error:
        _say(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:  # while it starts
        return INTERRUPTED
    return DONE


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="caption-web",
        description="Serve a page to caption pictures on, POST /api/caption for programs, and /docs about it.",
    )
    parser.add_argument("--version", action="version", version=f"caption-web {__version__}")

    address = parser.add_argument_group("address")
    address.add_argument(
        "--host", type=text, default="127.0.0.1", help="listen on this address (%(default)s: this machine alone)"
    )
    address.add_argument(
        "--port", type=whole_number(0, 65535), default=8000, metavar="N", help="0 takes a free one (%(default)s)"
    )
    address.add_argument(
        "--allow-host",
        type=text,
        action="append",
        metavar="NAME",
        help="answer requests for this name too, such as a proxy's; may be repeated (default: localhost where "
        "that is all that can call, and otherwise any)",
    )

    static = parser.add_argument_group("without a server")
    static.add_argument(
        "--static",
        type=text,
        metavar="FOLDER",
        help="write the page as files for any static host, and exit; browsers then compute the captions themselves",
    )
    static.add_argument(
        f"--{RUNTIME}",
        type=text,
        metavar="FOLDER",
        help=f"folder of the npm package {RUNTIME} for --static (default: npm fetches version {RUNTIME_VERSION})",
    )

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", type=text, metavar="MODEL", help=MODEL_HELP)
    add_engine_options(model)

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-bytes",
        type=whole_number(1, 1 << 40),
        default=32 << 20,
        metavar="N",
        help="of a picture's file (%(default)s)",
    )
    limits.add_argument(
        "--max-pixels",
        type=whole_number(1, 1 << 40),
        default=64_000_000,
        metavar="N",
        help="of a picture (%(default)s)",
    )
    limits.add_argument(
        "--queue",
        type=whole_number(1, 1 << 20),
        default=128,
        metavar="N",
        help="pictures that may wait (%(default)s)",
    )
    limits.add_argument(
        "--batch-size",
        type=whole_number(1, MOST_AT_ONCE),
        default=16,
        metavar="N",
        help="pictures at once (%(default)s)",
    )

    words = parser.add_argument_group("choice of words")
    words.add_argument("--beam-size", type=int, metavar="N", help="sentences kept while searching; 1 is greedy")
    words.add_argument("--max-words", type=int, metavar="N", help="longest caption")
    words.add_argument("--min-words", type=int, metavar="N", help="shortest caption")
    words.add_argument(
        "--ban", type=text, action="append", metavar="WORD", help="never write this word; may be repeated"
    )
    words.add_argument("--length-penalty", type=float, metavar="X", help="higher favours longer captions")

    return parser


def _write(options: argparse.Namespace) -> None:
    """Write the site of `--static`."""
    used = ("static", "onnxruntime_web", "model")
    defaults = make_parser().parse_args([])
    unused = [
        name for name, value in vars(options).items() if name not in used and value != getattr(defaults, name)
    ]
    if options.static is None:
        unused = ["onnxruntime_web"]
    if unused:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise CaptionerError(f"{names}: --static FOLDER goes with --model and --{RUNTIME} alone")
    runtime = Path(options.onnxruntime_web) if options.onnxruntime_web else None
    write_site(Path(options.static), model_name(options), runtime)
    _say(f"try it: python -m http.server -d {shlex.quote(options.static)} (and open http://localhost:8000)")


def _serve(options: argparse.Namespace) -> None:
    try:
        import uvicorn

        from captioner.web.server import WebSettings, create_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("captioner"):
            raise
        raise MissingExtraError(
            f"the web server needs {error.name}, which is not installed. Run: {install_hint('web')}"
        ) from error
    listener = _listen(options.host, options.port)
    with listener:
        address, port = listener.getsockname()[:2]
        is_ours = ipaddress.ip_address(address).is_loopback
        allowed = [name.lower() for name in options.allow_host or ()]
        if is_ours:
            allowed += ["localhost", "127.0.0.1", "[::1]", options.host.lower()]
        checkpoint = model_name(options)
        search = search_settings(options, checkpoint)
        captioner = load(checkpoint, options.device, threads=options.threads)
        # The first caption takes longest, and tells what is wrong with the choice of words.
        captioner.caption(np.zeros((8, 8, 3), np.uint8), search)
        settings = WebSettings(
            search=search,
            model=Path(checkpoint).stem,
            max_bytes=options.max_bytes,
            max_pixels=options.max_pixels,
            queue=options.queue,
            batch_size=options.batch_size,
            hosts=tuple(allowed),
        )
        app = create_app(captioner, settings)
        server = uvicorn.Server(
            uvicorn.Config(
                app, ws="none", log_level="warning", server_header=False, timeout_graceful_shutdown=PATIENCE
            )
        )

        def stop(*_: object) -> None:
            server.should_exit = True

        # While it runs, the server has its own. When it has stopped, it raises the signal once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        name = "localhost" if ipaddress.ip_address(address).is_unspecified else address
        _say(f"open http://{f'[{name}]' if ':' in name else name}:{port} (Ctrl-C stops)")
        server.run([listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise CaptionerError(
            f"cannot listen on {host} port {port} ({getattr(error, 'strerror', None) or error}). "
            "Choose another --host or --port."
        ) from error


def _say(message: str) -> None:
    say("caption-web", message)
