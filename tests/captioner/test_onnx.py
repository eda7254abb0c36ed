import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner import CaptionerError, CheckpointError, SearchSettings
from captioner.captioning import load
from captioner.network.checkpoint import load_checkpoint, save_checkpoint

ENGINES = ("onnx", "torch")


def run_python(code, *arguments, seconds=100):
    """Return what a program prints. A program that hangs is an error, and is killed with all that it forked."""
    program = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return program.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        pytest.fail(f"no end after {seconds} s: {program.communicate()[0]}")


def test_captions_do_not_depend_on_the_number_of_threads(tiny_checkpoint, pictures):
    settings = SearchSettings(candidates=3)
    first, *others = (load(tiny_checkpoint, engine="onnx", threads=count) for count in (1, 2, 4))
    expected = first.caption(pictures, settings)
    assert len({caption.text for caption in expected}) > 1  # or equality would say little
    for model in others:
        for caption, other in zip(model.caption(pictures, settings), expected, strict=True):
            assert caption.text == other.text
            assert [candidate.text for candidate in caption.candidates] == [
                candidate.text for candidate in other.candidates
            ]
            assert caption.log_prob == pytest.approx(other.log_prob, abs=1e-4)


def test_the_number_of_threads_is_in_the_name_of_the_engine(tiny_checkpoint):
    assert load(tiny_checkpoint, engine="onnx", threads=1).engine.name.endswith(" on CPU, 1 thread")
    assert load(tiny_checkpoint, engine="onnx", threads=3).engine.name.endswith(" on CPU, 3 threads")
    with pytest.raises(CaptionerError, match="threads: must be at least 1, got 0"):
        load(tiny_checkpoint, threads=0)


FORK = """
import multiprocessing, os, sys
from captioner.captioning import load
engine, way, checkpoint, picture = sys.argv[1:]
if engine == "torch":
    import torch
    torch.set_num_threads(2)
model = load(checkpoint, device="cpu", engine=engine, threads=2)
if way != "fork before the first caption":
    expected = model.caption(picture).text

def work(picture):
    return model.caption(picture).text

if way == "multiprocessing":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(work, [picture] * 4)
else:
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        if way != "fork without a caption":
            os.write(writing, work(picture).encode())
        sys.exit(7)  # which frees what the child inherited
    os.close(writing)
    found = [os.read(reading, 1000).decode()]
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
text = model.caption(picture).text  # the parent goes on
assert found == [""] if way == "fork without a caption" else set(found) == {text}, (found, text)
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "way", ["fork", "fork before the first caption", "fork without a caption", "multiprocessing"]
)
@pytest.mark.parametrize("engine", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_process_that_forks_after_loading_captions_in_both(engine, way, tiny_checkpoint, pictures):
    assert run_python(FORK, engine, way, tiny_checkpoint, pictures[0]) == "same\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_thread_safe(engine, tiny_checkpoint):
    shared = load(tiny_checkpoint, device="cpu", engine=engine, threads=2).engine

    def work(seed):
        random = np.random.default_rng(seed)
        state = shared.start(random.normal(size=(seed + 1, 3, 64, 64)).astype(np.float32))
        rows, found = np.zeros((seed + 1, 2), np.int64), []
        for _ in range(5):
            step = shared.step(random.integers(4, 16, rows.shape), state.select(np.arange(seed + 1), rows))
            found += [step.log_probs.copy(), step.maps.attention]
            state, rows = step.state, random.integers(0, 2, rows.shape)
        return found

    alone = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(work, range(6)))
    for arrays, expected in zip(together, alone, strict=True):
        for array, other in zip(arrays, expected, strict=True):
            np.testing.assert_allclose(array, other, atol=1e-5)


def test_selecting_rows_does_not_change_the_state(tiny):
    pixels = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    state = tiny.engine.start(pixels)
    before = [tensor.copy() for tensor in (*state.images.values(), *state.rows.values())]
    chosen = state.select(np.array([0, 2]), np.zeros((2, 4), np.int64))
    tiny.engine.step(np.full((2, 4), 5), chosen)
    for tensor, other in zip((*state.images.values(), *state.rows.values()), before, strict=True):
        np.testing.assert_array_equal(tensor, other)
    assert {len(tensor) for tensor in chosen.images.values()} == {2}
    assert {tensor.shape[:2] for tensor in chosen.rows.values()} == {(2, 4)}


def test_replaced_cells_are_equal_in_both_engines(tiny_checkpoint):
    pixels = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    cells = np.array([[True, False, False, True], [False] * 4, [True] * 4])
    log_probs = {}
    for engine in (load(tiny_checkpoint, device="cpu", engine=name).engine for name in ENGINES):
        state, words = engine.start(pixels), np.full((3, 1), 5)
        before = engine.step(words, state).log_probs
        log_probs[engine] = engine.step(words, state.replace_cells(cells)).log_probs
        np.testing.assert_array_equal(engine.step(words, state).log_probs, before)
        np.testing.assert_allclose(log_probs[engine][1], before[1], atol=1e-6)
        assert np.abs(log_probs[engine] - before).max(axis=(1, 2))[[0, 2]].min() > 1e-3
    np.testing.assert_allclose(*log_probs.values(), atol=1e-4)


# Which engine.

MAY_HAVE_GPU = sys.platform != "linux" or any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd", "dxg"))


@pytest.mark.skipif(MAY_HAVE_GPU, reason="PyTorch is asked whether it can use the GPU")
def test_without_a_gpu_captioning_never_imports_pytorch(tiny_checkpoint, pictures):
    code = (
        "import sys, captioner\n"
        "model = captioner.load(sys.argv[1])\n"
        "model.caption(sys.argv[2])\n"
        "print(model.engine.name.split()[0], 'torch' in sys.modules)"
    )
    assert run_python(code, tiny_checkpoint, pictures[0]) == "ONNX False\n"


def test_no_usage_data_is_collected(tiny_checkpoint, pictures, tmp_path, monkeypatch):
    """ONNX Runtime would collect some below the user's folder, and send it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI"):
        monkeypatch.delenv(name, raising=False)
    code = "import sys, captioner; print(captioner.load(sys.argv[1], 'cpu').caption(sys.argv[2]).text)"
    assert run_python(code, tiny_checkpoint, pictures[0])
    assert list(home.rglob("*")) == []


@pytest.fixture(scope="module")
def without_graphs(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "bare.safetensors"
    save_checkpoint(path, *load_checkpoint(tiny_checkpoint))
    return path


def test_a_file_without_graphs_is_for_pytorch(without_graphs, tiny_checkpoint, pictures):
    assert load(tiny_checkpoint, "cpu").engine.name.startswith("ONNX Runtime ")
    model = load(without_graphs)
    assert model.engine.name.startswith("PyTorch ")
    assert model.caption(pictures[0]).text == load(tiny_checkpoint, "cpu").caption(pictures[0]).text
    with pytest.raises(
        CheckpointError, match=r"bare\.safetensors: holds no ONNX graphs.* python -m training export"
    ):
        load(without_graphs, engine="onnx")


def test_incompatible_engines_and_devices_are_refused(tiny_checkpoint):
    with pytest.raises(CaptionerError, match="device: engine 'onnx' runs on 'cpu', got 'cuda'"):
        load(tiny_checkpoint, "cuda", engine="onnx")
    with pytest.raises(CaptionerError, match="engine: expected 'auto', 'onnx' or 'torch', got 'tensorflow'"):
        load(tiny_checkpoint, engine="tensorflow")


WITHOUT_PYTORCH = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else find(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("bare", [], "holds no ONNX graphs and needs PyTorch, which is not installed. pip install"),
        ("tiny", ["--device", "cuda"], "device 'cuda' needs PyTorch, which is not installed. pip install"),
    ],
)
def test_without_pytorch_the_command_says_what_to_install(
    file, options, message, without_graphs, tiny_checkpoint, pictures
):
    path = {"bare": without_graphs, "tiny": tiny_checkpoint}[file]
    code = WITHOUT_PYTORCH + "from captioner.cli import main\nsys.exit(main(sys.argv[1:]))"
    said = run_python(code, pictures[0], "-m", path, *options)
    assert message in said
    assert "[torch]" in said
    assert said.startswith("caption: ")
    assert said.count("\n") == 1


def test_without_pytorch_captions_are_the_same(tiny_checkpoint, tiny, pictures):
    code = WITHOUT_PYTORCH + (
        "from captioner.captioning import load\n"
        "from captioner.errors import MissingExtraError\n"
        "print(load(sys.argv[1]).caption(sys.argv[2]).text)\n"
        "try: load(sys.argv[1], engine='torch')\n"
        "except MissingExtraError as error: print(error)"
    )
    text, error = run_python(code, tiny_checkpoint, pictures[0]).splitlines()
    assert text == tiny.caption(pictures[0]).text
    assert error.startswith("engine 'torch' needs PyTorch, which is not installed. pip install")


# On GPUs: python -m pytest -m gpu


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [SearchSettings(candidates=3), SearchSettings(beam_size=1), SearchSettings(sample=True, candidates=3)],
    ids=["beam", "greedy", "sampling"],
)
def test_captions_on_cuda_are_those_on_the_cpu(cuda, settings, tiny_checkpoint, pictures):
    model = load(tiny_checkpoint, "cuda")
    assert model.engine.device.type == "cuda"
    for engine in ENGINES:
        expected = load(tiny_checkpoint, "cpu", engine=engine).caption(pictures, settings)
        for caption, other in zip(model.caption(pictures, settings), expected, strict=True):
            assert caption.text == other.text
            assert [candidate.text for candidate in caption.candidates] == [
                candidate.text for candidate in other.candidates
            ]
            assert caption.log_prob == pytest.approx(other.log_prob, abs=1e-2)
            np.testing.assert_allclose(caption.attention, other.attention, atol=1e-3)


@pytest.mark.gpu
def test_the_shipped_model_on_cuda_captions_as_on_the_cpu(cuda):
    drawing = Image.new("RGB", (320, 200), "skyblue")
    drawing.paste("green", (0, 120, 320, 200))
    model = load("default")
    assert model.engine.name.endswith("cuda:0") or model.engine.name.endswith("cuda")
    assert model.caption(drawing).text == load("default", "cpu").caption(drawing).text


@pytest.mark.gpu
def test_threads_share_a_captioner_on_cuda(cuda, tiny_checkpoint, pictures):
    model = load(tiny_checkpoint, "cuda")
    expected = [caption.text for caption in model.caption(pictures)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda picture: model.caption(picture).text, pictures)) == expected
