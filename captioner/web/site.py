"""`caption-web --static`: the page as files for any static host. The browser computes the captions itself."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from captioner.cli import EXAMPLE
from captioner.errors import CaptionerError, OutputError
from captioner.model_file import find_checkpoint, no_graphs, read_header

STATIC = Path(__file__).parent / "static"

RUNTIME = "onnxruntime-web"
"""npm package that runs the ONNX graphs."""

RUNTIME_VERSION = "1.30.0"

RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of the npm archive of this version, in Base64."""

RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.jspi.min.mjs",
    "ort-wasm-simd-threaded.jspi.mjs",
    "ort-wasm-simd-threaded.jspi.wasm",
)
"""Files of the package's folder `dist` that the page needs: without WebGPU, and with it."""

WORKER = "service-worker.js"
MANIFEST = {
    "name": "Captions for pictures",
    "short_name": "Captions",
    "description": "Captions for pictures, computed on this device, and where the network looked for each word.",
    "start_url": ".",
    "display": "standalone",
    "background_color": "#f6f4f0",
    "theme_color": "#f6f4f0",
    "icons": [{"src": "static/icon.svg", "sizes": "any", "type": "image/svg+xml"}],
}

NPM_SECONDS = 300
"""Timeout of npm."""


def write_site(folder: Path, checkpoint: str, runtime: Path | None = None) -> None:
    """Write the site.

    Args:
        folder: a new or empty folder, or an existing site, which is replaced.
        checkpoint: name or path of the model file, with ONNX graphs.
        runtime: folder of the npm package onnxruntime-web. None: npm fetches it.

    Raises:
        CheckpointError: if the model file cannot be used, or has no graphs.
        OutputError: if the folder contains anything else, or cannot be written.
        CaptionerError: if onnxruntime-web is missing, and cannot be downloaded.
    """
    model = find_checkpoint(checkpoint)
    if read_header(model).graphs is None:
        raise no_graphs(model)
    try:
        if folder.exists() and not (folder / WORKER).is_file() and any(folder.iterdir()):
            raise OutputError(f"{folder}: holds other files. Name a new folder.")
        with open_runtime(runtime) as runtime_files:
            for name in ("static", "runtime"):
                shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(STATIC, folder / "static")
            (folder / "static" / WORKER).unlink()
            (folder / "runtime").mkdir()
            for name in RUNTIME_FILES:
                shutil.copyfile(runtime_files / name, folder / "runtime" / name)
        shutil.copyfile(model, folder / "model.safetensors")
        shutil.copyfile(EXAMPLE, folder / EXAMPLE.name)
        (folder / "static" / "index.html").unlink()
        (folder / "index.html").write_text(_choose_browser((STATIC / "index.html").read_text("utf-8")), "utf-8")
        (folder / "manifest.webmanifest").write_text(json.dumps(MANIFEST, indent=1), "utf-8")
        (folder / WORKER).write_text(_list_files(folder) + (STATIC / WORKER).read_text("utf-8"), "utf-8")
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot be written ({error.strerror or error}).") from error


def _choose_browser(page: str) -> str:
    """Return the page with its parts for browsers instead of those for servers."""
    return re.sub(r"<!-- server -->.*?<!-- browser\n(.*?)\s*-->", r"\1", page, flags=re.DOTALL)


def _list_files(folder: Path) -> str:
    """Return the first line of the service worker: the size and a checksum of each file by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != WORKER)
    listed = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "checksum": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        }
        for path in files
    }
    return f"const FILES = {json.dumps(listed)};\n"


@contextmanager
def open_runtime(package: Path | None) -> Iterator[Path]:
    """Yield a folder with `RUNTIME_FILES`: of a package, or of a temporary copy that npm downloads.

    npm downloads it, so that its settings (mirrors, proxies) apply.

    Raises:
        CaptionerError: if files are missing, or npm cannot download them.
    """
    if package is not None:
        dist = package / "dist"
        if missing := [name for name in RUNTIME_FILES if not (dist / name).is_file()]:
            raise CaptionerError(f"{dist}: {missing[0]} is missing. Name the folder of the package {RUNTIME}.")
        yield dist
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = _fetch(folder)
        with tarfile.open(archive) as tar:
            for name in RUNTIME_FILES:
                member = tar.extractfile(f"package/dist/{name}")
                assert member is not None  # the checksum fits
                (folder / name).write_bytes(member.read())
        yield folder


def _fetch(folder: Path) -> Path:
    """Download the archive of the package into a folder with npm."""
    what = f"{RUNTIME}@{RUNTIME_VERSION}"
    hint = f"Or name a copy of the package: --{RUNTIME} FOLDER"
    npm = shutil.which("npm")
    if npm is None:
        raise CaptionerError(f"npm is needed to fetch {what}, and not installed. Install Node.js. {hint}")
    command = [npm, "pack", what, "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
        reason = " ".join(done.stderr.split())[:200]
    except subprocess.TimeoutExpired:
        reason = f"no end after {NPM_SECONDS} s"
    archive = next(folder.glob("*.tgz"), None)
    if archive is None:
        raise CaptionerError(f"npm cannot fetch {what} ({reason or 'no reason given'}). {hint}")
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != RUNTIME_SHA512:
        raise CaptionerError(f"checksum mismatch of {what}, as npm fetched it. {hint}")
    return archive
