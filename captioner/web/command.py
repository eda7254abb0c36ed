"""`caption-web`: a web page that captions pictures, and an HTTP API; with `--static`, the page as files.

Exit code 0: the files are written, or the server was stopped by Ctrl-C or SIGTERM, after every accepted request was
answered; 2: invalid usage, no usable model, or no such address.
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
    MODEL_HELP,
    add_batch_size,
    add_engine_options,
    add_search_options,
    model_name,
    search_settings,
)
from captioner.console import Parser, run_command, say, text, whole_number
from captioner.errors import CaptionerError
from captioner.installation import require_extra
from captioner.version import __version__
from captioner.web.site import RUNTIME, RUNTIME_VERSION, write_site

BACKLOG = 1024
"""Maximum number of connections that wait to be accepted."""

SHUTDOWN_SECONDS = 60
"""Maximum time of a graceful shutdown, in which accepted requests are answered."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    # Pillow warns about irregular files, which are the clients' responsibility.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    return run_command("caption-web", lambda: _run(make_parser().parse_args(arguments)))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="caption-web",
        description="Serve a web page that captions pictures, and an HTTP API (POST /api/caption, see /docs).",
    )
    parser.add_argument("--version", action="version", version=f"caption-web {__version__}")

    address = parser.add_argument_group("address")
    address.add_argument(
        "--host", type=text, default="127.0.0.1", help="listen on this address (%(default)s: this machine only)"
    )
    address.add_argument(
        "--port", type=whole_number(0, 65535), default=8000, metavar="N", help="0: any free port (%(default)s)"
    )
    address.add_argument(
        "--allow-host",
        type=text,
        action="append",
        metavar="NAME",
        help="accept requests for this host name, such as a proxy's; may be repeated (default: localhost if --host "
        "is this machine only, otherwise any)",
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
    for option, highest, default, help in (
        ("--max-bytes", 1 << 40, 32 << 20, "maximum size of a picture file in bytes"),
        ("--max-pixels", 1 << 40, 64_000_000, "maximum number of pixels of a picture"),
        ("--queue", 1 << 20, 128, "maximum number of waiting pictures"),
    ):
        limits.add_argument(
            option, type=whole_number(1, highest), default=default, metavar="N", help=f"{help} (%(default)s)"
        )
    add_batch_size(limits, 16)

    add_search_options(parser.add_argument_group("search"), leave_out=("candidates", "alternatives"))
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.static is None and options.onnxruntime_web is None:
        return _serve(options)
    return _write(options)


def _write(options: argparse.Namespace) -> int:
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
    folder = shlex.quote(options.static)
    say("caption-web", f"try it: python -m http.server -d {folder} (and open http://localhost:8000)")
    return DONE


def _serve(options: argparse.Namespace) -> int:
    with require_extra("web", "the web server"):
        import uvicorn

        from captioner.web.server import WebSettings, create_app
    with _listen(options.host, options.port) as listener:
        address, port = listener.getsockname()[:2]
        hosts = [name.lower() for name in options.allow_host or ()]
        if ipaddress.ip_address(address).is_loopback:
            hosts += ["localhost", "127.0.0.1", "[::1]", options.host.lower()]
        checkpoint = model_name(options)
        search = search_settings(options, checkpoint)
        captioner = load(checkpoint, options.device, threads=options.threads)
        # The first caption takes longest, and reveals invalid search settings.
        captioner.caption(np.zeros((8, 8, 3), np.uint8), search)
        settings = WebSettings(
            search=search,
            model=Path(checkpoint).stem,
            max_bytes=options.max_bytes,
            max_pixels=options.max_pixels,
            queue=options.queue,
            batch_size=options.batch_size,
            hosts=tuple(hosts),
        )
        app = create_app(captioner, settings)
        server = uvicorn.Server(
            uvicorn.Config(
                app, ws="none", log_level="warning", server_header=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS
            )
        )

        def stop(*_: object) -> None:
            server.should_exit = True

        # The server has its own handlers while it runs. After it has stopped, it raises the signal once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        name = "localhost" if ipaddress.ip_address(address).is_unspecified else address
        say("caption-web", f"open http://{f'[{name}]' if ':' in name else name}:{port} (Ctrl-C stops)")
        server.run([listener])
    return DONE


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise CaptionerError(
            f"cannot listen on {host} port {port} ({getattr(error, 'strerror', None) or error}). "
            "Choose another --host or --port."
        ) from error
