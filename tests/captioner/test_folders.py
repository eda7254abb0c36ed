"""Runs on folders that are killed at any moment."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from captioner import images

COUNT = 60


@pytest.mark.slow
def test_a_killed_run_is_resumed_without_loss(tiny_checkpoint, tmp_path):
    random = np.random.default_rng(0)
    for number in range(COUNT):
        path = tmp_path / "photos" / f"{number % 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)

    def start(output):
        command = [sys.executable, "-m", "captioner", str(tmp_path / "photos"), "-m", str(tiny_checkpoint)]
        command += ["-f", "jsonl", "-o", str(output), "--sidecar", ".txt", "--batch-size", "4", "--candidates", "2"]
        command += ["--overlay", str(tmp_path / "seen"), "--max-words", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    undisturbed = start(tmp_path / "whole")
    assert undisturbed.communicate()[1] == ""
    for path in (tmp_path / "photos").rglob("*.txt"):
        path.unlink()
    shutil.rmtree(tmp_path / "seen")

    output = tmp_path / "captions"
    for share in (0.2, 0.5, 0.8):
        run = start(output)
        deadline = time.monotonic() + 120
        while not output.exists() or output.stat().st_size < share * (tmp_path / "whole").stat().st_size:
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        sidecars = [path.read_text() for path in (tmp_path / "photos").rglob("*.txt")]
        assert 0 < len(sidecars) < COUNT
        assert all(text.endswith("\n") for text in sidecars)  # none is half written
    last = start(output)
    assert "pictures have captions already" in last.communicate()[1]
    assert last.returncode == 0
    # Log-probabilities may differ in the last digit with the pictures of a batch.
    digits = re.compile(r"-\d+\.\d+")
    assert digits.sub("", output.read_text()) == digits.sub("", (tmp_path / "whole").read_text())
    assert len(list((tmp_path / "photos").rglob("*.txt"))) == COUNT
    overlays = [path for path in (tmp_path / "seen").rglob("*") if path.is_file()]
    assert len(overlays) == COUNT  # and nothing of what was being written when a run was killed
    for path in overlays:
        images.open(path)
