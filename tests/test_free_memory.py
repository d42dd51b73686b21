"""Free memory: what the system and the control groups of the process leave."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ditmoe_cli.free_memory import free_memory

MEMINFO = "MemTotal:       10000 kB\nMemFree:         1000 kB\nMemAvailable:    4000 kB\n"
V2 = "30 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = "31 23 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_without_limits_what_is_available_counts(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == math.inf, "no /proc"
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert free_memory(tmp_path) == 4000 * 1024


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [("2000000", "1500000", 700_000), ("max", "1500000", 4_096_000), ("90000000", "1500000", 4_096_000)],
)
def test_the_limit_of_a_pod_without_the_pages_of_files(tmp_path: Path, limit: str, used: str, free: int) -> None:
    stat = "anon 1300000\nactive_file 150000\ninactive_file 50000\n"
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/pod\n", "proc/self/mountinfo": V2})
    folder = "sys/fs/cgroup/pod"
    write(tmp_path, {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat})
    assert free_memory(tmp_path) == free


def test_the_least_of_nested_groups_in_version_1(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memory:/a/b\n", "proc/self/mountinfo": V1})
    for folder, limit in (("memory/a/b", "9223372036854771712"), ("memory/a", "3000000")):
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": "1000000", "memory.stat": "cache 0\n"}
        write(tmp_path, {f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()})
    assert free_memory(tmp_path) == 2_000_000


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2})
    write(tmp_path, {"sys/fs/cgroup/memory.max": "1000", "sys/fs/cgroup/memory.current": "5000"})
    assert free_memory(tmp_path) == 0


def test_this_system_can_be_read() -> None:
    assert free_memory() > 0
