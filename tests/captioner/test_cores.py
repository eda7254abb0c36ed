import os
import subprocess
import sys

import pytest

from captioner.cores import count_cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write files of /proc and /sys of a machine of 8 cores, and return its root folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)

    def write(group, **files):
        for name, text in {"proc/self/cgroup": group, **files}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


V1 = "12:memory:/docker/1f\n4:cpu,cpuacct:{}\n1:name=systemd:/docker/1f\n"


def v1(folder, quota, period="100000"):
    return {
        f"sys/fs/cgroup/cpu/{folder}cpu.cfs_quota_us": f"{quota}\n",
        f"sys/fs/cgroup/cpu/{folder}cpu.cfs_period_us": f"{period}\n",
    }


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {}, 8),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (
            "0::/a/b\n",
            {"sys/fs/cgroup/a/b/cpu.max": "400000 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"},
            3,
        ),
        ("0::/../../kubelet\n", {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        (V1.format("/"), v1("", 250000), 3),
        (V1.format("/docker/1f"), v1("", 250000), 3),  # in the container, its own group is the top
        (V1.format("/docker/1f"), v1("docker/1f/", 100000), 1),
        (V1.format("/"), v1("", -1), 8),
        (V1.format("/"), v1("", 250000, "0"), 8),
        ("12:memory:/\n", v1("", 250000), 8),
        ("0::/\n" + V1.format("/"), v1("", 250000), 3),  # both versions are mounted
        ("", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "garbage"}, 8),
    ],
)
def test_the_quota_of_the_control_group_limits_the_cores(machine, group, files, expected):
    assert count_cores(machine(group, **files)) == expected


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert count_cores(tmp_path) == 1


def test_without_affinity_all_cores_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert count_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores(tmp_path) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")
def test_a_process_bound_to_one_core_counts_one():
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{core}}}); from captioner import cores; print(cores.count_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
