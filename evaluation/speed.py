"""How fast captioning, training and scoring are on this machine, and how much memory they take.

Every workload (`evaluation.workloads`) has a process of its own, so that its memory is its own. Those of a group
stand ready side by side and take turns, round by round, so that what else the machine does slows them all.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from tqdm import tqdm

from captioner.config import to_dict
from captioner.errors import CaptionerError
from evaluation.workloads import GROUPS, WORKLOADS, Settings, Sizes, Workload

_CHECKOUT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds."""

    median: float
    low: float  # the least of all rounds
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of some values, at least one."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Figures:
    """What was measured of a workload; none: it could not be done."""

    unit: str
    """What the workload is counted in, such as pictures."""
    amount: float
    seconds: Spread | None = None
    cpu_seconds: Spread | None = None
    """The processor's, all threads and ended child processes included."""
    peak_mb: float | None = None
    """The most memory that the workload, its preparation included, held at any time: megabytes of 2^20 bytes."""
    times_first: Spread | None = None
    """Seconds, by those that the first of the group took in the same round."""
    unavailable: str | None = None
    """Why it could not be done."""


def measure_speed(
    groups: Sequence[str] = GROUPS,
    checkpoint: str | os.PathLike[str] = "default",
    *,
    rounds: int = 5,
    device: str = "auto",
    threads: int | None = None,
    sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
) -> dict[str, Figures]:
    """Measure groups of workloads; on a terminal a progress bar shows.

    Args:
        groups: some of `GROUPS`.
        checkpoint: whose network writes captions, as of `captioner.load`.
        rounds: how often each workload is timed, after it was done once to warm up.
        device: of networks and of the matrix product.
        threads: of the processor; none: as many as torch takes.
        sizes: how much work the workloads are.

    Returns:
        The figures by name of the workload, in the order of `WORKLOADS`.

    Raises:
        CaptionerError: when a number is impossible, or a workload fails.
    """
    for name, value in {"rounds": rounds, "threads": threads}.items():
        if value is not None and value < 1:
            raise CaptionerError(f"{name}: must be at least 1, got {value}")
    from captioner.checkpoint import find_checkpoint

    chosen = {name: workload for name, workload in WORKLOADS.items() if workload.group in groups}
    figures: dict[str, Figures] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(chosen) * (rounds + 1), unit="round", disable=None, leave=False) as bar,
    ):
        settings = Settings(folder, str(find_checkpoint(checkpoint).resolve()), device, sizes)
        for group in dict.fromkeys(workload.group for workload in chosen.values()):
            bar.set_description(group)
            members = {name: workload for name, workload in chosen.items() if workload.group == group}
            figures |= _measure_group(members, settings, rounds, threads, bar)
    return figures


def _measure_group(
    members: dict[str, Workload], settings: Settings, rounds: int, threads: int | None, bar: tqdm
) -> dict[str, Figures]:
    with ExitStack() as running:
        workers: dict[str, _Worker] = {}
        unavailable: dict[str, str] = {}
        for name in members:
            worker = running.enter_context(_Worker(name, settings, threads))
            if reason := worker.answer().get("unavailable"):
                unavailable[name] = reason
            else:
                workers[name] = worker
            bar.update()
        timed: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                timed[name].append(worker.work())
                bar.update()
        peaks = {name: worker.finish() for name, worker in workers.items()}

    figures = {}
    first = [each["seconds"] for each in timed[next(iter(workers))]]
    for name, workload in members.items():
        amount = workload.amount(settings.sizes)
        if name in unavailable:
            figures[name] = Figures(workload.unit, amount, unavailable=unavailable[name])
            continue
        seconds = [each["seconds"] for each in timed[name]]
        figures[name] = Figures(
            workload.unit,
            amount,
            Spread.of(seconds),
            Spread.of([each["cpu_seconds"] for each in timed[name]]),
            peaks[name],
            Spread.of([one / other for one, other in zip(seconds, first, strict=True)]),
        )
    return figures


class _Worker:
    """A process that has prepared a workload and does it when asked. It ends with the `with` block."""

    def __init__(self, name: str, settings: Settings, threads: int | None):
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        environment = dict(os.environ)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users' modules are compiled once, and then start faster
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evaluation.workloads", name, json.dumps(to_dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=_CHECKOUT,
            env=environment,
            start_new_session=True,  # to end it together with the processes that it starts
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()

    def work(self) -> dict[str, float]:
        """Do the workload once and return what that took."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` says why
            os.write(self._process.stdin.fileno(), b"again\n")
        return self.answer()

    def finish(self) -> float:
        """Let the process end, and return the most memory that it held, in megabytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.answer()["peak_mb"]

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            CaptionerError: when the workload failed.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            *_, last = ["?", *self._errors.read().splitlines()]
            raise CaptionerError(f"{self._name}: its process ended with status {status}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise CaptionerError(f"{self._name}: {answer['error']}")
        return answer


def describe_machine(device: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """Return what figures depend on: processor, cores, threads, system and versions."""
    import torch

    from captioner.captioning import choose_device

    chosen = choose_device(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def to_text(machine: dict[str, Any], figures: dict[str, Figures], rounds: int) -> str:
    """Return a table, with the machine above it."""
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        f"device {machine['device']}, {machine['system']}, Python {machine['python']}, torch {machine['torch']}",
        "",
        f"{f'median of {rounds}':40}{'seconds':>9}{'lowest to highest':>20}{'CPU':>9}{'MB':>7}{'x first':>9}"
        f"{'a second':>10}{'ms each':>10}",
    ]
    for name, found in figures.items():
        title = WORKLOADS[name].title
        if found.amount != 1:
            title += f", {found.amount:,.4g} {found.unit}"
        if found.seconds is None or found.cpu_seconds is None or found.times_first is None:
            lines.append(f"{title:40}  unavailable: {found.unavailable}")
            continue
        seconds = found.seconds
        lines.append(
            f"{title:40}{_short(seconds.median):>9}{f'{_short(seconds.low)} to {_short(seconds.high)}':>20}"
            f"{_short(found.cpu_seconds.median):>9}{found.peak_mb:7.0f}{found.times_first.median:9.2f}"
            f"{_short(found.amount / seconds.median):>10}{_short(1000 * seconds.median / found.amount):>10}"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    """Return a number with three significant digits, and no exponent."""
    return f"{value:#.3g}".rstrip(".") if 1e-4 < value < 1000 else f"{value:,.0f}"
