"""What training keeps can be used by either engine."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captioner.captioning import load
from captioner.errors import CheckpointError
from captioner.model_file import GRAPH, read_header
from captioner.network.checkpoint import load_checkpoint, save_checkpoint
from training.__main__ import main
from training.start import start_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def best(learning, tmp_path):
    """The checkpoint of a run that has learned a little."""
    run = start_run(learning, tmp_path / "runs")
    run.train()
    return run.folder / "best.safetensors"


def test_a_checkpoint_gives_the_same_captions_with_both_engines(best, learning, dataset):
    pictures = sorted(dataset.parent.glob("*.png"))
    onnx, pytorch = (load(best, device="cpu", engine=engine) for engine in ("onnx", "torch"))
    assert onnx.header.search == pytorch.search_settings == learning.search
    captions = onnx.caption(pictures), pytorch.caption(pictures)
    assert len({caption.text for caption in captions[0]}) > 1
    for item, other in zip(*captions, strict=True):
        assert item.words == other.words
        assert item.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        torch.testing.assert_close(torch.tensor(item.attention), torch.tensor(other.attention), rtol=0, atol=1e-4)


def test_export_adds_graphs_to_a_file_and_changes_no_weight(best, dataset, tmp_path, capsys):
    network, header = load_checkpoint(best)
    bare = tmp_path / "bare.safetensors"
    save_checkpoint(bare, network, header, torch.float16)
    with pytest.raises(
        CheckpointError, match=f"holds no ONNX graphs. Add them with: python -m training export {bare}"
    ):
        load(bare, engine="onnx")
    before = load_file(bare)
    assert main(["export", str(bare)]) == 0
    assert "ONNX Runtime can use it now" in capsys.readouterr().out
    after = {name: tensor for name, tensor in load_file(bare).items() if not name.startswith(GRAPH)}
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert read_header(bare) == read_header(best)
    picture = dataset.parent / "dev-red.png"
    assert load(bare, engine="onnx").caption(picture).text == load(best, engine="torch").caption(picture).text


def test_a_network_that_cannot_be_exported_is_reported_once_and_saved(learning, tmp_path, without_graphs, capsys):
    selection = replace(learning.selection, keep_last=2)
    run = start_run(replace(learning, selection=selection), tmp_path)
    run.train()
    assert capsys.readouterr().err.count("need the PyTorch engine: this network cannot be exported") == 1
    assert read_header(run.folder / "best.safetensors").graphs is None
    assert load(run.folder / "best.safetensors").engine.name.startswith("PyTorch")


NOTE_POLICY = """
import importlib.abc, os, sys

class Watcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()

sys.meta_path.insert(0, Watcher())
"""


@pytest.mark.parametrize("given", [None, "active"])
@pytest.mark.parametrize(
    "program",
    [
        "import captioner.network.model",
        "import training.losses",
        "from training.__main__ import main; main(['check', 'none.toml'])",
    ],
)
def test_threads_are_set_to_wait_passively_before_torch_is_imported(monkeypatch, program, given):
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    command = [sys.executable, "-c", NOTE_POLICY + program]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stdout == f"{given or 'passive'}\n", ran.stderr


@pytest.mark.parametrize(("variable", "cores", "expected"), [(None, 1, 1), (None, 64, 2), ("2", 1, 2)])
def test_pytorch_computes_in_no_more_threads_than_there_are_cores_to_use(monkeypatch, variable, cores, expected):
    from captioner.network import engine

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(engine, "count_cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine.limit_threads()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
