"""Training on CUDA devices. These tests are for machines that have some: python -m pytest -m gpu tests/training."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from captioner.captioning import load
from training.start import resume_run, start_run

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def devices():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_learns_on_the_device_as_on_the_cpu(learning, tmp_path, precision):
    decoder = replace(learning.model.decoder, dropout=0.0)
    settings = replace(learning, model=replace(learning.model, decoder=decoder), precision=precision)
    terms = {}
    for device in ("cpu", "cuda"):
        run = start_run(
            replace(settings, device=device, precision="float32" if device == "cpu" else precision),
            tmp_path / device,
        )
        (step,) = run.examples.epoch(0, 4, seed=1)
        terms[device] = [run._train_step(step) for _ in range(5)]
        assert all(weight.dtype == torch.float32 for weight in run.network.parameters())
        assert all(weight.isfinite().all() for weight in run.network.parameters())
    losses = {device: [entry["loss"] for entry in found] for device, found in terms.items()}
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], abs=1e-3 if precision == "float32" else 0.05)
    assert losses["cuda"][-1] < losses["cuda"][0]


def test_a_run_in_bfloat16_resumes_and_its_checkpoint_captions_on_every_engine(
    learning, dataset, tmp_path, stop_before_step
):
    settings = replace(learning, device="cuda", precision="bfloat16", save_minutes=0)
    whole = start_run(settings, tmp_path / "whole")
    whole.train()
    run = start_run(settings, tmp_path / "broken")
    stop_before_step(run, 3)
    resumed = resume_run(run.folder)
    resumed.train()
    for name, tensor in whole.averaged.state_dict().items():
        torch.testing.assert_close(resumed.averaged.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    file, picture = whole.folder / "best.safetensors", dataset.parent / "dev-red.png"
    captions = {device: load(file, device, engine="torch").caption(picture).text for device in ("cpu", "cuda")}
    assert captions["cuda"] == captions["cpu"] == load(file, engine="onnx").caption(picture).text


def test_two_processes_learn_together_by_nccl(learning, write_toml, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: NCCL refuses two processes on one")
    decoder = replace(learning.model.decoder, dropout=0.0)
    settings = replace(learning, device="cuda", model=replace(learning.model, decoder=decoder))
    file = write_toml(settings, tmp_path / "small.toml")
    for count in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [
            sys.executable,
            *torchrun,
            "-m",
            "training",
            "run",
            str(file),
            "--runs",
            str(tmp_path / str(count)),
        ]
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
    item, two = (
        torch.load(tmp_path / count / "small" / "state.pt", map_location="cpu", weights_only=True)["averaged"]
        for count in ("1", "2")
    )
    for name, tensor in item.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-3, msg=name)
