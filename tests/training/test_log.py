import json
import os

import pytest

from training.log import RunLog


def test_the_log_is_synced_through_a_file_that_can_be_written(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="needs the flags of open files")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    log = RunLog(tmp_path, tensorboard=False)
    assert log.sync() == 0
    log.write(50, loss=1.5)
    log.write(100, loss=1.25)
    assert log.sync() == len((tmp_path / "log.jsonl").read_bytes())
    assert modes == [os.O_RDWR]  # os.fsync of Windows refuses others
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 50, "loss": 1.5}, {"step": 100, "loss": 1.25}]
