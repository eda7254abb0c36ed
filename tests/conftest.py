import ctypes
import importlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from captioner.captioning import Captioner, load
from captioner.cli import main
from captioner.confidence import Calibration, CaptionWeights, Distance, Tables, WordWeights
from captioner.images import ImageSettings
from captioner.model_file import FORMAT, KEY, Header
from captioner.network.checkpoint import add_calibration, save_checkpoint
from captioner.network.export import export_graphs
from captioner.network.model import build_network
from captioner.settings import AttentionSettings, DecoderSettings, EncoderSettings, ModelSettings
from captioner.vocabulary import RULE, SPECIAL


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Let PyTorch compute in one thread: on networks as small as these, threads mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs, which is not part of the project."""
    folder = os.environ.get("CAPTIONER_DATA")
    if not folder:
        pytest.skip("needs real photographs: set CAPTIONER_DATA to a folder with flickr8k/ and general/")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A model file of a small untrained network that writes nonsense, quickly, with either engine."""
    torch.manual_seed(0)
    settings = ModelSettings(
        EncoderSettings("small_cnn", stride=8, grid=(2, 2)),
        AttentionSettings(size=8),
        DecoderSettings(hidden_size=16, embedding_size=12),
    )
    words = (*SPECIAL, "a", "the", "dog", "cat", "ball", "runs", "sleeps", "on", "in", "'s", "red", "blue")
    network = build_network(settings, len(words), 64)
    with torch.no_grad():  # or every picture would get the same nonsense
        network.decoder.start_hidden.weight.mul_(200)
        network.decoder.output_weight.mul_(6)
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors"
    header = Header(FORMAT, settings, ImageSettings(size=64), words, RULE, {"about": "a test"})
    save_checkpoint(path, network, header, graphs=export_graphs(settings, len(words), 64))
    return path


@pytest.fixture(scope="session")
def calibrated_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny model file with a calibration that was made up."""
    random = np.random.default_rng(0)
    shape = (
        load(tiny_checkpoint, device="cpu").engine.start(np.zeros((1, 3, 64, 64), np.float32)).annotations().shape
    )
    words = ("dog", "cat", "ball", "runs", "sleeps", "red", "blue")
    tables = Tables(
        mean=np.zeros(shape[1], np.float32),
        axes=np.linalg.qr(random.normal(size=(shape[1], 4)))[0].astype(np.float32),
        detectors=random.normal(0, 0.3, (4, len(words))).astype(np.float32),
        rates=random.uniform(0.2, 0.8, (2, len(words))).astype(np.float32),
    )
    calibration = Calibration(
        words=words,
        things=3,
        thing=WordWeights(0.5, 0.2, 0.9, -0.3, 0.4),
        other=WordWeights(0.1, 0.1, 0.5, -0.1, 0.2),
        caption=CaptionWeights(0.2, 0.8, 0.1),
        distance=Distance(0.0, 10.0),
    )
    path = tmp_path_factory.mktemp("checkpoints") / "calibrated.safetensors"
    shutil.copy(tiny_checkpoint, path)
    add_calibration(path, calibration, tables, {"about": "made up"})
    return path


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint) -> Captioner:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture
def rewrite_model(tmp_path):
    """Write a model file again with its header or its tensors changed; return the new file."""

    def rewrite(source, header=lambda values: None, tensors=lambda tensors: None):
        with safe_open(source, framework="pt") as file:
            values = json.loads(file.metadata()[KEY])
        stored = load_file(source)
        header(values)
        tensors(stored)
        path = tmp_path / "changed.safetensors"
        save_file(stored, path, metadata={KEY: json.dumps(values)})
        return path

    return rewrite


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Nine files of noise and colour, of various shapes."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(9):
        height, width = random.integers(40, 160, 2)
        noise = random.integers(0, 60, (height, width, 3))
        paths.append(tmp_path / f"picture-{number}.png")
        Image.fromarray((noise + random.integers(0, 190, 3)).astype(np.uint8)).save(paths[-1])
    return paths


@pytest.fixture
def write_shards():
    """Write shards of so many records, as WebDataset; return their folder."""

    def write(folder, records, count, name="shard"):
        folder.mkdir(exist_ok=True)
        for number, start in enumerate(range(0, len(records), count)):
            with tarfile.open(folder / f"{name}-{number:03}.tar", "w") as tar:
                for record in records[start : start + count]:
                    row = json.dumps({"captions": record.captions, "split": record.split}).encode()
                    members = {record.image.suffix: record.image.read_bytes(), ".json": row}
                    for suffix, content in members.items():
                        info = tarfile.TarInfo(record.image_id.rpartition(".")[0] + suffix)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        return folder

    return write


@pytest.fixture
def write_parquet():
    """Write a table of records, as those of the Hugging Face Hub, with so many rows in a row group."""
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: the extra `parquet`")
    parquet = importlib.import_module("pyarrow.parquet")

    def write(file, records, count):
        table = {
            "image": [{"bytes": record.image.read_bytes(), "path": record.image.name} for record in records],
            "captions": [list(record.captions) for record in records],
            "split": [{"dev": "validation"}.get(record.split, record.split) for record in records],
            "name": [record.image.stem for record in records],
        }
        parquet.write_table(arrow.table(table), file, row_group_size=count)
        return file

    return write


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


@pytest.fixture
def ordinary_user():
    """Make permissions apply to the superuser too, until the test ends: CI often runs as root.

    Linux exempts threads by capabilities (capabilities(7)). Those started within the test have none either.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "capset"):
        pytest.skip("the superuser may read and write every file, and this system cannot take that away")
    header, capabilities = _CapabilityHeader(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(ctypes.byref(header), capabilities) == 0
    effective = capabilities[0]
    capabilities[0] = effective & ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert library.capset(ctypes.byref(header), capabilities) == 0
    yield
    capabilities[0] = effective
    assert library.capset(ctypes.byref(header), capabilities) == 0


@pytest.fixture
def run(tiny_checkpoint, capsys, monkeypatch):
    """Run `caption` with the tiny model, and return its exit code, output and messages."""
    monkeypatch.setenv("CAPTIONER_MODEL", str(tiny_checkpoint))

    def command(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *capsys.readouterr()

    return command


@dataclass
class Website:
    """A server on the loopback."""

    url: str = ""
    pages: dict[str, bytes | Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    """What comes by path: bytes, or what a function of the request's handler does."""
    asked: list[str] = field(default_factory=list)
    """The path of each request."""


@pytest.fixture
def serve_http(monkeypatch):
    """Serve with a handler of requests, on the loopback until the test ends, and tell the address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = []

    def serve(handler):
        handler.log_message = lambda *values: None
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        http.daemon_threads = True
        http.handle_error = lambda *values: None  # a client that gave up is no error of the server
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((http, thread))
        return f"http://127.0.0.1:{http.server_port}"

    yield serve
    for http, thread in running:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def website(serve_http):
    served = Website()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            served.asked.append(self.path)
            page = served.pages.get(self.path)
            if page is None:
                self.send_error(404)
            elif callable(page):
                page(self)
                self.close_connection = True
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

    served.url = serve_http(Handler)
    return served


@pytest.fixture(scope="session")
def launch():
    """Start a browser with some more arguments."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser: install Debian's package chromium")
    arguments = ["--no-sandbox", "--disable-quic", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as running:
        yield lambda *more: running.chromium.launch(executable_path=chromium, args=[*arguments, *more])


@pytest.fixture(scope="session")
def browser(launch):
    with launch("--disable-gpu") as opened:
        yield opened


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page from its file, offline, in a window of some width; it may not complain, nor ask for anything."""
    complaints, asked, contexts = [], [], []

    def visit(page, width=1280):
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        contexts.append(
            browser.new_context(viewport={"width": width, "height": 800}, offline=True, reduced_motion="reduce")
        )
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert not complaints
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()] * len(
        contexts
    )
