"""`caption-web --static`: the page without a server."""

import csv
import io
import json
import os
import re
import shutil
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from captioner.captioning import load
from captioner.web import command, site


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint, onnxruntime_web):
    folder = tmp_path_factory.mktemp("site") / "captions"
    site.write_site(folder, str(tiny_checkpoint), onnxruntime_web)
    return folder


class Host:
    """A static host of a folder, that sends no headers of isolation and can be stopped."""

    def __init__(self, folder):
        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}/"
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def visit(browser, folder):
    """Open the site in a browser of its own. It may not complain, and sends requests to its host only."""
    opened = []

    def visit(script="", site=folder, browser=browser, **options):
        host = Host(site)
        context = browser.new_context(reduced_motion="reduce", viewport={"width": 1280, "height": 800}, **options)
        tab = context.new_page()
        complaints, asked = [], []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        context.on("request", lambda request: asked.append(request.url))
        tab.on("dialog", lambda dialog: dialog.accept())
        tab.add_init_script(script)
        tab.goto(host.address)
        opened.append((host, context, complaints, asked))
        tab.host, tab.asked = host, asked
        return tab

    yield visit
    for host, context, complaints, asked in opened:
        context.close()
        host.stop()
        assert complaints == []
        assert [url for url in asked if not url.startswith((host.address, "blob:", "data:"))] == []


def caption_all(tab, paths):
    tab.set_input_files("#choose", paths)
    wait_for(tab, len(paths))
    return tab.locator(".caption").all_text_contents()


def wait_for(tab, count):
    done = "count => document.querySelectorAll('[data-state=captioned], [data-state=failed]').length == count"
    tab.wait_for_function(done, arg=count, timeout=120_000)


def save(tab, button):
    with tab.expect_download() as download:
        tab.get_by_role("button", name=button).click()
    return download.value.path().read_text("utf-8-sig")


def test_the_site_gives_the_captions_of_the_package_also_without_its_host(visit, pictures, tiny_checkpoint):
    expected = [caption.text for caption in load(tiny_checkpoint, engine="onnx").caption(pictures)]
    tab = visit()
    assert caption_all(tab, pictures) == expected
    lines = [json.loads(line) for line in save(tab, "Save as JSON").splitlines()]
    assert [line["caption"] for line in lines] == expected
    assert len(lines[0]["attention"]) == len(lines[0]["words"])
    rows = list(csv.reader(io.StringIO(save(tab, "Save as CSV"))))
    assert [row[0] for row in rows[1:]] == [path.name for path in pictures]
    tab.host.stop()
    tab.reload()
    assert caption_all(tab, pictures[:2]) == expected[:2]
    assert tab.evaluate("crossOriginIsolated")  # so that several threads compute


@pytest.fixture
def software_gpu(launch):
    """A browser with a software adapter of WebGPU."""
    software = ("--use-webgpu-adapter=swiftshader", "--use-vulkan=swiftshader", "--enable-features=Vulkan")
    with launch("--enable-unsafe-webgpu", *software) as opened:
        yield opened


@pytest.mark.slow
def test_captions_with_webgpu_are_those_without(visit, software_gpu, folder, pictures, tmp_path):
    expected = caption_all(visit(), pictures)
    site = tmp_path / "site"
    shutil.copytree(folder, site)
    worker = site / "static" / "worker.js"
    worker.write_text(
        worker.read_text().replace("!adapter.info.isFallbackAdapter", "adapter.info.isFallbackAdapter")
    )
    tab = visit("", site, browser=software_gpu)
    assert caption_all(tab, pictures) == expected
    assert any(url.endswith(".jspi.wasm") for url in tab.asked)
    tab.reload()
    assert caption_all(tab, pictures[:2]) == expected[:2]
    assert tab.evaluate("crossOriginIsolated")  # in several threads


@pytest.mark.slow
def test_a_file_that_cannot_be_read_costs_one_line_and_the_others_go_on(visit, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0" + bytes(99))
    empty = tmp_path / "empty.png"
    empty.touch()
    large, huge = tmp_path / "large.png", tmp_path / "huge.png"  # 480 MB and 4.8 GB of pixels
    Image.new("1", (12_000, 10_000)).save(large)
    Image.new("1", (40_000, 30_000)).save(huge)
    tab = visit()
    assert caption_all(tab, [broken, empty, large, huge, pictures[0]])[:4] == ["", "", "", ""]
    problems = tab.locator("[data-state=failed] .state").all_text_contents()
    expected = ("cannot read this picture", "empty", "12000 x 10000 pixels are too many", "too large")
    assert [part in problem for part, problem in zip(expected, problems, strict=True)] == [True] * 4
    assert tab.locator("[data-state=captioned]").count() == 1


# Notes when the files were there, and when the first caption was.
NOTE_TIMES = """addEventListener("DOMContentLoaded", () => {
  const times = (window.times = {});
  const note = () => {
    if (!document.getElementById("loading").hidden) times.loading ??= performance.now();
    else if (times.loading) times.loaded ??= performance.now();
    if (document.querySelector("[data-state=captioned]")) times.captioned ??= performance.now();
  };
  new MutationObserver(note).observe(document, { subtree: true, childList: true, attributes: true });
})"""


@pytest.mark.slow
@pytest.mark.skipif("SITE_FIGURES" not in os.environ, reason="takes minutes; SITE_FIGURES=1 prints its figures")
def test_200_photographs_take_no_more_memory_than_50(visit, real_data, onnxruntime_web, tmp_path):
    names = (real_data / "flickr8k" / "Flickr8k_text" / "Flickr_8k.devImages.txt").read_text().split()
    photographs = [real_data / "flickr8k" / "Flicker8k_Dataset" / name for name in names[:200]]
    site.write_site(tmp_path / "site", "default", onnxruntime_web)
    tab = visit(NOTE_TIMES, tmp_path / "site")
    for _ in range(2):  # on the first visit in one thread
        caption_all(tab, photographs[:1])
        times = tab.evaluate("times")
        start = time.monotonic()
        tab.set_input_files("#choose", photographs[1:21])
        wait_for(tab, 21)
        seconds = (time.monotonic() - start) / 20
        first = (times["captioned"] - times["loaded"]) / 1000
        threads = tab.evaluate("crossOriginIsolated ? navigator.hardwareConcurrency : 1")
        print(f"threads: {threads}, first caption: {first:.2f} s, then {seconds:.2f} s each")
        tab.reload()
    used = []
    for count in (50, 100, 150, 200):
        tab.set_input_files("#choose", photographs[count - 50 : count])
        wait_for(tab, count)
        used.append(tab.evaluate("performance.measureUserAgentSpecificMemory().then(({ bytes }) => bytes)") / 1e6)
        print(f"memory after {count} photographs: {used[-1]:.0f} MB")
    assert used[-1] < used[0] + 50  # MB


# A folder of the browser's own file system stands for one that somebody chooses.
FOLDER = """
window.showDirectoryPicker = () => navigator.storage.getDirectory();
window.put = async (path, bytes) => {
  const parts = path.split("/");
  let folder = await navigator.storage.getDirectory();
  for (const part of parts.slice(0, -1)) folder = await folder.getDirectoryHandle(part, { create: true });
  const stream = await (await folder.getFileHandle(parts.at(-1), { create: true })).createWritable();
  await stream.write(new Uint8Array(bytes));
  await stream.close();
};
FileSystemHandle.prototype.requestPermission = async () => "granted";
"""


def test_captions_of_a_folder_are_written_beside_its_pictures(visit, pictures):
    tab = visit(FOLDER)
    content = list(pictures[0].read_bytes())
    for path in ("b.png", "a/one.png", "a/two.png", "a/two.jpg", ".hidden/three.png", "notes.md", "b.txt"):
        tab.evaluate("([path, bytes]) => put(path, bytes)", [path, content])
    tab.get_by_role("button", name="Caption a folder").click()
    wait_for(tab, 4)
    assert tab.locator("h2").all_text_contents() == ["a/one.png", "a/two.jpg", "a/two.png", "b.png"]
    tab.get_by_role("button", name="Save beside pictures").click()
    tab.get_by_text("1 text files written, 3 skipped").wait_for()
    written = tab.evaluate(
        """async () => {
          const folder = await (await navigator.storage.getDirectory()).getDirectoryHandle("a");
          const names = await Array.fromAsync(folder.keys());
          return [names.sort(), await (await (await folder.getFileHandle("one.txt")).getFile()).text()];
        }"""
    )
    assert written[0] == ["one.png", "one.txt", "two.jpg", "two.png"]
    assert re.fullmatch(r"[A-Z].*\.\n", written[1])


@pytest.mark.slow
def test_axe_finds_nothing_on_the_page(visit, pictures):
    named = os.environ.get("AXE_CORE")
    if not named:
        pytest.skip("needs axe-core: set AXE_CORE to axe.min.js of that npm package")
    script = Path(named).read_text()
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            tab = visit(color_scheme=scheme, bypass_csp=True)
            tab.set_viewport_size({"width": width, "height": 800})
            caption_all(tab, pictures[:2])
            tab.evaluate(script)
            found = tab.evaluate("axe.run()")
            assert [(violation["id"], violation["nodes"][0]["html"]) for violation in found["violations"]] == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--static", "{tmp}/site", "--port", "80"], "--port: --static FOLDER goes with --model and"),
        (["--onnxruntime-web", "{tmp}"], "--onnxruntime-web: --static FOLDER"),
        (["--static", "{tmp}/site", "--onnxruntime-web", "{tmp}"], "ort.wasm.min.mjs is missing. Name the folder"),
        (["--static", "{tmp}"], "holds other files. Name a new folder."),
        (["--static", "{tmp}/site", "--model", "none.safetensors"], "no such checkpoint"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_line(
    capsys, monkeypatch, tmp_path, tiny_checkpoint, options, problem
):
    monkeypatch.setenv("CAPTIONER_MODEL", str(tiny_checkpoint))
    (tmp_path / "other").touch()
    assert command.main([option.format(tmp=tmp_path) for option in options]) == 2
    message = capsys.readouterr().err
    assert problem in message
    assert message.count("\n") == 1


def test_without_npm_the_error_says_what_to_do(capsys, monkeypatch, tmp_path, tiny_checkpoint):
    monkeypatch.setenv("PATH", "")
    assert command.main(["--static", str(tmp_path / "site"), "--model", str(tiny_checkpoint)]) == 2
    message = capsys.readouterr().err
    assert "npm is needed to fetch onnxruntime-web@" in message
    assert "--onnxruntime-web FOLDER" in message


def test_an_archive_of_other_bytes_is_refused(monkeypatch, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho other > onnxruntime-web.tgz\n")
    npm.chmod(0o755)
    monkeypatch.setattr(site.shutil, "which", lambda _: str(npm))
    with pytest.raises(site.CaptionerError, match="checksum mismatch"), site.open_runtime(None):
        pass


def test_the_site_is_replaced_and_says_what_belongs_to_it(folder, tiny_checkpoint, onnxruntime_web):
    site.write_site(folder, str(tiny_checkpoint), onnxruntime_web)
    first = (folder / site.WORKER).read_text().partition("\n")[0]
    listed = json.loads(first.removeprefix("const FILES = ").removesuffix(";"))
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert listed.keys() == there - {site.WORKER}
    assert listed["model.safetensors"]["bytes"] == tiny_checkpoint.stat().st_size
    page = (folder / "index.html").read_text()
    assert "start-browser.js" in page
    assert "server" not in re.sub(r"without a server", "", page)
    Image.open(folder / "example.jpg").verify()
