import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from captioner.errors import CaptionerError
from evaluation import speed
from evaluation.__main__ import main
from evaluation.speed import (
    WORKLOADS,
    Figures,
    Settings,
    describe_machine,
    make_captions,
    measure,
    measure_speed,
    to_text,
)

COCO_CAPTION = "scores-by-coco-caption"


@pytest.fixture
def small(tiny_checkpoint: Path) -> Settings:
    return Settings(str(tiny_checkpoint), "cpu", rounds=2, matrix_size=8, pictures=2, scored=3)


def test_generated_captions_are_deterministic():
    assert make_captions(3) == make_captions(3)


def test_word_frequencies_follow_zipf():
    references, candidates = make_captions(200)
    captions = [*candidates.values(), *(text for texts in references.values() for text in texts)]
    lengths = [len(caption.split()) for caption in captions]
    assert 9 < sum(lengths) / len(lengths) < 11
    words = Counter(" ".join(captions).lower().replace(".", "").split())
    assert words.most_common(1)[0][1] > 0.03 * words.total()  # as "a" is
    assert sum(count == 1 for count in words.values()) > 0.2 * len(words)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != COCO_CAPTION])
def test_every_workload_runs(name, small, monkeypatch):
    commands = []

    def start(command: list[str], **options: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("evaluation.speed.subprocess.run", start)  # a process takes seconds
    found = measure(name, small)
    assert len(found.seconds) == len(found.cpu_seconds) == 2
    assert min(found.seconds) > 0
    assert min(found.cpu_seconds) >= 0
    assert found.amount > 0
    assert 10 < found.peak_mb < 10_000
    assert len(commands) == (3 if found.unit == "start" else 0)


def test_pycocoevalcap_that_is_missing_is_named(small, monkeypatch):
    monkeypatch.setattr("evaluation.metrics.java.shutil.which", lambda name: None)
    found = measure(COCO_CAPTION, small)
    assert found.unavailable
    assert not found.seconds


@pytest.mark.slow
def test_pycocoevalcap_is_measured_where_it_runs(small):
    found = measure(COCO_CAPTION, small)
    if found.unavailable:
        pytest.skip(found.unavailable)
    assert len(found.seconds) == 2


def test_a_command_that_fails_is_named_with_its_reason():
    with pytest.raises(
        CaptionerError, match=r"(?s)`python -c import nothing_of_this_name` failed: .*ModuleNotFound"
    ):
        speed.start_python("-c", "import nothing_of_this_name").run()


def test_each_workload_has_its_own_process(small, monkeypatch):
    monkeypatch.setattr("evaluation.speed.Scorer", pytest.fail)  # which another process does not see
    assert len(measure_speed(["scores"], small)["scores"].seconds) == 2


def test_the_table_has_a_line_for_each_workload():
    figures = {
        "scores": Figures(5000, "pictures", [2, 1.5, 3], [2.5, 2.5, 2.5], 99.4),
        COCO_CAPTION: Figures(unavailable="java was not found"),
    }
    *_, scores, by_coco_caption = to_text(describe_machine(), figures, Settings(rounds=3)).splitlines()
    assert scores.split()[:3] == ["scores,", "5,000", "pictures"]
    assert scores.split()[3:] == ["2.00", "1.50", "to", "3.00", "2.50", "99", "2,500", "0.400"]
    assert by_coco_caption.split(maxsplit=1) == [COCO_CAPTION, "unavailable: java was not found"]


def test_the_command_writes_figures(capsys, monkeypatch):
    found = {"matrix-product": Figures(17.18, "GFLOP", [2, 1.5, 3], [2, 2, 2], 99.4)}
    monkeypatch.setattr("evaluation.speed.measure_speed", lambda names, settings: found)
    assert main(["speed", "--only", "matrix-product", "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["figures"]["matrix-product"]["seconds"] == [2, 1.5, 3]
    assert {"processor", "cores", "system", "versions"} == written["machine"].keys()
    assert main(["speed", "--only", "matrix-product", "--device", "cpu"]) == 0
    assert "17.18 GFLOP " in capsys.readouterr().out


def test_zero_rounds_are_rejected(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["speed", "--rounds", "0"])
    assert "argument --rounds: must be 1 to 1000, got 0" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CaptionerError, match=r"missing.safetensors: no such checkpoint"):
        measure_speed(["files-beam"], Settings(str(tmp_path / "missing.safetensors"), "cpu"))


@pytest.mark.slow
def test_ctrl_c_leaves_no_process():
    command = [sys.executable, "-m", "evaluation", "speed", "--only", "caption-command", "--rounds", "99"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed_interrupts
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while len(started := descendants(process.pid)) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(started) >= 3, "multiprocessing's tracker, a workload, and the command that it measures"
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
            while any(map(is_running, started)) and time.monotonic() < deadline:  # the tracker is the last to end
                time.sleep(0.05)
            assert not [number for number in started if is_running(number)]
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


def heed_interrupts() -> None:
    """Where the tests run in the background of a script, Ctrl-C is ignored, and programs inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(process: int) -> list[int]:
    """Return the ids of the child processes of a process, and of theirs."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        if not Path("/proc/self/task").exists():
            pytest.skip("needs Linux's list of child processes")
        return []
    return [number for child in map(int, children) for number in (child, *descendants(child))]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
