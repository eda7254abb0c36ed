"""How fast captioning and scoring are on this machine, and how much memory they take."""

import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from captioner.errors import CaptionerError
from evaluation.metrics.java import UnavailableError
from evaluation.workloads import WORKLOADS, Settings


@dataclass(frozen=True)
class Figures:
    """What was measured of a workload."""

    amount: float = 0
    """How much a round does, in `unit`."""
    unit: str = ""
    seconds: list[float] = field(default_factory=list)
    """Wall-clock time of each round."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor time of each round, of all threads and of child processes."""
    peak_mb: float = 0
    """Maximum memory of the process or of a child process, in megabytes of 2^20 bytes."""
    unavailable: str | None = None
    """Why the workload cannot run on this machine."""


def measure_speed(
    names: Sequence[str] = tuple(WORKLOADS),
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> dict[str, Figures]:
    """Return the figures of workloads, by their names in `WORKLOADS`. A progress bar shows on a terminal.

    Raises:
        CaptionerError: if there are no rounds, or a workload fails.
    """
    if settings.rounds < 1:
        raise CaptionerError(f"rounds: must be at least 1, got {settings.rounds}")
    figures = {}
    for name in tqdm(names, unit="workload", disable=None, leave=False):
        # A process for each workload, so that none has the memory of another.
        with ProcessPoolExecutor(1, get_context("spawn"), _discard_stderr) as process:
            figures[name] = process.submit(measure, name, settings).result()
    return figures


def _discard_stderr() -> None:
    """Discard what Java prints. Exceptions reach the parent process by another way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def measure(name: str, settings: Settings) -> Figures:
    """Return the figures of a workload that runs in this process.

    Raises:
        CaptionerError: if it fails.
    """
    try:
        work = WORKLOADS[name](settings)
    except UnavailableError as error:
        return Figures(unavailable=str(error))
    work.run()
    seconds, cpu_seconds = [], []
    for _ in range(settings.rounds):
        started, cpu_started = time.perf_counter(), sum(os.times()[:4])
        work.run()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(sum(os.times()[:4]) - cpu_started)
    return Figures(work.amount, work.unit, seconds, cpu_seconds, _peak_mb())


def _peak_mb() -> float:
    import resource  # which Windows does not have

    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(peaks) / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def describe_machine() -> dict[str, Any]:
    """Return what figures depend on: processor, cores, system and versions."""
    versions = {"python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "torch"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    system = f"{platform.system()} {platform.machine()}"
    return {"processor": _processor(), "cores": os.cpu_count(), "system": system, "versions": versions}


def _processor() -> str:
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def to_text(machine: dict[str, Any], figures: dict[str, Figures], settings: Settings) -> str:
    """Return a table, with the machine above it."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        f"device {settings.device}, {versions}",
        "",
        f"{f'median of {settings.rounds}':40}{'seconds':>9}{'lowest to highest':>20}{'CPU':>9}{'MB':>7}"
        f"{'a second':>10}{'ms each':>10}",
    ]
    for name, found in figures.items():
        if found.unavailable:
            lines.append(f"{name:40}  unavailable: {found.unavailable}")
            continue
        title = f"{name}, {found.amount:,.4g} {found.unit}"
        seconds = median(found.seconds)
        span = f"{_short(min(found.seconds))} to {_short(max(found.seconds))}"
        lines.append(
            f"{title:40}{_short(seconds):>9}{span:>20}{_short(median(found.cpu_seconds)):>9}{found.peak_mb:7.0f}"
            f"{_short(found.amount / seconds):>10}{_short(1000 * seconds / found.amount):>10}"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    return f"{value:#.3g}".rstrip(".") if 1e-4 < value < 1000 else f"{value:,.0f}"
