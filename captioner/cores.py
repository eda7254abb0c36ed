"""How many cores this process may use."""

import math
import os
from pathlib import Path


def count_cores() -> int:
    """Return how many cores this process may keep busy, at least 1.

    This is the least of what the scheduler (affinity) and the container (the CPU quota of its control group) allow.
    Threads beyond it wait for each other.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, min(cores, _quota()))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the CPU quota in whole cores, rounded up."""
    for read in (_quota_v2, _quota_v1):
        try:
            return math.ceil(read(root))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return 1 << 16


def _quota_v2(root: Path) -> float:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line for line in lines if line.startswith("0::")), "0::/")
    folder = root / path.removeprefix("0::").lstrip("/")
    quotas = []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            break
        file = group / "cpu.max"
        if file.exists():
            quota, period = file.read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
    if not quotas:
        raise ValueError("no quota")
    return min(quotas)


def _quota_v1(root: Path) -> float:
    quota = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
    if quota <= 0:
        raise ValueError("no quota")
    return quota / int((root / "cpu" / "cpu.cfs_period_us").read_text())
