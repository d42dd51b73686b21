"""Threads: their number, from what a process may use, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditmoe_cli import threads
from ditmoe_cli.threads import prepare_threads, usable_cores, usable_threads, use_threads

V2 = "30 23 0:28 {mount} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = "31 23 0:29 {mount} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a system on whose 64 CPUs, each a core, this process may run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_without_limits_all_cores_are_used(system: Path) -> None:
    assert usable_cores(system) == 64


def test_two_threads_of_a_core_are_one(system: Path) -> None:
    write(
        system,
        {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 32},{i % 32 + 32}" for i in range(64)},
    )
    assert usable_cores(system) == 32


def test_affinity_limits(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 9, 40})
    assert usable_cores(system) == 3


@pytest.mark.parametrize(
    ("limit", "threads"),
    [
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 64),
        ("9900000 100000", 64),
        ("", 64),
    ],
)
def test_the_quota_of_a_pod(system: Path, limit: str, threads: int) -> None:
    """In version 2 a container sees its own group as the root."""
    write(system, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2.format(mount="/")})
    write(system, {"sys/fs/cgroup/cpu.max": f"{limit}\n"})
    assert usable_cores(system) == threads


def test_the_least_quota_of_nested_groups_holds(system: Path) -> None:
    write(system, {"proc/self/cgroup": "0::/pod/one\n", "proc/self/mountinfo": V2.format(mount="/")})
    write(system, {"sys/fs/cgroup/pod/one/cpu.max": "max 100000", "sys/fs/cgroup/pod/cpu.max": "300000 100000"})
    assert usable_cores(system) == 3
    write(system, {"sys/fs/cgroup/pod/one/cpu.max": "200000 100000"})
    assert usable_cores(system) == 2


@pytest.mark.parametrize("path", ["/docker/one", "/docker", "/elsewhere", "/../../other"])
def test_version_1_with_the_path_of_the_host(system: Path, path: str) -> None:
    """The group of the container is mounted, under whatever name the host knows it by."""
    write(system, {"proc/self/cgroup": f"5:memory:{path}\n4:cpu,cpuacct:{path}\n0::/\n"})
    write(system, {"proc/self/mountinfo": V1.format(mount="/docker/one")})
    folder = "sys/fs/cgroup/cpu,cpuacct"
    write(system, {f"{folder}/cpu.cfs_quota_us": "400000\n", f"{folder}/cpu.cfs_period_us": "100000\n"})
    assert usable_cores(system) == 4


def test_version_1_without_a_quota(system: Path) -> None:
    write(system, {"proc/self/cgroup": "4:cpu:/\n", "proc/self/mountinfo": V1.format(mount="/")})
    write(system, {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"})
    assert usable_cores(system) == 64


def test_this_system_can_be_read() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_threads_spin_briefly_and_are_as_many_as_there_are_cores() -> None:
    environment: dict[str, str] = {}
    prepare_threads(environment, 3)
    assert environment == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_says_of_waiting_holds(name: str) -> None:
    environment = {name: "7"}
    prepare_threads(environment, 3)
    assert environment == {name: "7", "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_or_torchrun_says_of_the_number_holds(name: str) -> None:
    environment = {name: "7"}
    prepare_threads(environment, 3)
    assert environment == {name: "7", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}


def test_a_number_that_is_asked_for_holds_for_every_library() -> None:
    environment, before = {"MKL_NUM_THREADS": "7"}, torch.get_num_threads()
    try:
        use_threads(2, environment)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert environment == dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")


def test_threads_compute_by_themselves_also_where_one_of_them_is_the_first_to_load_torch() -> None:
    """And afterwards torch has the number that it would have taken, and the environment says what it said."""
    script = (
        "import os, sys\n"
        "from ditmoe_cli.files.streaming import in_threads\n"
        "def job():\n"
        "    import torch\n"
        "    return torch.get_num_threads()\n"
        "assert 'torch' not in sys.modules\n"
        "print(in_threads([job] * 4), job(), os.environ['OMP_NUM_THREADS'], os.environ.get('MKL_NUM_THREADS'))"
    )
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("MKL_", "OPENBLAS_"))}
    told = subprocess.run(
        [sys.executable, "-c", script], env={**environment, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True
    )
    assert told.stdout.split("\n")[0] == "[1, 1, 1, 1] 2 2 None", told.stderr


@pytest.mark.parametrize(
    ("environment", "count"),
    [({"OMP_NUM_THREADS": "3,1"}, 3), ({"MKL_NUM_THREADS": "5"}, 5), ({"OMP_NUM_THREADS": "many"}, 7), ({}, 7)],
)
def test_the_number_that_torch_will_take(
    environment: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(threads, "usable_cores", lambda: 7)
    assert usable_threads() == count
