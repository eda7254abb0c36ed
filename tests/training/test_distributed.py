"""Runs of two processes, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from captioner.model_file import read_header
from evaluation.datasets import read_dataset
from training.distributed import Processes

ROOT = Path(__file__).parents[2]

CONFIG = """
name = "small"
device = "cpu"
min_count = 1
images = { size = 64 }
encoder = { train_from = "all", learning_rate = 0.002 }
search = { beam_size = 2 }

[[datasets]]
name = "greys"
layout = "jsonl"
path = "PATH"

[model]
encoder = { name = "small_cnn", stride = 8 }
attention = { size = 16, coverage = true }
decoder = { hidden_size = 48, embedding_size = 24, dropout = 0.0 }

[optimizer]
epochs = 1
batch_size = 4
learning_rate = 0.005
warmup_steps = 2
average_decay = 0.5
"""


@pytest.fixture
def config(tmp_path):
    """Nine pictures to learn, with captions of unlike length; the last step has one for two processes."""
    rows = []
    for number in range(13):
        Image.new("RGB", (64, 64), (20 * number, 100, 0)).save(tmp_path / f"{number}.png")
        texts = [
            " ".join(["a", *["very"] * ((number + more) % 4), "green field"]) for more in range(1 + number % 3)
        ]
        rows.append({"image": f"{number}.png", "captions": texts, "split": "train" if number < 9 else "dev"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "small.toml"
    file.write_text(CONFIG.replace("PATH", str(data)))
    return file


@pytest.fixture
def start(tmp_path):
    """Start `python -m training` with every step in the log, in so many processes; none is left at the end.

    `shown-RANK` has a line with the epoch and the row of each picture that a process learns from.
    """
    script = tmp_path / "training_with_a_full_log.py"
    script.write_text(
        "import os, sys, training.__main__ as program, training.batches as batches, training.loop as loop\n"
        "loop.LOG_EVERY = 1\n"
        "read, shown = batches._read, open(f'shown-{os.environ.get(\"RANK\", 0)}', 'a', buffering=1)\n"
        "def log(example, variant, grid):\n"
        "    shown.write(f'{variant[1]} {example[0].row}\\n')\n"
        "    return read(example, variant, grid)\n"
        "batches._read = log\n"
        "sys.exit(program.main())\n"
    )
    started = []

    def start(processes, *arguments):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def averaged(folder):
    return torch.load(folder / "state.pt", weights_only=True)["averaged"]


def children(process):
    return [int(entry) for entry in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(what, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(config, start, tmp_path):
    for processes in (1, 2):
        finish(start(processes, "run", config, "--runs", tmp_path / str(processes)))
    item, two = (tmp_path / str(processes) / "small" for processes in (1, 2))
    lines, rest = read_log(item), read_log(two)
    assert [line["step"] for line in lines] == [line["step"] for line in rest] == [1, 2, 3, 3]
    for line, other in zip(lines[:3], rest[:3], strict=True):
        for term in ("words", "attention", "coverage", "gradient_norm"):
            assert line[term] == pytest.approx(other[term], abs=1e-5), term
    for name, tensor in averaged(item).items():
        torch.testing.assert_close(averaged(two)[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert lines[3]["scores"]["greys"] == pytest.approx(rest[3]["scores"]["greys"])
    assert sorted(file.name for file in item.iterdir()) == sorted(file.name for file in two.iterdir())
    assert read_header(two / "best.safetensors").card["steps"] == 3


@pytest.mark.slow
def test_two_processes_see_each_picture_of_shards_once_an_epoch(config, start, write_shards, tmp_path):
    shards = write_shards(tmp_path / "shards", read_dataset("jsonl", tmp_path / "data.jsonl"), 4)
    options = ["datasets=[{name='greys', layout='webdataset', path='" + str(shards) + "'}]"]
    options += ["optimizer.epochs=2", "optimizer.batch_size=3"]
    finish(start(2, "run", config, "--runs", tmp_path, *(part for option in options for part in ("--set", option))))
    seen = [(tmp_path / f"shown-{rank}").read_text().split("\n")[:-1] for rank in (0, 1)]
    assert sorted(seen[0] + seen[1]) == [f"{epoch} {row}" for epoch in range(2) for row in range(9)]
    assert len(seen[0]) == 12  # two of the three pictures of each step
    assert len(seen[1]) == 6


@pytest.mark.slow
def test_two_killed_processes_resume_to_the_same_weights(config, start, tmp_path):
    """With dropout, which each process draws for itself, and with locations that are chosen at random."""
    options = []
    for entry in ("model.decoder.dropout=0.3", "model.attention.kind=hard", "optimizer.epochs=8", "save_minutes=0"):
        options += ["--set", entry]
    finish(start(2, "run", config, "--runs", tmp_path / "whole", *options))
    process = start(2, "run", config, "--runs", tmp_path / "killed", *options)
    folder = tmp_path / "killed" / "small"
    assert wait_for(lambda: (folder / "log.jsonl").exists() and len(read_log(folder)) > 6, 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(start(2, "resume", folder))
    for name, tensor in averaged(tmp_path / "whole" / "small").items():
        assert torch.equal(averaged(folder)[name], tensor), name

    alone = start(1, "resume", folder)
    _, errors = alone.communicate()
    assert alone.returncode == 2
    assert "this run has 2 processes and cannot resume with 1" in errors


@pytest.mark.slow
def test_a_killed_process_ends_all_processes_with_a_message(config, start, tmp_path):
    process = start(2, "run", config, "--runs", tmp_path, "--set", "optimizer.epochs=10000")
    log = tmp_path / "small" / "log.jsonl"
    assert wait_for(lambda: log.exists() and log.stat().st_size > 1000, 120)
    workers = children(process.pid)
    assert len(workers) == 2
    killed = time.monotonic()
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    seconds = time.monotonic() - killed
    assert seconds < 30
    assert process.returncode not in (0, None)
    assert "another process of this run ended or cannot be reached" in errors
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.slow
def test_sigterm_stops_all_processes_with_their_state_saved(config, start, tmp_path):
    process = start(2, "run", config, "--runs", tmp_path, "--set", "optimizer.epochs=10000")
    folder = tmp_path / "small"
    assert wait_for(lambda: (folder / "log.jsonl").exists() and len(read_log(folder)) > 6, 120)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Resume with: python -m training resume" in errors
    step = torch.load(folder / "state.pt", weights_only=True)["step"]
    assert step >= read_log(folder)[-1]["step"]


def test_a_single_process_needs_no_process_group():
    alone = Processes(torch.device("cpu"))
    tensor = torch.tensor([1.0, 2.0])
    with alone.first_alone():
        alone.add_up([tensor])
    assert tensor.tolist() == [1, 2]
    assert alone.gather("mine") == ["mine"]
    assert alone.highest(3, 4) == [3, 4]
