"""The number of available cores."""

import math
import os
from pathlib import Path


def count_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use, at least 1.

    This is the minimum of the affinity of the scheduler and the CPU quota of the control group (of a container).

    Args:
        root: the folder that contains `proc` and `sys`.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(root))))


def _quota(root: Path) -> float:
    """Return the CPU quota in cores: the minimum of the process's control group and its parents.

    Both versions are supported: https://docs.kernel.org/admin-guide/cgroup-v2.html (`cpu.max`) and
    https://docs.kernel.org/scheduler/sched-bwc.html (`cpu.cfs_quota_us`).
    """
    quota = math.inf
    mount = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / "cpu" if controllers else mount
        group = top / path.lstrip("/")
        while group.is_relative_to(top):
            # In a container, the path may be that of the host. Then only the top exists.
            values = _read(group / "cpu.max") or " ".join(
                _read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")
            )
            quota = min(quota, _cores(values))
            group = group.parent
    return quota


def _cores(values: str) -> float:
    """Return the quota of "200000 100000" (microseconds per period): 2.0."""
    try:
        quota, period = map(int, values.split())
        return quota / period if quota >= 0 else math.inf
    except (ValueError, ZeroDivisionError):  # "max 100000", or no such file
        return math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
