import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from captioner.errors import CaptionerError
from evaluation import workloads
from evaluation.__main__ import main
from evaluation.speed import Figures, Spread, measure_speed, to_text
from evaluation.workloads import WORKLOADS, Settings, Sizes, draw_pictures, make_captions, train

TINY = Sizes(
    matrix=8,
    pictures=2,
    images=3,
    grid=(2, 3),
    annotation=6,
    width=8,
    vocabulary=20,
    words=4,
    rewarded=2,
    scored=3,
    references=2,
    shortest=0.0,
)
MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "system": "an OS",
    "python": "3",
    "torch": "2",
}


def test_both_orders_of_a_training_step_learn_the_same() -> None:
    settings = Settings("", device="cpu", sizes=TINY)
    at_once, word_by_word = train(settings, False), train(settings, True)
    losses = [(at_once(), word_by_word()) for _ in range(4)]
    assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], abs=1e-5)
    assert losses[-1][0] < losses[0][0] - 1e-3


def test_inputs_are_the_same_every_time(tmp_path: Path) -> None:
    assert make_captions(3, 2) == make_captions(3, 2)
    (tmp_path / "again").mkdir()
    first, again = draw_pictures(tmp_path, 2), draw_pictures(tmp_path / "again", 2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_captions_are_like_peoples() -> None:
    captions = [caption for several in make_captions(200, 5) for caption in several]
    lengths = [len(caption.split()) for caption in captions]
    assert 9 < sum(lengths) / len(lengths) < 11
    words = Counter(" ".join(captions).lower().replace(".", "").split())
    (_, most), *_ = words.most_common(1)
    assert most > 0.03 * words.total()  # as "a" is
    assert sum(count == 1 for count in words.values()) > 0.2 * len(words)


def test_projecting_at_every_word_projects_at_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from captioner.attention import AdditiveAttention

    calls = []
    prepare = AdditiveAttention.prepare
    monkeypatch.setattr(AdditiveAttention, "prepare", lambda self, grid: calls.append(1) or prepare(self, grid))
    settings = Settings("", device="cpu", sizes=TINY)
    train(settings, False)()
    assert len(calls) == 1
    train(settings, True)()
    assert len(calls) == 1 + TINY.words


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "scoring/pycocoevalcap"])
def test_every_workload_does_its_work(name: str, tmp_path: Path, tiny_checkpoint: Path, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(workloads, "_run", lambda *arguments: started.append(arguments))  # seconds each
    work = WORKLOADS[name].prepare(Settings(str(tmp_path), str(tiny_checkpoint), "cpu", TINY))
    took = workloads.measure(work, 2)
    assert len(started) == (2 if name.startswith("start-up/") else 0)
    assert took["seconds"] > 0
    assert took["cpu_seconds"] >= 0


def test_figures_come_from_processes_of_their_own(tiny_checkpoint: Path) -> None:
    figures = measure_speed(["machine", "reward"], tiny_checkpoint, rounds=3, device="cpu", threads=1, sizes=TINY)
    assert list(figures) == ["machine/product", "reward/ours"]
    for found in figures.values():
        for spread in (found.seconds, found.cpu_seconds, found.times_first):
            assert spread.low <= spread.median <= spread.high
        assert found.seconds.low > 0
        assert found.times_first == Spread(1, 1, 1)
        assert 10 < found.peak_mb < 10_000


def test_a_group_is_compared_with_its_first_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        def __init__(self, name, settings, threads):
            self.seconds = iter([1, 2, 4] if name == "step/ours" else [3, 4, 20])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def answer(self):
            return {}

        def work(self):
            return {"seconds": next(self.seconds), "cpu_seconds": 7}

        def finish(self):
            return 99.0

    monkeypatch.setattr("evaluation.speed._Worker", Worker)
    figures = measure_speed(["step"], rounds=3, sizes=TINY)
    assert figures["step/ours"].seconds == Spread(2, 1, 4)
    assert figures["step/projecting"] == Figures(
        "captions", 3, Spread(4, 3, 20), Spread(7, 7, 7), 99.0, Spread(3, 2, 5)
    )


def test_what_cannot_be_measured_says_why() -> None:
    figures = {
        "scoring/ours": Figures("pictures", 5000, Spread(2, 1.5, 3), Spread(2, 2, 2), 99.4, Spread(1, 1, 1)),
        "scoring/pycocoevalcap": Figures("pictures", 5000, unavailable="there is no java"),
    }
    *_, ours, theirs = to_text(MACHINE, figures, 3).splitlines()
    assert ours.split()[:5] == ["BLEU,", "ROUGE-L,", "CIDEr-D,", "5,000", "pictures"]
    assert ours.split()[5:] == ["2.00", "1.50", "to", "3.00", "2.00", "99", "1.00", "2,500", "0.400"]
    assert theirs.split(maxsplit=4) == [
        "by",
        "pycocoevalcap,",
        "5,000",
        "pictures",
        "unavailable: there is no java",
    ]


def test_the_command_writes_figures(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Figures("GFLOP", 17.18, Spread(2, 1.5, 3), Spread(2, 2, 2), 99.4, Spread(1, 1, 1))
    monkeypatch.setattr("evaluation.speed.measure_speed", lambda *given, **settings: {"machine/product": found})
    assert main(["speed", "--only", "machine", "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["figures"]["machine/product"]["seconds"] == {"median": 2, "low": 1.5, "high": 3}
    assert {"processor", "cores", "threads", "torch", "device"} <= written["machine"].keys()
    assert main(["speed", "--only", "machine", "--device", "cpu"]) == 0
    assert "17.18 GFLOP " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "rounds: must be at least 1, got 0"),
        (["--threads", "0"], "threads: must be at least 1, got 0"),
    ],
)
def test_impossible_wishes_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["speed", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_workload_that_fails_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CaptionerError, match=r"captioning/encoder: .*missing.safetensors"):
        measure_speed(["captioning"], tmp_path / "missing.safetensors", rounds=1, device="cpu", sizes=TINY)


@pytest.mark.slow
def test_an_interrupt_leaves_no_process() -> None:
    command = [sys.executable, "-m", "evaluation", "speed", "--only", "start-up", "--rounds", "99"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while len(started := descendants(process.pid)) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(started) >= 2, "a workload, and the Python whose start it measures"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert not [one for one in started if is_running(one)]
            assert process.stderr.read() == b""
        finally:
            process.kill()


def heed_interrupts() -> None:
    """Where the tests run in the background of a script, Ctrl-C is ignored, and programs inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(process: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        if not Path("/proc/self/task").exists():
            pytest.skip("this system does not tell which processes a process has started")
        return []
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
